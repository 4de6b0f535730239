"""k-means against scikit-learn, its first centres, empty clusters; agreement with classes against scipy and scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from fastskel.data.views import eval_view
from fastskel.evaluate import Evaluation, evaluate_cluster, k_means
from fastskel.evaluate import cluster as cluster_module
from fastskel.evaluate.cluster import _lloyd, _seeded_centres
from fastskel.evaluate.cluster_metrics import (
    adjusted_rand_index,
    best_assignment,
    cluster_accuracy,
    contingency_table,
    normalised_mutual_information,
)

MEASURES = (cluster_accuracy, normalised_mutual_information, adjusted_rand_index)


def _blobs(num: int, width: int, count: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = np.random.default_rng(seed)
    labels = np.arange(num) % count
    rows = draw.normal(0, 1, (count, width))[labels] + draw.normal(0, spread, (num, width))
    return torch.tensor(rows, dtype=torch.float32), torch.from_numpy(labels)


@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 5), (3, 8), (8, 3), (1, 6), (40, 40), (60, 25)])
@pytest.mark.parametrize("kind", ["real", "counts", "constant"])
def test_best_assignment_of_scipy(rows, columns, kind) -> None:
    draw = np.random.default_rng(rows * 100 + columns)
    for _ in range(5):
        weight = draw.normal(0, 3, (rows, columns)) if kind == "real" else draw.integers(0, 4, (rows, columns)) * 1.0
        weight = weight if kind != "constant" else np.full((rows, columns), 2.0)
        row, column = best_assignment(weight)
        expected = weight[linear_sum_assignment(weight, maximize=True)].sum()
        assert len(set(row.tolist())) == len(set(column.tolist())) == min(rows, columns)
        assert (np.diff(row) > 0).all()
        assert weight[row, column].sum() == pytest.approx(expected, rel=1e-12)


def test_assignment_refuses() -> None:
    for weight in (np.zeros(3), np.zeros((0, 2)), np.array([[np.nan]])):
        with pytest.raises(ValueError, match=r"best_assignment: weight must be finite numbers \(K, R\)"):
            best_assignment(weight)


@pytest.mark.parametrize("num, classes, clusters", [(50, 4, 4), (200, 3, 7), (200, 10, 2), (3, 3, 3), (30, 1, 4), (30, 4, 1)])
def test_agreement_of_scikit_learn(num, classes, clusters) -> None:
    for seed in range(6):
        draw = np.random.default_rng(seed)
        labels = draw.integers(0, classes, num)
        # from unrelated to equal
        own = np.where(draw.random(num) < seed / 5, labels % clusters, draw.integers(0, clusters, num))
        table = contingency_table(torch.from_numpy(labels), torch.from_numpy(own))
        # sums of at most 200 logarithms in double
        assert normalised_mutual_information(table) == pytest.approx(normalized_mutual_info_score(labels, own), abs=1e-10)
        assert adjusted_rand_index(table) == pytest.approx(adjusted_rand_score(labels, own), abs=1e-12)
        counts = np.zeros((classes, clusters))
        np.add.at(counts, (labels, own), 1)
        expected = counts[linear_sum_assignment(counts, maximize=True)].sum() / num
        assert cluster_accuracy(table) == pytest.approx(expected, rel=1e-12)


def test_perfect_clusters_give_one_whatever_their_numbers() -> None:
    labels = torch.arange(30) % 5
    numbers = torch.tensor([40, 7, 12, 0, 3])
    table = contingency_table(labels, numbers[labels])
    assert [measure(table) for measure in MEASURES] == pytest.approx([1.0] * 3, rel=1e-12)
    alone = contingency_table(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    assert [measure(alone) for measure in MEASURES] == [1.0] * 3


def test_permuting_classes_or_clusters_changes_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    labels, own = torch.randint(0, 4, (80,), generator=draw), torch.randint(0, 6, (80,), generator=draw)
    plain = contingency_table(labels, own)
    other = contingency_table(torch.randperm(4, generator=draw)[labels], torch.randperm(6, generator=draw)[own])
    assert [measure(plain) for measure in MEASURES] == pytest.approx([measure(other) for measure in MEASURES], rel=1e-12)


def test_a_single_cluster_tells_nothing() -> None:
    table = contingency_table(torch.tensor([0, 0, 0, 1, 1, 2]), torch.zeros(6, dtype=torch.int64))
    assert [measure(table) for measure in MEASURES] == [0.5, 0.0, 0.0]


def test_table_refuses() -> None:
    with pytest.raises(ValueError, match="agree in length, got 2 and 3"):
        contingency_table(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="clusters must be one integer per sample, got torch.float32"):
        contingency_table(torch.tensor([0]), torch.tensor([0.5]))


@pytest.mark.parametrize("num, width, count", [(60, 3, 4), (25, 40, 5), (7, 2, 7), (9, 3, 1)])
def test_lloyd_of_scikit_learn(num, width, count, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "BLOCK_ROWS", 8)
    rows = _blobs(num, width, count, 0.8)[0].double()
    first = rows[:count].clone()
    ours = _lloyd(rows, first, 300)
    oracle = KMeans(count, init=first.numpy(), n_init=1, tol=0, max_iter=300, algorithm="lloyd").fit(rows.numpy())
    assert ours.converged
    assert ours.clusters.tolist() == oracle.labels_.tolist()
    assert ours.inertia == pytest.approx(oracle.inertia_, rel=1e-9)
    np.testing.assert_allclose(ours.centres.numpy(), oracle.cluster_centers_, atol=1e-9)


def test_the_best_restart_counts_and_seeds_repeat() -> None:
    rows, _ = _blobs(120, 4, 12, 0.1)
    one, many = (k_means(rows, 12, restarts=restarts) for restarts in (1, 8))
    assert many.inertia <= one.inertia
    again = k_means(rows, 12, restarts=8)
    assert torch.equal(many.clusters, again.clusters) and torch.equal(many.centres, again.centres)
    inertias = {round(k_means(rows, 12, seed=seed, restarts=1).inertia, 6) for seed in range(8)}
    assert len(inertias) > 1 and many.inertia <= max(inertias)
    means = torch.stack([rows[many.clusters == cluster].double().mean(0) for cluster in range(12)])
    # rows are centred in float32
    torch.testing.assert_close(many.centres, means, rtol=0, atol=1e-5)


def test_far_from_the_origin() -> None:
    rows, labels = _blobs(40, 3, 4, 0.02)
    # float32 resolves 0.008 at 1e5; distances of rows that are not centred would not resolve at all
    found = k_means(rows + 1e5, 4, restarts=8)
    assert cluster_accuracy(contingency_table(labels, found.clusters)) == 1.0


def test_first_centres_have_the_odds_of_squared_distances() -> None:
    rows = torch.tensor([[0.0], [1.0], [3.0]])
    norms = rows.double().square().sum(1)
    pairs = [tuple(_seeded_centres(rows, norms, 2, 5, restart).flatten().tolist()) for restart in range(3000)]
    first = np.array([pair[0] for pair in pairs])
    # 3000 draws: a deviation of at most 0.009; four of them
    assert [(first == value).mean() for value in (0, 1, 3)] == pytest.approx([1 / 3] * 3, abs=0.036)
    after = np.array([pair[1] for pair in pairs])[first == 0]
    assert (after != 0).all() and (after == 3).mean() == pytest.approx(0.9, abs=0.04)
    assert all(a != b for a, b in pairs)


def test_empty_clusters_take_the_farthest_rows() -> None:
    rows = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [9.0]], dtype=torch.float64)
    # two centres beyond every row: the rows farthest from their centre are 9 and 5.1
    first = torch.tensor([[0.0], [100.0], [200.0]], dtype=torch.float64)
    found = _lloyd(rows, first, 50)
    assert found.converged
    assert found.clusters.tolist() == [0, 0, 0, 2, 2, 1]
    assert torch.equal(found.clusters, _lloyd(rows, first, 50).clusters)


def test_fewer_places_than_clusters() -> None:
    rows = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 3)
    found = k_means(rows, 5, restarts=2)
    assert found.converged and found.inertia == 0.0
    assert len(set(found.clusters.tolist())) == 2
    same = k_means(torch.ones(4, 2), 3)
    assert same.inertia == 0.0 and same.converged


def test_k_means_refuses() -> None:
    rows = torch.ones(4, 2)
    for change, message in [
        ({"num_clusters": 5}, r"num_clusters must lie in 1\.\.4 \(rows\), got 5"),
        ({"num_clusters": 0}, "got 0"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"rows": rows * float("nan")}, "rows must be finite"),
        ({"rows": rows.long()}, "got torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            k_means(**({"rows": rows, "num_clusters": 2} | change))


def test_not_converged_is_said() -> None:
    rows, _ = _blobs(200, 4, 20, 1.0)
    assert not k_means(rows, 20, restarts=1, max_iterations=1).converged


@pytest.mark.parametrize("part", ["test", "all"])
def test_a_whole_evaluation(encoder, dataset, part, tmp_path: Path) -> None:
    split = SimpleNamespace(train=np.arange(9), test=np.arange(9, 17))
    evaluation = Evaluation(encoder, dataset, split, eval_view(frames=6, normalise="none"), progress=False)
    result = evaluate_cluster(evaluation, tmp_path / "out", part=part, seeds=3)
    assert (result["task"], result["num_clusters"]) == ("cluster", 3)
    assert (result["num_train"], result["num_test"]) == (9 if part == "all" else 0, 8)
    for name in ("accuracy", "nmi", "ari"):
        assert len(result[name]["values"]) == 3
        assert result[name]["mean"] == pytest.approx(1.0)
    assert result["converged"] == [True] * 3
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(result))
    other = evaluate_cluster(evaluation, part=part, num_clusters=2, normalise=False, seeds=1)
    assert other["num_clusters"] == 2 and other["accuracy"]["mean"] < 1 and other["accuracy"]["deviation"] is None
    for change, message in [({"part": "train"}, "part must be test or all"), ({"seeds": 0}, "seeds must be at least 1")]:
        with pytest.raises(ValueError, match=message):
            evaluate_cluster(evaluation, **change)
