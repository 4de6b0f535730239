"""The exact linear probe beside scikit-learn's logistic regression, each in a process of its own; `bench.evaluation` runs it.

Features are made up: most of their variance lies along few directions, as that of encoders does, they have a large mean, and a
share of zeros after a ReLU. Both minimise mean cross-entropy + penalty / 2 * |W|^2 over float32 features, the weights and a free
bias; the objective is computed again from the weights, in float64, for everyone. `excess` is how far it lies above the lowest
that was reached, relative to it. "scikit-learn" stops at its own tolerance, "scikit-learn to the optimum" where it comes as
low as the exact solver does. A process that is ended by the time limit leaves a row without a time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastskel.bench.children import Child, failure
from fastskel.bench.harness import resident_bytes, timings
from torch import Tensor

from fastskel.evaluate.features import FeatureSet
from fastskel.evaluate.logistic import LogisticConfig, logistic_probe

__all__ = [
    "BASELINE", "PROVIDERS", "SOLVERS", "Fit", "ProbeCase", "Problem", "check", "make_problem", "measure", "solve_apart",
    "solve_here",
]  # fmt: skip

BASELINE, OWN = "scikit-learn", "fastskel"
SEED = 17
# of the total variance: the middle of the penalties that are tried
PENALTY = 1e-4
# deviations along the directions fall as 1 / number, as those of trained encoders do; the rest is noise of this deviation
DIRECTIONS, NOISE = 256, 0.02
# distance of the classes' centres in deviations: some nine in ten samples can be told
SPREAD = 0.8
# rows that are made, or in float64, at a time: neither must need more memory than the solvers
BLOCK_ROWS = 2048
# relative distance of objectives that are taken for one optimum
AGREEMENT = 1e-5
MOST_ITERATIONS = 100_000

Row = dict[str, Any]


@dataclass(frozen=True)
class ProbeCase:
    """A fit.

    Attributes:
        rows: N.
        width: F.
        classes: K.
    """

    rows: int = 40_000
    width: int = 2048
    classes: int = 60

    @property
    def name(self) -> str:
        """What tells its rows from others."""
        return f"{self.rows} rows of {self.width}, {self.classes} classes"


@dataclass(frozen=True)
class Problem:
    """What is minimised.

    Attributes:
        train: Features (N, F) and labels (N,).
        classes: K.
        penalty: Of the squared weights, absolute.
    """

    train: FeatureSet
    classes: int
    penalty: float

    def objective(self, weight: Tensor, bias: Tensor) -> float:
        """Mean cross-entropy with the penalty of weights (K, F) and bias (K,), in float64."""
        blocks = zip(torch.split(self.train.features, BLOCK_ROWS), torch.split(self.train.labels, BLOCK_ROWS), strict=True)
        loss = sum(
            float(torch.nn.functional.cross_entropy(rows.double() @ weight.T + bias, labels, reduction="sum"))
            for rows, labels in blocks
        )
        return loss / len(self.train) + self.penalty / 2 * float(weight.square().sum())


@dataclass(frozen=True)
class Fit:
    """What a solver found: weight (K, F) and bias (K,), float64, and its iterations."""

    weight: Tensor
    bias: Tensor
    iterations: int
    about: Row = field(default_factory=dict)


def make_problem(case: ProbeCase) -> Problem:
    """Make up features (N, F) with labels (N,)."""
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.randint(case.classes, (case.rows,), generator=generator)
    # every class occurs
    labels[: case.classes] = torch.arange(case.classes)
    directions = min(DIRECTIONS, case.width)
    deviation = 1.0 / torch.arange(1, directions + 1)
    centres = torch.randn(case.classes, directions, generator=generator) * SPREAD
    mixing = torch.randn(directions, case.width, generator=generator) * deviation[:, None]
    level = 3 * torch.rand(case.width, generator=generator)
    features = torch.empty(case.rows, case.width)
    total, square = torch.zeros(case.width, dtype=torch.float64), torch.zeros(case.width, dtype=torch.float64)
    for begin in range(0, case.rows, BLOCK_ROWS):
        part, own = features[begin : begin + BLOCK_ROWS], labels[begin : begin + BLOCK_ROWS]
        along = torch.randn(len(part), directions, generator=generator) + centres[own]
        part.normal_(0, NOISE, generator=generator).add_(along @ mixing).add_(level).relu_()
        total += part.double().sum(0)
        square += part.double().square().sum(0)
    variance = float((square / case.rows - (total / case.rows).square()).sum())
    return Problem(FeatureSet(features, labels, torch.arange(case.rows)), case.classes, PENALTY * variance)


def _own(problem: Problem) -> Fit:
    # a probe is tested as well: a class of each is enough
    few = FeatureSet(*(part[: problem.classes] for part in (problem.train.features, problem.train.labels, problem.train.index)))
    found = logistic_probe(problem.train, few, problem.classes, LogisticConfig(penalty=PENALTY, standardise=False))
    return Fit(found.weight, found.bias, found.iterations, {"converged": found.converged, "own_penalty": found.penalty})


def _sklearn(dtype: str, tolerance: float, problem: Problem) -> Fit:
    from sklearn.linear_model import LogisticRegression

    rows = problem.train.features.numpy().astype(dtype, copy=False)
    model = LogisticRegression(
        C=1 / (problem.penalty * len(rows)), tol=tolerance, max_iter=MOST_ITERATIONS, solver="lbfgs"
    ).fit(rows, problem.train.labels.numpy())
    weight, bias = (torch.from_numpy(part).double() for part in (model.coef_, model.intercept_))
    return Fit(weight, bias, int(model.n_iter_.max()), {"tolerance": tolerance})


SOLVERS: dict[str, Callable[[Problem], Fit]] = {
    # features as they come, and its own tolerance
    BASELINE: partial(_sklearn, "float32", 1e-4),
    "scikit-learn to the optimum": partial(_sklearn, "float64", 1e-6),
    OWN: _own,
}
PROVIDERS = tuple(SOLVERS)


def check(case: ProbeCase, providers: Sequence[str] = PROVIDERS) -> None:
    """Solve a small case by all providers in this process.

    Raises:
        ValueError: If the exact solver's penalty is another's, or its objective lies above another's or, of what goes to the
            optimum, beside it.
    """
    problem = make_problem(case)
    reached = {}
    for name in providers:
        found = SOLVERS[name](problem)
        reached[name] = problem.objective(found.weight, found.bias)
        own = found.about.get("own_penalty", problem.penalty)
        if abs(own / problem.penalty - 1) > AGREEMENT:
            raise ValueError(f"probe: {name} must have the penalty {problem.penalty:.6g}, got {own:.6g}. Mend one of them.")
    lowest = min(reached.values())
    for name, value in reached.items():
        if name != BASELINE and value > lowest * (1 + AGREEMENT):
            raise ValueError(f"probe: {name} must reach the objective {lowest:.8g}, got {value:.8g}. Mend the solver.")


def solve_here(case: ProbeCase, provider: str, warm: ProbeCase) -> Row:
    """Solve a case in this process, after a small one; seconds, memory added to features and libraries, objective."""
    problem = make_problem(case)
    # libraries and threads are there before the count begins
    SOLVERS[provider](make_problem(warm))
    before, begin = resident_bytes("VmRSS"), time.perf_counter()
    found = SOLVERS[provider](problem)
    seconds, peak = time.perf_counter() - begin, resident_bytes("VmHWM")
    return {
        "seconds": seconds, "peak_bytes": peak, "added_bytes": max(0, peak - before), "iterations": found.iterations,
        "objective": problem.objective(found.weight, found.bias), **found.about,
    }  # fmt: skip


def solve_apart(case: ProbeCase, provider: str, warm: ProbeCase, limit_s: float) -> Row:
    """Solve a case in a process of its own; one that fails, or is ended at the limit, is a row with its error."""
    words = json.dumps([asdict(case), provider, asdict(warm)])
    with tempfile.TemporaryDirectory() as folder:
        status, output = Child(Path(folder) / "log", limit_s).run("-m", "fastskel.bench.evaluation", "--solve", words)
    if status:
        return {"status": "failed", "error": failure(status, output), "limit_s": limit_s}
    row: Row = json.loads(output.splitlines()[-1])
    return {**row, "status": "ok"}


def measure(case: ProbeCase, warm: ProbeCase, rounds: int, limit_s: float) -> Iterator[Row]:
    """Solve a case by each provider in turns, a process each time; one row for each.

    Args:
        case: What is timed.
        warm: Small case that every solver is checked on and warmed up with.
        rounds: Turns of each provider; of less than three no ratio is sure.
        limit_s: Seconds after which a process is ended; its provider has no further turn.
    Raises:
        ValueError: If the solvers do not agree on the small case, or anybody comes below the exact one on the other.
    """
    check(warm)
    found: dict[str, list[Row]] = {name: [] for name in PROVIDERS}
    for _ in range(rounds):
        for name, earlier in found.items():
            if not earlier or earlier[-1]["status"] == "ok":
                earlier.append(solve_apart(case, name, warm, limit_s))
    solved = {name: rows for name, rows in found.items() if rows[-1]["status"] == "ok"}
    lowest = min((rows[-1]["objective"] for rows in solved.values()), default=0.0)
    for row in solved.get(OWN, []):
        if row["objective"] > lowest * (1 + AGREEMENT):
            raise ValueError(f"probe: {OWN} must reach the objective {lowest:.8g}, got {row['objective']:.8g}. Mend the solver.")
    times = {name: [1e3 * row["seconds"] for row in rows] for name, rows in solved.items()}
    # without the baseline's time there is no ratio to it
    timed = {timing.provider: timing.row() for timing in timings(times, BASELINE)} if BASELINE in solved else {}
    for name, rows in found.items():
        row = {"provider": name, **timed.get(name, {}), **rows[-1]}
        if name in solved:
            row["excess"] = row["objective"] / lowest - 1
            row["peak_bytes"], row["added_bytes"] = (max(each[key] for each in rows) for key in ("peak_bytes", "added_bytes"))
        yield row
