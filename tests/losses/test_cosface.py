"""CosFace against hand values, a slow loop and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import CosFaceLoss

from raydml.losses.cosface import CosFace
from tests.batches import proxy_batch
from tests.losses.oracles import SharedWeight, check_library, cosines, seeded


def test_by_hand() -> None:
    loss = CosFace(2, 2, scale=4, margin=0.25).double()
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))  # lengths must not matter
    points = torch.tensor([[1.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    # Logits 4 (1 - 0.25, 0) for the first, 4 (0 - 0.25, 1) for the second, both of class 0.
    expected = (math.log1p(math.exp(-3)) + math.log1p(math.exp(5))) / 2
    assert loss(points, torch.tensor([0, 0])).item() == pytest.approx(expected, rel=1e-12)


def test_against_a_slow_loop() -> None:
    points, labels = proxy_batch()
    loss = CosFace(5, 6, scale=10, margin=0.2).double()
    total = 0.0
    for point, label in zip(points.tolist(), labels.tolist(), strict=True):
        rows = loss.weight.tolist()
        logits = [10 * (cosine - 0.2 * (c == label)) for c, cosine in enumerate(cosines(point, rows))]
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    assert loss(points, labels).item() == pytest.approx(total / 13, rel=1e-12)


def test_defaults_are_the_papers() -> None:
    loss = CosFace(3, 4)
    assert (loss.scale, loss.margin) == (64, 0.35)


@pytest.mark.parametrize("settings", [{}, {"scale": 16.0}, {"margin": 0.1}, {"scale": 8.0, "margin": 0.0}])
def test_pytorch_metric_learning(settings: dict[str, float]) -> None:
    theirs, ours = CosFaceLoss(5, 6, **settings), CosFace(5, 6, **settings).double()
    check_library(ours, theirs, proxy_batch(1), SharedWeight(ours.weight, theirs.W))


def test_the_class_matrix_starts_as_that_of_normalized_softmax() -> None:
    weight = seeded(CosFace, 3000, 16).weight
    assert weight.shape == (3000, 16)
    assert 0.24 < weight.abs().max().item() <= 0.25
    assert weight.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.02)


def test_a_class_vector_of_length_zero_does_not_make_nan() -> None:
    loss = CosFace(3, 4)
    with torch.no_grad():
        loss.weight[1] = 0
    value = loss(torch.eye(3, 4), torch.tensor([0, 1, 2]))
    value.backward()
    assert value.isfinite()
    assert loss.weight.grad.isfinite().all()
