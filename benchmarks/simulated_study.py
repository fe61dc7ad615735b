"""A study event by event, without Ray and without training: a searcher, a scheduler, slots, and curves that are known.

A searcher of raydml draws the next configuration when a slot is free, and the scheduler that a study has decides after
each epoch. Every epoch takes the same time, and a paused trial goes on where it was. Used by benchmarks/search.py.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from search_table import METRIC, Pick, Point, drawn

from raydml.search_space.domains import random_pick
from raydml.search_space.space import SearchSpace
from raydml.study.scheduler import Asha, InOrder, SyncHalving


class Told(NamedTuple):
    """What a searcher learns of a trial."""

    point: Point
    value: float | None
    is_over: bool
    num_epochs: int


class Searcher(Protocol):
    """What is asked for the next configuration."""

    def pick(self, index: int, redraw: int, told: Sequence[Told]) -> Pick:
        """Return what picks trial number `index`."""


@dataclass
class RandomSearch:
    """The draws of a study without a searcher."""

    space: SearchSpace
    seed: int

    def pick(self, index: int, redraw: int, told: Sequence[Told]) -> Pick:  # noqa: ARG002
        """Return what picks trial number `index`."""
        return random_pick(self.seed, index, redraw, {})


def searcher_of(name: str, space: SearchSpace, seed: int) -> Searcher:
    """Return a searcher by its name."""
    assert name == "random"
    return RandomSearch(space, seed)


def scheduler_of(name: str, space: SearchSpace, num_epochs: int, num_trials: int) -> Any:
    """Return a scheduler by the name that it has in a study."""
    search = space.study.search
    halving: dict[str, Any] = {
        "metric": METRIC, "max_epochs": num_epochs, "grace_epochs": search.grace_epochs,
        "reduction_factor": search.reduction_factor, "history": {},
    }  # fmt: skip
    if name == "none":
        return InOrder()
    if name == "asha":
        return Asha(**halving)
    return SyncHalving(**halving, keys=[key_of(index) for index in range(num_trials)], ended=[])


def key_of(index: int) -> str:
    """Return the key of a trial."""
    return f"t{index:03d}"


@dataclass(eq=False)
class SimulatedTrial:
    """One trial as the schedulers of Tune see it, with the epochs that it has yet to report."""

    index: int
    point: Point
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

    def told(self) -> Told:
        """Return what a searcher learns of it."""
        return Told(self.point, max(self.curve[: self.epoch], default=None), self.status == "TERMINATED", self.epoch)


class Report(NamedTuple):
    """One epoch of one trial."""

    time: int
    index: int
    epoch: int
    value: float
    num_drawn: int


@dataclass
class SimulatedStudy:
    """A study in place of Tune's controller. curve_of: the values that a configuration reports, epoch by epoch."""

    space: SearchSpace
    curve_of: Callable[[Point], Sequence[float]]
    searcher: Searcher
    scheduler: Any
    num_trials: int
    num_slots: int
    trials: list[SimulatedTrial] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

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
        index, told = len(self.trials), [trial.told() for trial in self.trials]
        for redraw in itertools.count():
            point, _ = drawn(self.space, self.searcher.pick(index, redraw, told))
            if all(point != trial.point for trial in self.trials):
                break
        return SimulatedTrial(index, point, self.curve_of(point))

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
