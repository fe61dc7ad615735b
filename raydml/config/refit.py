"""The trial of a refit: a searched trial on all its training classes, for another number of epochs.

Nothing validates a refit, so its epochs are fixed beforehand and its last weights count. Its learning rates fall in the
shape that they had in the searched trial: a cosine by itself, the others by `scaled_schedule`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from raydml.config.sections import ConstantSchedule, ExponentialSchedule, Schedule, SplitSettings, StepSchedule
from raydml.config.trial import Trial


def validates(trial: Trial | Mapping[str, Any]) -> bool:
    """Return whether a trial, or its plain values, has validation classes.

    Without them nothing selects: neither an epoch nor a trial. Of an older event, some blocks may be missing.
    """
    return bool(_split_of(trial).get("val_fraction", True))


def has_search(trials: Iterable[Trial | Mapping[str, Any]]) -> bool:
    """Return whether a study of these trials, or of their plain values, has a search: each has validation classes."""
    return all(map(validates, trials))


def trains_on_test_classes(trial: Trial | Mapping[str, Any]) -> bool:
    """Return whether a trial, or its plain values, trains on the test classes as well: no score of them is valid."""
    return not _split_of(trial).get("test_fraction", True)


def trained_on(trial: Trial | Mapping[str, Any]) -> str:
    """Return which classes a trial, or its plain values, trains on, in words: a mark that goes with its weights."""
    if trains_on_test_classes(trial):
        return "all classes, the test classes included: never scored on them"
    return "the training classes of its split" if validates(trial) else "all development classes"


def _split_of(trial: Trial | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(trial, Trial):
        return trial.data.split.model_dump()
    return (trial.get("data") or {}).get("split") or {}


def refit_split(split: SplitSettings, classes: Literal["development", "all"]) -> SplitSettings:
    """Return a split in which no class validates, and with ``all`` none is sealed."""
    everything = {"test_fraction": 0.0} if classes == "all" else {}
    return split.model_copy(update={"val_fraction": 0.0, "fold": None, **everything})


def refit_trial(trial: Trial, *, epochs: int, classes: Literal["development", "all"], seed: int) -> Trial:
    """Return a searched trial with all development classes for training, and with ``all`` the test classes as well."""
    data = trial.data.model_copy(update={"split": refit_split(trial.data.split, classes)})
    schedule = scaled_schedule(trial.schedule, trial.epochs, epochs)
    return trial.model_copy(update={"data": data, "epochs": epochs, "schedule": schedule, "seed": seed})


def median_epochs(best_epochs: Sequence[int]) -> int:
    """Return the median of the best epochs of several runs; of an even number of runs, the mean of the two in the
    middle, with a half rounded up."""
    ordered, middle = sorted(best_epochs), len(best_epochs) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return _half_up(ordered[middle - 1] + ordered[middle], 2)


def scaled_schedule(schedule: Schedule, before: int, after: int) -> Schedule:
    """Return the schedule of a trial of `before` epochs for one of `after` epochs, with the same shape.

    Milestones and warm-ups keep their share of the epochs, rounded to whole epochs, a half up. A milestone or a warm-up
    keeps at least one epoch before and one after it; milestones that then coincide are one. A trial of one epoch has
    room for neither: its rate is constant. An exponential falls as far as before in all.
    """
    if before == after:
        return schedule

    def scaled(epochs: int) -> int:
        return min(max(_half_up(epochs * after, before), 1), after - 1) if epochs else 0

    settings: dict[str, Any] = {
        "warmup_epochs": scaled(schedule.warmup_epochs),
        "new_layer_warmup_epochs": scaled(schedule.new_layer_warmup_epochs),
    }
    if not settings["new_layer_warmup_epochs"]:
        settings["new_layer_factor"] = 1.0
    if isinstance(schedule, ExponentialSchedule):
        settings["gamma"] = max(schedule.gamma ** (before / after), sys.float_info.min)  # never 0, which is no factor
    if isinstance(schedule, StepSchedule):
        if after == 1:
            return ConstantSchedule()
        settings["milestones"] = tuple(dict.fromkeys(scaled(milestone) for milestone in schedule.milestones))
    return schedule.model_copy(update=settings)


def _half_up(numerator: int, denominator: int) -> int:
    """Return a quotient of natural numbers, rounded; a half is rounded up."""
    return (2 * numerator + denominator) // (2 * denominator)
