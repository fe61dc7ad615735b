"""Delivers a study's events to MLflow, in a thread that reads the event file and brings the study's runs up to date.

Nothing that trains waits for MLflow. The events are the truth; this thread, or a later ``launch.py sync``, reads them
from the beginning and sends what is missing. The runs themselves hold what has arrived: a tag of each run is the offset
in the event file up to which the run is complete. A kill at any moment, an unavailable server and a second delivery
therefore all end in the same runs, and a lost database is filled again.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
import traceback
from pathlib import Path
from typing import IO

from mlflow.exceptions import MlflowException

from raydml.study import events
from raydml.study.events import ExportedModel, StudyState, reduce_events
from raydml.tracking.models import is_registered, log_exported_model
from raydml.tracking.runs import StudyRuns
from raydml.tracking.store import (
    TrackingError,
    connect,
    create_missing,
    experiment_id,
    is_transient,
    prepare_store,
    redacted,
)
from raydml.tracking.updates import moved_model, updates_of

POLL_S, FIRST_DELAY_S, LONGEST_DELAY_S, LAST_DELAY_S = 0.5, 1.0, 30.0, 2.0
#: Consecutive deliveries that begin and break off before the request at fault is left out. A delivery that cannot even
#: look up the study's runs does not count: the store is unavailable, and no request is at fault.
PATIENCE = 5
_logger = logging.getLogger(__name__)


class Tracker:
    """Delivery of one study to one store: ``tracker.start()``, run the study, ``tracker.finish(60)``.

    ``problems`` lists what MLflow refused for good (a lost file, say), ``hint()`` sums the delivery up for the user.
    """

    def __init__(self, events_path: Path, tracking_uri: str, study: str) -> None:
        self.events_path, self.tracking_uri, self.study = Path(events_path), tracking_uri, study
        self._folder = self.events_path.resolve().parent
        self.problems: list[str] = []
        self._offset, self._state = 0, StudyState()  # what has been read and delivered
        self._runs: StudyRuns | None = None
        self._num_failures = 0  # in a row, of any kind: sets the delay
        self._num_broken_off = 0  # in a row, of deliveries that had begun: see PATIENCE
        self._last_error = ""
        self._delivered = False
        self._deadline = float("inf")
        self._stop = threading.Event()
        self._lock: IO[str] | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-tracker", daemon=True)

    def start(self) -> None:
        """Start to deliver. Raises TrackingError if another process delivers this study's events."""
        self.events_path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.events_path.with_name("tracking.lock"), "a", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise TrackingError(
                f"another process is delivering study {self.study!r} to MLflow, probably its own run. "
                "Cure: wait for its end"
            ) from error
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

    def hint(self) -> str:
        """Return a line about what is missing, with the command that completes it; empty if everything has arrived."""
        if not self._delivered:
            why = f" ({self._last_error})" if self._last_error else ""
            return (
                f"MLflow at {redacted(self.tracking_uri)} has not received everything{why}. Nothing is lost; "
                f"deliver it later: launch.py sync {self.study}"
            )
        if self.problems:
            return f"MLflow refused {len(self.problems)} of the study's records, the first: {self.problems[0]}"
        return ""

    def restore_deleted(self) -> bool:
        """Register the study's newest model again if it was deleted in MLflow, and report runs that were deleted.

        Call it after `finish`. Returns whether MLflow has everything.
        """
        runs = self._runs
        if runs is None:
            return True
        runs.report_deleted()
        for model in self._state.models[-1:]:
            run = runs.known.get(model.trial)
            if run is None or run.deleted:
                continue
            here = moved_model(model, self._state, self._folder)
            if not is_registered(runs.client, run.run_id, here):
                try:
                    address = log_exported_model(runs.client, run.run_id, here, self._folder, again=True)
                except (FileNotFoundError, MlflowException) as error:
                    self.problems.append(
                        f"model {model.name!r} was deleted in MLflow and cannot be made again: {error}"
                    )
                    continue
                _logger.warning("the model %r was deleted in MLflow; registered again as %s", model.name, address)
        return not self.problems

    # --- the thread ---

    def _run(self) -> None:
        try:
            while not self._deliver_once():
                pass
        except Exception:  # the outermost frame of the thread: hint() and the log report it
            self._last_error = traceback.format_exc(limit=-1).strip().splitlines()[-1]
            _logger.exception("the delivery to MLflow has ended")

    def _deliver_once(self) -> bool:
        """Deliver what has been written so far, then wait. Returns whether the thread is to end."""
        stopping = self._stop.is_set()  # before reading: what was written before the stop is still delivered
        try:
            self._deliver()
            if stopping:
                self._close()
        except Exception as error:
            if not is_transient(error):
                raise
            return self._wait_after(error)
        self._num_failures, self._last_error = 0, ""
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
        state, updates = updates_of(records, self._state, runs.offsets(), self._folder)
        for update in updates:
            runs.apply(update, self._log_model)
        if state.state == "interrupted":
            runs.close_running(int(state.changed_s * 1000), "interrupted")
        self._offset, self._state = offset, state
        self._num_broken_off, runs.refuse_transient = 0, False  # the next request at fault gets the whole patience

    def _connect(self, state: StudyState) -> StudyRuns | None:
        if state.state == "waiting":
            return None
        client = connect(self.tracking_uri)
        experiment = experiment_id(client, self.tracking_uri, self.events_path.resolve().parent.parent)
        runs = StudyRuns(client, experiment, self.study, state.study_id)
        runs.refused = self.problems
        runs.refuse_transient = self._num_broken_off >= PATIENCE
        return runs

    def _log_model(self, run_id: str, model: ExportedModel) -> None:
        assert self._runs is not None
        log_exported_model(self._runs.client, run_id, model, self._folder)

    def _close(self) -> None:
        """End the runs that are still open: the driver ends here. This also closes what a killed driver left open."""
        if self._runs is not None:
            reason = "unrecorded" if self._state.state == "finished" else "interrupted"
            self._runs.close_running(int(self._state.time_s * 1000), reason)

    def _wait_after(self, error: Exception) -> bool:
        self._num_failures += 1
        self._num_broken_off += self._runs is not None
        self._last_error = redacted(str(error).strip().splitlines()[0])[:300]
        # Whether the last request has arrived is unknown: begin again with what the runs say.
        self._runs, self._offset, self._state = None, 0, StudyState()
        _logger.debug("a delivery to MLflow failed (%d in a row): %s", self._num_failures, self._last_error)
        delay = min(FIRST_DELAY_S * 2 ** (self._num_failures - 1), LONGEST_DELAY_S)
        if not self._stop.is_set():
            self._stop.wait(delay)
            return False
        left = self._deadline - time.monotonic()
        time.sleep(max(min(delay, LAST_DELAY_S, left), 0))
        return left <= 0


def sync(events_path: Path, tracking_uri: str, study: str, timeout_s: float = 600.0, *, complete: bool = False) -> bool:
    """Deliver a study's events now and wait for it. What has arrived before is not sent again.

    complete: also look for what was deleted in MLflow: the newest model is registered again, a deleted run is reported.

    A database that does not exist is created and filled, if its folder exists. Returns whether MLflow has everything.
    Raises TrackingError if the store cannot be used, or while the study runs (its own driver delivers then).
    """
    storage = Path(events_path).resolve().parent.parent
    create_missing(tracking_uri, storage)
    prepare_store(tracking_uri, storage)
    tracker = Tracker(events_path, tracking_uri, study)
    tracker.start()
    delivered = tracker.finish(timeout_s)
    if delivered and complete:
        delivered = tracker.restore_deleted()
    if not delivered:
        _logger.warning("%s", tracker.hint())
    return delivered
