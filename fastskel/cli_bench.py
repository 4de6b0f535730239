"""The commands that measure: one of `bench` for each part of the suite, and one that puts two runs side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

__all__ = ["bench_commands"]

Command = Callable[..., None]
Earlier = Annotated[Positional[str], arg(metavar="EARLIER")]
Later = Annotated[Positional[str], arg(metavar="LATER")]


def bench_commands() -> dict[str, Command]:
    """Return the command of each selection of the suite, and `compare`."""
    from fastskel.bench.cases import SELECTIONS

    return {name: _bench_command(name, about) for name, about in SELECTIONS.items()} | {"compare": compare}


def compare(earlier: Earlier, later: Later) -> None:
    """Put two runs side by side; ends with code 1 if speed-ups differ by more than both runs' noise.

    Args:
        earlier: File of rows, folder of a run, or id of a row.
        later: The same of another run on the same machine.
    """
    from fastskel.bench.suite import compare_runs

    text, agree = compare_runs(earlier, later)
    print(text)
    if not agree:
        raise SystemExit(1)


def _bench_command(selection: str, about: str) -> Command:
    def bench(
        out: Path | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        parts: tuple[str, ...] = (),
        limit_s: float | None = None,
        compare: str | None = None,
        reference: Path | None = None,
        compile: bool = False,
        smoke: bool = False,
        quiet: bool = False,
    ) -> None:
        from fastskel.bench.suite import run

        status = run(
            selection, out, device=device, parts=parts, limit_s=limit_s, compare=compare, reference=reference,
            compiled=compile, smoke=smoke, progress=not quiet,
        )  # fmt: skip
        if status:
            raise SystemExit(status)

    bench.__doc__ = f"""{about}

    Ends with code 0, with 1 if a case failed, with 2 if an option is unusable.

    Args:
        out: Folder for rows, table, pictures and logs; by default one of its own in bench-run.
        device: Where it is measured.
        parts: Run only the cases whose names begin so.
        limit_s: Seconds for each case, instead of its own limit.
        compare: Put the results beside earlier ones of this machine: a file, the folder of a run, or the id of a row.
        reference: Folder of the published code, to be compared from where it lies.
        compile: Compare with what torch.compile makes of the reference too; takes minutes.
        smoke: Tiny sizes, to see that everything runs; they say nothing about speed.
        quiet: Show no progress bar.
    """
    return bench
