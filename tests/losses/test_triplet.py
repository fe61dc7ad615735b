"""Triplet loss against hand values, the released implementations' numbers, slow loops and another library."""

import itertools

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from torch import Tensor

from raydml.losses.triplet import Triplet
from raydml.ops.tuples import TripletRanges, all_pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_case, golden_cases
from tests.losses.oracles import check_golden, check_library, value_and_gradient
from tests.tuples import as_triplets, every_triplet, listed, random_ranges

FORMS = [(squared, average) for squared in (True, False) for average in ("all", "active")]


def _slow(points: Tensor, rows: list[tuple[int, int, int]], loss: Triplet) -> Tensor:
    """The definition with the settings of the loss, triplet by triplet; in the graph of the points."""
    costs = []
    for a, p, n in rows:
        pulled, pushed = (points[a] - points[p]).square().sum(), (points[a] - points[n]).square().sum()
        if not loss.squared:
            pulled, pushed = pulled.sqrt(), pushed.sqrt()
        costs.append((pulled - pushed + loss.margin).clamp(min=0))
    if loss.average_over == "active":
        costs = [cost for cost in costs if cost > 0]
    return torch.stack(costs).mean() if costs else points.sum() * 0


def _check_slow(loss: Triplet, points: Tensor, labels: Tensor, ways: list, rows: list[tuple[int, int, int]]) -> None:
    """Compare value and gradient of each way of giving these triplets with the slow loop."""
    expected, slow_gradient = value_and_gradient(_slow, points, rows, loss)
    for tuples in ways:
        value, gradient = value_and_gradient(loss, points, labels, tuples)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-9, atol=1e-12)


# On a line: the anchor at 0, its positive at 1; negatives at 1.05 (squared 1.1025) and at 3.
LINE = torch.tensor([[0.0], [1.0], [1.05], [3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1 - 1.1025 + 0.2) / 2),
        ({"average_over": "active"}, 1 - 1.1025 + 0.2),
        ({"squared": False}, (1 - 1.05 + 0.2) / 2),
        ({"margin": 10.0}, (1 - 1.1025 + 10 + 1 - 9 + 10) / 2),
    ],
)
def test_by_hand(settings: dict, expected: float) -> None:
    labels = torch.tensor([0, 0, 1, 2])
    triplets = as_triplets([(0, 1, 2), (0, 1, 3)])
    order = torch.tensor([[2, 3, 0, 1]] * 4)
    one = torch.zeros(4, 4, dtype=torch.bool)
    one[0, 1] = True
    ranges = TripletRanges(one, order, torch.zeros_like(order), torch.full_like(order, 2))
    for tuples in (triplets, ranges):
        assert Triplet(**settings)(LINE, labels, tuples).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", golden_cases("mic_triplet"))
def test_mic_release(case: dict) -> None:
    rows = golden_case("mic_triplet", case["case"])["triplets"].tolist()
    check_golden(Triplet(margin=case["margin"]), "mic_triplet", case, as_triplets([tuple(row) for row in rows]))


