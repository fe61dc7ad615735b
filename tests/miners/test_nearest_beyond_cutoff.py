"""Nearest negatives beyond a cutoff against the Divide and Conquer release, hand values and a slow loop."""

import pytest
import torch
from torch import Tensor

from raydml.miners.nearest_beyond_cutoff import NearestBeyondCutoff
from raydml.ops.tuples import Triplets
from tests.golden_vectors import golden_case, golden_facts

RELEASE = golden_facts("divide_conquer_miner")["hyperparameters"]
# Here no anchor has negatives beyond the cutoff, and the release pairs items with themselves; a departure.
DEGENERATE = "all_too_close"
CASES = [case for case in RELEASE if case != DEGENERATE]


def _listed(triplets: Triplets) -> list[tuple[int, ...]]:
    return [tuple(row[:3]) for row in zip(*(column.tolist() for column in triplets), strict=True) if row[3]]


@pytest.mark.parametrize("case", CASES)
def test_lists_of_the_release(case: str) -> None:
    golden = golden_case("divide_conquer_miner", case)
    mined = NearestBeyondCutoff(cutoff=RELEASE[case]["cutoff"])(golden["E"], golden["labels"])
    expected = zip(golden["anchor"].tolist(), golden["positive"].tolist(), golden["negative"].tolist(), strict=True)
    assert _listed(mined) == list(expected)  # in the same order, too


def test_the_excluded_case_is_degenerate() -> None:
    golden = golden_case("divide_conquer_miner", DEGENERATE)
    negative = golden["labels"][:, None] != golden["labels"]
    assert not (negative & (golden["dist"] >= RELEASE[DEGENERATE]["cutoff"])).any()
    assert (golden["anchor"] == golden["negative"]).any()
    # Ours takes the nearest, and never an item of the anchor's class.
    listed = _listed(NearestBeyondCutoff()(golden["E"], golden["labels"]))
    assert len(listed) == len(golden["anchor"])
    for a in range(8):
        nearest = golden["dist"][a].masked_fill(~negative[a], torch.inf).argsort()[:3].sort().values
        assert [n for anchor, _, n in listed if anchor == a] == nearest.tolist()


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
    listed = _listed(NearestBeyondCutoff(cutoff=cutoff)(points, labels))
    assert len(listed) > 40
    assert listed == _slow(points, labels, cutoff)


def test_by_hand() -> None:
    # 4 positives in 6 items: one negative an anchor, not the one at 0.25 from the first.
    points = torch.tensor([[0.0], [3.0], [0.25], [10.0], [5.0], [-2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    listed = _listed(NearestBeyondCutoff()(points, labels))
    assert listed == [(0, 1, 5), (1, 0, 4), (2, 3, 5), (3, 2, 4)]


def test_at_the_cutoff_is_beyond_it() -> None:
    points = torch.tensor([[0.0], [-1.0], [0.25], [0.75]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2])
    assert _listed(NearestBeyondCutoff(cutoff=0.25)(points, labels))[0] == (0, 1, 2)
    assert _listed(NearestBeyondCutoff(cutoff=0.2501)(points, labels))[0] == (0, 1, 3)


def test_one_row_for_every_pair_of_items() -> None:
    triplets = NearestBeyondCutoff()(torch.eye(3), torch.tensor([0, 0, 1]))
    assert triplets.anchor.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert triplets.positive.tolist() == [0, 1, 2] * 3
    assert triplets.valid.nonzero().flatten().tolist() == [1, 3]


def test_copies_of_the_anchor_are_taken_last() -> None:
    points = torch.cat([torch.zeros(4, 2), torch.eye(2)])
    listed = _listed(NearestBeyondCutoff()(points, torch.tensor([0, 0, 1, 1, 2, 2])))
    assert {n for a, _, n in listed if a < 4} <= {4, 5}
