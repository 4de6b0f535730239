"""Downstream tasks beside the plain way: cached features against encoding in every epoch, the exact solver, detection metrics.

    python -m fastskel.bench.evaluation [--out FILE.jsonl] [--part linear probe detection] [--size small published]

`linear`: a linear probe of 160 epochs. "re-encoding" does as the published code: in every epoch each batch goes through the
frozen encoder, in evaluation mode and without gradients, and then into one step of SGD. Two epochs of it are timed and scaled to
those of the schedule (`epochs_timed`, `epoch_ms`); what it would read off the test part every fifth epoch is left out, which
favours it. "cached" is timed whole: training and test part are encoded once and written to disk, then all epochs follow, with the
readings. "cached, warm" finds the features there. Before they are timed two epochs must leave both with the same weights.
`probe`: see `fastskel.bench.solvers`.
`detection`: all metrics at seven thresholds beside plain Python, which must have the same values. Segments are made up at the
densities of PKU-MMD I, or read: `--labels` has an array `segments` (S, 5) of recording, class from 1, start, end, confidence.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastskel.bench import solvers
from fastskel.bench.harness import append_rows, compare, origin, relative_l2
from fastskel.bench.reference import detection as plain_detection
from fastskel.bench.rows import verdict
from fastskel.bench.solvers import ProbeCase
from numpy.typing import NDArray
from torch import Tensor, nn

from fastskel.data import Loader, PackedDataset, pack_arrays
from fastskel.data.protocols import Split
from fastskel.evaluate.detection_metrics import THRESHOLDS, Segments, detection_metrics
from fastskel.evaluate.evaluation import Evaluation
from fastskel.evaluate.linear import INIT_STD, LinearConfig, linear_probe
from fastskel.models.encoder import ENCODERS
from fastskel.recipes import RECIPES

__all__ = [
    "DetectionCase", "LinearCase", "Probe", "detection_part", "line", "linear_part", "main", "make_proposals", "make_truth",
    "probe_part", "read_labels",
]  # fmt: skip

SEED = 23
REENCODING, CACHED, WARM = "re-encoding", "cached", "cached, warm"
# whole epochs of re-encoding that are timed
TIMED_EPOCHS = 2
NUM_CLASSES = 60
# frames of the made-up clips
CLIP_FRAMES = (60, 120)
# features of other batches of rows differ by rounding, and so do the steps taken from them
SAME_WEIGHTS = 1e-3

Row = dict[str, Any]


@dataclass(frozen=True)
class LinearCase:
    """A linear evaluation.

    Attributes:
        recipe: Whose encoder and view.
        train: Clips to train on.
        test: Clips to test on.
        joints: V; 25 come with two bodies.
        batch: Clips of a step of SGD and of a pass of the encoder.
        width: D; None is the recipe's.
        epochs: Of the schedule.
    """

    recipe: str
    train: int
    test: int
    joints: int
    batch: int
    width: int | None = None
    epochs: int = LinearConfig.epochs

    @property
    def name(self) -> str:
        """What tells its rows from others."""
        return f"{self.recipe}, {self.train} and {self.test} clips, {self.epochs} epochs"


@dataclass(frozen=True)
class DetectionCase:
    """Segments to make up.

    Attributes:
        segments: S.
        recordings: R.
        classes: K.
        proposals: For each segment.
    """

    segments: int = 21_545
    recordings: int = 1_076
    classes: int = 51
    proposals: int = 5


# as published: the encoder of width 1024 for 64 frames of two bodies; of a batch of 512 there would be one step an epoch
LINEAR = {
    "small": LinearCase("usdrl-small", 1000, 250, 20, 256),
    "published": LinearCase("usdrl-dste", 192, 48, 25, 64),
    "quick": LinearCase("usdrl-demo", 24, 8, 20, 10, width=16, epochs=6),
}
DETECTION = {"published": DetectionCase(), "quick": DetectionCase(200, 10, 7)}
PARTS, SIZES = ("linear", "probe", "detection"), ("small", "published")
PROBE = {"small": ProbeCase(4000, 256, 27), "published": ProbeCase(), "quick": ProbeCase(300, 24, 5)}


def make_clips(folder: Path, case: LinearCase) -> PackedDataset:
    """Pack made-up clips (T, M, V, 3): a pose for each class, and noise around it."""
    draw = np.random.default_rng(SEED)
    bodies, topology = (2, "ntu-25") if case.joints == 25 else (1, "kinect-20-ucla")
    poses = draw.standard_normal((NUM_CLASSES, bodies, case.joints, 3), np.float32)
    labels = draw.permutation(np.arange(case.train + case.test) % NUM_CLASSES)
    lengths = draw.integers(*CLIP_FRAMES, len(labels), endpoint=True)
    clips = (
        poses[label] + draw.standard_normal((length, *poses.shape[1:]), np.float32)
        for label, length in zip(labels, lengths, strict=True)
    )
    return pack_arrays(clips, out=folder, topology=topology, labels=labels)


class Probe:
    """Both ways to train one linear layer on a frozen encoder.

    Args:
        case: Sizes.
        folder: Where the data set, and what is cached, is written.
    """

    def __init__(self, case: LinearCase, folder: Path) -> None:
        recipe = RECIPES[case.recipe]()
        dataset = make_clips(folder / "data", case)
        stage = replace(recipe, width=case.width or recipe.width).stages(dataset)[0]
        torch.manual_seed(SEED)
        self.case, self.folder = case, folder
        self.config = LinearConfig(epochs=case.epochs, batch_size=case.batch)
        parts = np.split(np.arange(len(dataset)), [case.train])
        self.evaluation = Evaluation(
            ENCODERS[stage.encoder](**stage.encoder_options).eval(), dataset, Split(*parts), stage.eval_view,
            batch_size=case.batch, progress=False,
        )  # fmt: skip

    def start(self) -> nn.Linear:
        """Return the layer (F to K) that both begin with."""
        assert self.evaluation.encoder is not None
        layer = nn.Linear(self.evaluation.encoder.num_features, NUM_CLASSES)
        nn.init.normal_(layer.weight, 0, INIT_STD, generator=torch.Generator().manual_seed(self.config.seed))
        nn.init.zeros_(layer.bias)
        return layer

    def reencoding(self, epochs: int) -> list[Tensor]:
        """Train for some epochs, with every batch encoded anew; returns weight (K, F) and bias (K,)."""
        evaluation, config, layer = self.evaluation, self.config, self.start()
        assert evaluation.encoder is not None
        optimizer = torch.optim.SGD(layer.parameters(), config.rate(0), config.momentum, weight_decay=config.weight_decay)
        criterion = nn.CrossEntropyLoss()
        with Loader(
            evaluation.dataset, views=[evaluation.view], batch_size=config.batch_size, seed=config.seed,
            num_threads=evaluation.num_threads, indices=evaluation.split.train, drop_last=False,
        ) as loader:  # fmt: skip
            for epoch in range(epochs):
                for group in optimizer.param_groups:
                    group["lr"] = config.rate(epoch)
                for batch in loader:
                    with torch.no_grad():
                        features = evaluation.encoder(batch.views[0]).pooled
                    loss = criterion(layer(features), batch.labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return [layer.weight.detach(), layer.bias.detach()]

    def cached(self, epochs: int, *, warm: bool) -> list[Tensor]:
        """Encode once, or read what was encoded, and train; returns weight (K, F) and bias (K,)."""
        cache = self.folder / "features"
        if not warm:
            cache = Path(tempfile.mkdtemp(dir=self.folder))
        train, test = replace(self.evaluation, cache=cache).features()
        found = linear_probe(train, test, NUM_CLASSES, replace(self.config, epochs=epochs))
        return [found.weight, found.bias]

    def check(self) -> float:
        """Compare what few epochs make of the layer; return the relative distance of the changes.

        Raises:
            ValueError: If the layers differ by more than rounding.
        """
        begin = list(self.start().parameters())
        plain, own = self.reencoding(TIMED_EPOCHS), self.cached(TIMED_EPOCHS, warm=True)
        far = relative_l2([a - b for a, b in zip(own, begin)], [a - b for a, b in zip(plain, begin)])
        if not far <= SAME_WEIGHTS:
            raise ValueError(
                f"evaluation: {CACHED} must change the weights as {REENCODING} does, got a distance of {far:.2g}. Mend one."
            )
        return far


def linear_part(case: LinearCase, rounds: int, limit_s: float) -> Iterator[Row]:
    """Time the schedule of a linear evaluation in both ways; one row for each."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(case, Path(folder))
        # also the warm-up
        distance = probe.check()
        calls: dict[str, Callable[[], object]] = {
            REENCODING: partial(probe.reencoding, TIMED_EPOCHS),
            CACHED: partial(probe.cached, case.epochs, warm=False),
            WARM: partial(probe.cached, case.epochs, warm=True),
        }
        scale = case.epochs / TIMED_EPOCHS
        for timing in compare(calls, REENCODING, rounds=rounds, warmup=0, limit_s=limit_s):
            row = timing.row()
            part = timing.provider == REENCODING
            for key in ("median_ms", "q20_ms", "q80_ms") if part else ("speedup", "speedup_q20", "speedup_q80"):
                row[key] *= scale
            timed = TIMED_EPOCHS if part else case.epochs
            row |= {"epochs_timed": timed, "epoch_ms": row["median_ms"] / case.epochs, "extrapolated": part, "distance": distance}
            yield {"case": case.name, **asdict(case), **row}


