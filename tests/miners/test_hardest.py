"""Batch-hard mining against hand values, a slow loop and another library."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import BatchHardMiner

from raydml.miners.hardest import Hardest
from tests.batches import mining_batch
from tests.tuples import listed


def test_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [-3.0], [2.0], [10.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 2])
    assert listed(Hardest()(points, labels)) == [(0, 2, 3), (1, 2, 3), (2, 1, 3)]


@pytest.mark.parametrize("seed", range(4))
def test_pytorch_metric_learning(seed: int) -> None:
    points, labels = mining_batch(seed, num_classes=7, unit=False)
    theirs = BatchHardMiner(distance=LpDistance(normalize_embeddings=False))(points, labels)
    expected = list(zip(*(column.tolist() for column in theirs), strict=True))
    assert len(expected) > 10
    assert sorted(listed(Hardest()(points, labels))) == sorted(expected)


def test_against_a_slow_loop() -> None:
    points, labels = mining_batch(9, num_classes=7, unit=False)
    found = {a: (p, n) for a, p, n in listed(Hardest()(points, labels))}
    for a in range(20):
        distance = [float((points[a] - other).norm()) for other in points]
        positives = [j for j in range(20) if labels[j] == labels[a] and j != a]
        negatives = [j for j in range(20) if labels[j] != labels[a]]
        if positives:
            assert found[a] == (max(positives, key=distance.__getitem__), min(negatives, key=distance.__getitem__))
        else:
            assert a not in found


def test_exact_copies_are_positives_of_each_other() -> None:
    triplets = Hardest()(torch.eye(1, 3).repeat(4, 1), torch.tensor([0, 0, 1, 1]))
    assert [(a, p) for a, p, _ in listed(triplets)] == [(0, 1), (1, 0), (2, 3), (3, 2)]
