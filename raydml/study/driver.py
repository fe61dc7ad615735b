"""Which process runs a study: it holds a file of the study's folder locked, and the lock ends with the process."""

from __future__ import annotations

from pathlib import Path

import filelock


def driver_lock(folder: Path) -> filelock.BaseFileLock:
    """Return the lock of the study in a folder."""
    return filelock.FileLock(folder / "driver.lock")


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
