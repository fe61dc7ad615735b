"""Sub-center ArcFace against arc cosines in a slow loop, ArcFace, and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import SubCenterArcFaceLoss
from torch import Tensor

from raydml.losses.arcface import ArcFace
from raydml.losses.sub_center_arcface import SubCenterArcFace
from tests.batches import proxy_batch
from tests.losses.oracles import SharedWeight, check_library, cosines, seeded, value_and_gradient


def test_by_hand() -> None:
    loss = SubCenterArcFace(2, 2, num_centers=2, scale=3, margin=0.2).double()
    with torch.no_grad():
        # Class 0 at 90 and 30 degrees, class 1 at 180 and 300 degrees; lengths must not matter.
        angles = [math.radians(angle) for angle in (90, 30, 180, 300)]
        rows = [[n * math.cos(angle), n * math.sin(angle)] for n, angle in enumerate(angles, 1)]
        loss.weight.copy_(torch.tensor(rows, dtype=torch.float64))
    value = loss(torch.tensor([[5.0, 0.0]], dtype=torch.float64), torch.tensor([0])).item()
    own, other = 3 * math.cos(math.radians(30) + 0.2), 3 * math.cos(math.radians(60))
    assert value == pytest.approx(math.log1p(math.exp(other - own)), rel=1e-12)


def test_against_arc_cosines_in_a_slow_loop() -> None:
    points, labels = proxy_batch()
    loss = SubCenterArcFace(5, 6, num_centers=3, scale=10, margin=0.4).double()
    rows = loss.weight.tolist()
    total = 0.0
    for point, label in zip(points.tolist(), labels.tolist(), strict=True):
        nearest = [min(math.acos(s) for s in cosines(point, rows[3 * c : 3 * c + 3])) for c in range(5)]
        logits = [10 * math.cos(angle) for angle in nearest]
        beyond = math.cos(nearest[label]) - 0.4 * math.sin(0.4)
        logits[label] = 10 * (math.cos(nearest[label] + 0.4) if nearest[label] + 0.4 <= math.pi else beyond)
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    assert loss(points, labels).item() == pytest.approx(total / 13, rel=1e-10)


def test_defaults_are_the_papers() -> None:
    loss = SubCenterArcFace(7, 4)
    assert loss.weight.shape == (21, 4)
    assert (loss.num_centers, loss.scale, loss.margin) == (3, 64, 0.5)


@pytest.mark.parametrize(
    "settings", [{}, {"num_centers": 2}, {"scale": 16.0}, {"margin": 0.2}, {"scale": 8.0, "margin": 0.0}]
)
def test_pytorch_metric_learning(settings: dict[str, float]) -> None:
    points, labels = proxy_batch(1)
    named = {"num_centers": "sub_centers"}
    given = {named.get(key, key): value for key, value in settings.items()}
    given["margin"] = math.degrees(settings.get("margin", 0.5))
    theirs = SubCenterArcFaceLoss(num_classes=5, embedding_size=6, **given)
    ours = SubCenterArcFace(5, 6, **settings).double()  # type: ignore[arg-type]
    check_library(ours, theirs, (points, labels), SharedWeight(ours.weight, theirs.W), gradient_rtol=1e-7)


def test_pytorch_metric_learning_where_the_sum_of_angles_exceeds_pi() -> None:
    points, labels = proxy_batch(1)
    theirs = SubCenterArcFaceLoss(num_classes=5, embedding_size=6, margin=math.degrees(0.5))
    with torch.no_grad():  # all centres of a class are near each other, so that even the nearest can be opposite
        theirs.W.copy_(theirs.W[:, ::3].repeat_interleave(3, dim=1) + 0.02 * theirs.W)
        points[:3] = -theirs.W.T[[0, 3, 6]] + 0.05 * points[:3]
    ours = SubCenterArcFace(5, 6).double()
    weight = SharedWeight(ours.weight, theirs.W)
    check_library(ours, theirs, (points, labels), weight, gradient_rtol=1e-7, gradient_atol=1e-9)


def test_with_one_center_it_is_arcface() -> None:
    points, labels = proxy_batch()
    one, other = seeded(SubCenterArcFace, 5, 6, num_centers=1).double(), seeded(ArcFace, 5, 6).double()
    assert torch.equal(one.weight, other.weight)
    for ours, expected in zip(
        value_and_gradient(one, points, labels), value_and_gradient(other, points, labels), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_only_the_nearest_center_of_a_class_learns() -> None:
    points, labels = proxy_batch()
    loss = SubCenterArcFace(5, 6, num_centers=3).double()
    loss(points[:1], labels[:1]).backward()
    nearest = torch.nn.functional.cosine_similarity(points[0], loss.weight.detach()).reshape(5, 3).argmax(dim=1)
    learns = loss.weight.grad.abs().sum(dim=1).reshape(5, 3) > 0
    assert torch.equal(learns, torch.nn.functional.one_hot(nearest, 3).bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_on_and_opposite_a_center_gradients_are_finite(sign: int, dtype: torch.dtype) -> None:
    loss = SubCenterArcFace(3, 4, num_centers=2).to(dtype)
    with torch.no_grad():  # both centres of a class are the same point, so that -1 is the largest cosine too
        loss.weight.copy_(loss.weight[::2].repeat_interleave(2, dim=0))
    points: Tensor = (sign * loss.weight.detach()[::2]).requires_grad_()
    value = loss(points, torch.tensor([0, 1, 2]))
    value.backward()
    assert value.isfinite()
    assert points.grad.isfinite().all()
    assert loss.weight.grad.isfinite().all()
    # Two equal centres share the gradient.
    torch.testing.assert_close(loss.weight.grad[::2], loss.weight.grad[1::2])


def test_centers_start_as_the_vectors_of_arcface() -> None:
    assert torch.equal(seeded(SubCenterArcFace, 10, 4, num_centers=2).weight, seeded(ArcFace, 20, 4).weight)
