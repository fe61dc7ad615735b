"""Hard-mining loss against hand values and the Deep_Metric code."""

import pytest
import torch

from raydml.losses.hard_mining import HardMining
from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.ops.tuples import Pairs
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden

# The value filter takes rounding of the anchor's own similarity for a positive; ours goes by index.
CASES = golden_cases("deep_metric_hardmining", lambda case: not case["requires_value_filter"])


def test_by_hand() -> None:
    points = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    value = HardMining()(points, torch.tensor([0, 0, 1, 2]))
    # The first two have a positive (1 - 0.6) and two negatives, the others three negatives each.
    first, second = 0.4 + (-0.5 + 0.0) / 2, 0.4 + (0.1 + 0.8) / 2
    third, fourth = (-0.5 + 0.1 + 0.5) / 3, (0.0 + 0.8 + 0.5) / 3
    assert value.item() == pytest.approx((first + second + third + fourth) / 4, rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_deep_metric(case: dict) -> None:
    check_golden(HardMining(), "deep_metric_hardmining", case, MultiSimilarityMiner(epsilon=case["mining_margin"]))


def test_references_and_anchors_with_one_side_or_none() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]], dtype=torch.float64)
    memory = torch.tensor([[0.5, 0.25], [0.125, 1.0]], dtype=torch.float64)
    positive = torch.tensor([[True, True], [False, False], [False, False]])
    negative = torch.tensor([[False, False], [False, True], [False, False]])
    value = HardMining()(points, torch.arange(3), Pairs(positive, negative), memory)
    assert value.item() == pytest.approx(((0.5 + 0.875) / 2 + 1.0) / 3, rel=1e-12)
