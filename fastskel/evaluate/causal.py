"""Features of the first frames of clips, of an encoder that looks at the past only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastskel.evaluate.evaluation import Evaluation
from fastskel.evaluate.features import FeatureSet, batches, frozen
from fastskel.nn.pool import prefix_pool

__all__ = ["causal_features"]


def causal_features(evaluation: Evaluation, indices: NDArray[np.int64], frames: Sequence[int]) -> list[FeatureSet]:
    """Pool the causal temporal tokens of clips (N,) up to some of their frames, all in one pass each.

    Returns:
        For each of R numbers of frames the maxima and means, (N, 2D).
    Raises:
        ValueError: If there is no encoder, or it has no causal mode.
    """
    encoder, device = evaluation.encoder, torch.device(evaluation.device)
    if encoder is None:
        raise ValueError("causal_features: encoder must be one with a causal mode, got raw coordinates. Leave out causal.")
    chosen = torch.tensor(list(frames), device=device) - 1
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=evaluation.precision == "bf16")
    parts: list[Tensor] = []
    with frozen(encoder, device), mixed:
        for batch in batches(
            evaluation.dataset, evaluation.view, indices, evaluation.batch_size, evaluation.num_threads, evaluation.progress,
            "causal features",
        ):  # fmt: skip
            tokens = encoder(batch.views[0].to(device), mode="causal").need("temporal", "early")
            parts.append(prefix_pool(tokens)[:, chosen].float().cpu())
    pooled = torch.cat(parts)
    labels = evaluation.labels_of(indices)
    return [FeatureSet(pooled[:, number], labels, torch.from_numpy(indices)) for number in range(len(frames))]
