"""Early stopping of trials: asynchronous (ASHA) and synchronous successive halving over epochs.

Both take the *history* of an interrupted study, so that a resumed study decides against full rungs: Ray's own
schedulers start empty after a restore.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from raydml.study.rungs import milestones

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as TuneTrial

#: Trial key -> (epoch, value of the selection metric), ascending in epoch.
History = Mapping[str, Sequence[tuple[int, float]]]


def trial_key(trial: TuneTrial) -> str:
    return str(trial.config["run"]["key"])


class InOrder(FIFOScheduler):
    """Starts the trials in their order and stops none. Ray's own scheduler looks at every trial at each step."""

    def __init__(self) -> None:
        super().__init__()
        self._queue = TrialQueue()

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        self._queue.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:  # noqa: ARG002
        return self._queue.first_pending()


class TrialQueue:
    """The trials in the order in which Tune adds them. One that is tried again is added again, and is then the last."""

    def __init__(self) -> None:
        # Its first item is found at once, whereas a dict passes over all that were deleted before it.
        self._trials: OrderedDict[str, TuneTrial] = OrderedDict()

    def append(self, trial: TuneTrial) -> None:
        self._trials[trial_key(trial)] = trial
        self._trials.move_to_end(trial_key(trial))

    def first_pending(self) -> TuneTrial | None:
        """Return the first trial that has yet to start."""
        while self._trials:
            trial = next(iter(self._trials.values()))
            if trial.status == trial.PENDING:
                return trial
            self._trials.popitem(last=False)
        return None


class SortedRungs(_Bracket):
    """Ray's rungs, whose values are kept in order: Ray sorts all values of a rung for each that it decides about."""

    def __init__(self, min_t: int, max_t: int, reduction_factor: float) -> None:
        super().__init__(min_t, max_t, reduction_factor, s=0, stop_last_trials=False)
        self._ascending: list[list[float]] = [[] for _ in self._rungs]

    def on_result(self, trial: Any, cur_iter: int, cur_rew: float) -> str:
        """Return whether a trial goes on. Only the highest rung that it has reached counts."""
        for (milestone, recorded), ascending in zip(self._rungs, self._ascending, strict=True):
            if cur_iter < milestone:
                continue
            if trial.trial_id in recorded:
                break
            stops = bool(ascending) and cur_rew < percentile(ascending, 1 - 1 / self.rf)
            recorded[trial.trial_id] = cur_rew
            insort(ascending, cur_rew)
            return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)
        return str(TrialScheduler.CONTINUE)


def percentile(ascending: Sequence[float], share: float) -> float:
    """Return what ``np.percentile(ascending, share * 100)`` returns, to the last bit, of values in order."""
    position = (len(ascending) - 1) * (share * 100 / 100)
    below = int(position)
    low, high, part = ascending[below], ascending[min(below + 1, len(ascending) - 1)], position - below
    # As NumPy does it, from the nearer one.
    return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


class _Replayed(NamedTuple):
    """The one field of a trial that a rung reads."""

    trial_id: str


