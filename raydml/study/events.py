"""The events of a study: an append-only file with one JSON object a line, in the order in which things happened.

The driver writes the file; everything that shows or resumes a study reads it (see :mod:`raydml.study.state`). To the
delivery to MLflow it is the spool: what waits in it is sent when the server can take it. A line is one ``write`` to a
file opened for appending, so a reader sees whole lines, or the beginning of the last one. Byte offsets in the file
never change, so the offset behind its line identifies an event.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Record(NamedTuple):
    """An event and the byte offset just behind its line."""

    event: dict[str, Any]
    end: int


def events_path(folder: Path) -> Path:
    """Return the file of events of the study in a folder."""
    return folder / "events.jsonl"


def append(path: Path, event: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write one event as one line, with the current ``time`` (seconds since 1970) unless it has a time.

    ``durable``: wait until the line is on the disk (fsync, well below a millisecond on a local SSD); without it a
    crash of the machine, not of the process, may lose the last lines. NaN and infinite numbers are written as Python's
    ``json`` writes them. Raises TypeError for a value that is not plain.
    """
    line = json.dumps({"time": time.time(), **event}, default=_plain, separators=(",", ":")).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if _ends_within_line(descriptor):
            # A writer was killed in the middle of a line. That part stays as a line which readers skip.
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{path}: only {written} of {len(line)} bytes could be written (is the disk full?)")
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def records(path: Path, offset: int = 0, until: int | None = None) -> tuple[list[Record], int]:
    """Return the events whose lines lie between ``offset`` and ``until``, and the offset to read on from.

    ``offset`` is 0 or what an earlier call returned. A last line without its newline is left for the next call; a line
    that is not a JSON object (its writer was killed) is skipped. A file that does not exist holds no events.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read() if until is None else file.read(max(until - offset, 0))
    except FileNotFoundError:
        return [], offset
    found = []
    for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
        offset += len(line)
        event = _parse(line)
        if event is not None:
            found.append(Record(event, offset))
    return found, offset


def read(path: Path) -> list[dict[str, Any]]:
    """Return all events of the file, oldest first."""
    return read_from(path)[0]


def read_from(path: Path, offset: int = 0, until: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Return events without their offsets, and the offset to read on from; see :func:`records`."""
    found, offset = records(path, offset, until)
    return [record.event for record in found], offset


def _ends_within_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # covers JSONDecodeError and UnicodeDecodeError: the rest of a line that was cut off
        return None
    return event if isinstance(event, dict) else None


def _plain(value: object) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays; NumPy itself is slow to import
        return value.tolist()
    raise TypeError(f"an event holds plain values, not {type(value).__name__}: {value!r}")
