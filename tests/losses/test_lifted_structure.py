"""Lifted structure loss against hand values, the Deep_Metric release, slow loops and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import GeneralizedLiftedStructureLoss, LiftedStructureLoss
from torch import Tensor

from raydml.losses.lifted_structure import LiftedStructure
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden, check_library
from tests.tuples import some_pairs

CASES = golden_cases("deep_metric_lifted", lambda case: not case["requires_value_filter"])


def _mined(points: Tensor, labels: Tensor, slack: float = 0.1) -> Pairs:
    """The release's mining: positives less similar than the hardest negative plus slack, and the other way round."""
    pairs = all_pairs(labels)
    positive, negative = torch.zeros_like(pairs.positive), torch.zeros_like(pairs.negative)
    size = range(len(labels))
    for i in size:
        similarity = (points @ points[i]).tolist()
        positives = [j for j in size if pairs.positive[i, j]]
        negatives = [j for j in size if pairs.negative[i, j]]
        for j in positives:
            positive[i, j] = similarity[j] < max(similarity[n] for n in negatives) + slack
        for j in negatives:
            negative[i, j] = similarity[j] > min(similarity[p] for p in positives) - slack
    return Pairs(positive, negative)


@pytest.mark.parametrize("case", CASES)
def test_deep_metric_release(case: dict) -> None:
    if case["variant"] == "original":
        loss = LiftedStructure(margin=case["margin"], hardest_negative=case["hard"])
    else:
        loss = LiftedStructure(variant="modified", alpha=case["beta"], beta=case["alpha"])
    mined = case["variant"] == "modified" and case["hard"]
    check_golden(loss, "deep_metric_lifted", case, _mined if mined else None)


# On a line: 0 and 0.3 are one class, 0.7 another.
LINE, LABELS = torch.tensor([[0.0], [0.3], [0.7]], dtype=torch.float64), torch.tensor([0, 0, 1])


def test_original_by_hand() -> None:
    lifted = math.log(math.exp(1 - 0.7) + math.exp(1 - 0.4)) + 0.3
    assert LiftedStructure()(LINE, LABELS).item() == pytest.approx(lifted**2 / 2, rel=1e-12)
    lifted = math.log(math.exp(0.5 - 0.7) + math.exp(0.5 - 0.4)) + 0.3
    assert LiftedStructure(margin=0.5)(LINE, LABELS).item() == pytest.approx(lifted**2 / 2, rel=1e-12)


def test_generalized_by_hand() -> None:
    # Anchor 0: 0.3 + (1 - 0.7); anchor 1: 0.3 + (1 - 0.4); the third has no positive but counts.
    value = LiftedStructure(variant="generalized")(LINE, LABELS)
    assert value.item() == pytest.approx((0.6 + 0.9) / 3, rel=1e-12)


def test_modified_by_hand() -> None:
    points = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    # Sets of one: 2/alpha * -alpha * 0.8 + 2/beta * beta * (0 and 0.6); the third has no positive but counts.
    value = LiftedStructure(variant="modified", alpha=3, beta=7)(points, LABELS)
    assert value.item() == pytest.approx((-1.6 + 0 - 1.6 + 1.2) / 3, rel=1e-12)


@pytest.mark.parametrize("hardest", [True, False])
def test_original_on_chosen_pairs_against_a_slow_loop(hardest: bool) -> None:
    points, labels = unit_batch(1)
    pairs = some_pairs(labels, 0.4)
    total, count, size = 0.0, 0, range(len(labels))
    for i in size:
        for j in size:
            if not pairs.positive[i, j]:
                continue
            ends = [[(points[i] - points[k]).norm().item() for k in size if pairs.negative[i, k]]]
            ends += [[(points[j] - points[k]).norm().item() for k in size if pairs.negative[k, j]]]
            near = [min(end) for end in ends if end] if hardest else [d for end in ends for d in end]
            lifted = math.log(sum(math.exp(1 - d) for d in near)) + (points[i] - points[j]).norm().item()
            total, count = total + max(0.0, lifted) ** 2, count + 1
    value = LiftedStructure(hardest_negative=hardest)(points, labels, pairs)
    assert value.item() == pytest.approx(total / (2 * count), rel=1e-12)


