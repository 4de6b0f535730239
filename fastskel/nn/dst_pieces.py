"""The passes of a dense spatio-temporal layer over many rows, on a CPU in pieces of rows.

Rows do not depend on each other, so pieces give what the whole gives; gradients of weights are sums over pieces. Why: glibc maps
every tensor above 32 MiB anew, page by page as it is written, and unmaps it when it is freed. In a narrow layer tensors are large
and operations few, so that this is a large share of the time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fastskel.nn.drop_path import LayerDrops
from fastskel.nn.dst_function import Kept, LayerSpec, Weights
from fastskel.nn.dst_operator import passes

__all__ = ["LEAST_TOKENS", "PIECE_BYTES", "Cuts", "backward", "cut", "forward"]

# of the largest tensor between operators: below the 32 MiB from which glibc maps, with room for what is not counted here
PIECE_BYTES = 16 << 20
# each piece adds gradients of weights, which by its bytes takes as long as some 60 tokens do
LEAST_TOKENS = 4096

# first row of each piece but the first; none leaves the rows whole
Cuts = tuple[int, ...]


def cut(x: Tensor, spec: LayerSpec) -> Cuts:
    """Choose pieces of tokens (N, S, D), all of about one size; rows so wide that a piece had few tokens stay whole."""
    if x.device.type != "cpu" or spec.kernels != "torch" or torch.compiler.is_compiling():
        return ()
    (num_rows, tokens, width), (heads, merged, core) = x.shape, spec.attention
    # of all three attentions: scores; tokens with queries, or queries, keys and values; and two hidden activations
    scores = heads * tokens * spec.precision.wide.itemsize if core == "own" else 0
    widest = tokens * max(3 * scores, (4 if merged else 9) * width * spec.precision.compute.itemsize)
    most = PIECE_BYTES // widest
    if num_rows <= most or most * tokens < LEAST_TOKENS:
        return ()
    count = -(-num_rows // most)
    return tuple(num_rows * number // count for number in range(1, count))


def _bounds(cuts: Cuts, num_rows: int) -> list[tuple[int, int]]:
    return list(zip((0, *cuts), (*cuts, num_rows), strict=True))


def forward(x: Tensor, w: Weights, drops: LayerDrops, spec: LayerSpec, cuts: Cuts) -> tuple[Tensor, list[Tensor | None]]:
    """Run a layer.

    Args:
        x: Tokens, (N, S, D).
        w: Prepared weights.
        drops: What is dropped.
        spec: The rest.
        cuts: From `cut`.
    Returns:
        Tokens (N, S, D) in the residual type; what the backward pass needs, piece by piece the input in the compute type and the
        fields of `Kept`, nothing where `spec.memory` is "layer".
    """
    run, residual, keep = passes(spec).forward, spec.precision.residual, spec.memory != "layer"
    if not cuts:
        y, xb, kept = run(x.to(residual), w, drops, spec)
        return y, [xb, *kept] if keep else []
    y, saved = torch.empty_like(x, dtype=residual), []
    for begin, end in _bounds(cuts, len(x)):
        part, xb, kept = run(x[begin:end].to(residual), w, drops.part(begin, end), spec)
        y[begin:end] = part
        if keep:
            saved += [xb, *kept]
        # else it would be there beside the next one's
        del part, xb, kept
    return y, saved


def backward(
    grad: Tensor, x: Tensor | None, saved: Sequence[Tensor | None], w: Weights, drops: LayerDrops, spec: LayerSpec, cuts: Cuts,
    need: Collection[str],
) -> tuple[Tensor, dict[str, Tensor | None]]:  # fmt: skip
    """Differentiate a layer.

    Args:
        grad: Gradient of the output, (N, S, D).
        x: The input (N, S, D) to run forward again, None where something was saved.
        saved: What `forward` returned.
        w: Prepared weights.
        drops: What was dropped.
        spec: The rest.
        cuts: Those of the forward pass.
        need: Names of the weights whose gradients are wanted; others may come along.
    Returns:
        Gradients of the input (N, S, D), and of the prepared weights by name, as `dst_function.backward` has them.
    """

    def run(number: int, begin: int, end: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        part = drops.part(begin, end) if cuts else drops
        if x is None:
            xb, *fields = saved[number * stride : (number + 1) * stride]
            assert xb is not None
            kept = Kept(*fields)
        else:
            again = spec._replace(memory="lean")
            _, xb, kept = passes(spec).forward(x[begin:end].to(spec.precision.residual), w, part, again)
        return passes(spec).backward(grad[begin:end], xb, kept, w, part, spec, need)

    stride = 1 + len(Kept._fields)
    if not cuts:
        return run(0, 0, len(grad))
    dx = torch.empty_like(grad, dtype=spec.precision.residual)
    total: dict[str, Tensor | None] = {}
    for number, (begin, end) in enumerate(_bounds(cuts, len(grad))):
        dx[begin:end], got = run(number, begin, end)
        for name, value in got.items():
            before = total.get(name)
            total[name] = value if before is None or value is None else before.add_(value)
    return dx, total
