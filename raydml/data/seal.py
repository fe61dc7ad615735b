"""The seal on the test classes: test images open only with a key, and making a key writes a record."""

import datetime
import json
import os
import socket
from pathlib import Path
from typing import Any

from raydml.data.catalog import DataError
from raydml.ops.files import flush_to_disk

_MINT = object()  # only this module holds it, so only record() can make a key


class TestKey:
    """A key that opens the test images once; only `TestReads.record` makes one."""

    __test__ = False  # pytest would collect a class of this name

    def __init__(self, mint: object, record: dict[str, Any]) -> None:
        if mint is not _MINT:
            raise DataError("only TestReads.record(...) makes a TestKey, after it has written the record")
        self.record = record
        self._spent = False

    def spend(self) -> None:
        """Use the key up, as every reader of test images must. Raises DataError the second time."""
        if self._spent:
            raise DataError("this TestKey was used already; every read of the test classes is recorded: record() again")
        self._spent = True

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a TestKey is neither copied nor sent to another process; record() where the images are read")


class TestReads:
    """The records of all reads of the test classes: an append-only file of JSON lines.

    path: the study's test_reads.jsonl, or None outside a study: test_reads.jsonl beside the checkpoint of each record.
    """

    __test__ = False

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def record(self, *, purpose: str, checkpoint: str | Path, commit: str) -> TestKey:
        """Append (time, purpose, checkpoint, commit, host), flush it to the disk, and then return a key.

        Raises DataError if the purpose is empty or the record cannot be written.
        """
        if not purpose.strip():
            raise DataError("a read of the test classes needs a purpose, such as 'finalize' or 'evaluate'")
        path = self._path_beside(checkpoint)
        record = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
            "purpose": purpose,
            "checkpoint": str(checkpoint),
            "commit": commit,
            "host": socket.gethostname(),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, json.dumps(record))
        except OSError as error:
            raise DataError(
                f"the read of the test classes cannot be recorded in {path}: {error}; make this file writable"
            ) from error
        return TestKey(_MINT, record)

    def _path_beside(self, checkpoint: str | Path) -> Path:
        if self.path is not None:
            return self.path
        folder = Path(checkpoint)
        if not folder.exists():
            raise DataError(
                f"checkpoint = {str(checkpoint)!r} is no path on this machine, so the read of the test classes "
                "cannot be recorded beside it; give TestReads the path of a file"
            )
        return folder.absolute().parent / "test_reads.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """Return all records, oldest first; a line that a crash broke becomes {"damaged": its text}.

        No read belongs to a damaged line: the key is made after the flush.
        """
        if self.path is None:
            raise DataError("TestReads(None) writes beside each checkpoint; read one file with TestReads(path).read()")
        if not self.path.exists():
            return []
        return [
            _parsed(line)
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]


def _parsed(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    return record if isinstance(record, dict) else {"damaged": line}


def _append(path: Path, line: str) -> None:
    # One write to a file opened for appending: records of two processes do not mix.
    new = not path.exists()
    with open(path, "a+b", buffering=0) as handle:
        if handle.seek(0, os.SEEK_END):
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                line = "\n" + line  # after half a line that a crash left
        handle.write(line.encode() + b"\n")
        os.fsync(handle.fileno())
    if new:
        flush_to_disk(path.parent)
