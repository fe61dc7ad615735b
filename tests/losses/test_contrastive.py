"""Contrastive loss against hand values, a slow loop and another library."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import Tensor

from raydml.losses.contrastive import Contrastive
from raydml.tuples import Triplets


def _batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(14, 3, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(points, dim=1), torch.arange(14) % 4


def _triplets(seed: int = 1) -> Triplets:
    generator = torch.Generator().manual_seed(seed)
    anchor, positive, negative = (torch.randint(14, (40,), generator=generator) for _ in range(3))
    return Triplets(anchor, positive, negative, torch.rand(40, generator=generator) > 0.3)


# On a line: 0 and 0.3 are one class, 0.7 and 5 another.
LINE = torch.tensor([[0.0], [0.3], [0.7], [5.0]], dtype=torch.float64)
LINE_LABELS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Ordered pairs come twice and do not change a mean. Positives 0.3, 4.3. Negatives 0.7, 5, 0.4, 4.7.
        ({}, (0.3 + 4.3) / 2 + (0.3 + 0 + 0.6 + 0) / 4),
        ({"average_over": "active"}, (0.3 + 4.3) / 2 + (0.3 + 0.6) / 2),
        ({"positive_margin": 0.5, "negative_margin": 0.5}, 3.8 / 2 + 0.1 / 4),
        ({"positive_margin": 0.5, "negative_margin": 0.5, "average_over": "active"}, 3.8 + 0.1),
    ],
)
def test_by_hand(settings: dict, expected: float) -> None:
    assert Contrastive(**settings)(LINE, LINE_LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_a_triplet_is_a_positive_and_a_negative_pair() -> None:
    columns = [torch.tensor(column) for column in ([0, 2, 1], [1, 3, 1], [2, 1, 1])]
    triplets = Triplets(*columns, torch.tensor([True, True, False]))
    expected = (0.3 + 4.3) / 2 + (0.3 + 0.6) / 2
    assert Contrastive()(LINE, LINE_LABELS, triplets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("average_over", ["all", "active"])
def test_triplets_against_a_slow_loop(average_over: str) -> None:
    points, labels = _batch()
    triplets = _triplets()
    pulled, pushed = [], []
    for a, p, n, valid in zip(*(column.tolist() for column in triplets), strict=True):
        if valid:
            pulled.append(max(0.0, (points[a] - points[p]).norm().item() - 0.2))
            pushed.append(max(0.0, 1.1 - (points[a] - points[n]).norm().item()))
    if average_over == "active":
        pulled, pushed = [x for x in pulled if x], [x for x in pushed if x]
    expected = sum(pulled) / len(pulled) + sum(pushed) / len(pushed)
    loss = Contrastive(positive_margin=0.2, negative_margin=1.1, average_over=average_over)  # type: ignore[arg-type]
    assert loss(points, labels, triplets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("inner", "outer"), [(0.0, 1.0), (0.3, 0.9), (0.0, 2.5)])
def test_pytorch_metric_learning(inner: float, outer: float) -> None:
    points, labels = _batch()
    theirs = ContrastiveLoss(pos_margin=inner, neg_margin=outer, distance=LpDistance(normalize_embeddings=False))
    ours = Contrastive(positive_margin=inner, negative_margin=outer, average_over="active")
    one, other = points.clone().requires_grad_(), points.clone().requires_grad_()
    expected, value = theirs(one, labels), ours(other, labels)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    expected.backward()
    value.backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-7, atol=1e-12)


def test_embeddings_are_used_as_they_come() -> None:
    points, labels = _batch()
    wide = Contrastive(negative_margin=3.0)(3 * points, labels)
    torch.testing.assert_close(wide, 3 * Contrastive(negative_margin=1.0)(points, labels))


def test_where_embeddings_coincide_the_gradient_is_zero_not_nan() -> None:
    labels = torch.tensor([0, 0, 1])
    columns = [torch.tensor([column]) for column in (0, 1, 2)]
    for tuples in (None, Triplets(*columns, torch.tensor([True]))):
        points = torch.zeros(3, 4, requires_grad=True)
        value = Contrastive()(points, labels, tuples)
        assert value.item() == 1  # positives at 0, negatives a whole margin too close
        value.backward()
        assert not points.grad.any()


def test_close_pairs_far_from_the_origin_keep_their_distance() -> None:
    """|x|^2 + |y|^2 - 2xy would round 0.5 away here."""
    points = torch.tensor([[4096.0, 4096.0], [4096.0, 4096.5]])
    assert Contrastive()(points, torch.tensor([0, 0])).item() == pytest.approx(0.5)
