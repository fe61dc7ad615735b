"""Early stopping of trials: asynchronous (ASHA) and synchronous successive halving over epochs.

Both take the *history* of an interrupted study, so that a resumed study decides against full rungs: Ray's own
schedulers start empty after a restore.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raydml.study.rungs import milestones

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as TuneTrial

#: Trial key -> (epoch, value of the selection metric), ascending in epoch.
History = Mapping[str, Sequence[tuple[int, float]]]


def trial_key(trial: TuneTrial) -> str:
    return str(trial.config["run"]["key"])


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
        self._history = {key: list(rows) for key, rows in history.items()}
        for key, rows in self._history.items():
            self._replay(key, rows)

    def _replay(self, trial_id: str, rows: Sequence[tuple[int, float]]) -> None:
        for epoch, value in rows:
            if math.isfinite(value):
                self._brackets[0].on_result(_Replayed(trial_id), epoch, value)

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:
        super().on_trial_add(tune_controller, trial)
        rows = self._history.get(trial_key(trial))
        if rows is None:
            return
        # The trial runs again under an id of this Tune run: its values move from the key to the id.
        for _, recorded in self._brackets[0]._rungs:
            if trial_key(trial) in recorded:
                recorded[trial.trial_id] = recorded.pop(trial_key(trial))

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        # NaN < cutoff is false, so a rung would never stop a diverged trial.
        if not math.isfinite(result[self._metric]):
            return TrialScheduler.STOP
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        if math.isfinite(result[self._metric]):
            super().on_trial_complete(tune_controller, trial, result)


class SyncHalving(FIFOScheduler):
    """Synchronous successive halving: no trial passes a rung before all have reached it.

    Decisions depend on the values alone (of equal ones the earlier trial passes), not on the order of arrival, so the
    same seed gives the same study on any number of workers. The price is idle workers at the end of each rung.

    Trials wait at a rung as PAUSED, with a checkpoint and without resources.
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
        self._keys = list(keys)
        self._reduction_factor = reduction_factor
        self._milestones = milestones(
            max_epochs=max_epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor
        )
        self._values: dict[int, dict[str, float]] = {milestone: {} for milestone in self._milestones}
        self._ended = set(ended)
        for key, rows in history.items():
            for epoch, value in rows:
                self._record(key, epoch, value)

    def _record(self, key: str, epoch: int, value: float) -> None:
        if epoch in self._values and math.isfinite(value):
            self._values[epoch][key] = value

    def survivors(self, rung: int) -> list[str] | None:
        """Return the keys that pass the rung with this index, in trial order; None while a trial has not reached it."""
        entrants = self._keys if rung == 0 else self.survivors(rung - 1)
        if entrants is None:
            return None
        values = self._values[self._milestones[rung]]
        # A trial that crashed or diverged below the rung does not count and does not block the others.
        contestants = [key for key in entrants if key in values or key not in self._ended]
        if any(key not in values for key in contestants):
            return None
        num_kept = max(1, len(contestants) // self._reduction_factor)
        ranked = sorted(contestants, key=lambda key: (-values[key], self._keys.index(key)))
        return [key for key in contestants if key in set(ranked[:num_kept])]

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:  # noqa: ARG002
        if not math.isfinite(result[self._metric]):
            return TrialScheduler.STOP
        epoch = int(result["epoch"])
        if epoch not in self._values:
            return TrialScheduler.CONTINUE
        self._record(trial_key(trial), epoch, result[self._metric])
        # The last trial to arrive does not wait, nor one that was resumed after its rung was decided.
        passed = self.survivors(self._milestones.index(epoch))
        return TrialScheduler.CONTINUE if passed and trial_key(trial) in passed else TrialScheduler.PAUSE

    def on_trial_complete(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:  # noqa: ARG002
        # A trial whose last epoch is a rung ends without a call of on_trial_result; its value still counts.
        self._record(trial_key(trial), int(result["epoch"]), result[self._metric])
        self._ended.add(trial_key(trial))

    def on_trial_error(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        # Tune calls this before a retry as well, and then adds the trial again.
        self._ended.add(trial_key(trial))

    def on_trial_add(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        self._ended.discard(trial_key(trial))

    def on_trial_remove(self, tune_controller: Any, trial: TuneTrial) -> None:  # noqa: ARG002
        self._ended.add(trial_key(trial))

    def choose_trial_to_run(self, tune_controller: Any) -> TuneTrial | None:
        """Stop the losers of a decided rung and return the first paused winner; new trials start by themselves."""
        paused = [trial for trial in tune_controller.get_trials() if trial.status == trial.PAUSED]
        for trial in sorted(paused, key=lambda trial: self._keys.index(trial_key(trial))):
            rung = self._milestones.index(int(trial.last_result["epoch"]))
            passed = self.survivors(rung)
            if passed is None:
                continue
            if trial_key(trial) in passed:
                return trial
            tune_controller.stop_trial(trial)
        return None
