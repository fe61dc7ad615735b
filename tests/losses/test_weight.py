"""Weight loss against hand values, the Deep_Metric code and the multi-similarity loss."""

import math

import pytest
import torch

from raydml.losses.multi_similarity import MultiSimilarity
from raydml.losses.weight import Weight
from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.ops.tuples import Pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden

CASES = golden_cases("deep_metric_weight", lambda case: not case["requires_value_filter"])


def test_by_hand_with_references() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    memory = torch.tensor([[0.75, 0.5], [0.25, 0.0], [0.5, 1.0]], dtype=torch.float64)
    positive = torch.tensor([[True, True, False], [False, False, False]])
    negative = torch.tensor([[False, False, True], [True, False, False]])
    loss = Weight(alpha=2, beta=8, base=0.25)
    value = loss(points, torch.arange(2), Pairs(positive, negative), memory)
    pulled = math.log(1 + math.exp(-2 * 0.5) + math.exp(0))  # 2/alpha is 1
    pushed = 0.25 * (math.log1p(math.exp(8 * 0.25)) + math.log1p(math.exp(8 * 0.25)))
    assert value.item() == pytest.approx((pulled + pushed) / 2, rel=1e-12)


def test_defaults_are_the_run_scripts() -> None:
    loss = Weight()
    assert (loss.alpha, loss.beta, loss.base) == (2, 40, 0.5)


@pytest.mark.parametrize("case", CASES)
def test_deep_metric(case: dict) -> None:
    loss = Weight(alpha=case["beta"], beta=float(case["alpha"]), base=case["base"])
    tuples = MultiSimilarityMiner(epsilon=case["mining_margin"]) if case["mining"] else None
    check_golden(loss, "deep_metric_weight", case, tuples)


@pytest.mark.parametrize("mined", [False, True])
def test_it_is_twice_the_multi_similarity_loss(mined: bool) -> None:
    points, labels = unit_batch()
    pairs = MultiSimilarityMiner()(points, labels) if mined else None
    settings = {"alpha": 1.5, "beta": 30.0, "base": 0.4}
    expected = 2 * MultiSimilarity(**settings)(points, labels, pairs)
    torch.testing.assert_close(Weight(**settings)(points, labels, pairs), expected, rtol=1e-12, atol=0)


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha = 40, beta = 2: .* write alpha = 2, beta = 40"):
        Weight(alpha=40, beta=2)
