"""The argument --device of benchmarks' command lines."""

from __future__ import annotations

import argparse
from typing import Any

import torch

__all__ = ["add_device"]


class _Device(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if values == "cuda" and not torch.cuda.is_available():
            command = parser.prog.rpartition(".")[2]
            parser.exit(
                2,
                f"error: {command}: --device must be one that torch {torch.__version__} sees, got 'cuda'. "
                "Leave it out for the CPU.\n",
            )
        setattr(namespace, self.dest, values)


def add_device(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add --device, "cpu" or "cuda"; without a default it is a GPU where there is one.

    "cuda" where there is no GPU ends the command with a line on standard error and status 2.
    """
    default = default or ("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, action=_Device, help=f"here {default} by default")