@pytest.mark.parametrize("case", golden_cases("mdr_triplet"))
def test_mdr_release(case: dict) -> None:
    """Its 1e-6 on every difference is the same as moving the anchors by it, and only the anchors."""
    golden = golden_case("mdr_triplet", case["case"])
    points, labels, size = golden["E"], golden["labels"], len(golden["E"])
    loss = Triplet(margin=case["margin"], squared=False)
    rows = list(zip(*(golden[key].tolist() for key in ("anchor", "positive", "negative")), strict=True))
    moved = as_triplets([(a, size + p, size + n) for a, p, n in rows])
    value, gradient = value_and_gradient(loss, torch.cat([points + case["eps"], points]), labels.repeat(2), moved)
    torch.testing.assert_close(value, golden["loss"], **case["tolerance"])
    torch.testing.assert_close(gradient[:size] + gradient[size:], golden["grad_E"], **case["tolerance"])
    torch.testing.assert_close(loss(points, labels, as_triplets(rows)), golden["loss"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("squared", "average"), FORMS)
def test_all_triplets_against_a_slow_loop(squared: bool, average: str) -> None:
    points, labels = unit_batch()
    rows = every_triplet(labels)
    _check_slow(Triplet(margin=0.3, squared=squared, average_over=average), points, labels, [None], rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(("squared", "average"), FORMS)
@pytest.mark.parametrize("seed", [1, 2])
def test_ranges_and_lists_against_a_slow_loop(squared: bool, average: str, seed: int) -> None:
    points, labels = unit_batch(seed)
    ranges = random_ranges(points, labels, seed)
    rows = listed(ranges)
    assert len(rows) > 2 * len(points)
    loss = Triplet(squared=squared, average_over=average)  # type: ignore[arg-type]
    _check_slow(loss, points, labels, [ranges, as_triplets(rows)], rows)
    few = loss(points, labels, as_triplets(rows[:9]))
    torch.testing.assert_close(few, _slow(points, rows[:9], loss))


@pytest.mark.parametrize("squared", [True, False])
def test_few_active_triplets_keep_their_digits_in_float32(squared: bool) -> None:
    """A hinge is the small difference of large numbers."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(8, 16).repeat_interleave(8, dim=0)
    points = (centres + 0.02 * torch.randn(64, 16, generator=generator)).float()
    points[0] = 0.55 * points[8] + 0.45 * points[0]
    labels = torch.arange(64) // 8
    exact = points.double()
    distance = (exact[:, None] - exact[None]).square().sum(dim=2)
    distance = distance if squared else distance.sqrt()
    pairs = all_pairs(labels)
    cost = (distance[:, :, None] - distance[:, None, :] + 0.2).clamp(min=0)
    cost = torch.where(pairs.positive[:, :, None] & pairs.negative[:, None, :], cost, 0)
    assert 0 < (cost > 0).sum() < 0.03 * (pairs.positive[:, :, None] & pairs.negative[:, None, :]).sum()
    expected = (cost.sum() / (cost > 0).sum()).item()
    value = Triplet(squared=squared, average_over="active")(points, labels)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=2e-6)


def test_large_distances_that_cancel_leave_no_noise() -> None:
    """Distances of 2e6, exact in float32, of which only the margin is to be left; their sum there is off by more."""
    corners = 1000 * torch.eye(32)
    points = torch.cat([corners, -corners])
    labels = torch.cat([torch.arange(32) % 8, 8 + torch.arange(32) % 8])
    value = Triplet(margin=0.015625, average_over="active")(points, labels)
    assert value.item() == 0.015625
    # Each anchor's opposite corner, twice as far, costs nothing: one negative of sixty.
    assert Triplet(margin=0.015625)(points, labels).item() == pytest.approx(0.015625 * 59 / 60, rel=1e-7)


def test_invalid_triplets_do_not_count() -> None:
    points, labels = unit_batch(5)
    rows = every_triplet(labels)
    for some in (rows[:20], rows[:200]):
        triplets = as_triplets(some)
        triplets.valid[::3] = False
        kept = as_triplets([row for i, row in enumerate(some) if i % 3])
        for average in ("all", "active"):
            loss = Triplet(average_over=average)  # type: ignore[arg-type]
            torch.testing.assert_close(loss(points, labels, triplets), loss(points, labels, kept))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("average", ["all", "active"])
def test_pytorch_metric_learning(power: int, average: str) -> None:
    reducer = MeanReducer() if average == "all" else AvgNonZeroReducer()
    distance = LpDistance(power=power, normalize_embeddings=False)
    theirs = TripletMarginLoss(margin=0.1, distance=distance, reducer=reducer)
    ours = Triplet(margin=0.1, squared=power == 2, average_over=average)  # type: ignore[arg-type]
    check_library(ours, theirs, unit_batch(3))


def test_defaults_are_facenets() -> None:
    loss = Triplet()
    assert (loss.margin, loss.squared, loss.average_over) == (0.2, True, "all")


def test_an_easy_batch_costs_exactly_nothing() -> None:
    points = torch.tensor([[0.0], [0.1], [9.0], [9.1]], requires_grad=True)
    value = Triplet()(points, torch.tensor([0, 0, 1, 1]))
    assert value.item() == 0
    value.backward()
    assert not points.grad.any()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("distance", [0.5, 1e6])
def test_a_negative_at_the_margin_exactly_costs_nothing_and_does_not_count(
    order: tuple[int, ...], distance: float
) -> None:
    """In any order of the columns. From 0: positive at d, negative at d + 0.25. From 2: d, d + 0.125."""
    matrix = torch.tensor([[0, distance + 0.25, distance], [9e9, 0, 9e9], [distance, distance + 0.125, 0]]).double()
    labels = torch.tensor([0, 1, 0])
    rows = torch.tensor(order)
    pairs = all_pairs(labels[rows])
    loss = Triplet(margin=0.25, squared=False, average_over="active")
    leaf = matrix[rows][:, rows].requires_grad_()
    value = loss.cost_of(leaf, pairs)
    assert value.item() == 0.125  # one triplet, not two that cost 0 and 0.125
    value.backward()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[2, 0], expected[2, 1] = 1, -1
    assert torch.equal(leaf.grad, expected[rows][:, rows])
