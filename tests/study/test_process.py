"""A driver in a process of its own: how each way to end is reported, and what is left of it."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from raydml.study import events, process
from raydml.study.budget import UNLIMITED
from raydml.study.events import events_path, read_state
from raydml.study.process import DriverProcess, run_driver
from tests.chaos.targets import processes
from tests.study.test_folder import ROOT


def command_of(body):
    """The command of a driver whose study runs the lines of `body`: folder, events and signals are at hand."""
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    program = f"""
import os, signal, subprocess, sys, time
from collections import namedtuple
from raydml.study import events
from raydml.study.events import events_path
from raydml.study.process import MachineFault, RayEnded, serve_driver
Outcome = namedtuple("Outcome", "status signal", defaults=[None])
def run(folder, *, address, budget):
    path = events_path(folder)
{lines}
    return Outcome("finished")
sys.exit(serve_driver(sys.stdin, lambda: run))
"""
    return [sys.executable, "-c", program]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(process, "_PAUSE_S", 0.0)


def run(tmp_path, body, received=()):
    lines = []
    outcome = run_driver(tmp_path, command_of(body), received, lines.append)
    return outcome, lines


STARTED = 'events.append(path, {"event": "study_started", "study": "s", "config": {}})\n'


def test_a_study_that_ends_by_itself_reports_how(tmp_path):
    outcome, lines = run(tmp_path, "print('a line', file=sys.stderr)")
    assert (outcome.status, lines) == ("finished", ["a line"])
    defect, _ = run(tmp_path, "_ = 1 / 0")
    assert defect.status == "defect"
    assert "ZeroDivisionError" in defect.text
    refused, _ = run(tmp_path, "from raydml.study.folder import StudyError; raise StudyError('Cure: this')")
    assert (refused.status, refused.text) == ("refused", "Cure: this")


def test_a_driver_that_ray_ends_is_replaced_while_the_study_makes_progress(tmp_path):
    body = STARTED + textwrap.dedent("""\
        epochs = sum(event["event"] == "epoch" for event in events.read(path))
        if epochs < 5:
            events.append(path, {"event": "epoch", "trial": "search-000", "stage": "search", "epoch": epochs + 1,
                                 "metrics": {}})
            os.kill(os.getpid(), signal.SIGABRT)
        """)
    outcome, _ = run(tmp_path, body)
    assert outcome.status == "finished"
    kinds = [event["event"] for event in events.read(events_path(tmp_path))]
    assert kinds.count("study_started") == 6
    assert kinds.count("interrupted") == 5, "each end is in the record, and so the trials are not shown as running"
    assert "exit code -6" in next(event["text"] for event in events.read(events_path(tmp_path)) if "text" in event)


def test_a_driver_without_progress_is_given_up(tmp_path):
    outcome, _ = run(tmp_path, STARTED + "print('the last line'); sys.stdout.flush(); os.abort()")
    assert outcome.status == "broken"
    assert outcome.text.splitlines() == ["exit code -6", "the last line"]
    kinds = [event["event"] for event in events.read(events_path(tmp_path))]
    assert kinds.count("study_started") == process.MAX_FAILURES
    assert read_state(tmp_path).state == "interrupted"
    outcome, _ = run(tmp_path, "raise RayEnded('Ray does not start: port taken')")
    assert (outcome.status, outcome.text) == ("broken", "Ray does not start: port taken")


def send_when(exists, received, number):
    """Let a signal arrive when a file is there and is not empty."""

    def send():
        while not (exists.exists() and exists.read_text()):
            time.sleep(0.02)
        received.append(int(number))

    threading.Thread(target=send, daemon=True).start()


def test_reads_of_the_test_and_repeated_epochs_are_no_progress(tmp_path):
    body = STARTED + textwrap.dedent("""\
        events.append(path, {"event": "test_read", "stage": "finalize", "trial": "confirm-000", "checkpoint": "c"})
        events.append(path, {"event": "epoch", "trial": "search-000", "stage": "search", "epoch": 3, "metrics": {}})
        raise RayEnded("a worker was killed")
        """)
    outcome, _ = run(tmp_path, body)
    assert (outcome.status, outcome.text) == ("broken", "a worker was killed")
    kinds = [event["event"] for event in events.read(events_path(tmp_path))]
    assert kinds.count("study_started") == 1 + process.MAX_FAILURES, "the first one did report a new epoch"


def test_a_disk_that_is_still_full_does_not_hide_how_the_study_ended(tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(process.events, "append", full)
    outcome, _ = run(tmp_path, STARTED + "raise MachineFault('the disk is full')")
    assert (outcome.status, outcome.text) == ("paused", "the disk is full")
    assert read_state(tmp_path).state == "running", "nothing could be written"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_forwarded_and_recorded(tmp_path, number):
    received = []
    send_when(events_path(tmp_path), received, number)
    outcome, _ = run(tmp_path, STARTED + "time.sleep(60)", received)
    assert (outcome.status, outcome.signal) == ("interrupted", number)
    last = events.read(events_path(tmp_path))[-1]
    assert (last["event"], last["signal"]) == ("interrupted", number)


def test_a_driver_that_does_not_stop_is_killed_with_all_of_its_session(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "STOP_S", 0.5)
    pids = tmp_path / "pids"
    body = f"""\
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = "import time, os; os.setpgrp(); time.sleep(60)"
        left = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        open({str(pids)!r}, "w").write(" ".join(str(one.pid) for one in left))
        time.sleep(60)
        """
    received = []
    send_when(pids, received, signal.SIGTERM)
    outcome, _ = run(tmp_path, body, received)
    assert outcome.status == "interrupted"
    for pid in map(int, pids.read_text().split()):
        assert process._session_of(pid) is None


def test_a_driver_ends_when_the_process_that_started_it_is_gone(tmp_path):
    file = tmp_path / "pid"
    inner = command_of(f"open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    program = f"""
