"""Readers of public data sets and of the files that other tools prepare; importing this package registers them."""

from fastskel.data.formats import (
    agcn,
    ctr_gcn,
    kinetics_skeleton,
    ntu,
    nw_ucla,
    penn_action,
    pku_mmd,
    pku_pickle,
    plain,
    pyskl,
    sbu,
    uav_human,
    utd_mhad,
    utkinect,
)
from fastskel.data.formats.format import FORMATS, Format, SkipFile, SourceClip
from fastskel.data.formats.prepared import PREPARED, PreparedClips, PreparedFormat, PreparedOptions

__all__ = [
    "FORMATS",
    "PREPARED",
    "Format",
    "PreparedClips",
    "PreparedFormat",
    "PreparedOptions",
    "SkipFile",
    "SourceClip",
    "agcn",
    "ctr_gcn",
    "kinetics_skeleton",
    "ntu",
    "nw_ucla",
    "penn_action",
    "pku_mmd",
    "pku_pickle",
    "plain",
    "pyskl",
    "sbu",
    "uav_human",
    "utd_mhad",
    "utkinect",
]
