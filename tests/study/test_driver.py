"""One process at a time holds a study, and a refusal says which."""

import fcntl
import json
import multiprocessing
import os
import re
import socket
import time

import filelock
import pytest

from raydml.study import driver
from raydml.study.driver import DELIVERY_LOCK, HOLDER, LOCK, StudyHeld, is_running, only_driver


def hold(folder, held):
    with only_driver(folder):
        held.set()
        time.sleep(60)


@pytest.fixture
def other_process(tmp_path):
    """A process that holds the study in tmp_path."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join(30)


def test_a_second_process_is_refused_and_is_given_host_number_and_time(tmp_path, other_process):
    assert is_running(tmp_path)
    named = rf"by pid {other_process.pid} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:"
    with pytest.raises(StudyHeld, match=named), only_driver(tmp_path, timeout_s=0):
        pass
    other_process.kill()
    other_process.join(30)
    assert not is_running(tmp_path)
    with only_driver(tmp_path, timeout_s=0):  # the lock of a dead process is taken over at once
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()


def test_a_process_can_hold_its_study_once_more(tmp_path):
    with only_driver(tmp_path):
        with only_driver(tmp_path, timeout_s=0):
            assert is_running(tmp_path)
        assert (tmp_path / HOLDER).exists(), "the outer one still holds it"
    assert not (tmp_path / HOLDER).exists()
    assert not is_running(tmp_path)


def test_another_host_is_believed_while_its_file_is_fresh(tmp_path):
    """Where locks do not reach other hosts, the age of the file decides."""
    (tmp_path / LOCK).touch()
    file = tmp_path / HOLDER
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since_s": 0.0}))
    assert is_running(tmp_path)
    refused = pytest.raises(StudyHeld, match=r"by pid 7 on elsewhere.* alive \d s ago; if its host is dead")
    with refused, only_driver(tmp_path):
        pass
    assert json.loads(file.read_text())["pid"] == 7, "a refused process changes nothing"
    old_s = time.time() - driver.DEAD_AFTER_S - 1
    os.utime(file, (old_s, old_s))
    assert not is_running(tmp_path)
    with only_driver(tmp_path):
        assert json.loads(file.read_text())["host"] == socket.gethostname()


def test_the_file_of_another_host_is_neither_kept_fresh_nor_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "TOUCH_EVERY_S", 0.01)
    theirs = json.dumps({"host": "elsewhere", "pid": 7, "since_s": 0.0})
    with only_driver(tmp_path):
        (tmp_path / HOLDER).write_text(theirs)
        os.utime(tmp_path / HOLDER, (0, 0))
        time.sleep(0.1)
        assert (tmp_path / HOLDER).stat().st_mtime == 0
    assert (tmp_path / HOLDER).read_text() == theirs


def test_a_holder_stays_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "TOUCH_EVERY_S", 0.01)
    with only_driver(tmp_path):
        os.utime(tmp_path / HOLDER, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / HOLDER).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / HOLDER).stat().st_mtime > 0


def test_a_damaged_file_of_the_holder_hinders_nobody(tmp_path):
    for text in ("{", "[]", "null", '{"host": "h", "pid": 1e999, "since_s": 0}'):
        (tmp_path / HOLDER).write_text(text)
        with only_driver(tmp_path):
            pass
    with filelock.FileLock(tmp_path / LOCK):
        (tmp_path / HOLDER).write_bytes(b"\xff")
        with pytest.raises(StudyHeld, match="by another process"), only_driver(tmp_path, timeout_s=0):
            pass


def test_a_study_whose_events_are_being_delivered_is_not_changed(tmp_path):
    with open(tmp_path / DELIVERY_LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StudyHeld, match="pid is not recorded"), only_driver(tmp_path):
            pass
    with only_driver(tmp_path):
        pass


def test_a_folder_made_only_for_the_lock_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), only_driver(tmp_path / "new"):
        _ = 1 / 0
    assert not (tmp_path / "new").exists()
    with only_driver(tmp_path / "used"):
        (tmp_path / "used" / "study.json").touch()
    assert (tmp_path / "used" / "study.json").exists()
