"""One trial as its study's events describe it, and its configuration as parameters that can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from raydml.config.recipe import flatten, recipe_of

#: States of a trial that has not ended.
UNENDED = ("running", "retrying", "interrupted")
#: Reasons for which a trial ends, in words; the empty reason is that of a trial that has not ended.
ENDINGS = {
    "finished": "ran to the end",
    "stopped_early": "stopped early",
    "time": "ended by the time limit",
    "budget": "ended by the budget",
    "settled": "ended when the search had settled",
    "non_finite_loss": "non-finite loss",
    "collapsed": "collapsed",
    "out_of_memory": "out of memory",
    "stuck": "stuck",
    "crashed": "crashed",
    "": "not ended",
}
#: The reason of a trial that found no memory.
OUT_OF_MEMORY = "out_of_memory"
#: Endings by a limit of the search. Such a trial can go on in a longer one.
LIMITS = ("time", "budget", "settled")
#: Endings that mean that something went wrong.
FAILURES = ("non_finite_loss", "collapsed", "out_of_memory", "stuck", "crashed")
#: Reasons, in words, for which a trial is started again that are none of its own.
MOVES = {(PREEMPTED := "preempted"): "was about to be taken away", (LOST_NODE := "lost_node"): "is gone"}
#: Blocks of a configuration that are chosen by name.
CHOICES = ("loss", "method", "miner", "sampler", "regularizers")
#: In the keys of runs of searched trials on further folds: ``search-003-fold-1`` is search-003 on fold 1.
_ON_FOLD = "-fold-"


def further_key(searched: str, fold: int) -> str:
    """Return the key of a run of a searched trial on a further fold."""
    return f"{searched}{_ON_FOLD}{fold}"


@dataclass(frozen=True)
class EpochReport:
    """Metrics of one epoch by name, when they were reported (seconds since 1970), and the GPUs that the trial held."""

    metrics: Mapping[str, float]
    time_s: float = 0.0
    gpus: float | None = None


@dataclass(frozen=True)
class TrialState:
    """One trial of a study: its configuration, the epochs it has reported and what became of it.

    A trial that goes on from a checkpoint, after a crash or a resume, reports some epochs a second time. The rule for
    all readers of a study: **the last report counts**, and epochs behind the one reported last do not count until they
    are reported again. The reason: the trial's weights, its checkpoints and everything it does from there on descend
    from the last report. An earlier report may describe weights that no longer exist; where training repeats exactly
    (on a CPU) the two are equal anyway.

    trial: its key, such as ``search-003``. metric: what the study ranks its trials by. reports: the last report of each
    epoch, by number. num_epochs: number of the epoch reported last. state: one of `UNENDED`, or the reason why the
    trial has ended. started_s, changed_s: when it last started, and when the state last changed (seconds since 1970).
    error: why it ended in failure. retried_after: the error before the newest of its `num_retries` retries.
    num_moves: how often it was started again because its node went away; no retry is counted for that.
    retry_reasons: ``out_of_memory``, ``stuck`` or one of `MOVES`, for each new start that had such a reason.
    is_superseded: whether it belongs to a stage that is run again after a longer search, and is not part of it.
    gpus: what it holds; None in older studies. node, device: where it trained last, known once it has ended or been
    retried; device is the name of the GPU, or ``cpu``. class_values: of the metric at the best epoch, one for each
    validation class; known of some trials once they have ended (see `raydml.study.folds`).
    """

    trial: str
    stage: str
    metric: str = "val_map_at_r"
    config: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    configuration: str = ""
    reports: Mapping[int, EpochReport] = field(default_factory=dict)
    num_epochs: int = 0
    state: str = "running"
    started_s: float = 0.0
    changed_s: float = 0.0
    error: str | None = None
    num_retries: int = 0
    num_moves: int = 0
    retried_after: str = ""
    retry_reasons: tuple[str, ...] = ()
    is_superseded: bool = False
    gpus: float | None = None
    node: str = ""
    device: str = ""
    class_values: tuple[float, ...] = ()

    @property
    def searched(self) -> str:
        """The key of the searched trial that this is a run of: itself, unless it runs on a further fold."""
        return self.trial.partition(_ON_FOLD)[0]

    @property
    def is_further_fold(self) -> bool:
        """Whether it is a run of a searched trial on a further fold (`study.search.folds`)."""
        return _ON_FOLD in self.trial

    @property
    def ended(self) -> str:
        """The reason why it has ended; empty while it has not."""
        return "" if self.state in UNENDED else self.state

    @cached_property
    def epochs(self) -> dict[int, Mapping[str, float]]:
        """Number of an epoch -> its metrics, in order; only the epochs that count."""
        return {epoch: self.reports[epoch].metrics for epoch in sorted(self.reports) if epoch <= self.num_epochs}

    @cached_property
    def _best(self) -> tuple[float | None, int | None]:
        points = [(value, epoch) for epoch, value in self.curve(self.metric) if value is not None]
        finite = [point for point in points if math.isfinite(point[0])]
        return max(finite, key=lambda point: (point[0], -point[1])) if finite else (None, None)

    @property
    def best(self) -> float | None:
        """The highest finite value of the ranking metric."""
        return self._best[0]

    @property
    def epoch_of_best(self) -> int | None:
        """The epoch of the best value, the earliest if several have it."""
        return self._best[1]

    @property
    def num_planned_epochs(self) -> int:
        return int(self.config.get("epochs") or self.num_epochs)

    @property
    def recipe(self) -> str:
        return recipe_of(self.config)

    @property
    def fold(self) -> int | None:
        fold: int | None = self.config.get("data", {}).get("split", {}).get("fold")
        return fold

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def metrics(self) -> list[str]:
        """Names of what its epochs report, in order of appearance."""
        return list(dict.fromkeys(name for metrics in self.epochs.values() for name in metrics))

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(epoch, value) of the epochs that have this metric."""
        return [(epoch, metrics[metric]) for epoch, metrics in self.epochs.items() if metric in metrics]


