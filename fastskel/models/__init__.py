"""Skeleton encoders behind one contract."""

from fastskel.models.dste import DSTE
from fastskel.models.encoder import ENCODERS, Encoder, Features
from fastskel.models.multimodal import MultimodalDSTE, MultimodalSTTR
from fastskel.models.sttr import STTR

__all__ = ["DSTE", "ENCODERS", "STTR", "Encoder", "Features", "MultimodalDSTE", "MultimodalSTTR"]
