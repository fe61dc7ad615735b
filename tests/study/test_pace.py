"""The estimate of the time that a study still needs, and when its search has to end; expected values by hand."""

import numpy as np
import pytest

from raydml.study.events import reduce_events
from raydml.study.pace import remaining_s
from raydml.study.search_limit import has_to_end
from tests.study.study_events import ended, epoch, stage_started, started, study_started
from tests.study.test_rungs import simulated_asha


def at(time_s, event):
    return event | {"time": time_s}


def running_study(scheduler="none"):
    """A search with 2 slots: its first trial has run 2 of 4 epochs, 2 s each, and 3 trials wait."""
    planned = [
        {"stage": "search", "num_trials": 4, "max_epochs": 4},
        {"stage": "confirm", "num_trials": 4, "max_epochs": 4},
        {"stage": "finalize", "num_trials": 2, "max_epochs": 0},
    ]
    search = {"scheduler": scheduler, "grace_epochs": 1, "reduction_factor": 2}
    return [
        at(0.0, study_started() | {"planned": planned, "config": {"search": search}}),
        at(4.0, stage_started(4, 4) | {"num_slots": 2}),
        at(10.0, started(0, epochs=4)),
        at(12.0, epoch(0, 1, 0.5)),
        at(14.0, epoch(0, 2, 0.6)),
    ]


def test_there_is_no_estimate_before_the_first_epoch():
    assert remaining_s(reduce_events(running_study()[:3])) is None


def test_the_rest_of_a_study_is_epochs_over_slots_in_every_stage():
    # A whole trial: 0.4 s to take its place, and 4 epochs of 2 s. A stage starts in 6 s, as the search did.
    search = (2 * 2) / 2 + 3 * 8.4 / 2
    confirm = 6 + 4 * 8.4 / 2
    finalize = 6 + (2 + 1.5)
    study = reduce_events(running_study())
    assert remaining_s(study) == pytest.approx(search + confirm + finalize + 10)
    assert remaining_s(study, ("confirm",)) == pytest.approx(confirm)


def test_runs_on_further_folds_count_as_if_all_trials_had_them_and_then_as_they_are():
    events = running_study()
    one_fold = remaining_s(reduce_events(events), ("search",))
    events[0]["config"]["search"]["folds"] = 3
    # 4 trials of 4 epochs of 2 s on 2 more folds, 2 at a time.
    assert remaining_s(reduce_events(events), ("search",)) == pytest.approx(one_fold + 4 * 4 * 2 * 2 / 2)
    # With halving, 2 of 4 trials pass epoch 1, and 1 of these epoch 2; but no run on a further fold is stopped.
    events = running_study("sync")
    events[0]["config"]["search"]["folds"] = 2
    events.append(at(14.0, ended(0, "finished")))
    for number in (1, 2, 3):
        events += [at(14.0, started(number, epochs=4)), at(14.0, ended(number, "finished"))]
    events.append(at(14.0, stage_started(6, 4) | {"num_slots": 2}))
    further = {**started(0, epochs=4), "trial": "search-000-fold-0"}
    events += [at(20.0, further), at(22.0, {**epoch(0, 1, 0.5), "trial": "search-000-fold-0"})]
    events += [at(24.0, {**epoch(0, 2, 0.5), "trial": "search-000-fold-0"})]
    # It has 2 epochs left, and one waits, in a slot of its own.
    assert remaining_s(reduce_events(events), ("search",)) == pytest.approx(2 * 2 / 2 + 8.4)


def test_an_estimate_does_not_jump_where_one_stage_ends_and_the_next_begins():
    events = running_study()
    for number in (1, 2, 3):
        events += [
            at(16.0, started(number, epochs=4)),
            at(24.0, epoch(number, 4, 0.5)),
            at(24.0, ended(number, "finished")),
        ]
    events += [at(24.0, epoch(0, 4, 0.7)), at(24.0, ended(0, "finished"))]
    before = remaining_s(reduce_events(events))
    events += [
        at(24.1, {"event": "stage_finished", "stage": "search"}),
        at(24.2, stage_started(4, 4, "confirm") | {"num_slots": 2}),
    ]
    assert remaining_s(reduce_events(events)) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize(("num_trials", "max_epochs", "reduction_factor"), [(8, 6, 2), (9, 9, 3)])
def test_the_waiting_trials_of_a_search_take_what_rays_scheduler_takes(num_trials, max_epochs, reduction_factor):
    search = {"scheduler": "asha", "grace_epochs": 1, "reduction_factor": reduction_factor}
    planned = [{"stage": "search", "num_trials": num_trials, "max_epochs": max_epochs}]
    events = [
        at(0.0, study_started() | {"planned": planned, "config": {"search": search}}),
        at(4.0, stage_started(num_trials, max_epochs) | {"num_slots": 1}),
        at(10.0, started(0, epochs=max_epochs)),
        *(at(10.0 + 2 * number, epoch(0, number, 0.5)) for number in range(1, max_epochs + 1)),
    ]
    sizes = {"max_epochs": max_epochs, "grace_epochs": 1, "reduction_factor": reduction_factor}
    each = np.mean(simulated_asha(num_trials, **sizes))
    waiting_s = (num_trials - 1) * (0.4 + 2 * each)  # the first trial has no epoch left
    assert remaining_s(reduce_events(events), ("search",)) == pytest.approx(waiting_s, rel=0.03)


def test_a_running_trial_of_a_search_has_passed_its_rungs():
    # The first trial has passed the rungs at 1 and 2, and has two epochs of 2 s left.
    each = np.mean(simulated_asha(4, max_epochs=4, grace_epochs=1, reduction_factor=2))
    search = (2 * 2) / 2 + 3 * (0.4 + 2 * each) / 2
    assert remaining_s(reduce_events(running_study("asha")), ("search",)) == pytest.approx(search, rel=0.03)


def test_the_search_ends_when_the_later_stages_need_the_time_that_is_left():
    study = reduce_events(running_study())
    later = 1.3 * ((6 + 4 * 8.4 / 2) + (6 + 3.5) + 10)
    assert not has_to_end(study, later + 0.1)
    assert has_to_end(study, later - 0.1)
    assert not has_to_end(reduce_events(running_study()[:3]), -100.0), "without a value there is nothing to confirm"


def test_a_study_without_a_driver_is_not_active():
    events = [*running_study(), at(1000.0, study_started()), at(1003.0, {"event": "step", "name": "starting Ray"})]
    assert reduce_events(events).active_s == 14 + 3
