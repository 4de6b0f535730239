"""Batch normalisation of several views in one call, each by its own statistics, as separate forward passes would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    # builds of torch without it train in one process
    from torch.distributed import ProcessGroup

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


class _Synchronised(torch.autograd.Function):
    """Normalise rows of views, (n, W, F), by their statistics over a group's processes; also return these, (2, W, F)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        rows = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        # the number of rows travels with their sum: the host need not know it
        sums = torch.cat([rows.sum(0).flatten(), rows.new_full((1,), len(rows))])
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        mean = (sums[:-1] / count).view_as(x[0])
        centred = rows - mean
        second = centred.square().sum(0)
        dist.all_reduce(second, group=group)
        scale = torch.rsqrt(second / count + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.group, ctx.bias_type = group, None if bias is None else bias.dtype
        out = centred.mul_(scale)
        if weight is not None:
            out = out.mul_(weight)
        if bias is not None:
            out = out.add_(bias)
        # running statistics remember the unbiased variance
        statistics = torch.stack([mean, second / (count - 1)])
        ctx.mark_non_differentiable(statistics)
        return out.to(x.dtype), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        grad = grad.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean).mul_(scale)
        sums = torch.stack([grad.sum(0), (grad * normal).sum(0)])
        # of this process's rows only: parameters' gradients are summed elsewhere
        grad_bias, grad_weight = sums.sum(1).unbind()
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = sums.clone()
            dist.all_reduce(sums, group=ctx.group)
            sums /= count
            grad_x = (grad - sums[0]).addcmul_(normal, sums[1], value=-1.0).mul_(scale)
            grad_x = (grad_x if weight is None else grad_x.mul_(weight)).to(x.dtype)
        return (
            grad_x,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            grad_bias.to(ctx.bias_type) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _takes_batch_statistics(norm: _BatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _is_shared(group: ProcessGroup | None) -> bool:
    return group is not None and dist.get_world_size(group) > 1


def _normalise(x: Tensor, norm: nn.BatchNorm1d | nn.SyncBatchNorm, group: ProcessGroup | None = None) -> Tensor:
    """Normalise rows of views, (N, W, F), which is the order that one call over W*F channels needs."""
    n, w, f = x.shape
    if group is not None and _is_shared(group) and _takes_batch_statistics(norm):
        return _normalise_shared(x, norm, group)
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


def _normalise_shared(x: Tensor, norm: nn.BatchNorm1d | nn.SyncBatchNorm, group: ProcessGroup) -> Tensor:
    """Normalise rows of views, (n, W, F), of which other processes have more."""
    assert isinstance(norm, nn.BatchNorm1d)
    with torch.autocast(x.device.type, enabled=False):
        out, batch = _Synchronised.apply(x, norm.weight, norm.bias, norm.eps, group)  # type: ignore[no-untyped-call]
    if norm.running_mean is not None and norm.track_running_stats:
        with torch.no_grad():
            _update_running(norm, batch.to(norm.running_mean.dtype))
    return out  # type: ignore[no-any-return]


def _check(
    function: str, x: Tensor, norms: list[nn.BatchNorm1d | nn.SyncBatchNorm], group: ProcessGroup | None
) -> None:
    if x.dim() != 3 or x.shape[0] < 1:
        raise ValueError(f"{function}: x must be (W, N, F) with W at least 1, got {tuple(x.shape)}. Stack the views.")
    by_batch = [norm for norm in norms if _takes_batch_statistics(norm)]
    shared = _is_shared(group)
    # every other process has at least one more
    if by_batch and x.shape[1] < (1 if shared else 2):
        raise ValueError(
            f"{function}: x must be (W, N, F) with N at least {1 if shared else 2} in training, got {tuple(x.shape)}. "
            "Statistics need two samples."
        )
    for norm in by_batch if shared else ():
        if type(norm) is not nn.BatchNorm1d or _has_hooks(norm):
            raise ValueError(
                f"{function}: norm must be nn.BatchNorm1d without hooks to share statistics in a group, got "
                f"{type(norm).__name__}. Leave the group out, or take the hooks off."
            )


def grouped_batch_norm(x: Tensor, norm: nn.BatchNorm1d | nn.SyncBatchNorm, group: ProcessGroup | None = None) -> Tensor:
    """Normalise W views at once, exactly as `norm(x[0])`, `norm(x[1])`, .. in this order would.

    In training each view is normalised by its own statistics, and running statistics move view by view; in evaluation
    running statistics normalise all. A norm with hooks, or of a class of its own (SyncBatchNorm), is called view by view.

    With a group, statistics are those of the view's rows in all of its processes, computed in float32 (float64 for float64);
    processes may differ in N, and gradients of weight and bias are those of this process's rows.

    Args:
        x: Views of the same samples, (W, N, F), N at least 2 in training, with a group of several processes at least 1.
        norm: Its weights, statistics, momentum and mode are used, and its running statistics updated.
        group: Processes that share batch statistics; None, or a group of one, shares nothing.
    Returns:
        Normalised views, (W, N, F), of x's type.
    Raises:
        ValueError: If x has another shape, or a single sample where batch statistics are needed, or if the statistics of a norm
            that is called view by view were to be shared.
    """
    _check("grouped_batch_norm", x, [norm], group)
    if x.shape[2] != norm.num_features:
        raise ValueError(
            f"grouped_batch_norm: x must have {norm.num_features} features, got {tuple(x.shape)}. "
            "Pass what the norm was built for."
        )
    return _normalise(x.transpose(0, 1), norm, group).transpose(0, 1).contiguous()


def can_group(projector: nn.Module) -> bool:
    """Whether `grouped_projector` takes this module for views (W, N, F): a plain Sequential of known children."""
    return type(projector) is nn.Sequential and all(isinstance(child, ROWWISE + NORMS) for child in projector)


def grouped_projector(projector: nn.Sequential, x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Project W views at once, exactly as `projector(x[0])`, `projector(x[1])`, .. in this order would.

    Linear, ReLU and Identity are called once over the rows of all views, BatchNorm as `grouped_batch_norm` does. Hooks of
    the children fire; those of BatchNorm, and of the projector itself, by calling it view by view.

    Args:
        projector: Sequential of Linear, ReLU, Identity, BatchNorm1d (or SyncBatchNorm).
        x: Views, (W, N, F), N at least 2 in training.
        group: Processes that share batch statistics, as for `grouped_batch_norm`.
    Returns:
        Projected views, (W, N, F_out), contiguous.
    Raises:
        ValueError: Naming a child that is none of these, or a shape that does not fit, or hooks that keep statistics from
            being shared.
    """
    if not can_group(projector):
        strange = [name for name, child in projector.named_children() if not isinstance(child, ROWWISE + NORMS)]
        kinds = [type(projector.get_submodule(name)).__name__ for name in strange] or [type(projector).__name__]
        raise ValueError(
            "grouped_projector: projector must be an nn.Sequential of Linear, ReLU, Identity and BatchNorm1d, got "
            f"{', '.join(kinds)}{f' at {strange}' if strange else ''}. Call it view by view."
        )
    norms = [child for child in projector if isinstance(child, NORMS)]
    _check("grouped_projector", x, norms, group)
    if _has_hooks(projector):
        if _is_shared(group) and any(map(_takes_batch_statistics, norms)):
            raise ValueError(
                "grouped_projector: projector must have no hooks to share statistics in a group, got some. Take them off."
            )
        return torch.stack([projector(view) for view in x])
    w, n, _ = x.shape
    # samples before views: between two norms nothing is transposed
    rows = x.transpose(0, 1).flatten(0, 1)
    for child in projector:
        if isinstance(child, NORMS):
            rows = _normalise(rows.view(n, w, rows.shape[1]), child, group).flatten(0, 1)
        else:
            rows = child(rows)
    return rows.view(n, w, rows.shape[1]).transpose(0, 1).contiguous()


def uses_batch_statistics(module: nn.Module) -> bool:
    """Say whether a module's rows (N, ...) depend on each other now, so that views must not share a pass."""
    norms = (child for child in module.modules() if isinstance(child, _BatchNorm))
    return any(map(_takes_batch_statistics, norms))
