"""The threshold-consistent margin against a slow loop over pairs, and by hand."""

import math

import pytest
import torch

from raydml import registry
from raydml.errors import ConfigError
from raydml.regularizers.threshold_consistency import ThresholdConsistency
from tests.batches import uneven_batch


def slow(points, labels, positive_margin, negative_margin, positive_weight, negative_weight):
    hard_positives, hard_negatives = [], []
    for i in range(len(points)):
        for j in range(i):
            cosine = (points[i] @ points[j]) / (points[i].norm() * points[j].norm())
            if labels[i] == labels[j] and cosine <= positive_margin:
                hard_positives.append(positive_margin - cosine)
            elif labels[i] != labels[j] and cosine >= negative_margin:
                hard_negatives.append(cosine - negative_margin)
    total = points.sum() * 0
    for weight, costs in ((positive_weight, hard_positives), (negative_weight, hard_negatives)):
        if costs:
            total = total + weight * torch.stack(costs).mean()
    return total


@pytest.mark.parametrize("settings", [(0.9, 0.5, 1.0, 1.0), (0.2, -0.3, 0.7, 2.5), (-1.0, 1.0, 1.0, 1.0)])
def test_value_and_gradient_are_those_of_a_slow_loop(settings):
    points, labels = uneven_batch()
    ours, theirs = (points.detach().double().clone().requires_grad_() for _ in range(2))
    names = ("positive_margin", "negative_margin", "positive_weight", "negative_weight")
    value = ThresholdConsistency(**dict(zip(names, settings, strict=True)))(ours, labels)
    expected = slow(theirs, labels, *settings)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_by_hand():
    """Angles 0, 60 and 90 degrees: the positive pair has cosine 0.5, the negatives 0.866 and 0."""
    angles = torch.tensor([0.0, 60.0, 90.0], dtype=torch.float64).deg2rad()
    points = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [3.0], [0.5]])
    value = ThresholdConsistency()(points, torch.tensor([0, 0, 1]))
    assert value.item() == pytest.approx((0.9 - 0.5) + (math.cos(math.radians(30)) - 0.5))


def test_margins_beyond_a_cosine_are_refused():
    with pytest.raises(ConfigError, match="positive_margin"):
        registry.build("regularizers", "threshold_consistency", positive_margin=1.5)
