"""The trial of a refit: its classes, its epochs and its schedule, by hand."""

import pytest

from raydml.config.refit import median_epochs, refit_trial, scaled_schedule, trains_on_test_classes, validates
from raydml.config.sections import ConstantSchedule, CosineSchedule, ExponentialSchedule, StepSchedule
from raydml.config.trial import parse_study, parse_trial
from tests.config.problems import problems_of
from tests.config.test_trial import trial_with


@pytest.mark.parametrize(
    ("epochs", "median"),
    [([7], 7), ([16, 12, 14], 14), ([12, 14, 16, 14], 14), ([10, 13], 12), ([1, 2], 2), ([3, 30, 4, 5], 5)],
)
def test_the_median_of_an_even_number_of_epochs_is_the_rounded_middle_and_a_half_counts_up(epochs, median):
    assert median_epochs(epochs) == median


def step(*milestones, **settings):
    return StepSchedule.model_validate({"name": "step", "milestones": milestones, **settings})


@pytest.mark.parametrize(
    ("before", "after", "milestones", "scaled"),
    [
        (40, 40, (20, 30), (20, 30)),
        (40, 20, (20, 30), (10, 15)),
        (40, 14, (20, 30), (7, 11)),  # 10.5 is rounded up
        (40, 60, (20, 30), (30, 45)),
        (40, 13, (20, 39), (7, 12)),  # 12.675 would be after the last epoch
        (40, 3, (20, 30), (2,)),  # 1.5 and 2.25
        (40, 4, (1, 2, 20), (1, 2)),  # 0.1 and 0.2 would be before the first epoch
    ],
)
def test_milestones_keep_their_share_of_the_epochs(before, after, milestones, scaled):
    assert scaled_schedule(step(*milestones), before, after).milestones == scaled


def test_warm_ups_keep_their_share_and_at_least_one_epoch():
    cosine = {"name": "cosine", "warmup_epochs": 10, "new_layer_warmup_epochs": 1, "new_layer_factor": 10.0}
    settings = CosineSchedule.model_validate(cosine)
    half = scaled_schedule(settings, 40, 20)
    assert (half.warmup_epochs, half.new_layer_warmup_epochs, half.new_layer_factor) == (5, 1, 10.0)
    assert scaled_schedule(settings, 40, 2).warmup_epochs == 1
    assert scaled_schedule(ConstantSchedule(), 40, 7) == ConstantSchedule()
    # After all 40 epochs, as after all 20 of the refit, the rate is 0.9 ** 40 of the first.
    exponential = scaled_schedule(ExponentialSchedule(name="exponential", gamma=0.9), 40, 20)
    assert exponential.gamma == pytest.approx(0.81)
    # One epoch has room for neither, and what is left is a trial that its own rules accept.
    assert scaled_schedule(settings, 40, 1) == CosineSchedule(name="cosine")
    assert scaled_schedule(step(20, gamma=0.5, warmup_epochs=2), 40, 1) == ConstantSchedule()


def test_a_refit_is_the_trial_on_all_its_classes_with_other_epochs_and_seed():
    trial = parse_trial(trial_with(epochs=8, schedule={"name": "step", "milestones": [4, 6]}, seed=3))
    refit = refit_trial(trial, epochs=4, classes="development", seed=7)
    assert (refit.epochs, refit.seed, refit.schedule.milestones) == (4, 7, (2, 3))
    assert (refit.data.split.val_fraction, refit.data.split.fold) == (0.0, None)
    assert refit.data.split.test_fraction == trial.data.split.test_fraction
    assert not validates(refit)
    assert not trains_on_test_classes(refit)
    everything = refit_trial(trial, epochs=4, classes="all", seed=7)
    assert everything.data.split.test_fraction == 0.0
    assert trains_on_test_classes(everything)
    changed = {"epochs", "seed", "schedule", "data"}
    before, after = (one.model_dump(exclude=changed) for one in (trial, refit))
    assert before == after
    # The same of plain values, and of the event of an older study, which has not all of them.
    for one, has_validation in ((trial, True), (refit, False)):
        assert validates(one.model_dump(mode="json")) is has_validation
    assert validates({})
    assert not trains_on_test_classes({"data": {}})


def test_more_refits_than_the_stages_around_them_leave_are_refused_with_the_cure():
    confirm, finalize = {"top": 2, "folds": 2}, {"top": 1}
    found = problems_of(parse_study, {"confirm": confirm, "refit": {"top": 3}})
    assert found["refit.top"].cure == "write at most 2, or raise confirm.top"
    found = problems_of(parse_study, {"confirm": confirm, "refit": {"top": 2}, "finalize": finalize})
    assert found["refit.top"].cure == "write at most 1, or raise finalize.top"
    # What is never scored needs no place in finalize.
    study = parse_study({"confirm": confirm, "refit": {"top": 2, "classes": "all"}, "finalize": finalize})
    assert (study.refit.seeds, study.refit.epochs) == (3, "confirmed")
    assert parse_study({"refit": {"epochs": 40}}).refit.epochs == 40
    found = problems_of(parse_study, {"refit": {"epochs": "best", "classes": "train"}})
    assert set(found) == {"refit.epochs", "refit.classes"}
