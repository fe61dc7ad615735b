"""A study event by event, without Ray and without training: a searcher, a scheduler, slots, and curves that are known.

A searcher of raydml draws the next configuration when a slot is free, and the scheduler that a study has decides after
each epoch. Every epoch takes the same time, and a paused trial goes on where it was. Used by benchmarks/search.py.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from search_table import METRIC

from raydml.config.sections import SearcherBlock
from raydml.config.trial import Balance, fingerprint
from raydml.search_space.points import Point
from raydml.search_space.space import SearchSpace
from raydml.searchers._base import DrawnBefore
from raydml.study.draws import DrawnTrial, TrialDraws
from raydml.study.promotion import Pasha, Promotion
from raydml.study.rungs import milestones
from raydml.study.scheduler import Asha, InOrder, SyncHalving


class Draws(Protocol):
    """What draws the trials of a study: `raydml.study.draws.TrialDraws`."""

    def draw(self, index: int, before: Sequence[DrawnBefore], taken: Collection[str]) -> DrawnTrial | None:
        """Return trial number `index`."""


def draws_of(space: SearchSpace, searcher: str, seed: int, num_trials: int, *, is_balanced: bool = False) -> TrialDraws:
    """Return the draws of a study. is_balanced: with `search.balance` of the losses."""
    changes = {
        "searcher": SearcherBlock(name=searcher),
        "num_trials": num_trials,
        "balance": Balance() if is_balanced else None,
    }
    search = space.study.search.model_copy(update=changes)
    return TrialDraws(replace(space, study=space.study.model_copy(update={"seed": seed, "search": search})))


class Brackets:
    """Asynchronous Hyperband (Li et al. 2020): ASHA in brackets, each of which begins to compare one rung later.

    No study has it: see docs/LOG.md for how it compares. Trials are shared out as in Hyperband (Li et al. 2018): with
    three brackets and a factor of three 9, 5 and 3 of 17.
    """

    def __init__(self, *, max_epochs: int, grace_epochs: int, reduction_factor: int, **others: Any) -> None:
        rungs = milestones(max_epochs=max_epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor)
        self._brackets = [
            Asha(max_epochs=max_epochs, grace_epochs=rung, reduction_factor=reduction_factor, **others)
            for rung in [*rungs, max_epochs]
        ]
        most = len(rungs)
        sizes = [math.ceil((most + 1) / (s + 1) * reduction_factor**s) for s in range(most, -1, -1)]
        # Spread: at each place the bracket that is furthest behind its share.
        self._order: list[int] = []
        for number in range(1, sum(sizes) + 1):
            behind = [number * size / sum(sizes) - self._order.count(place) for place, size in enumerate(sizes)]
            self._order.append(behind.index(max(behind)))

    def _of(self, trial: "SimulatedTrial") -> Asha:
        return self._brackets[self._order[trial.index % len(self._order)]]

    def choose_trial_to_run(self, study: "SimulatedStudy") -> None:
        """Leave the start of trials to the study."""

    def on_trial_add(self, study: "SimulatedStudy", trial: "SimulatedTrial") -> None:
        self._of(trial).on_trial_add(study, trial)

    def on_trial_result(self, study: "SimulatedStudy", trial: "SimulatedTrial", result: dict[str, Any]) -> str:
        return str(self._of(trial).on_trial_result(study, trial, result))

    def on_trial_complete(self, study: "SimulatedStudy", trial: "SimulatedTrial", result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(study, trial, result)

    def on_trial_remove(self, study: "SimulatedStudy", trial: "SimulatedTrial") -> None:
        self._of(trial).on_trial_remove(study, trial)


def scheduler_of(name: str, space: SearchSpace, num_epochs: int, num_trials: int) -> Any:
    """Return a scheduler by the name that it has in a study, or ``hyperband``."""
    search = space.study.search
    halving: dict[str, Any] = {
        "metric": METRIC, "max_epochs": num_epochs, "grace_epochs": search.grace_epochs,
        "reduction_factor": search.reduction_factor, "history": {},
    }  # fmt: skip
    keys = [key_of(index) for index in range(num_trials)]
    match name:
        case "none":
            return InOrder()
        case "asha":
            return Asha(**halving)
        case "hyperband":
            return Brackets(**halving)
        case "sync":
            return SyncHalving(**halving, keys=keys, ended=[])
        case "promotion" | "pasha":
            return (Promotion if name == "promotion" else Pasha)(**halving, keys=keys)
    raise ValueError(f"{name} is no scheduler; choices: none, asha, hyperband, sync, promotion, pasha")


def key_of(index: int) -> str:
    """Return the key of a trial."""
    return f"t{index:03d}"


@dataclass(eq=False)
class SimulatedTrial:
    """One trial as the schedulers of Tune see it. curve: of all its epochs, also those that it has yet to report."""

    index: int
    drawn: DrawnTrial
    curve: Sequence[float]
    status: str = "PENDING"
    last_result: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, METRIC: math.nan})
    PENDING = "PENDING"
    PAUSED = "PAUSED"

    def __post_init__(self) -> None:
        self.trial_id = key_of(self.index)
        self.config = {"run": {"key": self.trial_id}}

    @property
    def epoch(self) -> int:
        """The epochs that it has reported."""
        return int(self.last_result["epoch"])

    def as_drawn(self, first_rung: float) -> DrawnBefore:
        """Return what is known of it for the next proposal."""
        reported = dict(enumerate(self.curve[: self.epoch], 1))
        best = max(reported.values(), default=None)
        has_result = self.status == "TERMINATED" or self.epoch >= first_rung
        return DrawnBefore(self.drawn.point, best, self.epoch, has_result, reported)


class Report(NamedTuple):
    """One epoch of one trial."""

    time: int
    index: int
    epoch: int
    value: float
    num_drawn: int


@dataclass
class SimulatedStudy:
    """A study in place of Tune's controller. curve_of: the values that a configuration reports, epoch by epoch.
    first_rung: the epoch from which a trial has a result, as `raydml.study.drawing` has it."""

    draws: Draws
    curve_of: Callable[[Point], Sequence[float]]
    scheduler: Any
    num_trials: int
    num_slots: int
    first_rung: float = math.inf
    trials: list[SimulatedTrial] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)
    _taken: set[str] = field(default_factory=set)

    def run(self) -> "SimulatedStudy":
        """Run all trials. A trial that starts at some time reports its first epoch one later."""
        running: list[tuple[int, int, SimulatedTrial]] = []
        order, time = itertools.count(), 0
        while True:
            while len(running) < self.num_slots and (trial := self._next()):
                trial.status = "RUNNING"
                heapq.heappush(running, (time + 1, next(order), trial))
            if not running:
                break
            time, _, trial = heapq.heappop(running)
            self._report(trial, time)
            if trial.status == "RUNNING":
                heapq.heappush(running, (time + 1, next(order), trial))
        assert len(self.trials) == self.num_trials
        assert all(trial.status == "TERMINATED" for trial in self.trials), "trials are left that nothing ends"
        return self

    def _next(self) -> SimulatedTrial | None:
        """Return the trial for a free slot: one that the scheduler chooses, or a new one."""
        chosen: SimulatedTrial | None = self.scheduler.choose_trial_to_run(self)
        if chosen is not None:
            return chosen
        # Some schedulers leave the start of new trials to Tune.
        pending = next((trial for trial in self.trials if trial.status == "PENDING"), None)
        if pending is not None or len(self.trials) == self.num_trials:
            return pending
        self.trials.append(self._draw())
        self.scheduler.on_trial_add(self, self.trials[-1])
        return self._next()

    def _draw(self) -> SimulatedTrial:
        before = [trial.as_drawn(self.first_rung) for trial in self.trials]
        drawn = self.draws.draw(len(self.trials), before, self._taken)
        assert drawn is not None, "the space has too few configurations"
        self._taken.add(fingerprint(drawn.trial))
        return SimulatedTrial(len(self.trials), drawn, self.curve_of(drawn.point))

    def _report(self, trial: SimulatedTrial, time: int) -> None:
        result = {"epoch": trial.epoch + 1, METRIC: trial.curve[trial.epoch]}
        self.reports.append(Report(time, trial.index, result["epoch"], result[METRIC], len(self.trials)))
        if result["epoch"] == len(trial.curve):
            trial.last_result = result
            self.stop_trial(trial)
            return
        decision = self.scheduler.on_trial_result(self, trial, result)
        trial.last_result = result
        if decision == "PAUSE":
            trial.status = "PAUSED"
        elif decision == "STOP":
            self.stop_trial(trial)

    @property
    def search_alg(self) -> Any:
        """What Tune's controller draws trials from, which a scheduler asks whether there are further ones."""
        return SimpleNamespace(is_finished=lambda: len(self.trials) == self.num_trials)

    def get_trials(self) -> list[SimulatedTrial]:
        """Return all trials, as Tune's controller does."""
        return self.trials

    def stop_trial(self, trial: SimulatedTrial) -> None:
        """End a trial, as Tune's controller does."""
        if trial.status in ("PENDING", "PAUSED"):
            self.scheduler.on_trial_remove(self, trial)
        else:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        trial.status = "TERMINATED"
