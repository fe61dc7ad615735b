"""Delivers a study's events to MLflow: a thread that reads the spool and brings the study's runs up to date.

Nothing that trains ever waits for MLflow. The spool (events.jsonl) is the truth; this thread, or later
``launch.py sync``, reads it from the beginning and sends what is missing. What has arrived is known from the runs
themselves: each carries as a tag how far in the spool it is. So a kill at any moment, a server that was away and a
second delivery all end in the same runs, and a lost database is filled anew.
"""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
import traceback
from pathlib import Path
from typing import IO

from raydml.ops.files import write_whole
from raydml.study import events
from raydml.study.state import ExportedModel, StudyState, reduce_events
from raydml.tracking.models import Origin, log_exported_model, log_test_read, origin_of, resolve_checkpoint
from raydml.tracking.runs import StudyRuns
from raydml.tracking.store import (
    TrackingError,
    connect,
    default_uri,
    experiment_id,
    is_transient,
    preflight,
    redacted,
)
from raydml.tracking.updates import updates_of

__all__ = [
    "Origin",
    "Tracker",
    "TrackingError",
    "default_uri",
    "log_test_read",
    "origin_of",
    "preflight",
    "resolve_checkpoint",
    "sync",
]

POLL_S, FIRST_DELAY_S, LONGEST_DELAY_S, LAST_DELAY_S = 0.5, 1.0, 30.0, 2.0
#: So many deliveries in a row that a store let begin and then broke off are the fault of one request, which is then
#: left out. Attempts that did not even find the study's runs say nothing about a request and do not count.
PATIENCE = 5
_logger = logging.getLogger(__name__)


