"""The seal on the test classes: no key without a record, no test image without a key."""

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
    """Opens the test images once; made by `TestReads.record` and by nothing else."""

    __test__ = False  # pytest takes a class of this name for tests

    def __init__(self, mint: object, record: dict[str, Any]) -> None:
        if mint is not _MINT:
            raise DataError("a TestKey is made by TestReads.record(...), which writes the read down first")
        self.record = record
        self._spent = False

    def spend(self) -> None:
        """Called by whoever reads the images. Raises DataError the second time: each read has its record."""
        if self._spent:
            raise DataError("this TestKey was used already; every read of the test classes is recorded: record() again")
        self._spent = True

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a TestKey is neither copied nor sent to another process; record() where the images are read")


class TestReads:
    """The list of all reads of the test classes: JSON lines, only ever appended to.

    path: the study's test_reads.jsonl. None, for a checkpoint outside a study: test_reads.jsonl beside the
    checkpoint that is being recorded.
    """

    __test__ = False

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def record(self, *, purpose: str, checkpoint: str | Path, commit: str) -> TestKey:
        """Write down (time, purpose, checkpoint, commit, host), flush it to the disk, and only then give the key.

        Raises DataError if the purpose is empty or the record cannot be written: then nothing may be read.
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
                f"checkpoint = {str(checkpoint)!r} is no path on this machine, so there is no folder to record the "
                "read of the test classes in; give TestReads the path of a file"
            )
        return folder.absolute().parent / "test_reads.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first; a line broken by a crash appears as {"damaged": its text}.

        No key was given out for a damaged line: the key follows the flush.
        """
        if self.path is None:
            raise DataError("TestReads(None) writes beside each checkpoint; read one file with TestReads(path).read()")
        if not self.path.exists():
            return []
        return [_parsed(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parsed(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    return record if isinstance(record, dict) else {"damaged": line}


def _append(path: Path, line: str) -> None:
    # One write to a file opened for appending: records of two processes do not mix.
    new = not path.exists()
    with open(path, "a+b", buffering=0) as handle:
        if handle.seek(0, os.SEEK_END):
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                line = "\n" + line  # a crash left half a line: keep it apart
        handle.write(line.encode() + b"\n")
        os.fsync(handle.fileno())
    if new:
        flush_to_disk(path.parent)
