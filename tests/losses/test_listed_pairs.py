"""What losses share of distances and tuples: lists read from rows or from a matrix, masked sums, counts, refusals."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raydml.ops.distances import entries_at, masked_logsumexp, squares_at
from raydml.ops.tuples import TripletRanges, Triplets, all_pairs, check_kind, counts, per_tuple


@pytest.mark.parametrize("length", [0, 6, 12, 13, 40])
def test_short_and_long_lists_have_the_same_squares(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    points = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    rows, *columns = (torch.randint(6, (length,), generator=generator) for _ in range(3))
    squares = squares_at(points, rows, torch.stack(columns))
    assert squares.shape == (2, length)
    for k in range(2):
        for t in range(length):
            expected = (points[rows[t]] - points[columns[k][t]]).square().sum().item()
            assert squares[k, t].item() == pytest.approx(expected, abs=1e-12)


def test_a_short_list_is_exact() -> None:
    """|x|^2 + |y|^2 - 2xy loses the distance of neighbours in a wide cloud."""
    points = torch.tensor([[4096.0], [4096.5], [-9000.0]])
    assert squares_at(points, torch.tensor([0]), torch.tensor([[1]])).item() == 0.25


def test_no_list_takes_more_than_the_matrix_of_all_pairs() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with FakeTensorMode(), Watch():
        rows = torch.zeros(1000, dtype=torch.int64)
        squares_at(torch.zeros(40, 512), rows, torch.zeros(2, 1000, dtype=torch.int64))
    assert largest <= 40 * 512


def test_entries_of_a_matrix() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    entries = entries_at(matrix, torch.tensor([0, 2]), torch.tensor([[1, 3], [0, 0]]))
    assert entries.tolist() == [[1, 11], [0, 8]]


@pytest.mark.parametrize("dim", [0, 1])
def test_the_log_of_a_masked_sum(dim: int) -> None:
    values = torch.tensor([[1.0, 2.0, 1e4], [3.0, 5.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    if dim == 0:
        values, mask = values.T, mask.T
    values = values.contiguous().requires_grad_()
    result = masked_logsumexp(values, mask, dim=dim)
    assert result[0].item() == pytest.approx(math.log(math.exp(1) + math.exp(2)), rel=1e-12)
    assert result[1].isfinite()
    assert result[1] < -1e29
    result.sum().backward()
    weight = math.exp(1) / (math.exp(1) + math.exp(2))
    expected = torch.tensor([[weight, 1 - weight, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(values.grad, expected if dim else expected.T)


def test_how_often_pairs_count_and_what_belongs_to_their_anchors() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    pairs = all_pairs(labels)
    assert all(torch.equal(*both) for both in zip(counts(pairs), pairs, strict=True))
    column = torch.tensor([3, 1, 1])
    triplets = Triplets(column, column, column, torch.tensor([True, False, True]))
    assert [count.tolist() for count in counts(triplets)] == [[True, False, True]] * 2
    order = torch.tensor([[2, 3, 0, 1], [3, 2, 0, 1], [0, 1, 2, 3], [1, 0, 2, 3]])
    start = torch.zeros_like(order)
    stop = torch.tensor([[2, 1, 2, 2], [1, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]])
    positive, negative = counts(TripletRanges(pairs.positive, order, start, stop))
    assert positive.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 2], [0, 0, 2, 0]]
    assert negative.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    values = torch.tensor([5.0, 6.0, 7.0, 8.0])
    assert per_tuple(values, triplets).tolist() == [8, 6, 6]
    assert per_tuple(values, pairs).tolist() == [[5], [6], [7], [8]]


def test_what_a_loss_does_not_take_is_refused_with_a_cure() -> None:
    pairs = all_pairs(torch.tensor([0, 1]))
    check_kind(pairs, ("pairs",), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="works on triplets or triplet_ranges, not on Pairs; choose a miner"):
        check_kind(pairs, ("triplets", "triplet_ranges"))
    with pytest.raises(ValueError, match=r"references: .* no place in Triplets; choose a miner that yields pairs"):
        check_kind(Triplets(*pairs, *pairs), ("pairs", "triplets"), torch.zeros(2, 3))