def folds_text(row: Mapping[str, Any]) -> str:
    """Return over how many folds the value of a searched trial is a mean. row: of the summary's ``search``."""
    num_folds = row.get("num_folds", 1)
    return f"mean of {num_folds}" if num_folds > 1 else "1, pruned" if row.get("pruned") else "1"


def level_of(config: Mapping[str, Any], choice: str) -> str:
    """Return the name that a trial has in a block of `CHOICES`: ``margin``; ``none`` without one; ``mdr + rho``."""
    block = config.get(choice) or {}
    if choice == "regularizers":
        return " + ".join(sorted(block)) or "none"
    return str(block.get("name", "none"))


def parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as parameters that mean the same in every trial: ``loss`` and ``loss.margin.beta``.

    The names of the choices are parameters of their own, and the settings of a choice carry its name: the beta of one
    loss is not that of another. The seed is left out.
    """
    flat: dict[str, Any] = {choice: level_of(config, choice) for choice in CHOICES}
    for name, value in flatten({key: block for key, block in config.items() if key != "seed"}).items():
        block, _, rest = name.partition(".")
        if block == "regularizers":
            flat[name] = value
        elif block in CHOICES:
            if rest and rest != "name":
                flat[f"{block}.{flat[block]}.{rest}"] = value
        else:
            flat[name] = value
    return flat


def varying(parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the parameters that differ among the trials that have them, in order of appearance."""
    names = dict.fromkeys(name for one in parameters for name in one)
    return [name for name in names if len({repr(one[name]) for one in parameters if name in one}) > 1]


def constant(parameters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the parameters that all trials have, with one value."""
    first, *others = parameters or [{}]
    return {name: value for name, value in first.items() if all(name in one and one[name] == value for one in others)}


def by_stage(trials: Iterable[TrialState], stage: str) -> list[TrialState]:
    return [trial for trial in trials if trial.stage == stage]


def searched_trials(trials: Iterable[TrialState]) -> list[TrialState]:
    """Return the trials of the search on its first fold."""
    return [trial for trial in by_stage(trials, "search") if not trial.is_further_fold]
