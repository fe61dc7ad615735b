"""The time limit of one run of a study: it ends the search early enough for the stages after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import tune

from raydml.study.events import STAGES, StudyReader, StudyState
from raydml.study.pace import remaining_s

CHECK_EVERY_S = 0.5
CHECK_SHARE = 0.02  # largest part of the time that the checks take: the estimate reads every trial
RESERVE = 1.3  # of the estimated time of the later stages: estimates are rough


class TimeLimit(tune.Stopper):
    """Ends the search when the stages after it are estimated to need all the time that is left.

    It does not end a search without a value: there would be nothing to confirm. Tune pickles its stoppers, hence plain
    data; what has been read is left out and read again.

    deadline_s: when the study has to be finished (seconds since 1970). is_over: whether the search has been ended.
    """

    def __init__(self, folder: str, deadline_s: float) -> None:
        self.is_over = False
        self._deadline_s, self._next_check_s = deadline_s, 0.0
        self._reader = StudyReader(Path(folder))

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        now_s = time.time()
        if not self.is_over and now_s >= self._next_check_s:
            self._reader.read_on()
            self.is_over = has_to_end(self._reader.now(), self._deadline_s - now_s)
            took_s = time.time() - now_s
            self._next_check_s = now_s + max(CHECK_EVERY_S, took_s / CHECK_SHARE)
        return self.is_over


def has_to_end(study: StudyState, left_s: float) -> bool:
    """Return whether the search has to end for the later stages to end within ``left_s`` seconds."""
    later_s = remaining_s(study, STAGES[1:])
    return study.best_of_stage("search") is not None and later_s is not None and RESERVE * later_s >= left_s
