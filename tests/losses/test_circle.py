"""Circle loss against hand values, a slow loop and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import CircleLoss
from pytorch_metric_learning.reducers import MeanReducer

from raydml.losses.circle import Circle
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import uneven_batch
from tests.losses.oracles import check_library


def test_by_hand() -> None:
    points = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 0.5]], dtype=torch.float64)
    value = Circle(margin=0.25, scale=4.0)(points, torch.tensor([0, 0, 1]))
    # Cosines: 0.6 of the positives; of the negatives 0 with the first and 0.8 with the second. The third counts not.
    pull = -4 * (1.25 - 0.6) * (0.6 - 0.75)
    first, second = 4 * (0 + 0.25) * (0 - 0.25), 4 * (0.8 + 0.25) * (0.8 - 0.25)
    expected = (math.log1p(math.exp(first + pull)) + math.log1p(math.exp(second + pull))) / 2
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_defaults_are_the_papers_for_fine_grained_retrieval() -> None:
    loss = Circle()
    assert (loss.margin, loss.scale) == (0.4, 80)


@pytest.mark.parametrize(("margin", "scale"), [(0.4, 80.0), (0.25, 16.0)])
@pytest.mark.parametrize("seed", range(3))
def test_pytorch_metric_learning(seed: int, margin: float, scale: float) -> None:
    ours, theirs = Circle(margin=margin, scale=scale), CircleLoss(m=margin, gamma=scale)
    check_library(ours, theirs, uneven_batch(seed))


def test_weights_are_constants_to_the_gradient() -> None:
    """dL/ds is the share of the exponent times its weight; a weight that moved would double it and more."""
    margin, scale = 0.25, 4.0
    angle = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    points = torch.stack([torch.stack([angle.cos(), angle.sin()]), torch.tensor([1.0, 0.0]).double()])
    memory = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    chosen = torch.zeros(2, 2, 2, dtype=torch.bool)
    chosen[0, 0, 0] = chosen[1, 0, 1] = True
    Circle(margin=margin, scale=scale)(points, torch.arange(2), Pairs(*chosen), memory).backward()
    s_p, s_n = math.cos(0.9), math.sin(0.9)
    weight_p, weight_n = 1 + margin - s_p, s_n + margin
    exponent = scale * (weight_n * (s_n - margin) - weight_p * (s_p - 1 + margin))
    share = 1 / (1 + math.exp(-exponent))
    expected = share * scale * (weight_n * math.cos(0.9) + weight_p * math.sin(0.9))
    assert angle.grad.item() == pytest.approx(expected, rel=1e-12)


def test_a_negative_beyond_the_margin_weighs_nothing() -> None:
    points = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    positive, negative = torch.zeros(2, 3, 3, dtype=torch.bool)
    positive[0, 1] = negative[0, 2] = True
    Circle(margin=0.4)(points, torch.tensor([0, 0, 1]), Pairs(positive, negative)).backward()
    assert not points.grad[2].any()
    assert points.grad[1].any()


def test_the_mean_is_over_anchors_with_both_sides_even_where_their_loss_is_zero() -> None:
    points = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1, 2, 3]]
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    pairs = all_pairs(labels)
    swapped = pairs.negative.clone()
    swapped[0, 2:] = False
    positive = pairs.positive.clone()
    positive[1] = False
    loss = Circle(margin=0.4, scale=5e3)
    assert loss(points, labels).item() == 0
    # Rows 2 and 3 are left, and only row 3 has a wrong positive.
    positive[3, 4], swapped[3, 4] = True, False
    one = loss(points, labels, Pairs(positive, swapped))
    lone = torch.zeros_like(positive)
    lone[3] = True
    torch.testing.assert_close(one, loss(points, labels, Pairs(positive & lone, swapped & lone)) / 2)


def test_pytorch_metric_learning_leaves_zeros_out_of_its_mean() -> None:
    """The one difference: with the plain mean over anchors the two are the same again."""
    points = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1, 2, 3]] + 1e-3 * uneven_batch()[0][:6, :4]
    labels = torch.tensor([0, 0, 1, 1, 2, 2])  # the last class is torn apart, the others are perfect
    ours = Circle(scale=3e3)(points, labels)
    torch.testing.assert_close(CircleLoss(gamma=3e3, reducer=MeanReducer())(points, labels), ours, rtol=1e-9, atol=0)
    torch.testing.assert_close(CircleLoss(gamma=3e3)(points, labels), 3 * ours, rtol=1e-9, atol=0)
