"""Smooth-AP against hand values, a slow loop and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import SmoothAPLoss
from torch import Tensor

from raydml.losses import smooth_ap
from raydml.losses.smooth_ap import SmoothAp
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import uneven_batch
from tests.losses.oracles import pairs_of, random_kinds, value_and_gradient


def _slow(cosine: Tensor, kind: Tensor, temperature: float) -> Tensor:
    """Kind 1 is a positive, 2 a negative. In the graph of the cosines."""
    losses = []
    for i in range(len(kind)):
        positives = [j for j in range(kind.shape[1]) if kind[i, j] == 1]
        negatives = [j for j in range(kind.shape[1]) if kind[i, j] == 2]
        terms = []
        for j in positives:
            before = {k: ((cosine[i, k] - cosine[i, j]) / temperature).sigmoid() for k in positives + negatives}
            rank = 1 + sum(before[k] for k in positives if k != j)
            terms.append(rank / (rank + sum(before[k] for k in negatives)))
        if positives:
            losses.append(1 - sum(terms) / len(terms))
    return torch.stack(losses).mean()


def test_by_hand() -> None:
    points = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 0.5]], dtype=torch.float64)
    value = SmoothAp(temperature=0.5)(points, torch.tensor([0, 0, 1]))
    # Cosines: 0.6 of the positives; of the negatives 0 with the first and 0.8 with the second. The third has none.
    first, second = (1 / (1 + math.exp(-(s - 0.6) / 0.5)) for s in (0.0, 0.8))
    assert value.item() == pytest.approx((first / (1 + first) + second / (1 + second)) / 2, rel=1e-12)


def test_default_is_the_papers() -> None:
    assert SmoothAp().temperature == 0.01


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_pytorch_metric_learning_where_an_anchor_retrieves_itself(seed: int, temperature: float) -> None:
    # Theirs wants classes in order and of one size, and takes that size for their number: 3 classes of 3.
    points, labels = uneven_batch(seed)[0][:9], torch.arange(9) // 3
    same = labels[:, None] == labels
    pairs = Pairs(same, ~same)
    value, gradient = value_and_gradient(SmoothAp(temperature=temperature), points, labels, pairs)
    expected, their_gradient = value_and_gradient(SmoothAPLoss(temperature=temperature), points, labels)
    # Theirs keeps the precisions in float32.
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert gradient.abs().max() > 1e-2
    assert abs(SmoothAp(temperature=temperature)(points, labels) - value) > 1e-3


@pytest.mark.parametrize("most_differences", [2**24, 5 * 9 * 9, 4 * 9])
def test_a_slow_loop_over_chosen_pairs_with_references(most_differences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, five anchors at a time, and four columns of one anchor at a time."""
    monkeypatch.setattr(smooth_ap, "MOST_DIFFERENCES", most_differences)
    points, memory = uneven_batch()[0], uneven_batch(1)[0][:9]
    kind = random_kinds()
    pairs = pairs_of(kind)
    value, gradient = value_and_gradient(SmoothAp(temperature=0.1), points, torch.arange(14), pairs, memory)
    expected, slow_gradient = value_and_gradient(
        lambda leaf: _slow(torch.nn.functional.cosine_similarity(leaf[:, None], memory[None], dim=2), kind, 0.1), points
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-10)


def test_the_gradient_through_both_sides_of_a_batch() -> None:
    points, labels = uneven_batch()
    value, gradient = value_and_gradient(SmoothAp(temperature=0.05), points, labels)
    positive, negative = all_pairs(labels)

    def slow(leaf: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(leaf)
        return _slow(unit @ unit.T, positive + 2 * negative.long(), 0.05)

    expected, slow_gradient = value_and_gradient(slow, points)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-10)


def test_without_a_gradient_the_value_is_the_same() -> None:
    points, labels = uneven_batch()
    assert SmoothAp()(points, labels).item() == SmoothAp()(points.clone().requires_grad_(), labels).item()


def test_cold_it_is_average_precision() -> None:
    points, labels = uneven_batch(4)
    cosine = torch.nn.functional.cosine_similarity(points[:, None], points[None], dim=2)
    precisions = []
    for i in range(12):  # the last two are alone in their classes
        order = [j for j in cosine[i].argsort(descending=True).tolist() if j != i]
        ranks = [rank for rank, j in enumerate(order, 1) if labels[j] == labels[i]]
        precisions.append(sum(found / rank for found, rank in enumerate(ranks, 1)) / len(ranks))
    value = SmoothAp(temperature=1e-6)(points, labels)
    assert value.item() == pytest.approx(1 - sum(precisions) / 12, rel=1e-9)