def test_a_positive_pair_without_negatives_costs_nothing_but_counts() -> None:
    pairs = all_pairs(LABELS)
    alone = LiftedStructure()(LINE, LABELS, Pairs(pairs.positive, torch.zeros_like(pairs.negative)))
    assert alone.item() == 0
    points = torch.cat([LINE, LINE + 100])
    twice = torch.block_diag(pairs.positive.double(), pairs.positive.double()).bool()
    once = torch.nn.functional.pad(pairs.negative, (0, 3, 0, 3))
    half = LiftedStructure()(points, torch.cat([LABELS, LABELS]), Pairs(twice, once))
    torch.testing.assert_close(half, LiftedStructure()(LINE, LABELS) / 2)


@pytest.mark.parametrize("margin", [0.6, 1.0])
@pytest.mark.parametrize("variant", ["original", "generalized"])
def test_pytorch_metric_learning(variant: str, margin: float) -> None:
    theirs = {"original": LiftedStructureLoss, "generalized": GeneralizedLiftedStructureLoss}[variant](
        neg_margin=margin, distance=LpDistance(normalize_embeddings=False)
    )
    ours = LiftedStructure(variant=variant, margin=margin)  # type: ignore[arg-type]
    check_library(ours, theirs, unit_batch(2))


def test_defaults_are_those_of_the_sources() -> None:
    loss = LiftedStructure()
    assert (loss.variant, loss.margin, loss.hardest_negative) == ("original", 1, False)
    assert (loss.alpha, loss.beta) == (2, 40)


def test_references_stand_for_the_columns() -> None:
    """Anchors 0 and 1 against a memory at 0.3 (a positive of 0, a negative of 1) and 0.7 (a negative of 0)."""
    points, memory = torch.tensor([[0.0], [0.9]]).double(), torch.tensor([[0.3], [0.7]]).double()
    pairs = Pairs(torch.tensor([[True, False], [False, False]]), torch.tensor([[False, True], [True, False]]))
    labels = torch.tensor([0, 1])
    lifted = math.log(math.exp(1 - 0.7) + math.exp(1 - 0.6)) + 0.3
    value = LiftedStructure()(points, labels, pairs, references=memory)
    assert value.item() == pytest.approx(lifted**2 / 2, rel=1e-6)
    value = LiftedStructure(variant="generalized")(points, labels, pairs, references=memory)
    assert value.item() == pytest.approx((0.3 + 1 - 0.7) / 2, rel=1e-6)
    value = LiftedStructure(variant="modified")(points, labels, pairs, references=memory)
    assert value.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("variant", ["original", "generalized", "modified"])
@pytest.mark.parametrize("labels", [torch.zeros(5), torch.arange(5), torch.zeros(0), torch.tensor([0, 0, 0, 0, 1])])
def test_what_is_missing_never_makes_a_gradient_infinite(variant: str, labels: Tensor) -> None:
    for points in (unit_batch(3, num_rows=len(labels))[0], torch.zeros(len(labels), 5)):
        leaf = points.float().requires_grad_()
        value = LiftedStructure(variant=variant)(leaf, labels.long())  # type: ignore[arg-type]
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()


def test_hardest_negative_belongs_to_the_original() -> None:
    with pytest.raises(ValueError, match=r"hardest_negative = True, variant = modified: .* write hardest_negative"):
        LiftedStructure(variant="modified", hardest_negative=True)


@pytest.mark.parametrize(
    "settings", [{"variant": "modified", "margin": 1.0}, {"alpha": 2.0}, {"variant": "generalized", "beta": 40.0}]
)
def test_settings_of_another_variant_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="has no effect there"):
        LiftedStructure(**settings)


def test_swapped_scales_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha = 40, beta = 2: .*swapped"):
        LiftedStructure(variant="modified", alpha=40, beta=2)
