"""NCA loss against hand values, the Deep_Metric release, a slow loop and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import NCALoss

from raydml.losses.nca import NCA
from raydml.ops.tuples import Pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden, check_library
from tests.tuples import as_triplets, some_pairs

# The other variant is the code of 2019, which takes similarities for distances and so turns the objective round.
CASES = golden_cases("deep_metric_nca", lambda case: case["variant"] == "distance")


@pytest.mark.parametrize("case", CASES)
def test_deep_metric_release(case: dict) -> None:
    check_golden(NCA(alpha=case["alpha"], nearest=case["K"]), "deep_metric_nca", case)


def test_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    # Squared distances: 0 has 1 and 4, 1 has 1 and 1; the third has no positive and does not count.
    expected = (math.log1p(math.exp(1 - 4)) + math.log(2)) / 2
    assert NCA()(points, labels).item() == pytest.approx(expected, rel=1e-12)
    expected = (math.log1p(math.exp(2 - 8)) + math.log(2)) / 2
    assert NCA(alpha=2)(points, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("nearest", [None, 1, 3, 5, 8])
def test_chosen_pairs_against_a_slow_loop(nearest: int | None) -> None:
    points, labels = unit_batch(1)
    pairs = some_pairs(labels, 0.5)
    costs, size = [], range(len(labels))
    for i in size:
        squares = [(points[i] - points[j]).square().sum().item() for j in size]
        positives = sorted(squares[j] for j in size if pairs.positive[i, j])
        negatives = sorted(squares[j] for j in size if pairs.negative[i, j])
        if not positives:
            continue
        kept = sorted(positives + negatives)[:nearest]
        pulled = [q for q in positives if q in kept] or positives[:1]
        pushed = [q for q in negatives if q in kept]
        costs.append(math.log1p(sum(math.exp(-5 * q) for q in pushed) / sum(math.exp(-5 * q) for q in pulled)))
    value = NCA(alpha=5, nearest=nearest)(points, labels, pairs)
    assert value.item() == pytest.approx(sum(costs) / len(costs), rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 12.0])
def test_pytorch_metric_learning(alpha: float) -> None:
    points, labels = unit_batch(2)
    labels[3] = 9  # without a positive: it does not count, there as here
    theirs = NCALoss(softmax_scale=alpha, distance=LpDistance(power=2, normalize_embeddings=False))
    check_library(NCA(alpha=alpha), theirs, (points, labels))


def test_defaults_are_the_papers() -> None:
    assert (NCA().alpha, NCA().nearest) == (1, None)


def test_an_easy_anchors_small_cost_is_not_rounded_away() -> None:
    points = torch.tensor([[0.0], [0.1], [6.0]])
    value = NCA()(points, torch.tensor([0, 0, 1]))
    expected = (math.exp(0.01 - 36) + math.exp(0.01 - 5.9**2)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("nearest", [None, 1, 2, 50])
def test_copies_and_missing_sides_stay_finite(nearest: int | None) -> None:
    for labels in (torch.zeros(6).long(), torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 3]), torch.zeros(0).long()):
        points = torch.ones(len(labels), 3, requires_grad=True)
        value = NCA(nearest=nearest, alpha=16)(points, labels)
        value.backward()
        assert value.isfinite()
        assert points.grad.isfinite().all()


def test_references_stand_for_the_columns() -> None:
    points, memory = torch.tensor([[0.0]]).double(), torch.tensor([[1.0], [2.0], [0.5]]).double()
    pairs = Pairs(torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]]))
    for nearest in (None, 2, 3):
        value = NCA(nearest=nearest)(points, torch.tensor([0]), pairs, references=memory)
        assert value.item() == pytest.approx(math.log1p(math.exp(1 - 4)), rel=1e-12)


def test_triplets_are_refused_with_a_cure() -> None:
    points, labels = unit_batch()
    with pytest.raises(ValueError, match="works on pairs, not on Triplets; choose a miner"):
        NCA()(points, labels, as_triplets([(0, 4, 1)]))  # type: ignore[arg-type]
