"""The time limit of one run of a study: it ends the search early enough for the stages after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import tune

from raydml.study import events
from raydml.study.events import StudyState, events_path, reduce_events
from raydml.study.pace import remaining_s

CHECK_EVERY_S = 0.5
RESERVE = 1.3  # of the estimated time of the later stages: estimates are rough
_LATER_STAGES = ("confirm", "refit", "finalize")


class TimeLimit(tune.Stopper):
    """Ends the search when the stages after it are estimated to need all the time that is left.

    It does not end a search without a value: there would be nothing to confirm. Tune pickles its stoppers, hence plain
    data; the state of the study is left out and read from the file again.

    deadline_s: when the study has to be finished (seconds since 1970). is_over: whether the search has been ended.
    """

    def __init__(self, folder: str, deadline_s: float) -> None:
        self.is_over = False
        self._folder, self._deadline_s = folder, deadline_s
        self._offset, self._state, self._checked_s = 0, StudyState(), 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_offset": 0, "_state": StudyState()}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        now_s = time.time()
        if not self.is_over and now_s - self._checked_s >= CHECK_EVERY_S:
            self._checked_s = now_s
            new, self._offset = events.read_from(events_path(Path(self._folder)), self._offset)
            self._state = reduce_events(new, self._state)
            self.is_over = has_to_end(self._state, self._deadline_s - now_s)
        return self.is_over


def has_to_end(study: StudyState, left_s: float) -> bool:
    """Return whether the search has to end for the later stages to end within ``left_s`` seconds."""
    later_s = remaining_s(study, _LATER_STAGES)
    return study.best_of_stage("search") is not None and later_s is not None and RESERVE * later_s >= left_s
