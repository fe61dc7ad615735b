"""Which checkpoints of a stage stay on the disk: those of its best trials, and of trials that have not ended."""

from __future__ import annotations

from bisect import insort
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from raydml.analysis.trials import TrialState
from raydml.study import events
from raydml.study.events import StudyReader, events_path
from raydml.study.remote import StoredFiles, files_of_study

#: Kinds of events that concern one trial, and those that concern none. Any other may change every trial.
_OF_TRIAL = ("trial_started", "epoch", "trial_retried", "trial_ended")
_OF_NONE = ("step", "note", "artifact", "model", "test_read")
#: What trials are sorted by: whether it has no value, minus its value, its key.
_Rank = tuple[bool, float, str]


class Retention:
    """Keeps the checkpoints of the best ``keep`` ended trials of a stage, within ``max_bytes``; deletes the others'.

    Checkpoints of trials that have not ended are never deleted. The winner's are kept even beyond the limit: without
    them the search is lost. A trial is beyond the limit if its checkpoints and those of all better trials are.

    all_finished: keep those of every trial that ran to its end as well, and count only the others: which of them is the
    best, only its runs on further folds will show (see `raydml.study.folds`).

    The ranking is kept from one call to the next, because a study may have many trials: the end of one reads the new
    events, measures the checkpoints of that trial and deletes what has lost. A pickled copy holds nothing that was
    read, and begins with all events.
    """

    def __init__(
        self, folder: Path, stage: str, keep: int, max_bytes: int | None, *, all_finished: bool = False
    ) -> None:
        self._folder, self._stage, self._keep, self._max_bytes = folder, stage, keep, max_bytes
        self._all_finished = all_finished
        self._reader = StudyReader(folder)
        self._changed: set[str] | None = None  # keys since the last call of `drop_losers`; None: any trial
        self._begin_anew()

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self._folder, self._stage, self._keep, self._max_bytes)
        return partial(Retention, all_finished=self._all_finished), given

    def _begin_anew(self) -> None:
        self._ended: set[str] = set()
        self._best: list[_Rank] = []  # the first `keep` ended trials, in order
        self._stored: list[_Rank] = []  # the ended trials that have checkpoints, in order
        self._sizes: dict[str, int] = {}  # bytes of their checkpoints
        self._used = 0  # bytes of all of them

    def read_on(self) -> None:
        """Read the new events. What has been read between the ends of trials need not be read at one."""
        for event in self._reader.read_on():
            if event["event"] in _OF_NONE:
                continue
            if event["event"] not in _OF_TRIAL:
                self._changed = None
            elif self._changed is not None:
                self._changed.add(str(event["trial"]))

    def drop_losers(self) -> None:
        """Delete the checkpoints of the ended trials that are not kept."""
        self.read_on()
        trials, changed = self._reader.trials, self._changed
        if changed is None or not changed.isdisjoint(self._ended):
            # At the start, where a trial that had ended has gone on, and where the last call broke off.
            self._begin_anew()
            changed = set(trials)
        for key in changed:
            if trials[key].stage == self._stage and trials[key].ended and not trials[key].is_superseded:
                self._add(trials[key])
        self._drop()
        self._changed = set()

    def _add(self, trial: TrialState) -> None:
        if self._all_finished and trial.ended == "finished":
            return
        rank = (trial.best is None, -(trial.best or 0.0), trial.trial)
        self._ended.add(trial.trial)
        insort(self._best, rank)
        del self._best[max(self._keep, 1) :]
        self._measure(rank)

    def _measure(self, rank: _Rank) -> None:
        files = files_of_study(self._folder)
        # To list a store at the end of each trial would hold up the others.
        is_listed = self._max_bytes is not None or not isinstance(files, StoredFiles)
        size = files.stored_bytes(self._stage, rank[-1]) if is_listed else 0
        if size is not None:
            self._sizes[rank[-1]] = size
            self._used += size
            insort(self._stored, rank)

    def _drop(self) -> None:
        losers: list[_Rank] = []
        while self._stored and self._stored[-1] != self._best[0]:
            is_within = self._max_bytes is None or self._used <= self._max_bytes
            if self._stored[-1] <= self._best[-1] and is_within:
                break
            losers.append(self._stored.pop())
            self._used -= self._sizes.pop(losers[-1][-1])
        for rank in reversed(losers):
            drop_checkpoints(self._folder, self._stage, rank[-1])
            if not isinstance(files_of_study(self._folder), StoredFiles):
                self._measure(rank)  # what could not be deleted is tried again


#: Deletes in stores, one trial after the other: the driver does not wait for them.
_deleting = ThreadPoolExecutor(1, thread_name_prefix="delete")


def drop_checkpoints(folder: Path, stage: str, key: str) -> None:
    """Delete the checkpoints of a trial; in a store that happens a little later.

    What cannot be deleted is reported in a note, and the study goes on.
    """

    def drop() -> None:
        for failure in files.drop_checkpoints(stage, key):
            events.append(events_path(folder), {"event": "note", "text": failure})

    files = files_of_study(folder)
    if isinstance(files, StoredFiles):
        _deleting.submit(drop)
    else:
        drop()
