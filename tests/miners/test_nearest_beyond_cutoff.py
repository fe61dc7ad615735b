"""Nearest negatives beyond a cutoff against the Divide and Conquer release, hand values and a slow loop."""

import pytest
import torch
from torch import Tensor

from raydml.miners.nearest_beyond_cutoff import NearestBeyondCutoff
from tests.golden_vectors import golden_case, golden_cases
from tests.tuples import listed


@pytest.mark.parametrize("case", golden_cases("divide_conquer_miner"))
def test_lists_of_the_release(case: dict) -> None:
    golden = golden_case("divide_conquer_miner", case["case"])
    labels = golden["labels"]
    found = listed(NearestBeyondCutoff(cutoff=case["cutoff"])(golden["E"], labels))
    negative = labels[:, None] != labels
    if (negative & (golden["dist"] >= case["cutoff"])).any():
        expected = zip(*(golden[column].tolist() for column in ("anchor", "positive", "negative")), strict=True)
        assert found == list(expected)  # in the same order, too
        return
    # Without negatives beyond the cutoff the release pairs items with themselves. Ours takes the nearest negatives.
    assert (golden["anchor"] == golden["negative"]).any()
    assert len(found) == len(golden["anchor"])
    for a in range(len(labels)):
        nearest = golden["dist"][a].masked_fill(~negative[a], torch.inf).argsort()[: golden["num_neg"]].sort().values
        assert [n for anchor, _, n in found if anchor == a] == nearest.tolist()


def _slow(points: Tensor, labels: Tensor, cutoff: float) -> list[tuple[int, int, int]]:
    size, y = len(labels), labels.tolist()
    positives = [[p for p in range(size) if y[p] == y[a] and p != a] for a in range(size)]
    k = max(1, sum(map(len, positives)) // size)
    found = []
    for a in range(size):
        distance = [float((points[a] - other).norm()) for other in points]
        negatives = [n for n in range(size) if y[n] != y[a]]
        negatives.sort(key=lambda n: (distance[n] < cutoff, distance[n]))
        found += [(a, p, n) for p, n in zip(positives[a], sorted(negatives[:k]), strict=False)]
    return found


@pytest.mark.parametrize("cutoff", [0.0, 0.5, 1.2, 9.0])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_slow_loop(seed: int, cutoff: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (24,), generator=generator)
    found = listed(NearestBeyondCutoff(cutoff=cutoff)(points, labels))
    assert len(found) > 40
    assert found == _slow(points, labels, cutoff)


def test_by_hand() -> None:
    # 4 positives in 6 items: one negative an anchor, not the one at 0.25 from the first.
    points = torch.tensor([[0.0], [3.0], [0.25], [10.0], [5.0], [-2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    found = listed(NearestBeyondCutoff()(points, labels))
    assert found == [(0, 1, 5), (1, 0, 4), (2, 3, 5), (3, 2, 4)]


def test_at_the_cutoff_is_beyond_it() -> None:
    points = torch.tensor([[0.0], [-1.0], [0.25], [0.75]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2])
    assert listed(NearestBeyondCutoff(cutoff=0.25)(points, labels))[0] == (0, 1, 2)
    assert listed(NearestBeyondCutoff(cutoff=0.2501)(points, labels))[0] == (0, 1, 3)


def test_one_row_for_every_pair_of_items() -> None:
    triplets = NearestBeyondCutoff()(torch.eye(3), torch.tensor([0, 0, 1]))
    assert triplets.anchor.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert triplets.positive.tolist() == [0, 1, 2] * 3
    assert triplets.valid.nonzero().flatten().tolist() == [1, 3]


def test_copies_of_the_anchor_are_taken_last() -> None:
    points = torch.cat([torch.zeros(4, 2), torch.eye(2)])
    found = listed(NearestBeyondCutoff()(points, torch.tensor([0, 0, 1, 1, 2, 2])))
    assert {n for a, _, n in found if a < 4} <= {4, 5}
