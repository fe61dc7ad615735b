"""All pairs and all triplets against slow loops and another library."""

import pytest
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_triplets_indices

from raydml.miners.all import All
from raydml.ops.tuples import all_pairs
from tests.batches import mining_batch
from tests.tuples import every_triplet, listed, some_pairs


@pytest.mark.parametrize("seed", range(3))
def test_pytorch_metric_learning(seed: int) -> None:
    points, labels = mining_batch(seed, unit=False)
    theirs = list(zip(*(column.tolist() for column in get_all_triplets_indices(labels)), strict=True))
    ours = listed(All()(points, labels))
    assert len(ours) == len(theirs) > 500
    assert sorted(ours) == sorted(theirs)


def test_against_a_slow_loop() -> None:
    points, labels = mining_batch(7, 9, unit=False)
    assert sorted(listed(All()(points, labels))) == every_triplet(labels)


def test_negatives_are_in_order_of_distance_at_any_length() -> None:
    points = torch.tensor([[0.0], [1.0], [-10.0], [7.0], [3.0]], dtype=torch.float64)
    ranges = All()(points, torch.tensor([0, 0, 1, 2, 1]))
    assert ranges.order[0, :3].tolist() == [4, 3, 2]
    assert ranges.order[2, :3].tolist() == [0, 1, 3]


def test_pairs_are_all_pairs() -> None:
    points, labels = mining_batch(unit=False)
    mined = All(tuples="pairs")(points, labels)
    for i in range(20):
        for j in range(20):
            assert mined.positive[i, j] == (labels[i] == labels[j] and i != j)
            assert mined.negative[i, j] == (labels[i] != labels[j])


def test_what_is_given_is_kept() -> None:
    points, labels = mining_batch(unit=False)
    given = some_pairs(labels, 0.5)
    mined = All(tuples="pairs")(points, labels, None, given)
    assert torch.equal(mined.positive, given.positive)
    assert torch.equal(mined.negative, given.negative)
    found = listed(All()(points, labels, None, given))
    assert found
    assert all(given.positive[a, p] and given.negative[a, n] for a, p, n in found)
    assert len(found) == int((given.positive.sum(dim=1) * given.negative.sum(dim=1)).sum())


def test_each_choice_says_what_it_yields() -> None:
    assert All().yields == All(tuples="triplets").yields == "triplet_ranges"
    assert All(tuples="pairs").yields == "pairs"


def test_triplets_of_a_memory_are_refused() -> None:
    points, labels = mining_batch(unit=False)
    with pytest.raises(ValueError, match="tuples: pairs"):
        All()(points, labels, None, all_pairs(labels), points)
