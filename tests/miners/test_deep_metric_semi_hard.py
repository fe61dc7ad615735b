"""Deep_Metric's semi-hard mining against hand values, and before the weight loss against the code itself."""

import pytest
import torch

from raydml.losses.weight import Weight
from raydml.miners.deep_metric_semi_hard import DeepMetricSemiHard
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import mining_batch
from tests.golden_vectors import golden_case, golden_cases
from tests.losses.oracles import check_golden

CASES = golden_cases("deep_metric_semihard", lambda case: not case["requires_value_filter"])


def test_by_hand() -> None:
    # Dot products with the anchor at 1 (only its row is looked at): positives 0.75 and 0.1, negatives 0.9, 0.5, 0.2.
    points = torch.tensor([[1.0], [0.75], [0.1], [0.9], [0.5], [0.2]], dtype=torch.float64)
    pairs = DeepMetricSemiHard()(points, torch.tensor([0, 0, 0, 1, 1, 2]))
    assert pairs.positive[0].tolist() == [False, True, False, False, False, False]  # 0.1 < 0.2, the easiest negative
    assert pairs.negative[0].tolist() == [False, False, False, False, True, True]  # 0.9 > 0.75, the easiest positive


def test_inequalities_are_strict() -> None:
    points = torch.tensor([[1.0], [0.5], [0.5]], dtype=torch.float64)
    pairs = DeepMetricSemiHard()(points, torch.tensor([0, 0, 1]))
    assert not pairs.positive[0].any()
    assert not pairs.negative[0].any()


@pytest.mark.parametrize("case", CASES)
def test_deep_metric(case: dict) -> None:
    golden = golden_case("deep_metric_semihard", case["case"])
    pairs, every = DeepMetricSemiHard()(golden["embeddings"], golden["labels"]), all_pairs(golden["labels"])
    assert any(not torch.equal(mask, unmined) for mask, unmined in zip(pairs, every, strict=True))
    check_golden(
        Weight(alpha=case["beta"], beta=float(case["alpha"]), base=case["base"]), "deep_metric_semihard", case, pairs
    )


def test_a_slow_loop_over_candidates_and_references() -> None:
    points, labels = mining_batch(unit=False)
    memory, others = mining_batch(1, unit=False)
    memory, others = memory[:15], others[:15]
    same = labels[:, None] == others
    offered = torch.rand(20, 15, generator=torch.Generator().manual_seed(2)) < 0.7
    candidates = Pairs(same & offered, ~same & offered)
    pairs = DeepMetricSemiHard()(points, labels, None, candidates, memory)
    assert all(mask.any() for mask in pairs)
    for i in range(20):
        s = [float(points[i] @ other) for other in memory]
        positives = [j for j in range(15) if candidates.positive[i, j]]
        negatives = [j for j in range(15) if candidates.negative[i, j]]
        kept = {j for j in positives if negatives and s[j] > min(s[n] for n in negatives)}
        assert set(pairs.positive[i].nonzero().flatten().tolist()) == kept
        kept = {j for j in negatives if positives and s[j] < max(s[p] for p in positives)}
        assert set(pairs.negative[i].nonzero().flatten().tolist()) == kept


def test_an_anchor_without_positives_or_negatives_keeps_nothing() -> None:
    points, _ = mining_batch(unit=False)
    for labels in (torch.zeros(20, dtype=torch.int64), torch.arange(20)):
        assert not any(mask.any() for mask in DeepMetricSemiHard()(points, labels))
