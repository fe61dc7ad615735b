"""Losses that write their gradient down: what they keep for it, what they multiply, and what they refuse."""

import math

import pytest
import torch
from torch import Tensor

from raydml import registry
from raydml.losses._base import soft_maxima, sum_of_soft_maxima, with_slope
from raydml.ops.tuples import Pairs, TripletRanges, all_pairs, all_triplets
from tests.products import CountedProducts

CASES = [
    ("multi_similarity", {}),
    ("contrastive", {}),
    ("contrastive", {"form": "squared", "average_over": "active"}),
    ("contrastive", {"form": "similarity"}),
    ("triplet", {}),
    ("triplet", {"squared": False, "average_over": "active"}),
]
SIZE, DIM = 12, 9


def _batch() -> tuple[Tensor, Tensor]:
    return torch.randn(SIZE, DIM, generator=torch.Generator().manual_seed(0)), torch.arange(SIZE) % 4


def _kinds(name: str) -> list[Pairs | TripletRanges | None]:
    points, labels = _batch()
    ranges = all_triplets(torch.cdist(points, points), all_pairs(labels))
    return [None, ranges] if name == "triplet" else [None, all_pairs(labels)]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_it_takes_one_product_forward_and_one_back(name: str, settings: dict) -> None:
    points, labels = _batch()
    loss = registry.build("losses", name, **settings)
    for tuples in _kinds(name):
        leaf = points.clone().requires_grad_()
        with CountedProducts() as forward:
            value = loss(leaf, labels, tuples)
        with CountedProducts() as backward:
            value.backward()
        assert (forward.count, backward.count) == (1, 1)
        assert leaf.grad.any()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_it_keeps_no_more_than_two_matrices_for_its_gradient(name: str, settings: dict) -> None:
    points, labels = _batch()
    loss = registry.build("losses", name, **settings)
    for tuples in _kinds(name):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, id):
            loss(points.clone().requires_grad_(), labels, tuples)
        squares = [tensor for tensor in kept if tensor.shape == (SIZE, SIZE)]
        assert 1 <= len(squares) <= 2  # the slope, and the distances where they are not squared


def test_a_slope_is_multiplied_by_what_comes_back() -> None:
    variable = torch.tensor([[2.0, 3.0]], requires_grad=True)
    given = torch.tensor(7.0)
    value = with_slope(variable * 2, given, torch.tensor([[5.0, -1.0]]))
    assert value.item() == 7
    (value * 3).backward()
    assert variable.grad.tolist() == [[3 * 5 * 2, 3 * -1 * 2]]
    assert not given.requires_grad


def test_a_second_derivative_is_refused() -> None:
    points, labels = _batch()
    leaf = points.requires_grad_()
    value = registry.build("losses", "multi_similarity")(leaf, labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, leaf, create_graph=True)


def test_soft_maxima_by_hand() -> None:
    values = torch.tensor([[1.0, -2.0, 900.0], [0.5, 3.0, -900.0], [900.0, 800.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, False]])
    total, slope = soft_maxima(values, mask)
    first = 1 + math.exp(1) + math.exp(-2)
    assert total.item() == pytest.approx(math.log(first) + 900, rel=1e-12)
    expected = [[math.exp(1) / first, math.exp(-2) / first, 0], [0, 0, 0], [1, math.exp(-100), 0]]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    leaf = values.clone().requires_grad_()
    (2 * sum_of_soft_maxima(leaf, mask)).backward()
    torch.testing.assert_close(leaf.grad, 2 * slope)


def test_soft_maxima_of_no_columns() -> None:
    leaf = torch.zeros(3, 0, requires_grad=True)
    value = sum_of_soft_maxima(leaf, torch.zeros(3, 0, dtype=torch.bool))
    value.backward()
    assert value.item() == 0


def test_a_soft_maximum_near_zero_is_exact_in_float32() -> None:
    """log(1 + x) of a small x, which is lost where 1 + x is rounded first."""
    value = sum_of_soft_maxima(torch.full((1, 1), -20.0), torch.ones(1, 1, dtype=torch.bool))
    assert value.item() == pytest.approx(math.exp(-20), rel=1e-5)
