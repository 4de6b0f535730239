"""The largest products of each query with the rows of a gallery, in plain torch, by a matrix of them all."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["nearest"]


def nearest(queries: Tensor, gallery: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the largest products of queries (B, K) with rows (N, K) in float32, falling, and their rows, int32: (B, keep) each.

    Where the gallery has fewer rows the rest is minus infinity, of row -1.
    """
    scores, rows = (queries.float() @ gallery.float().T).topk(min(keep, len(gallery)), dim=1)
    missing = (0, keep - scores.shape[1])
    return F.pad(scores, missing, value=float("-inf")), F.pad(rows.int(), missing, value=-1)
