"""ArcFace against hand values, arc cosines in a slow loop and another library."""

import math
from itertools import pairwise

import pytest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from torch import Tensor

from raydml.losses.arcface import ArcFace
from tests.batches import proxy_batch
from tests.losses.oracles import SharedWeight, check_library, cosines, seeded


def _at_angle(theta: float) -> Tensor:
    return torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=torch.float64)


def _own_logit(theta: float, margin: float) -> float:
    """The own class's logit at scale 1, read off the loss: against a logit of 0 it costs log(1 + exp(-logit))."""
    loss = ArcFace(2, 2, scale=1, margin=margin).double()
    with torch.no_grad():
        loss.weight.copy_(torch.cat([_at_angle(0), 0 * _at_angle(0)]))
    return -math.log(math.expm1(loss(_at_angle(theta), torch.tensor([0])).item()))


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.5, 2.6])
def test_the_margin_is_added_to_the_angle(theta: float) -> None:
    # At theta = 0 the floor under the squared sine, 1e-12, shows: sin(theta) counts as 1e-6.
    assert _own_logit(theta, 0.5) == pytest.approx(math.cos(theta + 0.5), abs=1e-6)


@pytest.mark.parametrize("theta", [2.7, 3.0, math.pi])
def test_beyond_pi_the_logit_goes_on_falling(theta: float) -> None:
    assert theta + 0.5 > math.pi
    assert _own_logit(theta, 0.5) == pytest.approx(math.cos(theta) - 0.5 * math.sin(0.5), abs=1e-9)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.0, math.pi / 2])
def test_a_larger_angle_never_has_a_larger_logit(margin: float) -> None:
    logits = [_own_logit(0.01 + 3.12 * step / 200, margin) for step in range(201)]
    assert all(after < before for before, after in pairwise(logits))


def test_against_arc_cosines_in_a_slow_loop() -> None:
    points, labels = proxy_batch()
    loss = ArcFace(5, 6, scale=10, margin=0.4).double()
    total = 0.0
    for point, label in zip(points.tolist(), labels.tolist(), strict=True):
        angles = [math.acos(cosine) for cosine in cosines(point, loss.weight.tolist())]
        logits = [10 * math.cos(angle) for angle in angles]
        beyond = math.cos(angles[label]) - 0.4 * math.sin(0.4)
        logits[label] = 10 * (math.cos(angles[label] + 0.4) if angles[label] + 0.4 <= math.pi else beyond)
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    assert loss(points, labels).item() == pytest.approx(total / 13, rel=1e-10)


def test_defaults_are_the_papers() -> None:
    loss = ArcFace(3, 4)
    assert (loss.scale, loss.margin) == (64, 0.5)


@pytest.mark.parametrize("settings", [{}, {"scale": 16.0}, {"margin": 0.2}, {"scale": 8.0, "margin": 0.0}])
def test_pytorch_metric_learning(settings: dict[str, float]) -> None:
    points, labels = proxy_batch(1)
    in_degrees = {**settings, "margin": math.degrees(settings.get("margin", 0.5))}
    theirs, ours = ArcFaceLoss(5, 6, **in_degrees), ArcFace(5, 6, **settings).double()
    # Nearly opposite to the own class vector, where the sum of angles exceeds pi.
    points[:3] = -theirs.W.detach().T[:3] + 0.05 * points[:3]
    weight = SharedWeight(ours.weight, theirs.W)
    check_library(ours, theirs, (points, labels), weight, gradient_rtol=1e-7, gradient_atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_on_and_opposite_the_class_vector_gradients_are_finite(sign: int, dtype: torch.dtype) -> None:
    loss = ArcFace(3, 4).to(dtype)
    points = (sign * loss.weight.detach()).requires_grad_()
    value = loss(points, torch.tensor([0, 1, 2]))
    value.backward()
    assert value.isfinite()
    assert points.grad.isfinite().all()
    # The slope of an angle is 1 / the vector's length: no more than that, times the scale and the mean, may be left.
    bound = 2 * 64 / 3 / points.detach().norm(dim=1)
    assert (points.grad.norm(dim=1) <= 1.01 * bound).all()


def test_the_class_matrix_starts_as_that_of_normalized_softmax() -> None:
    weight = seeded(ArcFace, 3000, 16).weight
    assert weight.shape == (3000, 16)
    assert 0.24 < weight.abs().max().item() <= 0.25
    assert weight.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.02)
