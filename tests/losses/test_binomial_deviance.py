"""Binomial deviance against hand values, the Deep_Metric code and a slow loop."""

import math

import pytest
import torch

from raydml.losses.binomial_deviance import BinomialDeviance
from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.ops.tuples import all_pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden, pairs_of, random_kinds

# The value filter takes rounding of the anchor's own similarity for a positive; ours goes by index.
CASES = golden_cases("deep_metric_binomial", lambda case: not case["requires_value_filter"])


def test_by_hand() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    value = BinomialDeviance(alpha=2, beta=4, base=0.5)(points, torch.tensor([0, 0, 1]))
    pulled, pushed = math.log1p(math.exp(-2 * 0.5)), math.log1p(math.exp(4 * -0.5))
    # The third has no positive; the mean over its two negatives is that of one.
    assert value.item() == pytest.approx((2 * (pulled + pushed) + pushed) / 3, rel=1e-12)


def test_defaults_are_the_codes() -> None:
    loss = BinomialDeviance()
    assert (loss.alpha, loss.beta, loss.base, loss.divide_by_scale) == (2, 40, 0.5, False)


@pytest.mark.parametrize("case", CASES)
def test_deep_metric(case: dict) -> None:
    if case["mining"]:  # the mined path has the base 0.5 written into it
        loss = BinomialDeviance(alpha=case["beta"], beta=float(case["alpha"]), divide_by_scale=True)
        tuples = MultiSimilarityMiner(epsilon=0.1)
    else:
        loss, tuples = BinomialDeviance(beta=float(case["alpha"]), base=case["margin"]), None
    check_golden(loss, "deep_metric_binomial", case, tuples)


@pytest.mark.parametrize("divide_by_scale", [False, True])
def test_a_slow_loop_over_chosen_pairs_with_references(divide_by_scale: bool) -> None:
    points, labels = unit_batch()
    memory = unit_batch(1)[0][:9] * 1.5
    kind = random_kinds()
    loss = BinomialDeviance(alpha=1.7, beta=9.3, base=0.3, divide_by_scale=divide_by_scale)
    value = loss(points, labels, pairs_of(kind), memory)
    total = 0.0
    for i in range(14):
        for wanted, scale in ((1, -1.7), (2, 9.3)):
            chosen = [j for j in range(9) if kind[i, j] == wanted]
            terms = [math.log1p(math.exp(scale * (float(points[i] @ memory[j]) - 0.3))) for j in chosen]
            factor = 2 / abs(scale) if divide_by_scale else 1
            total += factor * sum(terms) / max(len(terms), 1)
    assert value.item() == pytest.approx(total / 14, rel=1e-12)


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha = 40, beta = 2: .* write alpha = 2, beta = 40"):
        BinomialDeviance(alpha=40, beta=2)


def test_it_does_not_overflow() -> None:
    points = torch.tensor([[1e3, 0.0], [1e3, 0.0]], requires_grad=True)
    value = BinomialDeviance()(points, torch.tensor([0, 1]), all_pairs(torch.tensor([0, 1])))
    assert value.item() == pytest.approx(40 * 1e6, rel=1e-5)  # log(1 + e^x) = x for large x
    value.backward()
    assert points.grad.isfinite().all()