from pathlib import Path
from raydml.study.budget import UNLIMITED
from raydml.study.process import DriverProcess
driver = DriverProcess({inner!r})
driver.start(Path({str(tmp_path)!r}), None, UNLIMITED, print)
driver.wait([])
"""
    starter = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    starter.kill()
    starter.wait(30)
    pid = int(file.read_text())
    while process._session_of(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process._session_of(pid) is None


def test_a_driver_that_still_starts_ray_ends_with_the_process_that_started_it():
    """Ray takes seconds to start, and meanwhile nothing reads the pipe."""
    command = [sys.executable, str(ROOT / "launch.py"), "drive", "--embedded"]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline_s = time.monotonic() + 60
    while not any("gcs_server" in words for words in words_of_session(driver.pid)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert driver.poll() is None
    driver.stdin.close()
    assert driver.wait(5) == -signal.SIGKILL
    assert words_of_session(driver.pid) == []


def words_of_session(leader):
    return [words for _, session, words in processes().values() if session == leader]


def test_output_that_is_not_utf8_and_a_driver_that_cannot_start(tmp_path):
    raw = "[2026-11-29 03:34:51,106 E 12532 12723] rpc_client.h:204: Failed to connect to GCS"
    _, lines = run(tmp_path, f"print({raw!r}); print('(raylet) A worker died'); print('(a) note')")
    assert lines == ["(a) note"], "Ray's own log lines are left out"
    outcome, lines = run(tmp_path, "sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush()")
    assert (outcome.status, lines) == ("finished", ["\ufffd"])
    driver = DriverProcess([sys.executable, "-c", "import sys; sys.exit('no such thing')"])
    driver.start(tmp_path, None, UNLIMITED, lines.append)
    assert driver.wait([]).text.splitlines() == ["exit code 1", "no such thing"]


def test_a_driver_that_was_loaded_ahead_runs_the_study_and_ends_if_it_is_not_needed(tmp_path):
    command, lines = command_of("print('runs')"), []
    command[-1] = "print('loads', flush=True)\n" + command[-1]
    driver = DriverProcess(command)
    driver.load()
    outcome = run_driver(tmp_path, ["no such command"], [], lines.append, first=driver)
    assert (outcome.status, lines) == ("finished", ["loads", "runs"]), "it was not started a second time"
    driver.end_unused()  # it has been waited for, and nothing happens
    unused = DriverProcess(command_of("print('runs')"))
    unused.load()
    pid = unused._process.pid
    assert process._session_of(pid) == pid
    unused.end_unused()
    assert process._session_of(pid) is None


def test_a_driver_that_cannot_be_started_leaves_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            DriverProcess(["no such command"]).load()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_driver_whose_starter_has_nothing_to_run_ends_without_a_word():
    done = subprocess.run(command_of("print('runs')"), stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
