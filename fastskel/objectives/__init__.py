"""Pretraining objectives behind one contract."""

from fastskel.objectives.mgfd import MGFD
from fastskel.objectives.multimodal import MultimodalMGFD
from fastskel.objectives.objective import OBJECTIVES, Objective, Terms

__all__ = ["MGFD", "OBJECTIVES", "MultimodalMGFD", "Objective", "Terms"]
