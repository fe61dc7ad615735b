"""The mark of a study that ran in miniature, on generated images, and what it shows."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import NamedTuple

from raydml.config.rules import batch_size_of
from raydml.study.events import read_state
from raydml.study.folder import read_study, write_json


class SmokeOutcome(NamedTuple):
    """num_trials: of all stages. peak_memory_bytes: the largest of a trial. seconds_per_step: of training, the median
    over the epochs, 0 where unknown. failures: one sentence for each trial that did not reach its end. failed_stages:
    those in which no trial did."""

    num_trials: int
    peak_memory_bytes: int
    seconds_per_step: float
    failures: list[str]
    failed_stages: list[str]


def mark_as_smoke(folder: Path) -> None:
    """Record in study.json that the numbers of a study mean nothing; its report and its MLflow run say so, too."""
    write_json(folder / "study.json", {**read_study(folder), "smoke": True})


def smoke_outcome(folder: Path) -> SmokeOutcome:
    """Return what the trials of a study show, from its events."""
    trials = list(read_state(folder).trials.values())
    epochs = [(trial.config["sampler"], metrics) for trial in trials for metrics in trial.epochs.values()]
    reached_end = [trial for trial in trials if trial.ended in ("finished", "stopped_early")]
    stages = dict.fromkeys(trial.stage for trial in trials)
    sizes = [(batch_size_of(sampler), metrics.get("images_per_s")) for sampler, metrics in epochs]
    seconds = [size / images_per_s for size, images_per_s in sizes if size and images_per_s]
    return SmokeOutcome(
        len(trials),
        int(max((metrics.get("peak_memory_bytes", 0) for _, metrics in epochs), default=0)),
        median(seconds) if seconds else 0.0,
        [
            f"{trial.trial} ({trial.recipe}): {trial.ended.replace('_', ' ')}"
            + (f", {trial.error}" if trial.error else "")
            for trial in trials
            if trial not in reached_end
        ],
        [stage for stage in stages if not any(trial.stage == stage for trial in reached_end)],
    )