class Asha(ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020) that remembers the rungs of an interrupted study.

    ``history`` holds the epochs that no trial will report again: all of an ended trial, and of an unfinished one
    those before its newest checkpoint. The resumed trial reports the checkpoint's own epoch a second time, so that a
    decision lost in the interruption is made then, against the same rungs.
    """

    def __init__(
        self, *, metric: str, max_epochs: int, grace_epochs: int, reduction_factor: int, history: History
    ) -> None:
        super().__init__(
            time_attr="epoch",
            metric=metric,
            mode="max",
            max_t=max_epochs,
            grace_period=grace_epochs,
            reduction_factor=reduction_factor,
            brackets=1,  # several would be drawn from the global random state, and drawn again after a failure
            stop_last_trials=False,  # a trial ends by itself at its last epoch
        )
        self._brackets = [SortedRungs(grace_epochs, max_epochs, reduction_factor)]
        self._queue = TrialQueue()
        self._history = {key: list(rows) for key, rows in history.items()}
        for key, rows in self._history.items():
            self._replay(key, rows)

    def _replay(self, trial_id: str, rows: Sequence[tuple[int, float]]) -> None:
        for epoch, value in rows:
            if math.isfinite(value):
                self._brackets[0].on_result(_Replayed(trial_id), epoch, value)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        self._queue.append(trial)
        rows = self._history.get(trial_key(trial))
        if rows is None:
            return
        # The trial runs again under an id of this Tune run: its values move from the key to the id.
        for _, recorded in self._brackets[0]._rungs:
            if trial_key(trial) in recorded:
                recorded[trial.trial_id] = recorded.pop(trial_key(trial))

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:  # noqa: ARG002
        return self._queue.first_pending()

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        # NaN < cutoff is false, so a rung would never stop a diverged trial.
        if not math.isfinite(result[self._metric]):
            return TrialScheduler.STOP
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        if math.isfinite(result[self._metric]):
            super().on_trial_complete(tune_controller, trial, result)


class _PausedTrial(NamedTuple):
    """A trial that pauses at a rung, or is to."""

    trial: TuneTrial
    rung: int


class SyncHalving(FIFOScheduler):
    """Synchronous successive halving: no trial passes a rung before all have reached it.

    Decisions depend on the values alone (of equal ones the earlier trial passes), not on the order of arrival, so the
    same seed gives the same study on any number of workers. The price is idle workers at the end of each rung.

    Trials wait at a rung as PAUSED, with a checkpoint and without resources.

    A rung is decided once, when the last of its trials has arrived, and again only where that changes: a trial that
    had ended is tried again, or a resumed one reports another value. A step looks only at trials of decided rungs.
    """

    def __init__(
        self,
        *,
        metric: str,
        keys: Sequence[str],
        max_epochs: int,
        grace_epochs: int,
        reduction_factor: int,
        history: History,
        ended: Sequence[str],
    ) -> None:
        """Args: ``keys``: all trials of the stage in order. ``ended``: those that will not report again."""
        super().__init__()
        self._metric = metric
        self._places = {key: place for place, key in enumerate(keys)}
        self._reduction_factor = reduction_factor
        self._rungs = milestones(max_epochs=max_epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor)
        self._indices = {epoch: rung for rung, epoch in enumerate(self._rungs)}
        self._values: list[dict[str, float]] = [{} for _ in self._rungs]
        self._ended = set(ended)
        for key, rows in history.items():
            for epoch, value in rows:
                if epoch in self._indices and math.isfinite(value):
                    self._values[self._indices[epoch]][key] = value
        # The keys that enter each decided rung, in order, and the next one: all, then those that passed the one before.
        self._entrants: list[dict[str, None]] = [dict.fromkeys(keys)]
        self._missing = self._missing_at(0)  # those whom the first undecided rung waits for
        self._stopping: dict[str, _PausedTrial] = {}  # trials that were to pause and have not reported since, by key
        self._waiting: list[list[str]] = [[] for _ in self._rungs]  # those of undecided rungs
        self._ready: list[tuple[int, str, int]] = []  # a heap of those of decided rungs: place, key and rung
        self._saving: list[tuple[int, str, int]] = []  # those of them that have not paused yet
        self._handed_out: set[str] = set()

    def survivors(self, rung: int) -> list[str] | None:
        """Return the keys that pass the rung with this index, in trial order; None while a trial has not reached it."""
        self._decide()
        return list(self._entrants[rung + 1]) if self._is_decided(rung) else None

    def _is_decided(self, rung: int) -> bool:
        return rung + 1 < len(self._entrants)

    def _missing_at(self, rung: int) -> set[str]:
        # A trial that crashed or diverged below the rung does not count and does not block the others.
        values = self._values[rung] if rung < len(self._rungs) else self._entrants[rung]
        return {key for key in self._entrants[rung] if key not in values and key not in self._ended}

    def _decide(self) -> None:
        """Decide the rungs that no trial is missing at."""
        while not self._missing and (rung := len(self._entrants) - 1) < len(self._rungs):
            values = self._values[rung]
            contestants = [key for key in self._entrants[rung] if key in values]
            num_kept = max(1, len(contestants) // self._reduction_factor)
            # Of equal values the earlier trial is first: the sort is stable.
            kept = set(sorted(contestants, key=lambda key: -values[key])[:num_kept])
            self._entrants.append({key: None for key in contestants if key in kept})
            self._missing = self._missing_at(rung + 1)
            for key in self._waiting[rung]:
                heapq.heappush(self._ready, (self._places[key], key, rung))
            self._waiting[rung].clear()

    def _reopen(self, rung: int) -> None:
        del self._entrants[rung + 1 :]
        self._missing = self._missing_at(rung)

    def _record(self, key: str, epoch: int, value: float) -> None:
        rung = self._indices.get(epoch)
        if rung is None or not math.isfinite(value) or self._values[rung].get(key) == value:
            return
        self._values[rung][key] = value
        if not self._is_decided(rung):
            if rung == len(self._entrants) - 1:
                self._missing.discard(key)
        elif key in self._entrants[rung]:
            self._reopen(rung)

    def _end(self, key: str) -> None:
        self._ended.add(key)
        self._missing.discard(key)

    def leave_out(self, keys: Iterable[str]) -> None:
        """Wait no longer for trials that will never start."""
        for key in keys:
            self._end(key)

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:  # noqa: ARG002
        key = trial_key(trial)
        self._forget(key)
        if not math.isfinite(result[self._metric]):
            return TrialScheduler.STOP
        rung = self._indices.get(int(result["epoch"]))
        if rung is None:
            return TrialScheduler.CONTINUE
        self._record(key, int(result["epoch"]), result[self._metric])
        self._decide()
        # The last trial to arrive does not wait, nor one that was resumed after its rung was decided.
        if self._is_decided(rung) and key in self._entrants[rung + 1]:
            return TrialScheduler.CONTINUE
        self._stopping[key] = _PausedTrial(trial, rung)
        if self._is_decided(rung):
            heapq.heappush(self._ready, (self._places[key], key, rung))
        else:
            self._waiting[rung].append(key)
        return TrialScheduler.PAUSE

    def _forget(self, key: str) -> None:
        """Expect no longer that a trial pauses: it runs again, or has ended."""
        self._stopping.pop(key, None)
        self._handed_out.discard(key)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:  # noqa: ARG002
        # A trial whose last epoch is a rung ends without a call of on_trial_result; its value still counts.
        self._forget(trial_key(trial))
        self._record(trial_key(trial), int(result["epoch"]), result[self._metric])
        self._end(trial_key(trial))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        # Tune calls this before a retry as well, and then adds the trial again.
        self._end(trial_key(trial))

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        key = trial_key(trial)
        if key not in self._ended:
            return
        self._ended.discard(key)
        # The lowest rung that it has not reached waits for it again.
        for rung, (entrants, values) in enumerate(zip(self._entrants, self._values, strict=False)):
            if key in entrants and key not in values:
                if self._is_decided(rung):
                    self._reopen(rung)
                self._missing.add(key)
                break

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        self._forget(trial_key(trial))
        self._end(trial_key(trial))

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Stop the losers of a decided rung and return the first paused winner; new trials start by themselves."""
        self._decide()
        for place in self._saving:
            heapq.heappush(self._ready, place)
        self._saving.clear()
        while self._ready:
            _, key, rung = self._ready[0]
            found = self._stopping.get(key)
            if found is None or found.rung != rung:
                heapq.heappop(self._ready)
            elif not self._is_decided(rung):
                heapq.heappop(self._ready)
                self._waiting[rung].append(key)
            elif found.trial.status != found.trial.PAUSED:
                place = heapq.heappop(self._ready)
                if key in self._handed_out:
                    self._forget(key)
                else:  # its checkpoint is being written
                    self._saving.append(place)
            elif key in self._entrants[rung + 1]:
                self._handed_out.add(key)
                return found.trial
            else:
                heapq.heappop(self._ready)
                self._forget(key)
                tune_controller.stop_trial(found.trial)
        return None
