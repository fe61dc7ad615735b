"""Matrices of distances against torch.cdist, which takes differences, and their gradients against its autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raydml.ops.distances import (
    BEYOND_ALL,
    as_numbers,
    euclidean,
    hidden,
    inner_products,
    logsumexp_and_shares,
    products_with_unit,
    squared_euclidean,
)


def _points(num_rows: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _exact(points: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


THEIRS = {
    euclidean: _exact,
    squared_euclidean: lambda points, others: _exact(points, others).square(),
    inner_products: lambda points, others: torch.einsum("id,jd->ij", points, others),
}


@pytest.mark.parametrize("function", THEIRS)
@pytest.mark.parametrize(("num_rows", "dim"), [(7, 5), (30, 3), (1, 4), (0, 4)])
def test_among_a_batch_of_few_or_of_many_and_short_points(function, num_rows: int, dim: int) -> None:
    ours, theirs = (_points(num_rows, dim).requires_grad_() for _ in range(2))
    weight = _points(num_rows, num_rows, seed=1) if num_rows else torch.zeros(0, 0, dtype=torch.float64)
    weight = weight - weight.diag().diag()  # how far a point is from itself has no gradient
    value, expected = function(ours), THEIRS[function](theirs, theirs)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-6)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("function", THEIRS)
@pytest.mark.parametrize("size", [1, 7])
def test_the_gradient_that_comes_back_is_left_alone(function, size: int) -> None:
    """Also where its transpose lies in memory row by row."""
    for given in (_points(size, size, seed=1), _points(size, size, seed=1).T):
        before = given.clone()
        function(_points(size, 4).requires_grad_()).backward(given)
        assert torch.equal(given, before)


@pytest.mark.parametrize("function", THEIRS)
def test_from_others_with_gradients_on_both_sides(function) -> None:
    ours = [_points(6, 4).requires_grad_(), _points(9, 4, seed=2).requires_grad_()]
    theirs = [leaf.detach().clone().requires_grad_() for leaf in ours]
    value, expected = function(*ours), THEIRS[function](*theirs)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    weight = _points(6, 9, seed=3)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("pair", [False, True])
def test_a_cloud_far_from_the_origin_loses_nothing_in_float32(offset: float, pair: bool) -> None:
    points = (_points(40, 16) + offset).float()
    exact = _exact(points.double(), points.double())
    value = euclidean(points, points.clone() if pair else None)
    off_diagonal = ~torch.eye(40, dtype=torch.bool)
    torch.testing.assert_close(value[off_diagonal].double(), exact[off_diagonal], rtol=1e-5, atol=0)


def test_equal_points_have_no_gradient_and_a_point_is_at_zero_from_itself() -> None:
    points = _points(3, 4).repeat(2, 1).float().requires_grad_()
    assert torch.equal(squared_euclidean(points).diagonal(), torch.zeros(6))
    twins = torch.eye(3).repeat(2, 2).bool()
    distance = euclidean(points)
    assert (distance[twins] < 1e-2).all()
    euclidean(points * 0).sum().backward()
    assert not points.grad.any()


def test_products_with_unit_vectors() -> None:
    points, vectors = _points(5, 4), _points(7, 4, seed=1) * 30
    ours, theirs = (vectors.clone().requires_grad_() for _ in range(2))
    value, expected = products_with_unit(points, ours), points @ functional.normalize(theirs).T
    torch.testing.assert_close(value, expected)
    weight = _points(5, 7, seed=2)
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(products_with_unit(points, vectors * 0), torch.zeros(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_outside_a_mask_are_hidden_and_the_others_stay_bit_for_bit(dtype: torch.dtype) -> None:
    values = _points(6, 7).to(dtype) * 1e4
    mask = _points(6, 7, seed=1) > 0
    for stand_in in (BEYOND_ALL, -BEYOND_ALL):
        found = hidden(values, mask, stand_in)
        assert torch.equal(found[mask], values[mask])
        torch.testing.assert_close(found[~mask], torch.full_like(found[~mask], stand_in))
    assert hidden(values[:, :0], mask[:, :0], BEYOND_ALL).shape == (6, 0)


def test_masks_and_counts_as_numbers() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    for given in (mask, mask.T):
        assert as_numbers(given, torch.float32).tolist() == [[float(entry) for entry in row] for row in given.tolist()]
    counts = as_numbers(torch.tensor([3, 0, 2**20 + 1], dtype=torch.int32), torch.float64)
    assert counts.tolist() == [3, 0, 2**20 + 1]
    assert counts.dtype == torch.float64


@pytest.mark.parametrize("dim", [0, 1])
def test_the_log_of_a_masked_sum_and_its_shares(dim: int) -> None:
    values, mask = _points(5, 6) * 30, _points(5, 6, seed=3) > -0.5
    assert mask.any(dim=dim).all()
    result, shares = logsumexp_and_shares(values, mask, dim)
    masked = values.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(result, masked.logsumexp(dim=dim, keepdim=True))
    torch.testing.assert_close(shares, masked.softmax(dim=dim))
    assert not shares[~mask].any()


def test_points_that_nearly_coincide_have_no_gradient_and_those_farther_apart_have_it_whole() -> None:
    """At 1e-6, the smallest distance, the gradient is 0; beyond, each point is drawn with the weight of its pair."""
    points = torch.tensor([[0.0, 0.0], [5e-7, 0.0], [1.0, 0.0], [1.0, 4e-6]], dtype=torch.float64, requires_grad=True)
    distance = euclidean(points)
    (distance[0, 1] + 2 * distance[2, 3]).backward()
    expected = torch.tensor([[0, 0], [0, 0], [0, -2], [0, 2]], dtype=torch.float64)
    torch.testing.assert_close(points.grad, expected, rtol=1e-3, atol=0)
