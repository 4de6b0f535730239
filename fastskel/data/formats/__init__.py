"""Readers, one per public data set; importing this package registers them."""

from fastskel.data.formats import nw_ucla, utd_mhad
from fastskel.data.formats.format import FORMATS, Format, SourceClip

__all__ = ["FORMATS", "Format", "SourceClip", "nw_ucla", "utd_mhad"]
