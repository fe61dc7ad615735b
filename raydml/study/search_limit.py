"""The limits of a search: it ends early enough for the stages after it to stay within them, or when it has settled."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ray import tune

from raydml.analysis.cost import cost_of
from raydml.analysis.rank_stability import search_stability
from raydml.analysis.trials import TrialState
from raydml.study.budget import Budget
from raydml.study.events import STAGES, StudyReader, StudyState
from raydml.study.pace import TEST_EPOCHS, remaining_s

CHECK_EVERY_S = 0.5
CHECK_SHARE = 0.02  # largest part of the time that the checks take: the estimate reads every trial
RESERVE = 1.3  # of the estimated time and device hours of the later stages: estimates are rough
_LOOKS = (0.8, 0.9, 1.0)  # shares of the trials for which a search has to have settled
_LEAST_TRIALS = 8  # of each recipe


class Reached(NamedTuple):
    """The limit that has ended a search. reason: of the trials that it ended, see `ENDINGS`. words: for the user."""

    reason: str
    words: str


class SearchLimit(tune.Stopper):
    """Ends the search when it has settled, or when the stages after it are estimated to need all that is left.

    It does not end a search without a value: there would be nothing to confirm. Tune pickles its stoppers, hence plain
    data; what has been read is left out and read again.

    deadline_s: when the study has to be finished (seconds since 1970), None without a limit. reached: what has ended
    the search, None while nothing has.
    """

    def __init__(self, folder: str, budget: Budget, deadline_s: float | None) -> None:
        self.reached: Reached | None = None
        self._folder, self._budget, self._deadline_s, self._next_check_s = folder, budget, deadline_s, 0.0
        self._reader = StudyReader(Path(folder))

    @property
    def is_over(self) -> bool:
        return self.reached is not None

    def of_further_folds(self) -> SearchLimit | None:
        """Return the limit of the runs on further folds after this search; None where they have no time left.

        That a ranking has settled does not end them.
        """
        if self.reached is not None and self.reached.reason != "settled":
            return None
        return SearchLimit(self._folder, self._budget._replace(until_settled=False), self._deadline_s)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        now_s = time.time()
        if not self.is_over and now_s >= self._next_check_s:
            self._reader.read_on()
            left_s = None if self._deadline_s is None else self._deadline_s - now_s
            self.reached = limit_reached(self._reader.now(), self._budget, left_s)
            took_s = time.time() - now_s
            self._next_check_s = now_s + max(CHECK_EVERY_S, took_s / CHECK_SHARE)
        return self.is_over


def limit_reached(study: StudyState, budget: Budget, left_s: float | None) -> Reached | None:
    """Return the limit that ends the search now, None where it goes on. left_s: until the study has to be finished."""
    if study.best_of_stage("search") is None:
        return None
    if left_s is not None and has_to_end(study, left_s):
        return Reached("time", "the time limit ended the search")
    if budget.device_hours is not None:
        spent, later, unit = device_hours(study)
        if spent + RESERVE * later >= budget.device_hours:
            words = f"the budget of {budget.device_hours:g} {unit} ended the search after {spent:.2f}"
            return Reached("budget", f"{words}, with {later:.2f} for the stages after it")
    if budget.until_settled and (verdict := settled(study.searched)):
        return Reached("settled", f"the search has settled: {verdict}")
    return None


def has_to_end(study: StudyState, left_s: float) -> bool:
    """Return whether the search has to end for the later stages to end within ``left_s`` seconds."""
    later_s = remaining_s(study, STAGES[1:])
    return study.best_of_stage("search") is not None and later_s is not None and RESERVE * later_s >= left_s


def device_hours(study: StudyState) -> tuple[float, float, str]:
    """Return the device hours that the study has spent, those that the stages after the search are estimated to need,
    and their unit.

    A run of a later stage counts with all its epochs, at the mean time of an epoch of the search, and with the devices
    that its trials hold on average.
    """
    trials = list(study.trials.values())
    cost = cost_of(trials, cpus=study.cpus, gpus=study.gpus)
    times = [row["epoch_s"] for trial in trials for row in trial.epochs.values() if "epoch_s" in row]
    held = fmean([study.cpus if not study.gpus else trial.gpus or study.gpus for trial in trials])
    later = [plan for stage, plan in study.planned.items() if stage != "search"]
    epochs = sum(plan.num_trials * (plan.max_epochs or TEST_EPOCHS) for plan in later)
    needed = epochs * fmean(times) * held / 3600 if times else 0.0
    return sum(stage.hours for stage in cost.stages), needed, cost.unit


def settled(trials: list[TrialState]) -> str:
    """Return why the search of these trials has settled, in words; empty while it has not.

    A verdict that is looked up after every trial is right by chance sooner or later. So it has to hold for the trials
    so far, without the last tenth of them and without the last fifth, and every recipe needs `_LEAST_TRIALS`. Trials
    that run still count with their best value so far. A search of one recipe cannot settle.
    """
    counts = Counter(trial.recipe for trial in trials)
    if len(counts) < 2 or min(counts.values()) < _LEAST_TRIALS:
        return ""
    verdict = ""
    for share in _LOOKS:
        some = trials[: math.ceil(share * len(trials))]
        found = search_stability([trial.best for trial in some], [trial.recipe for trial in some], noun="recipes")
        if not found.settled:
            return ""
        verdict = found.verdict
    return verdict
