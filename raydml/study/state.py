"""How far a study is, told from its events alone: a pure fold over the lines of ``events.jsonl``.

No terminal, no thread and no clock here: ``reduce(state, event)`` gives the next state, so the live table, the plain
log and ``launch.py status`` say the same about the same file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from raydml.config.recipe import recipe_of

Event = Mapping[str, Any]

#: Reasons of a ``trial_ended`` event that mean something went wrong with the trial.
FAILURES = frozenset({"non_finite_loss", "collapsed", "crashed"})
#: Reasons that end a trial for good in the way the study wanted.
GOOD_ENDINGS = frozenset({"finished", "stopped_early"})


@dataclass(frozen=True)
class TrialProgress:
    """One trial: ``epoch`` of ``epochs`` have run; ``state`` is running, retrying, interrupted or why it ended."""

    trial: str
    stage: str
    recipe: str = ""
    embedding_dim: int | None = None
    learning_rate: float | None = None
    fold: int | None = None
    seed: int | None = None
    epochs: int = 0
    epoch: int = 0
    best: float | None = None
    best_epoch: int = 0
    state: str = "running"
    num_retries: int = 0
    error: str = ""

    @property
    def ended(self) -> bool:
        return self.state in GOOD_ENDINGS or self.state in FAILURES

    @property
    def settled_epochs(self) -> int:
        """Epochs of its budget about which nothing is open any more: all of them once the trial has ended."""
        return self.epochs if self.ended else self.epoch


@dataclass(frozen=True)
class StageProgress:
    """A stage as announced: ``num_trials`` trials of at most ``max_epochs`` epochs."""

    stage: str
    num_trials: int
    max_epochs: int
    finished: bool = False


@dataclass(frozen=True)
class StudyProgress:
    """A whole study. ``state`` is waiting, running, interrupted or finished; ``trials`` is keyed ``search-003``."""

    study: str = ""
    metric: str = "val_map_at_r"
    state: str = "waiting"
    stage: str = ""
    stages: Mapping[str, StageProgress] = field(default_factory=dict)
    trials: Mapping[str, TrialProgress] = field(default_factory=dict)
    num_test_reads: int = 0  # by the finalize stage; later evaluations are no progress
    notes: tuple[str, ...] = ()

    def of_stage(self, stage: str) -> list[TrialProgress]:
        """Its trials in the order of their keys: actors start them in any order."""
        return sorted((t for t in self.trials.values() if t.stage == stage), key=lambda trial: trial.trial)

    def best_of_stage(self, stage: str) -> TrialProgress | None:
        """The trial with the highest value of the metric; of equal ones the first."""
        scored = [trial for trial in self.of_stage(stage) if trial.best is not None]
        return max(scored, key=lambda trial: trial.best or 0.0, default=None)

    def settled(self, stage: str) -> tuple[int, int]:
        """Epochs settled in a stage and epochs it may cost at most: what a progress bar shows.

        A trial that is stopped early settles its whole budget at once, so the bar never overstates what is left.
        """
        plan = self.stages.get(stage)
        trials = self.of_stage(stage)
        total = max(plan.num_trials * plan.max_epochs if plan else 0, sum(trial.epochs for trial in trials))
        done = total if plan and plan.finished else sum(trial.settled_epochs for trial in trials)
        return min(done, total), total


def reduce(state: StudyProgress, event: Event) -> StudyProgress:
    """The state after one event. Kinds of events that say nothing about progress leave it as it is."""
    kind = event.get("event")
    if kind == "study_started":
        metric = str((event.get("config") or {}).get("select_on") or state.metric)
        return replace(state, study=str(event.get("study", "")), metric=metric, state="running")
    if kind == "stage_started":
        stage = StageProgress(str(event["stage"]), int(event.get("num_trials") or 0), int(event.get("max_epochs") or 0))
        return replace(state, state="running", stage=stage.stage, stages={**state.stages, stage.stage: stage})
    if kind == "stage_finished":
        name = str(event["stage"])
        stage = replace(state.stages.get(name) or StageProgress(name, 0, 0), finished=True)
        return replace(state, stages={**state.stages, name: stage})
    if kind == "trial_started":
        return _with_trial(state, _started(state, event))
    if kind in ("epoch", "trial_retried", "trial_ended"):
        # A file that begins in the middle (a lost spool) still gives a row, with what its events say.
        key = str(event["trial"])
        trial = state.trials.get(key) or TrialProgress(key, str(event.get("stage", state.stage)))
        return _with_trial(state, _advanced(trial, event, state.metric))
    if kind == "note":
        return replace(state, notes=(*state.notes, str(event.get("text", ""))))
    if kind == "test_read" and event.get("stage") == "finalize":
        return replace(state, num_test_reads=state.num_test_reads + 1)
    if kind == "interrupted":
        paused = {
            key: trial if trial.ended else replace(trial, state="interrupted") for key, trial in state.trials.items()
        }
        return replace(state, state="interrupted", trials=paused)
    if kind == "study_finished":
        return replace(state, state="finished")
    return state


def fold(events: Iterable[Event], state: StudyProgress | None = None) -> StudyProgress:
    """The state after many events."""
    state = StudyProgress() if state is None else state
    for event in events:
        state = reduce(state, event)
    return state


def _with_trial(state: StudyProgress, trial: TrialProgress) -> StudyProgress:
    return replace(state, trials={**state.trials, trial.trial: trial})


def _started(state: StudyProgress, event: Event) -> TrialProgress:
    """A row for a trial; one that starts again (a resume) keeps the epochs and the best value it has."""
    config: Mapping[str, Any] = event.get("config") or {}
    key, stage = str(event["trial"]), str(event.get("stage", state.stage))
    plan = state.stages.get(stage)
    row = state.trials.get(key) or TrialProgress(key, stage)
    model, optimizer = config.get("model") or {}, config.get("optimizer") or {}
    return replace(
        row,
        recipe=recipe_of(config),
        embedding_dim=model.get("embedding_dim"),
        learning_rate=optimizer.get("learning_rate"),
        fold=event.get("fold"),
        seed=event.get("seed"),
        epochs=int(config.get("epochs") or (plan.max_epochs if plan else 0)),
        state="running",
    )


def _advanced(trial: TrialProgress, event: Event, metric: str) -> TrialProgress:
    if event["event"] == "trial_retried":
        return replace(trial, state="retrying", num_retries=trial.num_retries + 1, error=str(event.get("error") or ""))
    if event["event"] == "trial_ended":
        return replace(trial, state=str(event.get("reason") or "finished"), error=str(event.get("error") or ""))
    epoch = int(event["epoch"])
    value = (event.get("metrics") or {}).get(metric)
    trial = replace(trial, epoch=epoch, state=trial.state if trial.ended else "running")
    if value is None or not math.isfinite(value) or (trial.best is not None and value <= trial.best):
        return trial
    return replace(trial, best=float(value), best_epoch=epoch)