class Tracker:
    """One study, one store: ``tracker.start()``, run the study, ``tracker.finish(60)``.

    ``problems`` holds what MLflow refused for good (a lost file, say), ``hint()`` the last word for the user.
    """

    def __init__(self, events_path: Path, tracking_uri: str, study: str) -> None:
        self.events_path, self.tracking_uri, self.study = Path(events_path), tracking_uri, study
        self.problems: list[str] = []
        self._offset, self._state = 0, StudyState()
        self._runs: StudyRuns | None = None
        self._failures = 0  # in a row, of any kind: how long to wait
        self._broken_off = 0  # deliveries that began and broke off, in a row: see PATIENCE
        self._last_error = ""
        self._delivered = False
        self._deadline = float("inf")
        self._stop = threading.Event()
        self._lock: IO[str] | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)

    def start(self) -> None:
        """Begin to deliver. Raises TrackingError if another process delivers this study's events."""
        self.events_path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.events_path.with_name("tracking.lock"), "a", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise TrackingError(
                f"another process is delivering study {self.study!r} to MLflow (it is running?). Cure: wait for it"
            ) from error
        self._thread.start()

    def finish(self, timeout_s: float = 60.0) -> bool:
        """Deliver what is left, end runs that nobody works on any more, and stop. True if MLflow has everything.

        Call it when nothing more is written to the spool. After ``timeout_s`` seconds it gives up: nothing is lost,
        ``sync`` delivers it later.
        """
        self._deadline = time.monotonic() + timeout_s
        self._stop.set()
        # A request that is under way may outlast the deadline; the thread is a daemon and ends with the process.
        self._thread.join(timeout_s + 1)
        if not self._thread.is_alive() and self._lock is not None:
            self._lock.close()
        return self._delivered and not self.problems

    def hint(self) -> str:
        """One line about the delivery, with the command that completes it; empty if everything has arrived."""
        if not self._delivered:
            why = f" ({self._last_error})" if self._last_error else ""
            return (
                f"MLflow at {redacted(self.tracking_uri)} has not received everything{why}. Nothing is lost; "
                f"deliver it later: launch.py sync {self.study}"
            )
        if self.problems:
            return f"MLflow refused {len(self.problems)} of the study's records, the first: {self.problems[0]}"
        return ""

    # --- the thread ---

    def _run(self) -> None:
        try:
            while not self._round():
                pass
        except Exception:  # the rim of the thread: told in hint() and in the log, not lost
            self._last_error = traceback.format_exc(limit=-1).strip().splitlines()[-1]
            _logger.exception("the delivery to MLflow has ended")

    def _round(self) -> bool:
        """Deliver what is there; wait. True when it is time to end."""
        stopping = self._stop.is_set()  # before reading: what was written before the stop is still delivered
        try:
            self._deliver()
            if stopping:
                self._close()
        except Exception as error:
            if not is_transient(error):
                raise
            return self._wait_after(error)
        self._failures, self._last_error = 0, ""
        if stopping:
            self._delivered = True
            return True
        self._stop.wait(POLL_S)
        return False

    def _deliver(self) -> None:
        records, offset = events.records(self.events_path, self._offset)
        if not records and self._runs is not None:
            return
        if self._runs is None:
            self._runs = self._connect(reduce_events(record.event for record in records))
            if self._runs is None:
                return  # the study has not started yet
        runs = self._runs
        state, updates = updates_of(records, self._state, runs.offsets())
        for update in updates:
            runs.apply(update, self._log_model)
        if state.state == "interrupted":
            runs.close_running(int(state.changed_s * 1000), "interrupted")
        self._offset, self._state = offset, state
        self._broken_off, runs.refuse_transient = 0, False  # what fails from here on gets all the patience again
        if records:
            self._note(runs)

    def _connect(self, state: StudyState) -> StudyRuns | None:
        if state.state == "waiting":
            return None
        client = connect(self.tracking_uri)
        storage = state.storage or self.events_path.resolve().parent.parent
        experiment = experiment_id(client, self.tracking_uri, storage)
        runs = StudyRuns(client, experiment, self.study, state.study_id)
        runs.refused = self.problems
        runs.refuse_transient = self._broken_off >= PATIENCE
        return runs

    def _log_model(self, run_id: str, model: ExportedModel) -> None:
        assert self._runs is not None
        log_exported_model(self._runs.client, run_id, model)

    def _close(self) -> None:
        """The driver ends here, so nobody works on a run any more. Also repairs what a killed driver left RUNNING."""
        if self._runs is None:
            return
        reason = "unrecorded" if self._state.state == "finished" else "interrupted"
        self._runs.close_running(int(self._state.time_s * 1000), reason)
        self._note(self._runs)

    def _wait_after(self, error: Exception) -> bool:
        self._failures += 1
        self._broken_off += self._runs is not None
        self._last_error = redacted(str(error).strip().splitlines()[0])[:300]
        # Whether the last request has arrived is unknown: begin again with what the runs say.
        self._runs, self._offset, self._state = None, 0, StudyState()
        _logger.debug("MLflow did not take it (%d times in a row): %s", self._failures, self._last_error)
        delay = min(FIRST_DELAY_S * 2 ** (self._failures - 1), LONGEST_DELAY_S)
        if not self._stop.is_set():
            self._stop.wait(delay)
            return False
        left = self._deadline - time.monotonic()
        time.sleep(max(min(delay, LAST_DELAY_S, left), 0))
        return left <= 0

    def _note(self, runs: StudyRuns) -> None:
        """Where to find the runs, for people and for other commands. Deliveries never read it."""
        path = self.events_path.with_name("tracking.json")
        stores = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        stores[redacted(self.tracking_uri)] = {
            "experiment_id": runs.experiment,
            "study_run_id": runs.known[None].run_id,
            "trial_run_ids": {trial: run.run_id for trial, run in runs.known.items() if trial is not None},
            "spool_offset": self._offset,
        }
        write_whole(path, json.dumps(stores, indent=1) + "\n")


def sync(events_path: Path, tracking_uri: str, study: str, timeout_s: float = 600.0) -> bool:
    """Deliver a study's events now and wait; what has arrived before is not sent again. True if MLflow has everything.

    Raises TrackingError if the store cannot be used, or while the study runs (its own driver delivers then).
    """
    preflight(tracking_uri, Path(events_path).resolve().parent.parent)
    tracker = Tracker(events_path, tracking_uri, study)
    tracker.start()
    delivered = tracker.finish(timeout_s)
    if not delivered:
        _logger.warning("%s", tracker.hint())
    return delivered
