"""Which cases the suite has: what runs in which process, at which sizes, and for how long at most."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["SELECTIONS", "Case", "cases"]

# what one can ask for -> what it is
SELECTIONS = {
    "quick": "A handful of cases in three minutes on two cores, explained.",
    "kernels": "Every fused kernel beside PyTorch's ways to do the same; without a GPU only that they run.",
    "encoder": "Both encoders: operations, memory, inference, training, one clip.",
    "loss": "The loss and its gradient at several batches.",
    "loader": "Batches: of one core, by threads, beside a training, and the memory for it.",
    "step": "A whole training step on a batch that is already there.",
    "job": "Training with the loader on, to epochs and recipes; time and memory by batch.",
    "tasks": "Features of clips, as downstream tasks extract them.",
    "all": "All of that.",
}
# modules that compare with a user's copy of the published code, and with what is compiled
COMPARING = ("encoder", "training")
KERNELS = Path(__file__).resolve().parent / "kernels"
# what the files of the kernels are collected by, also where no checkout with its settings is around
PYTEST = ("-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "--import-mode=importlib", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Case:
    """One process of the suite.

    Attributes:
        name: What its log is called, and `--parts` chooses by.
        part: Part that a row of its failure belongs to.
        module: Module of `fastskel.bench` that runs, or "" for pytest over the kernels.
        arguments: Its options.
        limit_s: Seconds until it is stopped.
        smoke: Its options instead, where it shall only be shown to run.
        tiny_kernels: Whether kernels run at tiny sizes in any case.
    """

    name: str
    part: str
    module: str
    arguments: tuple[str, ...]
    limit_s: float
    smoke: tuple[str, ...] = ("--quick",)
    tiny_kernels: bool = False

    @property
    def is_pytest(self) -> bool:
        """Whether its file of results is pytest-benchmark's."""
        return not self.module

    def with_options(self, options: Sequence[str]) -> Case:
        """Return the case with further options."""
        return replace(self, arguments=(*self.arguments, *options), smoke=(*self.smoke, *options))

    def command(self, out: Path, *, smoke: bool = False) -> list[str]:
        """Return the words after `python` that write its results to a file."""
        options = self.smoke if smoke else self.arguments
        if self.is_pytest:
            # the fixtures lie beside the kernels' folder
            where = (str(KERNELS), "--confcutdir", str(KERNELS.parent))
            return ["-m", "pytest", "-q", *where, *PYTEST, f"--benchmark-json={out}", *options]
        return ["-m", f"fastskel.bench.{self.module}", "--out", str(out), *options]


def _quick(device: str) -> list[Case]:
    """Cases that seconds are enough for on two cores: published width, but for the step, and small batches."""
    on, tiny = ("--device", device), ("--quick", "--device", device)
    two = ("--providers", "reference", "fastskel")
    encoder = ("--precision", "bf16", "--rounds", "7", "--limit", "8", *two, *on)
    return [
        Case("encoder-inference", "encoder", "encoder", ("--parts", "forward", "latency", "--batch", "8", *encoder), 75.0,
             ("--parts", "forward", *tiny)),
        Case("encoder-training", "encoder", "encoder", ("--parts", "train", "--batch", "4", *encoder), 60.0,
             ("--parts", "train", *tiny)),
        Case("loss", "loss", "loss", ("--rows", "356", "--rounds", "5", "--limit", "30", *on), 75.0,
             ("--rows", "6", "--rounds", "1", *tiny)),
        Case("loader", "loader", "loader", ("--parts", "speed", "--rounds", "5", "--clips", "800", "--limit", "15"), 40.0,
             ("--parts", "speed", "--rounds", "1", "--clips", "10", "--quick")),
        Case("step", "step", "training",
             ("--parts", "step", "--batch", "16", "--width", "256", "--rounds", "7", "--limit", "14", *two, *on), 60.0,
             ("--parts", "step", *tiny)),
        Case("job", "job", "job",
             ("--batch", "16", "--width", "128", "--rounds", "5", "--limit-s", "14", "--distinct", "400", *two, *on), 60.0, tiny),
    ]  # fmt: skip


def _full(device: str) -> dict[str, list[Case]]:
    """Cases of published size on a GPU; on a CPU of published width, at batches that minutes are enough for."""
    on, tiny = ("--device", device), ("--quick", "--device", device)
    batch = "356" if device == "cuda" else "32"
    # without a GPU the kernels' published sizes would take hours: only that they run is shown
    kernels = Case("kernels", "kernels", "", (), 1800.0, ("--benchmark-max-time=0.01", "-k", "philox"), device == "cpu")
    encoders = [
        Case(f"encoder-{name}", "encoder", "encoder", ("--encoder", name, "--batch", batch, *on), 1200.0,
             ("--encoder", name, *tiny))
        for name in ("dste", "sttr")
    ]  # fmt: skip
    return {
        "kernels": [kernels],
        "encoder": encoders,
        "loss": [Case("loss", "loss", "loss", on, 400.0, ("--rows", "6", "--rounds", "1", *tiny))],
        "loader": [Case("loader", "loader", "loader", (), 400.0, ("--rounds", "1", "--clips", "10", "--quick"))],
        "step": [Case("step", "step", "training", ("--parts", "step", *on), 900.0, ("--parts", "step", *tiny))],
        "job": [Case("job", "job", "job", on, 900.0, tiny), Case("sweep", "sweep", "sweep", on, 900.0, tiny)],
        "tasks": [Case("extract", "tasks", "training", ("--parts", "extract", *on), 300.0, ("--parts", "extract", *tiny))],
    }


def cases(
    selection: str, device: str, parts: Sequence[str] = (), *, reference: Path | None = None, compiled: bool = False
) -> list[Case]:
    """List the cases of a selection.

    Args:
        selection: One of `SELECTIONS`.
        device: "cpu" or "cuda".
        parts: Beginnings of the names of those to list; all if there are none.
        reference: Folder of the published code, to be compared too.
        compiled: Compare with what torch.compile makes of the reference too.
    Raises:
        ValueError: On an unknown selection or part, or kernels without pytest-benchmark.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"bench: selection must be one of {', '.join(SELECTIONS)}, got {selection!r}. Choose one.")
    full = _full(device)
    found = _quick(device) if selection == "quick" else full.get(selection) or [case for part in full.values() for case in part]
    for part in parts:
        if not any(case.name.startswith(part) for case in found):
            names = ", ".join(case.name for case in found)
            raise ValueError(f"bench: parts must begin names of cases ({names}), got {part!r}. Choose among them.")
    chosen = [case for case in found if not parts or case.name.startswith(tuple(parts))]
    if any(case.is_pytest for case in chosen) and importlib.util.find_spec("pytest_benchmark") is None:
        raise ValueError(
            "bench: pytest-benchmark must be installed for the kernels, got none. Install fastskel[test], or choose another part."
        )
    more = (*(("--reference", str(reference)) if reference else ()), *(("--compile",) if compiled else ()))
    return [case.with_options(more) if case.module in COMPARING else case for case in chosen]
