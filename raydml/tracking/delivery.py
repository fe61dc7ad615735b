"""Delivers a study's events to MLflow, in a thread that reads the event file and brings the study's runs up to date.

Nothing that trains waits for MLflow. The events are the truth; this thread, or a later ``launch.py sync``, reads them
from the beginning and sends what is missing. The runs themselves hold what has arrived, in tags: the offset in the
event file up to which the run is complete, the events before it whose files the store has refused, and a digest of the
event file up to there. A kill at any moment, an unavailable server and a second delivery therefore all end in the same
runs, a lost database is filled again, and an event file that was put back from a backup is noticed.

Nothing is given up. A store that does not answer, a run whose values are refused and a file that is refused are all
tried again, less and less often, until the driver ends; after that `sync` does it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from mlflow.exceptions import MlflowException

from raydml.ops.addresses import redacted, without_secrets
from raydml.ops.files import flush_to_disk
from raydml.ops.wording import counted
from raydml.study import events
from raydml.study.driver import lock_of_delivery, write_num_sent
from raydml.study.events import ExportedModel, Record, StudyState
from raydml.tracking.models import is_registered, log_exported_model
from raydml.tracking.runs import StudyRuns
from raydml.tracking.store import (
    StoreUnavailable,
    TrackingError,
    connect,
    create_missing,
    experiment_id,
    first_line,
    is_transient,
    reach_store,
)
from raydml.tracking.updates import moved_model, updates_of

POLL_S, LONGEST_POLL_S, FIRST_DELAY_S, LONGEST_DELAY_S, LAST_DELAY_S = 0.5, 20.0, 1.0, 30.0, 2.0
#: Tries once the driver has ended: of what is refused, and of a store that was away before for so many tries in a row
#: (half a minute). One that has gone away just now has all the time of `Tracker.finish`.
LAST_TRIES, NUM_AWAY = 3, 5
SYNC_PATIENCE_S = 60.0  # longest wait of `sync` for a server's first answers
#: Largest part of a processor that the deliveries of a study take while it runs.
CPU_SHARE = 0.015
_logger = logging.getLogger(__name__)


class Tracker:
    """Delivery of one study to one store: ``tracker.start()``, run the study, ``tracker.finish(60)``.

    ``problems`` lists what MLflow does not have and why, ``hint()`` sums the delivery up for the user.
    """

    def __init__(self, events_path: Path, tracking_uri: str, study: str) -> None:
        self.events_path, self.tracking_uri, self.study = Path(events_path), tracking_uri, study
        self._folder = self.events_path.resolve().parent
        self.problems: list[str] = []
        self._digests = SpoolDigests(self.events_path)
        self._offset, self._state = 0, StudyState()  # what has been read and delivered
        self._num_sent = 0  # events up to the offset
        self._runs: StudyRuns | None = None
        self._said: set[str] = set()
        self._num_failures = 0  # in a row, of any kind: sets the delay
        self._begin_anew_s = float("inf")  # when what was refused is sent again
        self._num_last_tries = 0
        self._last_error = ""
        self._delivered = False
        self._deadline = float("inf")
        self._stop = threading.Event()
        self._lock: IO[str] | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)

    def start(self) -> None:
        """Start to deliver. Raises TrackingError if another process delivers this study's events."""
        self.events_path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_of_delivery(self.events_path.parent)
        if self._lock is None:
            raise TrackingError(
                f"another process is delivering study {self.study!r} to MLflow, probably its own run. "
                "Cure: wait for its end"
            )
        self._thread.start()

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Deliver the rest, end the runs that are still open, and stop. Returns whether MLflow has everything.

        Call it when nothing more is written to the event file. After ``timeout_s`` seconds it gives up: nothing is
        lost, ``sync`` delivers it later.
        """
        self._deadline = time.monotonic() + timeout_s
        self._stop.set()
        # A request in progress may outlast the deadline; the thread is a daemon and ends with the process.
        self._thread.join(timeout_s + 1)
        if not self._thread.is_alive() and self._lock is not None:
            self._lock.close()
        return self._delivered and not self.problems

    def hint(self, command: str = "") -> str:
        """Return a line about what is missing, with the command that completes it; empty if everything has arrived.

        command: the one for this study, if `sync` and its name are not enough.
        """
        if self._delivered and not self.problems:
            return ""
        lacks = [] if self._delivered else [f"has not received everything{self._why()}"]
        if self.problems:
            lacks.append(f"lacks {counted(len(self.problems), 'part')} of the study, the first: {self.problems[0]}")
        command = command or f"launch.py sync {self.study}"
        if without_secrets(self.tracking_uri) != self.tracking_uri:
            command += " --tracking-uri URI (its password is not stored)"
        return (
            f"MLflow at {redacted(self.tracking_uri)} {', and '.join(lacks)}. Nothing is lost; complete it: {command}"
        )

    def _why(self) -> str:
        return f" ({self._last_error})" if self._last_error else ""

    def restore_deleted(self) -> bool:
        """Register the study's newest model again if it was deleted in MLflow, and report runs that were deleted.

        Call it after `finish`. Returns whether MLflow has everything.
        """
        runs = self._runs
        if runs is None:
            return True
        runs.report_deleted()
        self._take_problems(runs)
        for model in self._state.models[-1:]:
            run = runs.known.get(model.trial)
            if run is None or run.deleted:
                continue
            here = moved_model(model, self._state, self._folder)
            try:
                if is_registered(runs.client, run.run_id, here):
                    continue
                address = log_exported_model(runs.client, run.run_id, here, self._folder, again=True)
            except Exception as error:  # whatever it is, the model is not there
                self.problems.append(
                    f"model {model.name!r}: it was deleted in MLflow and cannot be made again: {first_line(error)}"
                )
                continue
            _logger.warning("the model %r was deleted in MLflow; registered again as %s", model.name, address)
        return not self.problems

    # --- the thread ---

    def _run(self) -> None:
        while not self._deliver_once():
            pass

    def _deliver_once(self) -> bool:
        """Deliver what has been written so far, then wait. Returns whether the thread is to end."""
        stopping = self._stop.is_set()  # before reading: what was written before the stop is still delivered
        began_s = time.thread_time()
        if time.monotonic() >= self._begin_anew_s or (stopping and self._begin_anew_s < float("inf")):
            self._begin_anew()
        try:
            self._deliver(stopping)
        except Exception as error:
            return self._wait_after(error, stopping)
        self._last_error, self._delivered = "", stopping
        runs = self._runs
        if runs is not None and runs.is_incomplete:
            return self._wait_for_refused(stopping, runs.may_arrive)
        self._num_failures = 0
        if not stopping:
            used_s = time.thread_time() - began_s
            self._stop.wait(min(max(POLL_S, used_s / CPU_SHARE), LONGEST_POLL_S))
        return stopping

    def _deliver(self, stopping: bool) -> None:
        records, offset = events.records(self.events_path, self._offset)
        if records:  # the store must not have events that a loss of power takes out of the file
            flush_to_disk(self.events_path)
        if self._runs is None:
            self._runs = self._connect(records)
            if self._runs is None:
                return  # the study has not started yet
        runs, damaged = self._runs, dict[str, str]()
        state, updates = updates_of(
            records, self._state, runs.offsets(), self._folder, unsent=runs.unsent(), damaged=damaged
        )
        self._report_damaged(damaged)
        if state.state == "interrupted":  # first of all: the process may not have the time for the rest
            self._close_runs(runs, state)
        digests = self._digests.of(update.offset for update in updates)
        for update in updates:
            if stopping and update.status == "RUNNING":
                update.status = None  # no driver works on it any more
            runs.apply(update, self._log_model, digests[update.offset])
        self._offset, self._state = offset, state
        self._num_sent += len(records)
        if records and self._lock is not None:
            write_num_sent(self._lock, self._num_sent)
        if stopping:
            self._close_runs(runs, state)
        self._take_problems(runs)

    def _connect(self, records: Sequence[Record]) -> StudyRuns | None:
        """Look the study's runs up, and begin those again that were sent other events than the file has now."""
        started = [one.event for one in records if one.event.get("event") == "study_started"]
        study_id = next((str(event["study_id"]) for event in reversed(started) if event.get("study_id")), None)
        if study_id is None:
            return None
        client = connect(self.tracking_uri)
        experiment = experiment_id(client, self.tracking_uri, self._folder.parent)
        runs = StudyRuns(client, experiment, self.study, study_id)
        known = {trial: run for trial, run in runs.known.items() if run.digest and not run.deleted}
        digests = self._digests.of(run.offset for run in known.values())
        others = [trial for trial, run in known.items() if run.digest != digests[run.offset]]
        if others:
            runs.replace(others)
            _logger.warning(
                "%s is not the file whose events MLflow has (put back from a backup?): %s made again from it; the "
                "former ones are in MLflow's trash",
                self.events_path,
                f"{counted(len(others), 'run')} {'is' if len(others) == 1 else 'are'}",
            )
        return runs

    def _log_model(self, run_id: str, model: ExportedModel) -> None:
        assert self._runs is not None
        log_exported_model(self._runs.client, run_id, model, self._folder)

    def _close_runs(self, runs: StudyRuns, state: StudyState) -> None:
        """End the runs that are still open: no driver works on them. This also ends those that a killed one left."""
        reason = "unrecorded" if state.state == "finished" else "interrupted"
        runs.close_running(int(state.time_s * 1000), reason)

    def _report_damaged(self, damaged: dict[str, str]) -> None:
        new = {place: error for place, error in damaged.items() if place not in self._said}
        self._said |= set(new)
        if new:
            others = f", and {len(new) - 1} more" if len(new) > 1 else ""
            place, error = next(iter(new.items()))
            _logger.warning("%s: damaged and not sent to MLflow: %s (%s)%s", self.events_path, place, error, others)

    def _take_problems(self, runs: StudyRuns) -> None:
        self.problems = list(runs.missing.values())
        for what, problem in runs.missing.items():
            if what not in self._said:
                self._said.add(what)
                _logger.warning("not in MLflow: %s", problem)

    def _begin_anew(self) -> None:
        """Let the next delivery begin with what the runs say that they have, and send the rest."""
        self._runs, self._offset, self._state = None, 0, StudyState()
        self._begin_anew_s = float("inf")

    def _wait_after(self, error: Exception, stopping: bool) -> bool:
        """Wait after a delivery that broke off; whether its last request has arrived is unknown."""
        self._begin_anew()
        self._last_error = first_line(error)
        if not isinstance(error, (MlflowException, TrackingError, OSError)) and not is_transient(error):
            self._last_error = traceback.format_exc(limit=-1).strip().splitlines()[-1]
            if self._last_error not in self._said:  # a mistake in raydml
                self._said.add(self._last_error)
                _logger.error("a delivery to MLflow failed", exc_info=error)
            if stopping:
                return True
        _logger.debug("a delivery to MLflow failed (%d in a row): %s", self._num_failures + 1, self._last_error)
        delay = self._next_delay()
        if not stopping:
            self._stop.wait(delay)
            return False
        self._num_last_tries += 1
        was_away = self._num_failures - self._num_last_tries >= NUM_AWAY
        return (was_away and self._num_last_tries >= LAST_TRIES) or self._wait_at_the_end(delay)

    def _wait_for_refused(self, stopping: bool, may_arrive: bool) -> bool:
        """Wait where the store lacks a part of what was sent. What is new goes on; the part is sent again later."""
        if stopping:
            self._num_last_tries += 1
            return (self._num_last_tries >= LAST_TRIES and not may_arrive) or self._wait_at_the_end(self._next_delay())
        if self._begin_anew_s == float("inf"):
            self._begin_anew_s = time.monotonic() + self._next_delay()
        self._stop.wait(POLL_S)
        return False

    def _wait_at_the_end(self, delay_s: float) -> bool:
        left_s = self._deadline - time.monotonic()
        time.sleep(max(min(delay_s, LAST_DELAY_S, left_s), 0))
        self._begin_anew_s = 0.0
        return left_s <= 0

    def _next_delay(self) -> float:
        """Return how long to wait before the next try: longer after each failure in a row."""
        self._num_failures += 1
        # A server can be away for days: 2 ** 1024 would be no float any more.
        return min(FIRST_DELAY_S * 2.0 ** min(self._num_failures - 1, 100), LONGEST_DELAY_S)


