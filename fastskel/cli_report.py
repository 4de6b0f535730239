"""The command that shows a run: `fastskel report RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

__all__ = ["report"]

Run = Annotated[Positional[Path], arg(metavar="RUN")]


def report(
    run: Run,
    data: Path | None = None,
    out: Path | None = None,
    results: tuple[Path, ...] = (),
    clips: int = 32,
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Write one HTML page of all that is known of a run: record, curves, every evaluation, what features look like.

    Args:
        run: Run folder, or published .pth.tar with its results beside it.
        data: Packed data set; by default the one that the run recorded, if it is still there.
        out: File to write; by default report.html in the run.
        results: Further folders to search for results, such as those of other encoders.
        clips: Test clips to measure on what features rest; 0 leaves it out.
        device: cpu, cuda, or auto for a GPU where there is one.
        quiet: Show no progress bar.
    """
    from fastskel.report import write_report

    path, found = write_report(run, data, out, results=results, clips=clips, device=device, progress=not quiet)
    left_out = f", {len(found.problems)} parts are missing or damaged (listed in it)" if found.problems else ""
    print(f"{len(found.results)} results, {path.stat().st_size / 2**20:.1f} MiB{left_out}: {path}")
