"""Which process runs a study: it holds a file of the study's folder locked, and the lock ends with the process.

Locks of files do not reach other hosts on every shared file system. So the process also writes who it is into a file
beside the lock, and touches that file every few seconds: while the file is fresh, a process on another host is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import filelock

from raydml.ops.files import write_whole

LOCK, HOLDER, DELIVERY_LOCK = "driver.lock", "driver.json", "tracking.lock"
TOUCH_EVERY_S = 5.0
#: A file that its process has not touched for so long belongs to a process that died with its host.
DEAD_AFTER_S = 60.0


class StudyHeld(ValueError):
    """Another process makes, changes or runs the study; the message has its host, its number and the cure."""


def driver_lock(folder: Path) -> filelock.BaseFileLock:
    """Return the lock of the study in a folder. Within a process it is one object, which can be taken again."""
    return filelock.FileLock(folder / LOCK, is_singleton=True)


@contextmanager
def only_driver(folder: Path, timeout_s: float = 1.0) -> Iterator[None]:
    """Keep other processes from running or changing the study in a folder meanwhile; the folder is made if missing.

    A process that holds the study can hold it once more. A folder that was made for the lock, and holds nothing else at
    the end, is removed. Raises StudyHeld with the host, the pid and the time if another process holds the study.
    """
    lock = driver_lock(folder)
    if lock.is_locked:
        with lock:
            yield
        return
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=timeout_s)
    except filelock.Timeout:
        raise _refusal(folder, _read_holder(folder)) from None
    try:
        _refuse_if_delivered(folder)
        with _named_holder(folder):
            yield
    finally:
        with suppress(OSError):  # on a full or vanished disk the process still ends with its own message
            if not existed and {path.name for path in folder.iterdir()} <= {LOCK}:
                shutil.rmtree(folder)
        lock.release()


@contextmanager
def _named_holder(folder: Path) -> Iterator[None]:
    """Write who holds the study, and keep the file fresh. Raises StudyHeld if another host holds it."""
    file, holder = folder / HOLDER, _read_holder(folder)
    if holder and holder["host"] != socket.gethostname() and (age_s := _age_s(file)) < DEAD_AFTER_S:
        raise _refusal(folder, holder, age_s)
    here = {"host": socket.gethostname(), "pid": os.getpid(), "since_s": time.time()}
    write_whole(file, json.dumps(here) + "\n")
    over = threading.Event()

    def touch() -> None:
        while not over.wait(TOUCH_EVERY_S):
            with suppress(OSError):  # the storage is away: the study itself reports that
                if _read_holder(folder) == here:
                    file.touch()

    thread = threading.Thread(target=touch, name="driver-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(1.0)
        with suppress(OSError):
            if _read_holder(folder) == here:
                file.unlink()


def lock_of_delivery(folder: Path) -> IO[str] | None:
    """Return the locked file of the process that sends a study's events to MLflow; None where another one has it.

    The lock ends when the file is closed.
    """
    file = open(folder / DELIVERY_LOCK, "a", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def write_num_sent(lock: IO[str], number: int) -> None:
    """Write how many events of a study MLflow has into the file of `lock_of_delivery`, for the driver's metrics."""
    lock.truncate(0)
    lock.write(str(number))
    lock.flush()


def read_num_sent(folder: Path) -> int:
    """Return how many events of a study MLflow has; 0 where none was sent yet."""
    try:
        text = (folder / DELIVERY_LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return 0
    return int(text) if text.isdecimal() else 0  # between two writes it is empty


def _refuse_if_delivered(folder: Path) -> None:
    """Raise StudyHeld while another process sends the events of a study to MLflow: `sync`, or an older raydml's run."""
    if (folder / DELIVERY_LOCK).exists():
        lock = lock_of_delivery(folder)
        if lock is None:
            raise _refusal(folder, None)
        lock.close()


def _read_holder(folder: Path) -> dict[str, Any] | None:
    """Return host, pid and since_s of the process that holds a study; None where the file is missing or damaged."""
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return {"host": str(holder["host"]), "pid": int(holder["pid"]), "since_s": float(holder["since_s"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _age_s(file: Path) -> float:
    """Return how long ago a file was touched, by the clock of its file system: those of two hosts may differ."""
    probe = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _refusal(folder: Path, holder: dict[str, Any] | None, age_s: float | None = None) -> StudyHeld:
    who = "by another process, whose pid is not recorded"
    if holder is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since_s"]))
        who = f"by pid {holder['pid']} on {holder['host']}, since {since}"
    cure = "wait for it, or stop it with Ctrl-C there"
    if age_s is not None:
        cure += f". It was alive {max(age_s, 0):.0f} s ago; if its host is dead, try again in {DEAD_AFTER_S:.0f} s"
    return StudyHeld(f"study {folder.name!r} is running already, {who}. Cure: {cure}")


def is_running(folder: Path) -> bool | None:
    """Return whether a process runs the study; None where that cannot be found out."""
    if not (folder / LOCK).exists():
        return False
    lock = driver_lock(folder)
    if lock.is_locked:
        return True
    try:
        with lock.acquire(timeout=0):
            holder = _read_holder(folder)
            is_elsewhere = holder is not None and holder["host"] != socket.gethostname()
            return is_elsewhere and _age_s(folder / HOLDER) < DEAD_AFTER_S
    except filelock.Timeout:
        return True
    except OSError:  # of another user, or on a file system without locks
        return None
