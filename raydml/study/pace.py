"""How long the rest of a study takes, estimated from the epochs that it has run.

The live view shows it, and ``--time`` ends the search by it. A stage costs the epochs that are left, at the mean time
of an epoch so far, divided by the number of trials that run at once. In a search that stops trials early, the expected
number of epochs counts: that of `study.rungs`, and increasingly what its ended trials have run. Before the first
epoch there is no estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from raydml.analysis.trials import TrialState
from raydml.study.events import STAGES, StageState, StudyState
from raydml.study.rungs import expected_epochs_left, expected_spans

#: Seconds until the first trial of a stage starts (a process that imports torch), until the next trial takes a place,
#: and for the pictures and the report. Assumed, with the start of a stage near the 6 s of docs/LOG.md (two idle CPU
#: cores; 17 s under load), until a stage of the study has started.
STAGE_START_S, TRIAL_START_S, RESULTS_S = 7.0, 0.4, 10.0
#: A test evaluates four parts (trained and untrained, validation and test): assumed to take as long as this many
#: epochs, plus this many seconds.
TEST_EPOCHS, TEST_S = 1.0, 1.5
_PRIOR_TRIALS = 2.0  # ended trials that the expectation by halving counts as much as


class Pace(NamedTuple):
    """Mean seconds of an epoch, of the first epoch of a trial, and from the start of a stage to its first trial."""

    epoch_s: float
    first_epoch_s: float
    stage_start_s: float


def remaining_s(
    study: StudyState, stages: Sequence[str] = STAGES, *, pace: Pace | None = None, num_slots: int | None = None
) -> float | None:
    """Return the estimated seconds from the newest event to the end of these stages; None before the first epoch.

    pace: measured otherwise, before there is an epoch. num_slots: trials at a time in stages that have not started.
    """
    pace = pace or pace_of(study)
    if pace is None:
        return None
    left_s = sum(_stage_s(study, stage, pace, num_slots) for stage in stages)
    return left_s + (RESULTS_S if "finalize" in stages else 0.0)


def pace_of(study: StudyState) -> Pace | None:
    """Return how fast the study has been: of the stage that runs where it has an epoch, else of all its trials."""
    trials = [trial for trial in study.of_stage(study.stage) if trial.reports] or list(study.trials.values())
    gaps, firsts = [], []
    for trial in trials:
        times = [trial.reports[epoch].time_s for epoch in sorted(trial.reports)]
        times = [time_s for time_s in times if time_s >= trial.started_s]  # since its newest start
        gaps += [later - earlier for earlier, later in pairwise(times) if later > earlier]
        firsts += [times[0] - trial.started_s] if times and trial.started_s else []
    if not gaps and not firsts:
        return None
    first_s = fmean(firsts) if firsts else fmean(gaps)
    starts = [
        min(begun) - stage.started_s
        for name, stage in study.stages.items()
        if (begun := [t.started_s for t in study.of_stage(name) if t.started_s >= stage.started_s > 0])
    ]
    return Pace(fmean(gaps) if gaps else first_s, first_s, fmean(starts) if starts else STAGE_START_S)


def _stage_s(study: StudyState, stage: str, pace: Pace, num_slots: int | None = None) -> float:
    plan = study.stages.get(stage) or study.planned.get(stage)
    if plan is None or plan.finished:
        return 0.0
    if stage in study.stages:
        num_slots = plan.num_slots
    elif num_slots is None:
        num_slots = max(begun.num_slots for begun in study.stages.values())
    num_slots = max(1, num_slots)
    if stage == "finalize":
        num_left = max(plan.num_trials - study.num_tested, 0) if stage in study.stages else plan.num_trials
        waves = -(-num_left // num_slots)
        return (pace.stage_start_s if num_left == plan.num_trials else 0.0) + waves * (
            TEST_EPOCHS * pace.epoch_s + TEST_S
        )
    trials = study.of_stage(stage)
    is_on_further_folds = any(trial.is_further_fold for trial in trials)
    search = study.config.get("search", {}) if stage == "search" and not is_on_further_folds else {}
    spans = _spans(search, plan)
    rest = [
        expected_epochs_left(spans, num_planned=t.num_planned_epochs, num_done=t.num_epochs)
        for t in trials
        if not t.ended
    ]
    num_waiting = max(plan.num_trials - len(trials), 0)
    fresh = _fresh_epochs(spans, plan, [trial for trial in trials if trial.ended])
    whole_s = TRIAL_START_S + pace.first_epoch_s + max(fresh - 1, 0.0) * pace.epoch_s
    busy_s = [epochs * pace.epoch_s for epochs in rest]
    # Equal trials run in waves: with fewer of them than places the stage lasts as long as one.
    waiting_s = num_waiting * whole_s / num_slots if num_waiting >= num_slots else whole_s * bool(num_waiting)
    start_s = 0.0 if trials else pace.stage_start_s
    # At most: those that are significantly worse than the best have no further folds.
    num_further = spans[-1][1] * (int(search.get("folds", 1)) - 1)
    start_s += num_further * plan.max_epochs * pace.epoch_s / num_slots
    return start_s + max(waiting_s + sum(busy_s) / num_slots, max(busy_s, default=0.0))


def _fresh_epochs(spans: tuple[tuple[int, float], ...], plan: StageState, ended: Sequence[TrialState]) -> float:
    """Return the expected epochs of a trial that has not started: by halving, and by what ended trials have run."""
    prior = expected_epochs_left(spans, num_planned=plan.max_epochs, num_done=0)
    if len(spans) == 1:
        return prior
    return (_PRIOR_TRIALS * prior + sum(trial.num_epochs for trial in ended)) / (_PRIOR_TRIALS + len(ended))


def _spans(search: Mapping[str, Any], plan: StageState) -> tuple[tuple[int, float], ...]:
    """Return the expected numbers of trials between the rungs. search: settings; empty for a stage that stops none."""
    return expected_spans(
        max(plan.num_trials, 1),
        search.get("scheduler", "none"),
        max_epochs=plan.max_epochs,
        grace_epochs=int(search.get("grace_epochs", 1)),
        reduction_factor=int(search.get("reduction_factor", 3)),
    )
