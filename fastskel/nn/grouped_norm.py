"""Batch normalisation of several views in one call, each by its own statistics, as separate forward passes would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["can_group", "grouped_batch_norm", "grouped_projector", "uses_batch_statistics"]

# children that treat every row alike, so that views may share one call
ROWWISE = (nn.Linear, nn.ReLU, nn.Identity)
NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _update_running(norm: nn.BatchNorm1d, batch: Tensor) -> None:
    """Move the running statistics by those of the views, (2, W, F) for mean and unbiased variance, in their order."""
    assert norm.running_mean is not None and norm.running_var is not None
    running, count = [norm.running_mean, norm.running_var], norm.num_batches_tracked
    # no momentum: the mean of all batches so far
    seen = int(count) if norm.momentum is None and count is not None else 0
    for number in range(batch.shape[1]):
        factor = 1.0 / (seen + number + 1) if norm.momentum is None else norm.momentum
        # one launch moves both
        torch._foreach_lerp_(running, list(batch[:, number].unbind()), factor)
    if count is not None:
        count.add_(batch.shape[1])


def _normalise(x: Tensor, norm: nn.BatchNorm1d | nn.SyncBatchNorm) -> Tensor:
    """Normalise rows of views, (N, W, F), which is the order that one call over W*F channels needs."""
    n, w, f = x.shape
    if type(norm) is not nn.BatchNorm1d or _has_hooks(norm):
        return torch.stack([norm(view) for view in x.unbind(1)], 1)
    if not norm.training and norm.running_mean is not None:
        return norm(x.flatten(0, 1)).view(n, w, f)  # type: ignore[no-any-return]
    weight = None if norm.weight is None else norm.weight.repeat(w)
    bias = None if norm.bias is None else norm.bias.repeat(w)
    rows, running = x.reshape(n, w * f), norm.running_mean
    if running is None or not norm.track_running_stats:
        return F.batch_norm(rows, None, None, weight, bias, True, 0.0, norm.eps).view(n, w, f)
    # with momentum 1, running statistics that start at zero become the batch's
    batch = running.new_zeros(2, w * f)
    out = F.batch_norm(rows, batch[0], batch[1], weight, bias, True, 1.0, norm.eps).view(n, w, f)
    with torch.no_grad():
        _update_running(norm, batch.view(2, w, f))
    return out


def _check(function: str, x: Tensor, norms: list[nn.BatchNorm1d | nn.SyncBatchNorm]) -> None:
    if x.dim() != 3 or x.shape[0] < 1:
        raise ValueError(f"{function}: x must be (W, N, F) with W at least 1, got {tuple(x.shape)}. Stack the views.")
    if x.shape[1] < 2 and any(norm.training or norm.running_mean is None for norm in norms):
        raise ValueError(
            f"{function}: x must be (W, N, F) with N at least 2 in training, got {tuple(x.shape)}. "
            "Statistics need two samples."
        )


def grouped_batch_norm(x: Tensor, norm: nn.BatchNorm1d | nn.SyncBatchNorm) -> Tensor:
    """Normalise W views at once, exactly as `norm(x[0])`, `norm(x[1])`, .. in this order would.

    In training each view is normalised by its own statistics, and running statistics move view by view; in evaluation
    running statistics normalise all. A norm with hooks, or of a class of its own (SyncBatchNorm), is called view by view.

    Args:
        x: Views of the same samples, (W, N, F), N at least 2 in training.
        norm: Its weights, statistics, momentum and mode are used, and its running statistics updated.
    Returns:
        Normalised views, (W, N, F), of x's type.
    Raises:
        ValueError: If x has another shape, or a single sample where batch statistics are needed.
    """
    _check("grouped_batch_norm", x, [norm])
    if x.shape[2] != norm.num_features:
        raise ValueError(
            f"grouped_batch_norm: x must have {norm.num_features} features, got {tuple(x.shape)}. "
            "Pass what the norm was built for."
        )
    return _normalise(x.transpose(0, 1), norm).transpose(0, 1).contiguous()


def can_group(projector: nn.Module) -> bool:
    """Whether `grouped_projector` takes this module for views (W, N, F): a plain Sequential of known children."""
    return type(projector) is nn.Sequential and all(isinstance(child, ROWWISE + NORMS) for child in projector)


def grouped_projector(projector: nn.Sequential, x: Tensor) -> Tensor:
    """Project W views at once, exactly as `projector(x[0])`, `projector(x[1])`, .. in this order would.

    Linear, ReLU and Identity are called once over the rows of all views, BatchNorm as `grouped_batch_norm` does. Hooks of
    the children fire; those of BatchNorm, and of the projector itself, by calling it view by view.

    Args:
        projector: Sequential of Linear, ReLU, Identity, BatchNorm1d (or SyncBatchNorm).
        x: Views, (W, N, F), N at least 2 in training.
    Returns:
        Projected views, (W, N, F_out), contiguous.
    Raises:
        ValueError: Naming a child that is none of these, or a shape that does not fit.
    """
    if not can_group(projector):
        strange = [name for name, child in projector.named_children() if not isinstance(child, ROWWISE + NORMS)]
        kinds = [type(projector.get_submodule(name)).__name__ for name in strange] or [type(projector).__name__]
        raise ValueError(
            "grouped_projector: projector must be an nn.Sequential of Linear, ReLU, Identity and BatchNorm1d, got "
            f"{', '.join(kinds)}{f' at {strange}' if strange else ''}. Call it view by view."
        )
    _check("grouped_projector", x, [child for child in projector if isinstance(child, NORMS)])
    if _has_hooks(projector):
        return torch.stack([projector(view) for view in x])
    w, n, _ = x.shape
    # samples before views: between two norms nothing is transposed
    rows = x.transpose(0, 1).flatten(0, 1)
    for child in projector:
        if isinstance(child, NORMS):
            rows = _normalise(rows.view(n, w, rows.shape[1]), child).flatten(0, 1)
        else:
            rows = child(rows)
    return rows.view(n, w, rows.shape[1]).transpose(0, 1).contiguous()


def uses_batch_statistics(module: nn.Module) -> bool:
    """Say whether a module's rows (N, ...) depend on each other now, so that views must not share a pass."""
    norms = (child for child in module.modules() if isinstance(child, _BatchNorm))
    return any(norm.training or norm.running_mean is None for norm in norms)
