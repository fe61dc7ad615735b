"""Multi-similarity mining against hand values, a slow loop and another library; the release is in the loss's tests."""

import pytest
import torch
from pytorch_metric_learning.miners import MultiSimilarityMiner as Theirs

from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import mining_batch
from tests.tuples import where


def test_by_hand() -> None:
    # Dot products with the anchor at 1 (only its row is looked at): positives 0.9, 0.25, negatives 0.5, 0.0.
    points = torch.tensor([[1.0], [0.875], [0.25], [0.5], [0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1])
    pairs = MultiSimilarityMiner(epsilon=0.125)(points, labels)
    assert pairs.positive[0].tolist() == [False, False, True, False, False]  # 0.25 - 0.125 < 0.5
    assert pairs.negative[0].tolist() == [False, False, False, True, False]  # 0.5 + 0.125 > 0.25
    wide = MultiSimilarityMiner(epsilon=0.4)(points, labels)
    assert wide.positive[0].tolist() == [False, True, True, False, False]
    assert wide.negative[0].tolist() == [False, False, False, True, True]


def test_inequalities_are_strict() -> None:
    points = torch.tensor([[1.0], [0.5], [0.25]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    assert not MultiSimilarityMiner(epsilon=0.25)(points, labels).positive[0].any()
    assert not MultiSimilarityMiner(epsilon=0.25)(points, labels).negative[0].any()
    assert MultiSimilarityMiner(epsilon=0.26)(points, labels).negative[0].any()


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_pytorch_metric_learning(seed: int, epsilon: float) -> None:
    points, labels = mining_batch(seed)
    anchor1, positive, anchor2, negative = Theirs(epsilon=epsilon)(points, labels)
    pairs = MultiSimilarityMiner(epsilon=epsilon)(points, labels)
    assert where(pairs.positive) == set(zip(anchor1.tolist(), positive.tolist(), strict=True))
    assert where(pairs.negative) == set(zip(anchor2.tolist(), negative.tolist(), strict=True))
    assert pairs.positive.any()


def test_against_a_slow_loop_on_embeddings_of_any_length() -> None:
    points, labels = mining_batch(7)
    points = points * torch.linspace(0.5, 3, len(points), dtype=torch.float64)[:, None]
    pairs = MultiSimilarityMiner(epsilon=0.1)(points, labels)
    for i in range(len(labels)):
        s = [float(points[i] @ other) for other in points]
        positives = [j for j in range(len(s)) if labels[j] == labels[i] and j != i]
        negatives = [j for j in range(len(s)) if labels[j] != labels[i]]
        hard_p = {j for j in positives if negatives and s[j] - 0.1 < max(s[n] for n in negatives)}
        hard_n = {j for j in negatives if positives and s[j] + 0.1 > min(s[p] for p in positives)}
        assert set(pairs.positive[i].nonzero().flatten().tolist()) == hard_p
        assert set(pairs.negative[i].nonzero().flatten().tolist()) == hard_n


def test_exact_copies_are_positives_of_each_other() -> None:
    """A filter by value (s < 1) would take the copy for the anchor itself."""
    points = torch.eye(1, 3).repeat(3, 1)
    pairs = MultiSimilarityMiner()(points, torch.tensor([0, 0, 1]))
    assert where(pairs.positive) == {(0, 1), (1, 0)}


def test_an_anchor_without_positives_or_negatives_keeps_nothing() -> None:
    points, _ = mining_batch()
    for labels in (torch.zeros(20, dtype=torch.int64), torch.arange(20)):
        pairs: Pairs = MultiSimilarityMiner(epsilon=3.0)(points, labels)
        assert not pairs.positive.any()
        assert not pairs.negative.any()


def test_it_mines_from_the_candidates_it_is_given() -> None:
    points, labels = mining_batch(1)
    pairs = all_pairs(labels)
    odd = torch.arange(20) % 2 == 1
    mined = MultiSimilarityMiner()(points, labels, None, Pairs(pairs.positive & odd, pairs.negative & odd))
    kept = MultiSimilarityMiner()(points[:0], labels[:0], None, Pairs(*(mask[:0] for mask in pairs)), points)
    assert [mask.shape for mask in kept] == [(0, 20), (0, 20)]
    # The same as with only the odd rows as references.
    some = Pairs(*(mask[:, odd] for mask in pairs))
    direct = MultiSimilarityMiner()(points, labels, None, some, points[odd].float())
    for mask, expected in zip(mined, direct, strict=True):
        assert not mask[:, ~odd].any()
        assert torch.equal(mask[:, odd], expected)
        assert expected.any()


def test_candidates_of_a_memory_against_a_slow_loop() -> None:
    points, labels = mining_batch(3, 8)
    memory, theirs = mining_batch(4, 30)
    same = labels[:, None] == theirs
    some = torch.rand(8, 30, generator=torch.Generator().manual_seed(0)) < 0.6
    given = Pairs(same & some, ~same & some)
    mined = MultiSimilarityMiner(epsilon=0.1)(points, labels, None, given, memory)
    for i in range(8):
        s = [float(points[i] @ other) for other in memory]
        positives, negatives = (mask[i].nonzero().flatten().tolist() for mask in given)
        hard_p = {j for j in positives if negatives and s[j] - 0.1 < max(s[n] for n in negatives)}
        hard_n = {j for j in negatives if positives and s[j] + 0.1 > min(s[p] for p in positives)}
        assert set(mined.positive[i].nonzero().flatten().tolist()) == hard_p
        assert set(mined.negative[i].nonzero().flatten().tolist()) == hard_n
    assert 0 < mined.positive.sum() < given.positive.sum()


def test_without_references_candidates_are_of_the_batch() -> None:
    points, labels = mining_batch(3)
    possible = all_pairs(labels)
    given = Pairs(possible.positive & torch.ones(20, 20).tril().bool(), possible.negative)
    mined = MultiSimilarityMiner()(points, labels, None, given)
    assert mined.positive.any()
    assert not (mined.positive & ~given.positive).any()
    assert not torch.equal(mined.negative, MultiSimilarityMiner()(points, labels).negative)
