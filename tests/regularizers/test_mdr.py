"""Multi-level distance regularisation against hand values and the released implementation's numbers."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raydml.regularizers.mdr import MDR
from tests.golden_vectors import golden_case, golden_cases, golden_facts, golden_tensors

TRAINING = golden_facts("mdr_train_steps")


def _labels(points: Tensor) -> Tensor:
    return torch.zeros(len(points), dtype=torch.int64)


# On a line at 0, 1 and 3: distances 1, 2 and 3, each twice in the matrix, and three zeros on its diagonal.
LINE = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
MEAN = 12 / 9
DEVIATION = math.sqrt((28 - 9 * MEAN**2) / 8)


def test_by_hand() -> None:
    regularizer = MDR(weight=2.0, level_weight=0.1).double()
    value = regularizer(LINE, _labels(LINE))
    nearest = [abs((distance - MEAN) / DEVIATION - 0) for distance in (1, 2, 3)]  # of -3, 0 and 3, always 0
    assert value.item() == pytest.approx(2 * sum(nearest) / 3 + 0.1 * (9 + 0 + 9), rel=1e-12)
    assert regularizer.mean.item() == pytest.approx(MEAN, rel=1e-12)
    assert regularizer.deviation.item() == pytest.approx(DEVIATION, rel=1e-12)


def test_later_batches_are_blended_in_before_use() -> None:
    regularizer = MDR(weight=1.0, level_weight=0.0, momentum=0.75).double()
    regularizer(LINE, _labels(LINE))
    value = regularizer(5 * LINE, _labels(LINE))
    mean, deviation = (0.75 * old + 0.25 * 5 * old for old in (MEAN, DEVIATION))
    nearest = [min(abs((5 * d - mean) / deviation - level) for level in (-3, 0, 3)) for d in (1, 2, 3)]
    assert value.item() == pytest.approx(sum(nearest) / 3, rel=1e-12)
    assert regularizer.mean.item() == pytest.approx(mean, rel=1e-12)


def test_levels_start_evenly_around_zero() -> None:
    assert MDR().levels.tolist() == [-3, 0, 3]
    assert MDR(num_levels=4, level_spread=1.5).levels.tolist() == pytest.approx([-1.5, -0.5, 0.5, 1.5])


def test_defaults_are_the_releases() -> None:
    regularizer = MDR()
    assert (regularizer.weight, regularizer.level_weight, regularizer.momentum) == (0.6, 0.01, 0.9)


@pytest.mark.parametrize("case", golden_cases("mdr_loss"))
def test_release(case: dict) -> None:
    """Three batches one after the other; the levels stay as they are."""
    golden, settings = golden_case("mdr_loss", case["case"]), {"weight": 1.0, "level_weight": 0.0}
    regularizer = MDR(**settings, num_levels=len(case["levels"]), momentum=case["momentum"]).double()
    with torch.no_grad():
        regularizer.levels.copy_(golden["levels"])
    for call in range(1, case["calls"] + 1):
        expected = {key.removeprefix(f"call{call}_"): value for key, value in golden.items()}
        points = expected["E"].requires_grad_()
        regularizer.zero_grad()
        value = regularizer(points, _labels(points))
        value.backward()
        for ours, theirs in (
            (value.detach(), expected["loss"]),
            (points.grad, expected["grad_E"]),
            (regularizer.levels.grad, expected["grad_levels"]),
            (regularizer.mean, expected["running_mean"].squeeze()),
            (regularizer.deviation, expected["running_std"].squeeze()),
        ):
            torch.testing.assert_close(ours, theirs, **case["tolerance"])


def test_release_in_training() -> None:
    """Six steps of Adam on the whole objective: a linear head scaled by its mean distance, triplets, this term."""
    settings, golden = TRAINING["hyperparameters"], golden_tensors("mdr_train_steps")
    weight, bias = golden["W0"].clone().requires_grad_(), golden["b0"].clone().requires_grad_()
    regularizer = MDR(weight=settings["lambda_mdr"], level_weight=settings["nu_mdr"]).double()
    optimizer = torch.optim.Adam(
        [weight, bias, regularizer.levels], lr=settings["lr"], weight_decay=settings["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, settings["milestones"], settings["gamma"])
    records = []
    for step, (features, labels) in enumerate(zip(golden["feat"], golden["labels"], strict=True)):
        raw = functional.linear(features, weight, bias)
        points = raw / torch.pdist(raw).mean()
        anchor, positive, negative = golden["triplets"][step]
        triplet = functional.triplet_margin_loss(
            points[anchor], points[positive], points[negative], margin=settings["margin"], eps=1e-6
        )
        term = regularizer(points, labels)
        optimizer.zero_grad()
        (triplet + term).backward()
        if step == 0:
            for ours, theirs in ((weight, "W"), (bias, "b"), (regularizer.levels, "levels")):
                torch.testing.assert_close(ours.grad, golden[f"step0_grad_{theirs}"], **TRAINING["tolerance"])
        of_levels = settings["nu_mdr"] * regularizer.levels.square().sum()
        alone = (term - of_levels) / settings["lambda_mdr"]
        rate = optimizer.param_groups[0]["lr"]
        values = (triplet, alone, term, regularizer.mean, regularizer.deviation, rate)
        records.append([float(torch.as_tensor(value).detach()) for value in values])
        optimizer.step()
        if (step + 1) % settings["steps_per_epoch"] == 0:
            schedule.step()
    record = torch.tensor(records, dtype=torch.float64)
    torch.testing.assert_close(record, golden["record"], **TRAINING["tolerance"])
    for ours, theirs in ((weight, "W_end"), (bias, "b_end"), (regularizer.levels, "levels_end")):
        torch.testing.assert_close(ours.detach(), golden[theirs], **TRAINING["tolerance"])


def test_a_batch_without_pairs_leaves_the_statistics_alone() -> None:
    regularizer = MDR()
    for _ in range(2):
        value = regularizer(LINE[:1].float().requires_grad_(), _labels(LINE[:1]))
        assert value.item() == 0
    assert not regularizer.initialised
    regularizer(LINE.float(), _labels(LINE))
    assert regularizer.initialised
    before = regularizer.mean.clone()
    regularizer(LINE[:1].float(), _labels(LINE[:1]))
    assert torch.equal(regularizer.mean, before)


def test_equal_rows_have_a_deviation_to_divide_by() -> None:
    regularizer = MDR()
    points = torch.ones(5, 3, requires_grad=True)
    value = regularizer(points, _labels(points))
    value.backward()
    assert value.isfinite()
    assert points.grad.isfinite().all()


def test_labels_do_not_matter() -> None:
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(MDR()(points, torch.arange(7)), MDR()(points, _labels(points)))
