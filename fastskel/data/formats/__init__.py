"""Readers, one per public data set; importing this package registers them."""

from fastskel.data.formats import ntu, nw_ucla, utd_mhad
from fastskel.data.formats.format import FORMATS, Format, SkipFile, SourceClip

__all__ = ["FORMATS", "Format", "SkipFile", "SourceClip", "ntu", "nw_ucla", "utd_mhad"]
