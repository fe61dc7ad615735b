"""Contrastive loss against hand values, the Deep_Metric release, slow loops and another library."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from torch import Tensor

from raydml.losses.contrastive import Contrastive
from raydml.ops.tuples import Pairs, Triplets, all_pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden, check_library, check_triplets

# The release of 2019 takes itself as a positive where its own dot product is below 1; ours goes by index.
CASES = golden_cases("deep_metric_contrastive", lambda case: not case["requires_value_filter"])


def _triplets(seed: int = 1) -> Triplets:
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randint(14, (40,), generator=generator)
    # Never the anchor itself: its distance is 1e-6 here, which keeps the gradient finite, and 0 in the slow loop.
    positive, negative = ((anchor + torch.randint(1, 14, (40,), generator=generator)) % 14 for _ in range(2))
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
        ({"form": "squared"}, (0.3**2 + 4.3**2) / 4 + (0.3**2 + 0.6**2) / 8),
        ({"form": "squared", "average_over": "active"}, (0.3**2 + 4.3**2) / 4 + (0.3**2 + 0.6**2) / 4),
        # Over ordered pairs, sums over four anchors; means for each anchor (0: 0.3; 1: 0.6; 2: 0.3 and 0.6; 3: none).
        ({"average_over": "anchors"}, (2 * (0.3 + 4.3) + 2 * (0.3 + 0.6)) / 4),
        ({"average_over": "anchor_means"}, (2 * (0.3 + 4.3) + 0.3 + 0.6 + (0.3 + 0.6) / 2) / 4),
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
    points, labels = unit_batch(dim=3)
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
    theirs = ContrastiveLoss(pos_margin=inner, neg_margin=outer, distance=LpDistance(normalize_embeddings=False))
    ours = Contrastive(positive_margin=inner, negative_margin=outer, average_over="active")
    check_library(ours, theirs, unit_batch(dim=3))


def test_embeddings_are_used_as_they_come() -> None:
    points, labels = unit_batch(dim=3)
    wide = Contrastive(negative_margin=3.0)(3 * points, labels)
    torch.testing.assert_close(wide, 3 * Contrastive(negative_margin=1.0)(points, labels))


def test_where_embeddings_coincide_the_gradient_is_zero_not_nan() -> None:
    labels = torch.tensor([0, 0, 1])
    columns = [torch.tensor([column]) for column in (0, 1, 2)]
    for tuples in (None, Triplets(*columns, torch.tensor([True]))):
        points = torch.zeros(3, 4, requires_grad=True)
        value = Contrastive()(points, labels, tuples)
        assert value.item() == pytest.approx(1, abs=2e-6)  # positives at 0, negatives a whole margin too close
        value.backward()
        assert not points.grad.any()


def test_close_pairs_far_from_the_origin_keep_their_distance() -> None:
    """|x|^2 + |y|^2 - 2xy would round 0.5 away here."""
    points = torch.tensor([[4096.0, 4096.0], [4096.0, 4096.5]])
    assert Contrastive()(points, torch.tensor([0, 0])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [{}, {"form": "similarity"}, {"form": "squared"}])
def test_defaults_of_each_form(settings: dict) -> None:
    loss = Contrastive(**settings)
    similarity = settings.get("form") == "similarity"
    assert loss.positive_margin == 0
    assert loss.negative_margin == (0.5 if similarity else 1)
    assert loss.average_over == ("anchors" if similarity else "all")


@pytest.mark.parametrize("case", CASES)
def test_deep_metric_release(case: dict) -> None:
    loss = Contrastive(form="similarity", negative_margin=case["margin"])
    check_golden(loss, "deep_metric_contrastive", case)


def _slow(rows: list[tuple[int, float, float]], size: int, average: str) -> float:
    """rows: anchor, cost of its positive, cost of its negative (None where there is none)."""
    value = 0.0
    for side in (1, 2):
        costs = [(row[0], row[side]) for row in rows if row[side] is not None]
        active = [(anchor, cost) for anchor, cost in costs if cost > 0]
        total = sum(cost for _, cost in costs)
        if average == "all":
            value += total / len(costs)
        elif average == "active":
            value += total / len(active)
        elif average == "anchors":
            value += total / size
        else:
            for i in range(size):
                of_anchor = [cost for anchor, cost in active if anchor == i]
                value += sum(of_anchor) / max(len(of_anchor), 1) / size
    return value


def _costs(points: Tensor, a: int, b: int, form: str) -> tuple[float, float]:
    """As a positive, as a negative: margins 0.2 and 1.1, for similarity 0 and 0.3."""
    distance, similarity = (points[a] - points[b]).norm().item(), (points[a] @ points[b]).item()
    pulled, pushed = max(0.0, distance - 0.2), max(0.0, 1.1 - distance)
    if form == "similarity":
        return max(0.0, 1 - similarity), similarity if similarity > 0.3 else 0.0
    return (pulled**2 / 2, pushed**2 / 2) if form == "squared" else (pulled, pushed)


@pytest.mark.parametrize("average", ["all", "active", "anchors", "anchor_means"])
@pytest.mark.parametrize("form", ["linear", "squared", "similarity"])
def test_every_form_and_average_against_a_slow_loop(form: str, average: str) -> None:
    points, labels = unit_batch(2, dim=3)
    margins = {"negative_margin": 0.3} if form == "similarity" else {"positive_margin": 0.2, "negative_margin": 1.1}
    loss = Contrastive(form=form, average_over=average, **margins)  # type: ignore[arg-type]
    size = len(labels)
    pairs = [
        (i, _costs(points, i, j, form)[0], None) if labels[i] == labels[j] else (i, None, _costs(points, i, j, form)[1])
        for i in range(size)
        for j in range(size)
        if i != j
    ]
    assert loss(points, labels).item() == pytest.approx(_slow(pairs, size, average), rel=1e-12)

    def slow(rows: list[tuple[int, int, int]]) -> float:
        costs = [(a, _costs(points, a, p, form)[0], _costs(points, a, n, form)[1]) for a, p, n in rows]
        return _slow(costs, size, average)

    check_triplets(loss, points, labels, slow)


def test_a_similarity_above_one_costs_nothing_to_a_positive() -> None:
    points = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert Contrastive(form="similarity")(points, torch.tensor([0, 0, 1])).item() == 0


def test_a_margin_for_positives_has_no_place_in_the_similarity_form() -> None:
    with pytest.raises(ValueError, match=r"form = similarity, positive_margin = 0.1: .* write positive_margin: 0"):
        Contrastive(form="similarity", positive_margin=0.1)


@pytest.mark.parametrize("form", ["linear", "similarity"])
def test_references_stand_for_the_columns(form: str) -> None:
    points, memory = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]]).double()
    pairs = Pairs(torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]]))
    value = Contrastive(form=form)(points, torch.tensor([0]), pairs, references=memory)  # type: ignore[arg-type]
    expected = {"linear": 0.8**0.5 + 1 - 0.4**0.5, "similarity": 0.4 + 0.8}[form]
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_other_things_than_tuples_are_refused_with_a_cure() -> None:
    points, labels = unit_batch(dim=3)
    with pytest.raises(ValueError, match="pairs or triplets or triplet_ranges, not on tuple; choose a miner"):
        Contrastive()(points, labels, tuple(all_pairs(labels)))  # type: ignore[arg-type]