def probe_part(case: ProbeCase, rounds: int, limit_s: float) -> Iterator[Row]:
    """Solve the exact probe by each solver, a process each; one row for each."""
    warm = PROBE["quick"]
    for row in solvers.measure(case, warm, rounds, limit_s):
        yield {"case": case.name, **asdict(case), **row}


def make_truth(case: DetectionCase) -> NDArray[np.float64]:
    """Make up true segments (S, 5), one after another in each recording; lengths and gaps as log-normal as PKU-MMD's are."""
    draw = np.random.default_rng(SEED)
    recording = np.sort(np.arange(case.segments) % case.recordings)
    gap, length = (np.ceil(draw.lognormal(mean, deviation, case.segments)) for mean, deviation in ((4.7, 0.6), (4.55, 0.63)))
    end = np.cumsum(gap + length)
    first = np.searchsorted(recording, np.arange(case.recordings))
    end -= (end - gap - length)[first][recording]
    return np.stack([recording, draw.integers(case.classes, size=case.segments), end - length, end, np.ones(case.segments)], 1)


def read_labels(path: Path) -> NDArray[np.float64]:
    """Read true segments (S, 5) with classes from 0; those that end before they start are left out."""
    with np.load(path) as archive:
        rows: NDArray[np.float64] = archive["segments"].astype(np.float64)
    rows[:, 1] -= 1
    return rows[rows[:, 3] > rows[:, 2]]


