"""What a study cost and what early stopping saved, from the seconds that each epoch reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from raydml.analysis.trials import TrialState

_HOUR_S = 3600.0


class StageCost(NamedTuple):
    """The cost of one stage. Hours are device hours: seconds of all epochs times the devices that a trial holds.

    hours_clustering: the part spent on embedding the training images and clustering them.
    epochs_saved: epochs that trials stopped early did not run. hours_saved: the same at each trial's mean epoch time.
    """

    stage: str
    num_trials: int
    epochs_run: int
    epochs_planned: int
    hours: float
    hours_clustering: float
    num_stopped: int
    epochs_saved: int
    hours_saved: float


class Cost(NamedTuple):
    """The cost of a study.

    unit: "GPU-hours" or, where trials hold no GPU, "CPU-hours". per_trial: devices of this kind that a trial holds, at
    most; least_per_trial: at least.
    """

    unit: str
    per_trial: float
    least_per_trial: float
    stages: list[StageCost]


def cost_of(trials: Sequence[TrialState], *, cpus: float, gpus: float) -> Cost:
    """Return the cost of each stage, in order of the stages' first trials.

    cpus, gpus: the resources that a trial holds, where its events do not have its own.

    Each epoch counts once. Not counted are epochs lost to an interruption, the time between two epochs, and epochs
    that diverged, which report no time.
    """
    unit = "GPU-hours" if gpus else "CPU-hours"
    held = {t.trial: cpus if not gpus else gpus if t.gpus is None else t.gpus for t in trials}
    most, least = max(held.values(), default=gpus or cpus), min(held.values(), default=gpus or cpus)
    stages = dict.fromkeys(trial.stage for trial in trials)
    by_stage = [_stage_cost(stage, [t for t in trials if t.stage == stage], held) for stage in stages]
    return Cost(unit, most, least, by_stage)


def _stage_cost(stage: str, trials: Sequence[TrialState], held: Mapping[str, float]) -> StageCost:
    stopped = [trial for trial in trials if trial.ended == "stopped_early"]
    missing = {trial.trial: max(trial.num_planned_epochs - trial.num_epochs, 0) for trial in stopped}
    hours, hours_clustering = (
        sum(_device_seconds(trial, name, held[trial.trial]) for trial in trials) / _HOUR_S
        for name in ("epoch_s", "clustering_s")
    )
    saved = [missing[trial.trial] * _mean_epoch_s(trial) * held[trial.trial] for trial in stopped]
    return StageCost(
        stage=stage,
        num_trials=len(trials),
        epochs_run=sum(len(trial.epochs) for trial in trials),
        epochs_planned=sum(trial.num_planned_epochs for trial in trials),
        hours=hours,
        hours_clustering=hours_clustering,
        num_stopped=len(stopped),
        epochs_saved=sum(missing.values()),
        hours_saved=sum(saved) / _HOUR_S,
    )


def _device_seconds(trial: TrialState, name: str, held: float) -> float:
    """Return the seconds of a trial's epochs times what it held in each; one that ran again may have held more."""
    total = 0.0
    for epoch, metrics in trial.epochs.items():
        then = trial.reports[epoch].gpus if trial.gpus and epoch in trial.reports else None
        total += metrics.get(name, 0.0) * (held if then is None else then)
    return total


def _seconds(trial: TrialState, name: str) -> list[float]:
    return [metrics[name] for metrics in trial.epochs.values() if name in metrics]


def _mean_epoch_s(trial: TrialState) -> float:
    seconds = _seconds(trial, "epoch_s")
    return sum(seconds) / len(seconds) if seconds else 0.0
