"""Trials that make no progress: found by the age of their last epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

#: An epoch may take so many times the usual time of an epoch of the trial.
USUAL_TIMES = 10
#: Before its first epoch a trial may take so many times `stuck_after_s`: what is usual is not known, and a first epoch
#: includes the start of the process, the decoding and the compilation.
FIRST_TIMES = 12


class StuckTrial(NamedTuple):
    """A trial that makes no progress. waited_s: since its last epoch. usual_s: of an epoch, None where not known."""

    key: str
    waited_s: float
    usual_s: float | None

    def __str__(self) -> str:
        usual = "" if self.usual_s is None else f", and an epoch took at most {self.usual_s:.3g} s so far"
        return f"no epoch for {self.waited_s:.0f} s{usual}"


class StuckWatch:
    """Finds the running trials whose last sign is older than ``stuck_after_s`` and than `USUAL_TIMES` epochs.

    What is usual is the longest epoch of the trial itself. Before it has reported one, it has `FIRST_TIMES` as long, or
    `USUAL_TIMES` of the longest epoch of the others, whichever is longer.

    longest_s: key -> the longest epoch so far in seconds, of trials that go on.
    """

    def __init__(
        self,
        stuck_after_s: float,
        longest_s: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stuck_after_s, self._clock = stuck_after_s, clock
        self._signs_s: dict[str, float] = {}  # when a running trial started or last reported
        self._longest_s = dict(longest_s or {})
        self._longest_of_all_s = max(self._longest_s.values(), default=0.0)

    def report(self, key: str, epoch_s: float | None) -> None:
        """Take note of an epoch, which took ``epoch_s`` seconds where that is known."""
        self._signs_s[key] = self._clock()
        if epoch_s is not None:
            self._longest_s[key] = max(epoch_s, self._longest_s.get(key, 0.0))
            self._longest_of_all_s = max(epoch_s, self._longest_of_all_s)

    def stuck(self, running: Iterable[str]) -> list[StuckTrial]:
        """Return the stuck ones among the trials that run now. Each is returned once, until it reports again."""
        now_s, running = self._clock(), set(running)
        # A trial that waits, for a rung or for a retry, is not stuck. Its time begins again when it runs.
        self._signs_s = {key: self._signs_s.get(key, now_s) for key in running}
        found = [StuckTrial(key, now_s - sign_s, self._longest_s.get(key)) for key, sign_s in self._signs_s.items()]
        late = [trial for trial in found if trial.waited_s > self.limit_s(trial.key)]
        for trial in late:
            self._signs_s[trial.key] = now_s
        return late

    def limit_s(self, key: str) -> float:
        """Return how long a trial may take from one sign to the next."""
        if (usual_s := self._longest_s.get(key)) is not None:
            return max(self._stuck_after_s, USUAL_TIMES * usual_s)
        return max(FIRST_TIMES * self._stuck_after_s, USUAL_TIMES * self._longest_of_all_s)
