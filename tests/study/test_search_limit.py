"""When a budget ends a search, by hand-made events."""

import pytest

from raydml.study.budget import Budget
from raydml.study.events import reduce_events
from raydml.study.search_limit import device_hours, limit_reached, settled
from tests.study.study_events import ended, epoch, stage_started, started, study_started


def running(num_epochs, *, epoch_s=360.0, gpus=2.0):
    """A search of trials that hold two GPUs, and two epochs of six minutes each reported so far."""
    found = [
        {**study_started(), "planned": [
            {"stage": "search", "num_trials": 3, "max_epochs": 9},
            {"stage": "confirm", "num_trials": 4, "max_epochs": 5},
            {"stage": "finalize", "num_trials": 2, "max_epochs": 0},
        ]},
        {**stage_started(3), "resources": {"cpu": 1.0, "gpu": gpus}},
        {**started(0), "gpus": gpus},
    ]  # fmt: skip
    for number in range(1, num_epochs + 1):
        one = epoch(0, number, 0.5)
        one["metrics"]["epoch_s"] = epoch_s
        found.append(one)
    return reduce_events(found)


def test_device_hours_are_those_of_all_epochs_and_of_the_stages_to_come():
    # 2 epochs x 0.1 h x 2 GPUs; then 4 runs x 5 epochs and 2 tests of one epoch each, 22 x 0.1 h x 2 GPUs.
    assert device_hours(running(2)) == (pytest.approx(0.4), pytest.approx(4.4), "GPU-hours")
    assert device_hours(running(2, gpus=0.0)) == (pytest.approx(0.2), pytest.approx(2.2), "CPU-hours")


def test_a_budget_ends_the_search_with_a_share_for_confirm_and_finalize():
    # After 2 epochs 0.4 are spent, and 1.3 x 4.4 = 5.72 reserved: 6.12.
    study = running(2)
    assert limit_reached(study, Budget(device_hours=6.13), None) is None
    reached = limit_reached(study, Budget(device_hours=6.11), None)
    assert reached.reason == "budget"
    words = "the budget of 6.11 GPU-hours ended the search after 0.40, with 4.40 for the stages after it"
    assert reached.words == words


def test_no_limit_ends_a_search_without_a_value():
    for budget in (Budget(device_hours=1e-9), Budget(until_settled=True)):
        assert limit_reached(running(0), budget, None) is None


def trials_of(values_by_loss):
    found = [study_started(), stage_started(40)]
    number = 0
    for values in zip(*values_by_loss.values(), strict=True):
        for loss, value in zip(values_by_loss, values, strict=True):
            found += [started(number, loss=loss, miner=None), epoch(number, 1, value), ended(number, "finished")]
            number += 1
    return reduce_events(found)


def test_a_search_ends_when_its_ranking_has_settled():
    clear = {"margin": [0.9, 0.91, 0.92, 0.9] * 3, "triplet": [0.5, 0.52, 0.51, 0.5] * 3, "circle": [0.1, 0.12] * 6}
    study = trials_of(clear)
    reached = limit_reached(study, Budget(until_settled=True), None)
    assert reached.reason == "settled"
    assert "the search has settled: the ranking of the 3 recipes did not change" in reached.words
    assert limit_reached(study, Budget(), None) is None
    # Two losses that are as good: halves of their trials do not agree.
    mixed = {"margin": [0.5, 0.6, 0.4, 0.7, 0.3, 0.55], "triplet": [0.6, 0.5, 0.7, 0.4, 0.55, 0.3]}
    assert limit_reached(trials_of(mixed), Budget(until_settled=True), None) is None


def test_a_search_of_one_recipe_cannot_settle():
    assert settled(trials_of({"margin": [0.5] * 20}).of_stage("search")) == ""
