"""Refusing what a fused block would silently ignore: parts whose own forward pass is never called."""

from __future__ import annotations

from torch import nn

__all__ = ["check_plain"]


def check_plain(owner: str, kind: type[nn.Module], *modules: nn.Module) -> None:
    """Check that a block over (N, S, D) may read the parameters of its parts instead of calling them.

    Parametrisations pass: they change the parameter itself.

    Raises:
        ValueError: If a part is not of the kind, has another forward or hooks, or has no bias.
    """
    for module in modules:
        own = type(module).forward is kind.forward if isinstance(module, kind) else False
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        if not own or hooked or getattr(module, "bias", True) is None:
            what = f"{type(module).__name__}{' with hooks' if hooked else ''}{'' if own or hooked else ' of another forward'}"
            raise ValueError(
                f"{owner}: every {kind.__name__} inside must be a plain one with a bias and without hooks, got {what}. The fused "
                "layer reads parameters and calls no part: parametrise the weight, merge the adapter into it, or hook the layer."
            )