class SpoolDigests:
    """Digests of what an event file holds before an offset, read once from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._path, self._hash, self._end = path, hashlib.sha256(), 0

    def of(self, offsets: Iterable[int]) -> dict[int, str]:
        """Return the digest before each offset; empty where the file is shorter."""
        found = {}
        for offset in sorted(set(offsets)):
            if offset < self._end:
                self._hash, self._end = hashlib.sha256(), 0
            with open(self._path, "rb") as file:
                file.seek(self._end)
                data = file.read(offset - self._end)
            self._hash.update(data)
            self._end += len(data)
            found[offset] = self._hash.hexdigest()[:16] if self._end == offset else ""
        return found


def sync(
    events_path: Path,
    tracking_uri: str,
    study: str,
    timeout_s: float = 600.0,
    *,
    complete: bool = False,
    command: str = "",
) -> bool:
    """Deliver a study's events now and wait for it. What has arrived before is not sent again.

    complete: also look for what was deleted in MLflow: the newest model is registered again, a deleted run is reported.
    command: the one that completes it later.

    A database that does not exist is created and filled, if its folder exists. Returns whether MLflow has everything.
    Raises TrackingError if the store cannot be used, or while the study runs (its own driver delivers then).
    """
    storage = Path(events_path).resolve().parent.parent
    create_missing(tracking_uri, storage)
    if reason := reach_store(tracking_uri, storage, min(timeout_s, SYNC_PATIENCE_S)):
        raise StoreUnavailable(reason)
    tracker = Tracker(events_path, tracking_uri, study)
    tracker.start()
    delivered = tracker.finish(timeout_s)
    if delivered and complete:
        delivered = tracker.restore_deleted()
    if not delivered:
        _logger.warning("%s", tracker.hint(command))
    return delivered
