"""SNR contrastive loss against hand values, slow loops and another library."""

import math
import statistics

import pytest
import torch
from pytorch_metric_learning.losses import SignalToNoiseRatioContrastiveLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from pytorch_metric_learning.regularizers import ZeroMeanRegularizer
from torch import Tensor

from raydml.losses.snr_contrastive import SNRContrastive
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import unit_batch
from tests.losses.oracles import check_triplets


def _ratio(points: Tensor, a: int, x: int) -> float:
    difference = [u - v for u, v in zip(points[a].tolist(), points[x].tolist(), strict=True)]
    return statistics.variance(difference) / statistics.variance(points[a].tolist())


def test_by_hand() -> None:
    # Variances over two coordinates are half the squared difference: 2 for the anchor, 0.5 and 4.5 for the noise.
    points = torch.tensor([[1.0, -1.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    positive, negative = torch.zeros(2, 3, 3, dtype=torch.bool)
    positive[0, 1] = negative[0, 2] = True
    pairs, labels = Pairs(positive, negative), torch.tensor([0, 0, 1])
    for settings, expected in [
        ({}, 0.5 / 2),
        ({"positive_margin": 0.1}, 0.15),
        ({"negative_margin": 3.0}, 0.25 + 3 - 2.25),
    ]:
        value = SNRContrastive(zero_mean=0, **settings)(points, labels, pairs)
        assert value.item() == pytest.approx(expected, rel=1e-12)
    # The sums over the coordinates are 0, 1 and -1.
    assert SNRContrastive(zero_mean=0.3)(points, labels, pairs).item() == pytest.approx(0.25 + 0.3 * 2 / 3, rel=1e-12)


@pytest.mark.parametrize("average", ["all", "active"])
def test_triplets_and_ranges_against_a_slow_loop(average: str) -> None:
    points, labels = unit_batch(1)
    loss = SNRContrastive(positive_margin=0.4, negative_margin=2.2, zero_mean=0.01, average_over=average)  # type: ignore[arg-type]
    penalty = statistics.fmean(abs(sum(row)) for row in points.tolist())

    def slow(rows: list[tuple[int, int, int]]) -> float:
        pulled = [max(0.0, _ratio(points, a, p) - 0.4) for a, p, _ in rows]
        pushed = [max(0.0, 2.2 - _ratio(points, a, n)) for a, _, n in rows]
        if average == "active":
            pulled, pushed = [x for x in pulled if x], [x for x in pushed if x]
        return statistics.fmean(pulled) + statistics.fmean(pushed) + 0.01 * penalty

    check_triplets(loss, points, labels, slow)


@pytest.mark.parametrize("zero_mean", [0.0, 0.1])
@pytest.mark.parametrize("average", ["all", "active"])
def test_pytorch_metric_learning(average: str, zero_mean: float) -> None:
    points, labels = unit_batch(2)
    theirs = SignalToNoiseRatioContrastiveLoss(
        pos_margin=0.3,
        neg_margin=2.0,
        reducer=MeanReducer() if average == "all" else AvgNonZeroReducer(),
        embedding_regularizer=ZeroMeanRegularizer(),
        embedding_reg_weight=zero_mean,
    )
    ours = SNRContrastive(positive_margin=0.3, negative_margin=2.0, average_over=average, zero_mean=zero_mean)  # type: ignore[arg-type]
    # Their distance normalises the embeddings, which are of length 1 here: its gradient is ours along the sphere.
    one, other = points.clone().requires_grad_(), points.clone().requires_grad_()
    expected = theirs(one, labels)
    value = ours(torch.nn.functional.normalize(other, dim=1), labels)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    expected.backward()
    value.backward()
    if not zero_mean:  # their penalty sees the embeddings before normalisation
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-7, atol=1e-10)


def test_defaults() -> None:
    loss = SNRContrastive()
    assert (loss.positive_margin, loss.negative_margin, loss.zero_mean, loss.average_over) == (0, 1, 0.005, "all")


def test_an_anchor_without_a_signal_is_left_out_with_its_pairs() -> None:
    points, labels = unit_batch(3, num_rows=8, dim=7)
    pairs = all_pairs(labels)
    # Of the last, float32 leaves coordinates of 2e-4 when it takes away their mean.
    for silent in (torch.zeros(7), torch.full((7,), 0.3), torch.full((7,), 1e4 / 3)):
        with_silent = points.clone()
        with_silent[2] = silent
        without = Pairs(*(mask.clone() for mask in pairs))
        without.positive[2] = without.negative[2] = False
        for dtype in (torch.float32, torch.float64):
            leaf = with_silent.to(dtype).requires_grad_()
            loss = SNRContrastive(zero_mean=0)
            value = loss(leaf, labels, pairs)
            assert torch.equal(value, loss(leaf, labels, without))
            value.backward()
            assert leaf.grad.isfinite().all()
            assert leaf.grad.abs().max() < 1e3 * silent.abs().max().clamp(min=1)


def test_a_shift_of_all_coordinates_changes_nothing_but_the_penalty() -> None:
    points, labels = unit_batch(4)
    shifted = points + torch.linspace(-2, 2, len(points), dtype=torch.float64)[:, None]
    plain = SNRContrastive(zero_mean=0)
    torch.testing.assert_close(plain(shifted, labels), plain(points, labels))
    assert not math.isclose(SNRContrastive()(shifted, labels).item(), SNRContrastive()(points, labels).item())


def test_references_stand_for_the_columns() -> None:
    points, labels = unit_batch(5)
    memory, _ = unit_batch(6, num_rows=4)
    pairs = Pairs(torch.zeros(14, 4, dtype=torch.bool), torch.zeros(14, 4, dtype=torch.bool))
    pairs.positive[3, 1] = pairs.negative[7, 2] = True
    both = torch.cat([points, memory])
    expected = _ratio(both, 3, 15) + max(0.0, 3 - _ratio(both, 7, 16))
    value = SNRContrastive(negative_margin=3.0, zero_mean=0)(points, labels, pairs, references=memory)
    assert value.item() == pytest.approx(expected, rel=1e-12)
