"""Successive halving that promotes: trials pause at each rung, and the best go on when a slot is free.

ASHA as Li et al. (2020, Algorithm 2) wrote it. Ray's scheduler of that name stops trials instead, and has to let the
first ones pass that reach a rung, whatever their values. Here they wait until two thirds of the rung are known to be
worse: few slots are spent on bad trials. The price is a checkpoint for each trial that waits.

`Pasha` (Bohdal et al., ICLR 2023) also lets no trial beyond a highest rung, and adds the next one only where the two
highest rungs rank their trials differently.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raydml.study.rungs import milestones
from raydml.study.scheduler import TrialQueue, trial_key

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as TuneTrial


class _Rung:
    """The values at one rung, and who may still be promoted from it. Of equal values the earlier trial is better."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.promoted: set[str] = set()
        self.waiting: dict[str, TuneTrial] = {}  # those that have paused here
        self.has_changed = True  # since it was looked for trials that cannot be promoted any more
        self._order: list[tuple[float, int]] = []  # (-value, place of the trial), best first
        self._candidates: list[tuple[float, int, str]] = []  # a heap of the same, with those that wait

    def record(self, key: str, place: int, value: float) -> None:
        if self.values.get(key) == value:
            return
        if key in self.values:  # it was trained again, with another result
            self._order.remove((-self.values[key], place))
        self.values[key], self.has_changed = value, True
        insort(self._order, (-value, place))

    def rank(self, key: str, place: int) -> int:
        """Return how many trials of the rung are better."""
        return bisect_left(self._order, (-self.values[key], place))

    def wait(self, key: str, place: int, trial: TuneTrial) -> None:
        self.waiting[key] = trial
        heapq.heappush(self._candidates, (-self.values[key], place, key))

    def best(self) -> tuple[TuneTrial, int] | None:
        """Return the best trial that waits here, with its rank; None without one."""
        while self._candidates:
            negative, place, key = self._candidates[0]
            if key in self.waiting and self.values[key] == -negative:
                return self.waiting[key], self.rank(key, place)
            heapq.heappop(self._candidates)
        return None


