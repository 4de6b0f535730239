"""Readers, one per public data set; importing this package registers them."""

from fastskel.data.formats import (
    kinetics_skeleton,
    ntu,
    nw_ucla,
    penn_action,
    pku_mmd,
    plain,
    sbu,
    uav_human,
    utd_mhad,
    utkinect,
)
from fastskel.data.formats.format import FORMATS, Format, SkipFile, SourceClip

__all__ = [
    "FORMATS",
    "Format",
    "SkipFile",
    "SourceClip",
    "kinetics_skeleton",
    "ntu",
    "nw_ucla",
    "penn_action",
    "pku_mmd",
    "plain",
    "sbu",
    "uav_human",
    "utd_mhad",
    "utkinect",
]
