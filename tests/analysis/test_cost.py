"""The cost of studies whose seconds were chosen by hand."""

from __future__ import annotations

import pytest

from raydml.analysis.cost import cost_of
from raydml.analysis.trials import EpochReport, TrialState


def trial(key, stage, planned, seconds, ended, *, clustering=()):
    epochs = {number: {"epoch_s": spent} for number, spent in enumerate(seconds, start=1)}
    for number, spent in clustering:
        epochs[number]["clustering_s"] = spent
    reports = {number: EpochReport(metrics) for number, metrics in epochs.items()}
    state = ended or "running"
    return TrialState(key, stage, config={"epochs": planned}, reports=reports, num_epochs=len(seconds), state=state)


TRIALS = [
    trial("search-000", "search", 9, [10.0] * 9, "finished", clustering=[(1, 4.0), (5, 5.0)]),
    # Mean 30 s, 7 epochs missing: 210 s saved.
    trial("search-001", "search", 9, [20.0, 40.0], "stopped_early"),
    # A failure and a trial that is still running save nothing.
    trial("search-002", "search", 9, [10.0], "crashed"),
    trial("search-003", "search", 9, [10.0] * 3, ""),
    trial("confirm-000", "confirm", 9, [50.0] * 9, "finished"),
]


def test_each_stage_costs_the_seconds_of_its_epochs():
    cost = cost_of(TRIALS, cpus=8, gpus=0.5)
    assert (cost.unit, cost.per_trial) == ("GPU-hours", 0.5)
    search, confirm = cost.stages
    assert (search.stage, search.num_trials, search.epochs_run, search.epochs_planned) == ("search", 4, 15, 36)
    assert search.hours == pytest.approx((90 + 60 + 10 + 30) / 2 / 3600)
    assert search.hours_clustering == pytest.approx(9 / 2 / 3600)
    assert (search.num_stopped, search.epochs_saved) == (1, 7)
    assert search.hours_saved == pytest.approx(7 * 30 / 2 / 3600)
    assert (confirm.hours, confirm.hours_saved, confirm.epochs_saved) == (pytest.approx(450 / 2 / 3600), 0, 0)


def test_an_epoch_costs_what_the_trial_held_then():
    """Three epochs of 10 s on a quarter of a GPU, one on a whole one after the trial had found no memory."""
    reports = {n: EpochReport({"epoch_s": 10.0}, gpus=0.25 if n < 4 else 1.0) for n in (1, 2, 3, 4)}
    moved = TrialState("search-000", "search", reports=reports, num_epochs=4, state="finished", gpus=1.0)
    shared = TrialState("search-001", "search", reports={1: EpochReport({"epoch_s": 8.0}, gpus=0.5)}, num_epochs=1,
                        state="finished", gpus=0.5)  # fmt: skip
    cost = cost_of([moved, shared], cpus=8, gpus=1.0)
    assert cost.stages[0].hours == pytest.approx((3 * 10 * 0.25 + 10 + 8 * 0.5) / 3600)
    assert (cost.least_per_trial, cost.per_trial) == (0.5, 1.0)


def test_without_a_gpu_the_cost_is_that_of_the_cpus():
    cost = cost_of(TRIALS[:1], cpus=4, gpus=0)
    assert (cost.unit, cost.per_trial) == ("CPU-hours", 4)
    assert cost.stages[0].hours == pytest.approx(4 * 90 / 3600)


def test_an_epoch_that_diverged_has_no_time_and_a_trial_without_epochs_saves_nothing():
    diverged = trial("search-000", "search", 4, [10.0], "non_finite_loss")
    diverged.epochs[2] = {"train_loss": 1.0}
    stopped = trial("search-001", "search", 4, [], "stopped_early")
    (search,) = cost_of([diverged, stopped], cpus=1, gpus=1).stages
    assert search.hours == pytest.approx(10 / 3600)
    assert search.epochs_run == 2
    assert search.epochs_saved == 4
    assert search.hours_saved == 0
    assert cost_of([], cpus=1, gpus=1).stages == []