class Promotion(FIFOScheduler):
    """Asynchronous successive halving that promotes (Li et al. 2020).

    When a slot is free, the best trial that waits at the highest possible rung goes on, if it is among the best 1/η of
    the trials that have reached this rung; else a new trial starts. A trial at the first rung that cannot be promoted
    any more, whatever the trials to come, is stopped, and so are all that wait once nothing else is left. Then the best
    of the highest rung goes on, so that a search of few trials also trains one to its end.

    Args:
        keys: of all trials of the stage, in order; some may never start.
        history: key, epoch and value of all reports of earlier runs, in their order. Trials that go on from a
            checkpoint report some of them again.
    """

    def __init__(
        self,
        *,
        metric: str,
        keys: Sequence[str],
        max_epochs: int,
        grace_epochs: int,
        reduction_factor: int,
        history: Iterable[tuple[str, int, float]],
    ) -> None:
        super().__init__()
        self._metric, self._reduction_factor = metric, reduction_factor
        self._places = {key: place for place, key in enumerate(keys)}
        epochs = milestones(max_epochs=max_epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor)
        self._indices = {epoch: rung for rung, epoch in enumerate(epochs)}
        self._rungs = [_Rung() for _ in epochs]
        self._most = max(1, len(keys) // reduction_factor)  # that can be promoted from the first rung
        self._active = set[str]()  # those that have not ended
        self._saving: dict[str, tuple[TuneTrial, int]] = {}  # those that are to pause, and their rungs
        self._handed_out: dict[str, TuneTrial] = {}
        self._queue = TrialQueue()
        self._highest = len(epochs)  # the rung that trials may train to; this one is their last epoch
        for key, epoch, value in history:
            if key in self._places:
                self._know(key, epoch, value)

    def _know(self, key: str, epoch: int, value: float) -> None:
        for at, rung in self._indices.items():
            if at < epoch and key in self._rungs[rung].values:
                self._rungs[rung].promoted.add(key)
        if epoch in self._indices and math.isfinite(value):
            self._rungs[self._indices[epoch]].record(key, self._places[key], value)

    def _can_promote(self, rung: int, rank: int) -> bool:
        return rung < self._highest and rank < len(self._rungs[rung].values) // self._reduction_factor

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        self._active.add(trial_key(trial))
        self._queue.append(trial)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:  # noqa: ARG002
        key, epoch, value = trial_key(trial), int(result["epoch"]), float(result[self._metric])
        self._forget(key)
        if not math.isfinite(value):
            return TrialScheduler.STOP
        self._know(key, epoch, value)
        rung = self._indices.get(epoch)
        if rung is None:
            return TrialScheduler.CONTINUE
        rank = self._rungs[rung].rank(key, self._places[key])
        # Without a pause; also one that was promoted before a restart.
        if key in self._rungs[rung].promoted or self._can_promote(rung, rank):
            self._rungs[rung].promoted.add(key)
            return TrialScheduler.CONTINUE
        self._saving[key] = trial, rung
        return TrialScheduler.PAUSE

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:  # noqa: ARG002
        value = float(result[self._metric])
        self._know(trial_key(trial), int(result["epoch"]), value)
        self._end(trial_key(trial))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        # Tune calls this before a retry as well, and then adds the trial again.
        self._end(trial_key(trial))

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        self._end(trial_key(trial))

    def _end(self, key: str) -> None:
        self._forget(key)
        self._active.discard(key)

    def _forget(self, key: str) -> None:
        """Drop a trial from all lists of those that wait or will: it runs again, or has ended."""
        self._saving.pop(key, None)
        self._handed_out.pop(key, None)
        for rung in self._rungs:
            rung.waiting.pop(key, None)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Return the trial to promote, or else the first new one; stop those that cannot be promoted any more."""
        for key, (trial, number) in list(self._saving.items()):
            if trial.status == trial.PAUSED:
                del self._saving[key]
                self._rungs[number].wait(key, self._places[key], trial)
        for key, trial in list(self._handed_out.items()):
            if trial.status == trial.PAUSED:  # Tune had no place for it
                return trial
            del self._handed_out[key]
        open_rungs = self._rungs[: self._highest]
        for number in reversed(range(len(open_rungs))):
            best = open_rungs[number].best()
            if best is not None and self._can_promote(number, best[1]):
                return self._promote(best[0], open_rungs[number])
        if (new := self._queue.first_pending()) is not None:
            return new
        num_waiting = sum(len(rung.waiting) for rung in self._rungs)
        if num_waiting == len(self._active) and tune_controller.search_alg.is_finished():
            return self._last(open_rungs, tune_controller)
        # Of later rungs it is not known how many trials will reach them.
        for rung in self._rungs[:1]:
            if rung.has_changed:
                rung.has_changed = False
                late = [key for key in rung.waiting if rung.rank(key, self._places[key]) >= self._most]
                self._stop([rung.waiting[key] for key in late], tune_controller)
        return None

    def _promote(self, trial: TuneTrial, rung: _Rung) -> TuneTrial:
        key = trial_key(trial)
        self._forget(key)
        rung.promoted.add(key)
        self._handed_out[key] = trial
        return trial

    def _last(self, open_rungs: Sequence[_Rung], tune_controller: Any) -> TuneTrial | None:
        """Return the best trial of the highest rung with values, if nobody has passed it; else stop all that wait."""
        reached = [rung for rung in open_rungs if rung.values]
        best = reached[-1].best() if reached and not reached[-1].promoted else None
        if best is not None and best[1] == 0:
            return self._promote(best[0], reached[-1])
        self._stop([trial for rung in self._rungs for trial in rung.waiting.values()], tune_controller)
        return None

    def _stop(self, trials: Sequence[TuneTrial], tune_controller: Any) -> None:
        for trial in trials:
            self._forget(trial_key(trial))
            tune_controller.stop_trial(trial)


#: The share of the distances between curves that cross which counts as noise (Bohdal et al. 2023, Section 4.2).
_NOISE_PERCENTILE = 90


class Pasha(Promotion):
    """Promotion with a highest rung that grows while the ranking of the trials changes (Bohdal et al., ICLR 2023).

    It begins with two rungs. Whenever a trial reaches the highest one, its trials are ranked there and at the rung
    before. Where the rankings differ by more than the noise, trials may train to the next rung. The noise is the 90th
    percentile of the distances between trials of the highest rung whose curves cross at least twice. The best trials of
    such a search are not trained to their end: `confirm` does that.
    """

    def __init__(self, **settings: Any) -> None:
        self._curves: dict[str, dict[int, float]] = {}
        self._distances: list[float] = []  # of the pairs of trials at the highest rung whose curves cross
        self._compared: list[str] = []
        history = settings.pop("history")
        super().__init__(**settings, history=())
        self._highest = min(1, len(self._rungs))
        for key, epoch, value in history:
            if key in self._places:
                self._know(key, epoch, value)

    def _know(self, key: str, epoch: int, value: float) -> None:
        if math.isfinite(value):
            self._curves.setdefault(key, {})[epoch] = value
        super()._know(key, epoch, value)
        if self._indices.get(epoch) == self._highest:
            self._raise_if_unstable()

    def _raise_if_unstable(self) -> None:
        while 0 < self._highest < len(self._rungs):
            before, top = self._rungs[self._highest - 1].values, self._rungs[self._highest].values
            keys = [key for key in top if key in before]
            self._compare(keys)
            noise = float(np.percentile(self._distances, _NOISE_PERCENTILE)) if self._distances else 0.0
            if len(keys) < 2 or is_same_ranking(before, top, keys, noise):
                return
            self._highest += 1
            self._distances, self._compared = [], []

    def _compare(self, keys: Sequence[str]) -> None:
        """Add the distances between trials that are new at the highest rung and those that were there."""
        known = set(self._compared)
        for key in keys:
            if key in known:
                continue
            for other in self._compared:
                self._distances += distances_of_crossing(self._curves[key], self._curves[other])
            self._compared.append(key)


def is_same_ranking(before: Mapping[str, float], after: Mapping[str, float], keys: Sequence[str], noise: float) -> bool:
    """Return whether two rankings of the same trials agree: at each place of the second there is the trial that is at
    this place of the first, or one that is within the noise of it there."""
    first = sorted(keys, key=lambda key: -before[key])
    second = sorted(keys, key=lambda key: -after[key])
    return all(abs(before[one] - before[other]) <= noise for one, other in zip(first, second, strict=True))


def distances_of_crossing(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Return the distance of two curves at their last common epoch, where they cross at least twice; else nothing."""
    epochs = sorted(first.keys() & second.keys())
    signs = [sign for epoch in epochs if (sign := np.sign(first[epoch] - second[epoch]))]
    num_crossings = sum(one != other for one, other in pairwise(signs))
    return [abs(first[epochs[-1]] - second[epochs[-1]])] if num_crossings >= 2 else []
