"""The USDRL reference system in plain eager torch, computed as the published code computes it.

What fastskel's encoder and losses are compared with, in speed and in numbers. It shares no code with `fastskel.nn`,
`fastskel.models`, `fastskel.objectives` and `fastskel.compat`, so that a change there cannot move the measure.
"""

from fastskel.bench.reference.loss import cal_xc, similarity, total, v_ac, xcorr_loss
from fastskel.bench.reference.usdrl import DSTE, STTR, USDRL, init_weights, xformers_attention

__all__ = [
    "DSTE", "STTR", "USDRL", "cal_xc", "init_weights", "similarity", "total", "v_ac", "xcorr_loss", "xformers_attention",
]  # fmt: skip
