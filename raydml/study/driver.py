"""Which process runs a study: it holds a file of the study's folder locked, and the lock ends with the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

#: What a command that would run a study says where another process does.
REFUSAL = "is running already, in another process. Cure: wait for it, or stop it with Ctrl-C there"


def driver_lock(folder: Path) -> filelock.BaseFileLock:
    """Return the lock of the study in a folder."""
    return filelock.FileLock(folder / "driver.lock")


@contextmanager
def only_driver(folder: Path, refusal: str, timeout_s: float = 0.0) -> Iterator[None]:
    """Keep other processes from running or changing the study meanwhile.

    Raises StudyError if one does: "study 'mine' " and the refusal, which has the cure.
    """
    lock = driver_lock(folder)
    try:
        lock.acquire(timeout=timeout_s)
    except filelock.Timeout:
        from raydml.study.folder import StudyError  # not for `status`, which only asks `is_running`

        raise StudyError(f"study {folder.name!r} {refusal}") from None
    try:
        yield
    finally:
        lock.release()


def is_running(folder: Path) -> bool | None:
    """Return whether a process on this machine runs the study; None where that cannot be found out."""
    if not (folder / "driver.lock").exists():
        return False
    try:
        with driver_lock(folder).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # of another user, or on a file system without locks
        return None
