"""Nearest neighbours against scikit-learn and against a plain vote."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from fastskel.evaluate import knn_neighbours, knn_predict, knn_rank

SIZES = [(1, 1, 1, 1), (1, 3, 2, 1), (9, 1, 1, 1), (37, 23, 5, 1), (37, 23, 5, 4), (130, 61, 33, 7), (50, 3, 200, 50)]


def _draw(num_train: int, num_test: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    train_x = torch.randn(num_train, width, generator=generator, dtype=dtype)
    test_x = torch.randn(num_test, width, generator=generator, dtype=dtype)
    return train_x, torch.randint(6, (num_train,), generator=generator), test_x


def _plain_vote(train_x, train_y, test_x, k: int) -> list[int]:
    """Majority, then smallest summed distance, then nearest, written out."""
    similarity, rows = knn_neighbours(train_x, test_x, k)
    answers = []
    for values, neighbours in zip(similarity.tolist(), rows.tolist()):
        voters: dict[int, list[int]] = {}
        for position, row in enumerate(neighbours):
            voters.setdefault(int(train_y[row]), []).append(position)
        answers.append(min(voters, key=lambda y: (-len(voters[y]), -sum(values[p] for p in voters[y]), voters[y][0])))
    return answers


@pytest.mark.parametrize("num_train, num_test, width, k", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block_rows", [1, 5, 1024], ids=lambda rows: f"block{rows}")
def test_neighbours_equal_to_scikit_learn(num_train, num_test, width, k, dtype, block_rows) -> None:
    train_x, _, test_x = _draw(num_train, num_test, width, dtype=dtype)
    similarity, rows = knn_neighbours(train_x, test_x, k, block_rows=block_rows)
    finder = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(train_x.double())
    distance, expected = finder.kneighbors(test_x.double())
    # one half of the last place kept
    torch.testing.assert_close(similarity, 1 - torch.from_numpy(distance), atol=2**-30, rtol=0)
    if width > 1:
        assert rows.tolist() == expected.tolist()


@pytest.mark.parametrize("num_train, num_test, width, k", SIZES, ids=str)
def test_predictions(num_train, num_test, width, k) -> None:
    train_x, train_y, test_x = _draw(num_train, num_test, width, seed=1)
    predictions = knn_predict(train_x, train_y, test_x, k, block_rows=4)
    assert predictions.tolist() == _plain_vote(train_x, train_y, test_x, k)
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train_x.double(), train_y)
    votes = torch.from_numpy(model.predict_proba(test_x.double())).sort(1, descending=True).values
    # scikit-learn breaks ties by class number: compare where the majority is clear
    clear = votes[:, 0] > votes[:, 1] if votes.shape[1] > 1 else torch.ones(num_test, dtype=torch.bool)
    if width > 1:
        expected = torch.from_numpy(model.predict(test_x.double()))
        assert predictions[clear].tolist() == expected[clear].tolist()


def test_ties_go_to_the_smaller_summed_distance() -> None:
    angle = torch.deg2rad(torch.tensor([1.0, 40.0, 10.0, 20.0]))
    train_x = torch.stack([angle.cos(), angle.sin()], 1)
    test_x = torch.tensor([[1.0, 0.0]])
    # class 7 holds the nearest sample, class 3 the smaller sum: cos 10 + cos 20 > cos 1 + cos 40
    assert knn_predict(train_x, torch.tensor([7, 7, 3, 3]), test_x, 4).tolist() == [3]
    assert knn_predict(train_x, torch.tensor([7, 7, 3, 3]), test_x, 1).tolist() == [7]


@pytest.mark.parametrize("block_rows", [1, 2, 1024], ids=str)
@pytest.mark.parametrize("num_copies", [2, 67], ids=str)
def test_equal_rows_go_to_the_lowest_index(block_rows: int, num_copies: int) -> None:
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(1, 333, generator=generator)
    # the same direction at other lengths ties as well
    train_x = torch.cat([-row, row.repeat(num_copies, 1), 2 * row])
    test_x = torch.cat([row, row + 0.1 * torch.randn(4, 333, generator=generator)])
    _, rows = knn_neighbours(train_x, test_x, num_copies, block_rows=block_rows)
    assert rows.tolist() == [list(range(1, num_copies + 1))] * 5


def test_zero_vectors_have_similarity_zero() -> None:
    train_x = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    train_y = torch.tensor([4, 5, 6])
    similarity, rows = knn_neighbours(train_x, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 3)
    assert similarity.tolist() == [[0.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
    assert rows.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert knn_predict(train_x, train_y, torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist() == [5, 4]


@pytest.mark.parametrize("scale", [1e-300, 1e300], ids=str)
def test_huge_and_tiny_float64_features(scale: float) -> None:
    train_x, train_y, test_x = _draw(40, 9, 6, dtype=torch.float64)
    expected = knn_predict(train_x, train_y, test_x, 3)
    assert knn_predict(train_x * scale, train_y, test_x * scale, 3).tolist() == expected.tolist()


def test_rank_lists_classes_by_votes_then_nearest() -> None:
    angle = torch.deg2rad(torch.tensor([1.0, 5.0, 6.0, 90.0, 50.0]))
    train_x = torch.stack([angle.cos(), angle.sin()], 1)
    train_y = torch.tensor([9, 2, 2, 0, 4])
    ranking = knn_rank(train_x, train_y, torch.tensor([[2.0, 0.0]]), 3, num_ranked=5)
    assert ranking.tolist() == [[2, 9, 4, 0]]
    assert knn_rank(train_x, train_y, torch.tensor([[2.0, 0.0]]), 3, num_ranked=2).tolist() == [[2, 9]]


@pytest.mark.parametrize("k", [1, 3, 8], ids=str)
@pytest.mark.parametrize("block_rows", [2, 1024], ids=str)
def test_rank_begins_with_the_prediction(k: int, block_rows: int) -> None:
    train_x, train_y, test_x = _draw(60, 31, 4, seed=2)
    ranking = knn_rank(train_x, train_y, test_x, k, num_ranked=6, block_rows=block_rows)
    assert ranking[:, 0].tolist() == knn_predict(train_x, train_y, test_x, k).tolist()
    assert ranking.sort(1).values.tolist() == [list(range(6))] * 31


@pytest.mark.parametrize("num_near", [39, 40, 500, 2900], ids=str)
def test_rank_finds_classes_behind_many_rows_of_one(num_near: int) -> None:
    # class 7 lies around the queries, the others follow in the order 3 1 9 5, on both sides
    place = torch.tensor([7] * num_near + [3, 1, 9, 5] * 10)
    angle = torch.cat([torch.linspace(0.0, 0.5, num_near), torch.linspace(0.6, 1.5, 40)])
    order = torch.randperm(len(place), generator=torch.Generator().manual_seed(0))
    train_x = torch.stack([angle.cos(), angle.sin()], 1)[order]
    test_x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    ranking = knn_rank(train_x, place[order], test_x, 1, num_ranked=5)
    assert ranking.tolist() == [[7, 3, 1, 9, 5], [7, 3, 1, 9, 5], [5, 9, 1, 3, 7]]


def test_errors() -> None:
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    bad = x.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(ValueError, match="k must lie in 1..4 .training rows., got 5"):
        knn_predict(x, y, x, 5)
    with pytest.raises(ValueError, match="k must lie in"):
        knn_predict(x, y, x, 0)
    with pytest.raises(ValueError, match="test_x must be finite, got nan in row 2"):
        knn_predict(x, y, bad)
    with pytest.raises(ValueError, match="train_x must be finite, got nan in row 2"):
        knn_rank(bad, y, x)
    with pytest.raises(ValueError, match="width of train_x, got 2 and 3"):
        knn_neighbours(x, x[:, :2], 1)
    with pytest.raises(ValueError, match="metric must be 'cosine', got 'euclidean'"):
        knn_predict(x, y, x, metric="euclidean")
    with pytest.raises(ValueError, match="one integer per training row"):
        knn_predict(x, y[:3], x)
    with pytest.raises(ValueError, match="train_x must have rows, got none"):
        knn_predict(x[:0], y[:0], x)
    with pytest.raises(ValueError, match="floating-point"):
        knn_predict(x.long(), y, x)
    with pytest.raises(ValueError, match="block_rows must be at least 1"):
        knn_predict(x, y, x, block_rows=0)
    with pytest.raises(ValueError, match="num_ranked must be at least 1"):
        knn_rank(x, y, x, num_ranked=0)
