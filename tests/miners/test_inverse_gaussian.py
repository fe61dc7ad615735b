"""Inverse-Gaussian sampling against the Deep_Metric code, a slow loop and the frequencies of its draws."""

import math

import pytest
import torch
from torch import Tensor

from raydml.losses.weight import Weight
from raydml.miners.inverse_gaussian import InverseGaussian, negative_weights
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_case, golden_cases
from tests.losses.oracles import check_golden

CASES = golden_cases("deep_metric_distweighted")


def _in_order(points: Tensor, negative: Tensor) -> Tensor:
    """Columns of each row's negatives, the least similar first. All rows have as many."""
    order = (points @ points.T).detach().masked_fill(~negative, math.inf).argsort(dim=1)
    return order[:, : int(negative[0].sum())]


@pytest.mark.parametrize("case", CASES)
def test_probabilities_of_deep_metric(case: dict) -> None:
    golden = golden_case("deep_metric_distweighted", case["case"])
    negative = all_pairs(golden["labels"].long()).negative
    weight = negative_weights(golden["embeddings"] @ golden["embeddings"].T, negative)
    found = (weight / weight.sum(dim=1, keepdim=True)).gather(1, _in_order(golden["embeddings"], negative))
    torch.testing.assert_close(found, golden["probs"], **case["tolerance"], check_dtype=False)
    assert torch.equal(weight > 0, negative)


@pytest.mark.parametrize("case", CASES)
def test_loss_of_deep_metric_on_its_own_draws(case: dict) -> None:
    golden = golden_case("deep_metric_distweighted", case["case"])
    points, labels = golden["embeddings"], golden["labels"]
    pairs = all_pairs(labels)
    columns = _in_order(points, pairs.negative).gather(1, golden["neg_index"].long())
    drawn = Pairs(pairs.positive, torch.zeros_like(pairs.negative).scatter(1, columns, True))
    loss = Weight(alpha=case["beta"], beta=float(case["alpha"]), base=case["base"])
    check_golden(loss, "deep_metric_distweighted", case, drawn)
    # As many as ours draws, whichever.
    assert torch.equal(InverseGaussian()(points, labels).negative.sum(dim=1), drawn.negative.sum(dim=1))


def test_weights_by_hand() -> None:
    similarity = torch.tensor([[9.0, 0.0, 0.25, 1.0]], dtype=torch.float64)
    weight = negative_weights(similarity, torch.tensor([[False, True, True, True]]))
    mean = 1.25 / 3
    variance = sum((s - mean) ** 2 for s in (0.0, 0.25, 1.0)) / 3
    raw = [math.exp((s - mean) ** 2 / (2 * variance)) for s in (0.0, 0.25, 1.0)]
    assert weight[0].tolist() == pytest.approx([0, *(value / max(raw) for value in raw)], rel=1e-12)


@pytest.mark.parametrize("one_in", [1, 3, 10, 31, 50])
def test_all_positives_stay_and_one_in_so_many_negatives_of_each_row(one_in: int) -> None:
    points, _ = unit_batch(num_rows=40, dim=6)
    labels = torch.tensor([0] * 25 + [1] * 10 + [2] * 5)  # 15, 30 and 35 negatives
    every = all_pairs(labels)
    pairs = InverseGaussian(one_in=one_in)(points, labels, torch.Generator().manual_seed(0))
    assert torch.equal(pairs.positive, every.positive)
    assert not (pairs.negative & ~every.negative).any()
    assert pairs.negative.sum(dim=1).tolist() == [15 // one_in] * 25 + [30 // one_in] * 10 + [35 // one_in] * 5


def test_draws_are_as_frequent_as_they_weigh() -> None:
    similarity = torch.tensor([-1.0, 0.0, 0.1, 0.2, 1.5])
    num_rows = 20_000
    points, memory = torch.ones(num_rows, 1), similarity[:, None]
    negative = torch.ones(num_rows, 5, dtype=torch.bool)
    pairs = InverseGaussian(one_in=5)(
        points, torch.zeros(num_rows), torch.Generator().manual_seed(0), Pairs(~negative, negative), memory
    )
    mean, variance = similarity.mean(), similarity.var(correction=0)
    raw = ((similarity - mean).square() / (2 * variance)).exp()
    expected = raw / raw.sum()
    found = pairs.negative.float().mean(dim=0)
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / num_rows)
    assert expected.max() > 2 * expected.min()


def test_candidates_and_references_decide_what_may_be_drawn() -> None:
    points, labels = unit_batch(num_rows=40, dim=6)
    some = Pairs(*(mask[:, :25] & (torch.arange(25) % 5 > 0) for mask in all_pairs(labels)))
    pairs = InverseGaussian(one_in=4)(points, labels, torch.Generator().manual_seed(0), some, points[:25].float())
    assert torch.equal(pairs.positive, some.positive)
    assert not (pairs.negative & ~some.negative).any()
    assert torch.equal(pairs.negative.sum(dim=1), some.negative.sum(dim=1) // 4)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e4])
def test_it_always_draws_its_number_and_only_negatives(scale: float) -> None:
    """Also where all similarities are one, and where one of 2000 negatives outweighs the others by exp(1000)."""
    points = torch.zeros(4000, 2)
    points[:, 0] = scale
    points[3999, 1] = points[0, 1] = scale
    labels = torch.arange(4000) % 2
    rows = Pairs(*(mask[:3] for mask in all_pairs(labels)))
    pairs = InverseGaussian()(points[:3], labels[:3], torch.Generator().manual_seed(0), rows, points)
    assert pairs.negative.sum(dim=1).tolist() == [200, 200, 200]
    assert not (pairs.negative & ~rows.negative).any()


def test_equally_similar_negatives_weigh_the_same() -> None:
    weight = negative_weights(torch.full((1, 4), 0.5), torch.tensor([[True, True, False, True]]))
    assert weight.tolist() == [[1, 1, 0, 1]]


def test_too_few_negatives_leave_none() -> None:
    points, labels = unit_batch(num_rows=8, dim=6)
    assert not InverseGaussian()(points, labels).negative.any()
    assert InverseGaussian(one_in=2)(points, labels).negative.any()
