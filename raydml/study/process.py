"""The driver of a study in a process of its own, and what ends together with it.

Ray may end the process that uses it: its core aborts where the head node of the cluster is gone, where the local raylet
dies, and where TERM arrives at the wrong moment. The process that a user has started therefore does not use Ray. It
starts the driver, forwards signals to it, waits, and ends whatever the driver leaves behind. The driver is the leader
of a session, and so all of an embedded Ray is found by the number of that session.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from raydml.study import events
from raydml.study.budget import UNLIMITED, Budget
from raydml.study.events import events_path, read_state

#: Signals that stop a study in order: Ctrl-C, a scheduler's notice, a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_S = 6.0  # from the first signal to the end of the driver; then it is killed
MAX_FAILURES = 3  # of drivers in a row, without progress of the study
_PAUSE_S = 2.0  # before a new driver, for each failure in a row
_POLL_S = 0.1
_NUM_LAST_LINES = 15
#: Log lines of Ray's C++ part, which are of no use to who runs a study: the events say what has happened.
_RAY_LOG = re.compile(r"(\x1b\[\d+m)*(\[[\d:, .-]+ [A-Z] \d+ \d+\] |\((raylet|gcs_server|autoscaler)\b)")


class RayEnded(Exception):
    """Ray does not start, or has ended while a study runs; a new driver can go on with the study."""


class MachineFault(ValueError):
    """Something outside a trial that would end every trial; the message has the cure."""


class DriverOutcome(NamedTuple):
    """How a driver ended.

    status: ``finished``; ``interrupted`` by a signal; ``refused`` with a mistake of the user; ``paused`` by a fault of
    the machine; ``broken``: Ray or the operating system ended it; ``defect`` of raydml. text: the message of a refused
    or paused one, the last lines of a broken one, the traceback of a defect.
    """

    status: str
    signal: int | None = None
    text: str = ""


class DriverProcess:
    """The process that runs a study: `start` and `wait`. `load` may come before, and `end_unused` at any time.

    command: the words that start it; it calls `serve_driver`.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._show: Callable[[str], None] | None = None
        self._unshown: list[str] = []  # lines from before `start`
        self._lock = threading.Lock()
        self._last_lines: list[str] = []
        self._reported: dict[str, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._outcome_end = -1  # of the pipe, in the process
        self._readers: list[threading.Thread] = []

    def load(self) -> None:
        """Start the process, which imports its libraries and waits; `start` or `end_unused` has to follow."""
        reading, self._outcome_end = os.pipe()
        outcome = os.fdopen(reading, "rb")
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,  # kept open: the driver ends when this process is gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[self._outcome_end],
                start_new_session=True,
            )
        except BaseException:
            outcome.close()
            raise
        finally:
            os.close(self._outcome_end)
        assert self._process.stdout is not None
        self._readers = [
            threading.Thread(target=self._read_output, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_outcome, args=(outcome,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def start(self, folder: Path, address: str | None, budget: Budget, show: Callable[[str], None]) -> None:
        """Start to run the study in a folder. show: is called with each line that the process prints."""
        with self._lock:
            for line in self._unshown:
                show(line)
            self._show = show
        if self._process is None:
            self.load()
        assert self._process is not None
        assert self._process.stdin is not None
        request = {
            "folder": str(folder), "address": address, "budget": budget._asdict(), "outcome": self._outcome_end,
        }  # fmt: skip
        with suppress(BrokenPipeError):  # it has died already: `wait` reports that
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def end_unused(self) -> None:
        """End the process, unless `wait` has seen its end."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            end_session(self._process.pid)

    def wait(self, received: Sequence[int]) -> DriverOutcome:
        """Wait for the end of the driver, and end what it leaves behind.

        received: the signals that have arrived so far, which another thread or a signal handler extends. The first one
        is forwarded to the driver, which then has STOP_S seconds; a second one kills it.
        """
        assert self._process is not None
        process, kill_at_s = self._process, float("inf")
        while process.poll() is None:
            if received and kill_at_s == float("inf"):
                kill_at_s = time.monotonic() + STOP_S
                process.send_signal(signal.SIGTERM)
            if len(received) > 1 or time.monotonic() > kill_at_s:
                process.kill()
            time.sleep(_POLL_S)
        end_session(process.pid)
        for reader in self._readers:
            reader.join(1.0)
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        reported = None if self._reported is None else DriverOutcome(**self._reported)
        if received and (reported is None or reported.status in ("interrupted", "broken")):
            return DriverOutcome("interrupted", received[0])
        last_lines = "\n".join([f"exit code {process.returncode}", *self._last_lines])
        return reported or DriverOutcome("broken", text=last_lines)

    def _read_output(self, output: IO[bytes]) -> None:
        with output:
            for line in output:
                text = line.decode("utf-8", "replace").rstrip()
                self._last_lines = [*self._last_lines, text][-_NUM_LAST_LINES:]
                if not _RAY_LOG.match(text):
                    with self._lock:
                        (self._show or self._unshown.append)(text)

    def _read_outcome(self, outcome: IO[bytes]) -> None:
        with outcome, suppress(ValueError):  # half a line of a driver that was killed
            if line := outcome.readline():
                self._reported = json.loads(line)


def run_driver(
    folder: Path,
    command: Sequence[str],
    received: Sequence[int],
    show: Callable[[str], None],
    *,
    address: str | None = None,
    budget: Budget = UNLIMITED,
    first: DriverProcess | None = None,
) -> DriverOutcome:
    """Run a study in a driver process, and in further ones where Ray ends under it, and return how it ended.

    A driver that broke is replaced as long as the study makes progress; MAX_FAILURES in a row without any end it.
    command, show: of `DriverProcess`. received: the signals that have arrived. first: the process that begins; it may
    have been loaded. The events say what has happened, also where the driver could not write them any more.
    """
    path = events_path(folder)
    until_s = None if budget.time_s is None else time.monotonic() + budget.time_s
    num_failures = 0
    while True:
        begin, num_tested = path.stat().st_size if path.exists() else 0, _num_tested(folder)
        driver, first = first or DriverProcess(command), None
        left_s = None if until_s is None else max(until_s - time.monotonic(), 1.0)
        driver.start(folder, address, budget._replace(time_s=left_s), show)
        outcome = driver.wait(received)
        if outcome.status == "finished":
            return outcome
        if path.exists() and read_state(folder).state == "running":
            with suppress(OSError):  # a full disk: the outcome still reaches the user
                events.append(path, {"event": "interrupted", "signal": outcome.signal})
        if outcome.status != "broken":
            return outcome
        has_progressed = _num_tested(folder) > num_tested or _reports_progress(path, begin)
        num_failures = 0 if has_progressed else num_failures + 1
        if num_failures >= MAX_FAILURES:
            return outcome
        why = outcome.text.splitlines()[0] if outcome.text else "for an unknown reason"
        if path.exists():
            note = f"Ray has ended ({why}); the study goes on from its checkpoints."
            with suppress(OSError):
                events.append(path, {"event": "note", "text": note})
        time.sleep(_PAUSE_S * num_failures)


def _num_tested(folder: Path) -> int:
    """Return how many networks have been tested. The record of a test is written before it, and does not count."""
    return len(list((folder / "final").glob("*.json")))


def _reports_progress(path: Path, begin: int) -> bool:
    """Return whether the events behind an offset report an epoch, or the end of a trial or a stage, for the first time.

    A trial that goes on reports the epoch of its checkpoint again.
    """
    before: set[tuple[Any, ...]] = set()
    after: set[tuple[Any, ...]] = set()
    for event, end in events.records(path)[0]:
        if event["event"] in ("epoch", "trial_ended", "stage_finished"):
            (before if end <= begin else after).add(
                (event["event"], event.get("stage"), event.get("trial"), event.get("epoch"))
            )
    return bool(after - before)


def end_session(leader: int) -> None:
    """Kill every process of a session but this one."""
    for _ in range(20):  # a process may have started another one meanwhile
        members = [pid for pid in _process_ids() if pid != os.getpid() and _session_of(pid) == leader]
        if not members:
            return
        for pid in members:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _process_ids() -> list[int]:
    if (proc := Path("/proc")).is_dir():
        return [int(path.name) for path in proc.iterdir() if path.name.isdigit()]
    listed = subprocess.run(["ps", "-A", "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def _session_of(pid: int) -> int | None:
    """Return the session of a process that runs; None of one that has ended, also where nobody has waited for it."""
    try:
        session = os.getsid(pid)
        with suppress(FileNotFoundError):
            if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return None
    except (ProcessLookupError, PermissionError):
        return None
    return session


def serve_driver(request: IO[str], load: Callable[[], Callable[..., Any]]) -> int:
    """Run the study that the first line of a stream describes, report how it ended, and return the exit code.

    A stream that ends before it has a line describes none.

    request: a pipe from the starting process. When its other end is closed, that process is gone, and this one ends at
    once, with all of its session. load: is called at once, takes its time, and returns
    `raydml.study.stages.run_study`, or a function that is called like it.
    """
    threading.Thread(target=_end_with, args=(request,), name="lifeline", daemon=True).start()
    run = load()
    line = request.readline()
    if not line:  # the starting process has ended, or refused the study, before it had anything to run
        return 0
    asked = json.loads(line)

    def report(status: str, number: int | None = None, text: str = "") -> None:
        line = json.dumps({"status": status, "signal": number, "text": text}) + "\n"
        os.write(asked["outcome"], line.encode("utf-8", "backslashreplace"))

    try:
        ended = run(Path(asked["folder"]), address=asked["address"], budget=Budget(**asked["budget"]))
    except RayEnded as error:
        report("broken", text=str(error))
        return 1
    except Exception as error:  # the outermost frame of the study: the starting process prints it
        if not isinstance(error, ValueError) or type(error).__module__.partition(".")[0] != "raydml":
            report("defect", text=traceback.format_exc())
            return 1
        report("paused" if isinstance(error, MachineFault) else "refused", text=str(error))
        return 2
    report(ended.status, ended.signal)
    return 0


def _end_with(pipe: IO[str]) -> None:
    # Nothing is read: what the pipe holds is the request. Asked for no event, `poll` reports those that it always does,
    # and one of them is that the other end was closed.
    closed = select.poll()
    closed.register(pipe, 0)
    closed.poll()
    # An embedded Ray would end by itself, but its agents take long for it. A resume goes on from the checkpoints.
    end_session(os.getpid())
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def stop_signals(on_signal: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Collect the STOP_SIGNALS that arrive, in place of their usual effect, and call a function with each, if any.

    One that is ignored, as HUP is under nohup, stays ignored. Where the terminal has been closed, what this process
    still prints is dropped.
    """
    received: list[int] = []

    def handle(number: int, _frame: Any) -> None:
        received.append(number)
        if number == signal.SIGHUP:
            _drop_output_to_terminals()
        if on_signal is not None:
            on_signal(number)

    chosen = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in chosen}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drop_output_to_terminals() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.isatty(descriptor):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)