def make_proposals(case: DetectionCase, truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make up proposals (P, 5) for true segments (S, 5): three in five near one, of its class; the others anywhere, of any."""
    draw = np.random.default_rng(SEED + 1)
    rows = np.repeat(truth, case.proposals, axis=0)
    length, near = rows[:, 3] - rows[:, 2], draw.uniform(size=len(rows)) < 0.6
    moved = np.where(near[:, None], draw.normal(0, 0.2, (len(rows), 2)) * length[:, None], 0)
    rows[:, 2:4] = np.sort(rows[:, 2:4] + moved, axis=1)
    rows[:, 2:4] += np.where(near, 0, draw.normal(0, 10, len(rows)) * length)[:, None]
    rows[:, 1] = np.where(near, rows[:, 1], draw.integers(case.classes, size=len(rows)))
    # a frame at least; and scores of which some are equal
    rows[:, 3] = np.maximum(rows[:, 3], rows[:, 2] + 1)
    rows[:, 4] = np.round(np.where(near, draw.beta(4, 2, len(rows)), draw.beta(2, 4, len(rows))), 4)
    return rows[draw.permutation(len(rows))]


def _listed(rows: NDArray[np.float64]) -> list[plain_detection.Segment]:
    return [(int(recording), int(label), start, end, score) for recording, label, start, end, score in rows.tolist()]


def _differences(own: Any, plain: Any) -> float:
    """Return the largest difference of two nested results of the same names."""
    if isinstance(own, dict):
        return max(_differences(own[key], plain[key]) for key in own.keys() | plain.keys())
    return float(np.abs(np.subtract(own, plain)).max())


def detection_part(case: DetectionCase, truth: NDArray[np.float64], source: str, rounds: int, limit_s: float) -> Iterator[Row]:
    """Measure proposals for true segments (S, 5) at all thresholds, plainly and by fastskel; one row for each.

    Raises:
        ValueError: If their results differ by more than rounding.
    """
    proposals = make_proposals(case, truth)
    recordings = int(truth[:, 0].max()) + 1
    sizes = (case.classes, recordings, THRESHOLDS)
    calls: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": partial(plain_detection.detection_metrics, _listed(truth), _listed(proposals), *sizes),
        "fastskel": partial(detection_metrics, Segments.of(truth), Segments.of(proposals), *sizes),
    }
    plain, own = (call() for call in calls.values())
    far = _differences(own, plain)
    # sums of some thousand shares in another order
    if not far < 1e-9:
        raise ValueError(f"evaluation: detection_metrics must be those of plain Python, got {far:.2g} beside. Mend one of them.")
    about = {"case": f"{len(truth)} segments, {len(proposals)} proposals, {recordings} recordings", "segments": source}
    for timing in compare(calls, "plain", rounds=rounds, warmup=0, limit_s=limit_s):
        yield {**about, **timing.row(), "map_action": own["0.5"]["map_action"], "distance": far}


def line(row: Row) -> str:
    """Say a row in one line."""
    start = f"{row['part']:<9} {row['provider']:<27}"
    if row.get("status", "ok") != "ok":
        return f"{start} {verdict(row)}"
    seconds = row["median_ms"] / 1e3 if "median_ms" in row else row["seconds"]
    parts = [f"{start} {seconds:10.3f} s"]
    if row.get("extrapolated"):
        parts.append(f"scaled from {row['epochs_timed']} epochs of {row['epoch_ms'] / 1e3:.3f} s")
    if "excess" in row:
        parts.append(f"{row['iterations']} iterations, {row['excess']:.1e} above the lowest objective")
    if "added_bytes" in row:
        parts.append(f"+{row['added_bytes'] / 2**20:.0f} MiB")
    return "  ".join([*parts, verdict(row)])


def _rows(part: str, given: argparse.Namespace) -> Iterator[Row]:
    if part == "detection":
        case = DETECTION["quick" if given.quick else "published"]
        truth = read_labels(given.labels) if given.labels else make_truth(case)
        yield from detection_part(case, truth, "a file" if given.labels else "made up", given.rounds, given.limit_s)
        return
    for size in ["quick"] if given.quick else given.size:
        if part == "linear":
            yield from linear_part(LINEAR[size], given.rounds, given.limit_s)
        else:
            rounds = given.solver_rounds if size == "published" else given.rounds
            yield from probe_part(PROBE[size], rounds, given.limit_s)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, append rows; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m fastskel.bench.evaluation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON lines file to add rows to")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=SIZES, help="of linear and probe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--solver-rounds", type=int, default=1, help="of the published probe, whose solvers take a minute")
    parser.add_argument("--limit-s", type=float, default=90.0, help="seconds after which no round begins, or a solver ends")
    parser.add_argument("--labels", type=Path, help="arrays of true segments for detection, of 51 classes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--solve", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.solve:
        case, provider, warm = given.solve
        print(json.dumps(solvers.solve_here(ProbeCase(**case), provider, ProbeCase(**warm))))
        return 0
    for part in given.part:
        rows = []
        for found in _rows(part, given):
            rows.append({"part": part, "precision": "fp32", "quick": given.quick, **found})
            print(line(rows[-1]), flush=True)
        if given.out:
            append_rows(given.out, [{**row, **origin()} for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
