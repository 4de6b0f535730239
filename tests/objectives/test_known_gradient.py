"""A loss that keeps its gradient instead of a graph, in everything that autograd does with it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from fastskel.bench.harness import peak_bytes
from fastskel.kernels.decorrelation import Options, decorrelation_cost
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastskel.objectives.across import mgfd_across, similarity_across
from fastskel.objectives.functional import (
    barlow_twins_loss,
    covariance_penalty,
    cross_correlation,
    mgfd_loss,
    variance_covariance,
    vicreg_loss,
)

# plain tensors only, one at a time: each has a gradient of its own
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mgfd": lambda z: mgfd_loss(z, z, z)[0],
    "mgfd-across": lambda z: mgfd_across(z, z, z)[0],
    "similarity-across": similarity_across,
    "vicreg": lambda z: vicreg_loss(z[0], z[1])[0],
    "barlow-twins": lambda z: barlow_twins_loss(z[0], z[1])[0],
    "cross-correlation": lambda z: cross_correlation(z[0], z[1]),
    "variance-covariance": lambda z: variance_covariance(z[0]),
    "covariance-penalty": covariance_penalty,
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss(z), z)
    return grad


@losses
def test_gradients_add_up(loss):
    z = embeddings(3, 6, 4).requires_grad_()
    expected = gradient(loss, z)
    first, second = loss(z), loss(z)
    (first + 2.0 * second + first).backward()
    torch.testing.assert_close(z.grad, 4.0 * expected, rtol=1e-12, atol=1e-14)
    outputs, scales = [loss(z), loss(z)], [torch.tensor(scale, dtype=torch.float64) for scale in (1.0, 2.0)]
    (grad,) = torch.autograd.grad([*outputs, outputs[0]], z, [*scales, 4.0 * scales[0]])
    torch.testing.assert_close(grad, 7.0 * expected, rtol=1e-12, atol=1e-14)


@losses
def test_gradients_of_a_kept_graph_are_not_overwritten(loss):
    z = embeddings(3, 6, 4).requires_grad_()
    expected = gradient(loss, z)
    value = loss(z)
    value.backward(retain_graph=True)
    # an optimiser that clears in place owns what it was given
    z.grad.zero_()
    value.backward()
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-14)


@losses
def test_a_batch_of_gradients(loss):
    z = embeddings(3, 6, 4).requires_grad_()
    expected, scales = gradient(loss, z), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    (grads,) = torch.autograd.grad(loss(z), z, scales, is_grads_batched=True)
    torch.testing.assert_close(grads, scales[:, None, None, None] * expected)
    value = loss(z)
    grads = torch.func.vmap(lambda scale: torch.autograd.grad(value, z, scale)[0])(scales)
    torch.testing.assert_close(grads, scales[:, None, None, None] * expected)


@losses
def test_what_a_hook_keeps_is_not_overwritten(loss):
    z, kept = embeddings(3, 6, 4).requires_grad_(), []
    expected = gradient(loss, z)

    def keep(tensor: Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, kept.__getitem__):
        value = loss(z)
    before = [tensor.clone() for tensor in kept]
    (grad,) = torch.autograd.grad(3.0 * value, z)
    torch.testing.assert_close(grad, 3.0 * expected)
    assert kept and all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


# of torch's forward mode, about itself
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@losses
def test_transforms_that_would_lose_the_gradient_are_refused(loss):
    """Gradients that are numbers have no derivative: forward mode and torch.func would take them for zero."""
    z = embeddings(3, 6, 4)
    refused = pytest.raises(RuntimeError, match="must be differentiated by a backward pass of plain tensors")
    with refused:
        torch.func.grad(loss)(z)
    with refused:
        torch.func.vmap(loss)(embeddings(2, 3, 6, 4).requires_grad_())
    with forward_ad.dual_level(), refused:
        loss(forward_ad.make_dual(z, z))
    with pytest.raises(RuntimeError, match="must be differentiated once, got create_graph=True"):
        torch.autograd.grad(loss(z.requires_grad_()), z, create_graph=True)


@losses
def test_inference_and_strides(loss):
    z = embeddings(3, 6, 4)
    expected, value = gradient(loss, z.clone().requires_grad_()), loss(z)
    with torch.inference_mode():
        inside = embeddings(3, 6, 4)
        torch.testing.assert_close(loss(inside), value)
    torch.testing.assert_close(loss(inside), value)
    # a transposed tensor that is no leaf
    leaf = z.transpose(0, 2).contiguous().requires_grad_()
    loss((1.0 * leaf).transpose(0, 2)).backward()
    torch.testing.assert_close(leaf.grad.transpose(0, 2), expected, rtol=1e-12, atol=1e-14)


def test_views_that_are_one_tensor():
    z = embeddings(1, 6, 4).requires_grad_()
    repeated = z.detach().repeat(3, 1, 1).requires_grad_()
    expected = gradient(LOSSES["mgfd"], repeated).sum(0, keepdim=True)
    torch.testing.assert_close(gradient(lambda z: LOSSES["mgfd"](z.expand(3, 6, 4)), z), expected)


def test_stacks_of_different_types():
    z = [embeddings(3, 6, 4, seed=seed).to(dtype) for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))]
    leaves = [part.clone().requires_grad_() for part in z]
    total, _ = mgfd_loss(*leaves)
    assert torch.equal(total, mgfd_loss(*(part.float() for part in z))[0])
    assert [grad.dtype for grad in torch.autograd.grad(total, leaves)] == [part.dtype for part in z]


def test_threads_do_not_disturb_each_other():
    z = embeddings(3, 40, 30)
    expected, found = gradient(LOSSES["mgfd"], z.clone().requires_grad_()), []

    def work() -> None:
        found.extend(gradient(LOSSES["mgfd"], z.clone().requires_grad_()) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30 and all(torch.equal(grad, expected) for grad in found)


def test_weights_of_zero():
    a, b = (embeddings(6, 4, seed=seed).requires_grad_() for seed in (1, 2))
    total, terms = vicreg_loss(a, b, invariance_weight=0.0, variance_weight=0.0, covariance_weight=0.0)
    assert float(total.detach()) == 0.0 and not any(grad.any() for grad in torch.autograd.grad(total, (a, b)))
    # parts are those of the loss, whatever they weigh
    for name, value in vicreg_loss(a, b)[1].items():
        assert float(terms[name]) == float(value) > 0
    total, terms = barlow_twins_loss(a, b, off_diagonal_weight=0.0)
    assert float(total.detach()) == pytest.approx(float(terms["on_diagonal"])) and float(terms["off_diagonal"]) > 0
    assert torch.autograd.gradcheck(lambda *z: barlow_twins_loss(*z, off_diagonal_weight=0.0)[0], (a, b))


@pytest.mark.parametrize("loss", [cross_correlation, lambda a, b: barlow_twins_loss(a, b)[0]], ids=["usdrl", "barlow-twins"])
def test_cross_correlation_does_not_compute_covariances(loss):
    a, b = (embeddings(8, 40, seed=seed).requires_grad_() for seed in (1, 2))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss(a, b), (a, b))
    pairs = decorrelation_cost(2, 8, 40, 8, options=Options(covariances=False), backward=True)
    assert 0 < counter.get_total_flops() == pairs.flops


def test_nothing_but_the_gradient_is_kept():
    z = embeddings(4, 16, 512).float().requires_grad_()
    value = LOSSES["covariance-penalty"](z)
    # an upstream of one is not known to be one: the product is made in place
    assert peak_bytes(lambda: value.backward()) < z.nbytes // 8
