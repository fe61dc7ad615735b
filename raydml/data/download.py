"""Fetch one archive over HTTP: resumed after a break, checked when whole, and only then under its own name.

`<file>.partial` holds the bytes so far and `<file>.partial.json` what they are the beginning of, so that a later call,
also of another process, goes on where this one stopped (RFC 9110, sections 13.1.5 and 14).
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from raydml.data.catalog import DataError
from raydml.data.http_body import Body, Broken, NotServed, Origin, RangeRefused, request
from raydml.data.sources import Archive
from raydml.ops.files import digest_of, flush_to_disk, write_whole

RESERVE_BYTES = 64 << 20  # left free on the disk for everybody else
GAIN_BYTES = 1 << 20  # a try that brought this much was not in vain and does not count as one
MAX_WAIT_S = 30.0

Progress = Callable[[int, int | None], None]  # bytes there, bytes in all (None: the server does not say)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Patience:
    """stall_s: seconds without a byte before a connection is given up. num_retries: how many tries in a row may bring
    next to nothing after the first. wait_s: seconds before the first retry; doubles, up to MAX_WAIT_S."""

    stall_s: float = 30.0
    num_retries: int = 4
    wait_s: float = 1.0


PATIENCE = Patience()


def fetch(
    archive: Archive,
    folder: Path,
    *,
    patience: Patience = PATIENCE,
    accepted_sha256: str | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> Path:
    """The archive's file in `folder`, downloaded unless it is there already; its size and digest are always checked.

    accepted_sha256: 64 hex digits that the user vouches for; they replace the size and digest of the table, and a file
    that was set aside for another digest is taken back. Any interruption, also Ctrl-C or a kill, leaves a partial file
    that the next call resumes. Two calls at once for one file are the caller's to prevent.

    Raises NotServed: an answer that will not change (404, a redirect to another scheme, another size), the last of
    `patience.num_retries` fruitless retries. Raises DataError: a wrong digest (the file is renamed to `<file>.rejected`
    and never resumed into), too little room, a file of this name that is not the one expected.
    """
    target = folder / archive.file_name
    rejected = folder / f"{archive.file_name}.rejected"
    if target.exists():
        fault = fault_of(target, archive, accepted_sha256)
        if fault:
            raise DataError(f"{target} is there already, but {fault}. Move it away and run the command again")
        return target
    if accepted_sha256 and rejected.exists() and not fault_of(rejected, archive, accepted_sha256):
        rejected.replace(target)
        return target
    partial = _Partial(folder, archive)
    try:
        _receive(archive, partial, patience, accepted_sha256, progress or _ignore, tell or _ignore)
        (tell or _ignore)(f"checking {archive.file_name}")
        fault = fault_of(partial.path, archive, accepted_sha256)
        if fault:
            partial.path.replace(rejected)
            partial.forget()
            raise DataError(_rejection(archive, rejected, fault))
        flush_to_disk(partial.path)
        partial.path.replace(target)
        partial.forget()
    except OSError as error:  # the network's are Broken by now: this is the disk
        raise DataError(f"cannot write {partial.path} ({error}); {partial.how_to_go_on()}") from error
    return target


def fault_of(path: Path, archive: Archive, accepted_sha256: str | None = None) -> str:
    """What speaks against a file being the archive, or "" if nothing does; the whole file is read."""
    num_bytes, sha256 = path.stat().st_size, digest_of(path)
    if accepted_sha256:
        return "" if sha256 == accepted_sha256.lower() else f"its sha256 is {sha256}, not the one given with --sha256"
    if archive.num_bytes is not None and num_bytes != archive.num_bytes:
        return f"it has {num_bytes:,} bytes where {archive.num_bytes:,} are expected (its sha256 is {sha256})"
    if archive.digest is None:
        return ""
    algorithm, _, wanted = archive.digest.partition(":")
    found = sha256 if algorithm == "sha256" else digest_of(path, algorithm)
    if found == wanted:
        return ""
    same = "" if algorithm == "sha256" else f"; its sha256 is {sha256}"
    return f"its {algorithm} is {found} where {wanted} is expected{same}"


def _rejection(archive: Archive, rejected: Path, fault: str) -> str:
    doubt = "" if archive.verified else " The expected values are from memory and not confirmed: they may be wrong."
    sha256 = digest_of(rejected)
    return (
        f"what came from {archive.url} is not {archive.file_name}: {fault}.{doubt} It was moved to {rejected}; the "
        f"same command starts from the beginning. If another source says that this file is right, add --sha256 {sha256}"
    )


class _Partial:
    """The bytes received so far and their origin, both on disk."""

    def __init__(self, folder: Path, archive: Archive) -> None:
        self.path = folder / f"{archive.file_name}.partial"
        self._note = folder / f"{archive.file_name}.partial.json"
        self._has_digest = archive.digest is not None
        self._url = archive.url

    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def origin(self) -> Origin | None:
        """None where there is nothing to go on with. Bytes of unknown origin are only resumed if a digest will judge
        the result: otherwise two versions of a file could be joined unseen."""
        if not self.num_bytes():
            return None
        try:
            origin = Origin(**json.loads(self._note.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):  # never written whole: begin again
            return None
        resumable = origin.url == self._url and (origin.if_range is not None or self._has_digest)
        return origin if resumable else None

    def begin(self, origin: Origin) -> None:
        # Emptied first: a kill in between must not leave old bytes under a new origin.
        self.path.write_bytes(b"")
        write_whole(self._note, json.dumps(asdict(origin)))

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def how_to_go_on(self) -> str:
        if not self.num_bytes():
            return "nothing has arrived; the same command tries again"
        return f"{self.num_bytes():,} bytes are in {self.path}, and the same command goes on from there"


def _receive(
    archive: Archive, partial: _Partial, patience: Patience, accepted: str | None, progress: Progress, tell: Tell
) -> None:
    """Try until the body is whole. What counts against `num_retries` is a try that did not get beyond all before it,
    so that a long download over a bad line ends, and one that always breaks at the same place does too."""
    num_failures, furthest = 0, partial.num_bytes()
    while True:
        try:
            return _try_once(archive, partial, patience.stall_s, accepted, progress)
        except Broken as error:
            there = partial.num_bytes()
            num_failures = 1 if there >= furthest + GAIN_BYTES else num_failures + 1
            furthest = max(furthest, there)
            if num_failures > patience.num_retries:
                raise NotServed(
                    f"cannot fetch {archive.url}: {error} ({num_failures} tries in a row); {partial.how_to_go_on()}"
                ) from error
            wait_s = min(patience.wait_s * 2 ** (num_failures - 1), MAX_WAIT_S)
            tell(f"{error}; {there:,} bytes are there, trying again in {wait_s:g} s")
        time.sleep(wait_s)


def _try_once(archive: Archive, partial: _Partial, stall_s: float, accepted: str | None, progress: Progress) -> None:
    origin = partial.origin()
    there = partial.num_bytes() if origin else 0
    if origin and there == origin.num_bytes:  # stopped between the last byte and the check
        return
    try:
        with request(archive.url, there, origin, stall_s) as body:
            if body.start and (origin is None or body.start != there or origin.contradicts(body.origin)):
                raise RangeRefused("the file changed on the server, or it sent another part than was asked for")
            wanted = None if accepted else archive.num_bytes
            total = body.origin.num_bytes if body.origin.num_bytes is not None else wanted
            if wanted is not None and total != wanted:
                raise NotServed(
                    f"{archive.url} offers {total:,} bytes where {wanted:,} are expected: it is another file, perhaps "
                    "a page that explains why. Look at the address with a browser; if its file is right nevertheless, "
                    "give that file's sha256 with --sha256"
                )
            _refuse_full_disk(partial.path.parent, (total or 0) - body.start)
            if body.start == 0:
                partial.begin(body.origin)
            _append(body, archive.url, partial, total, progress)
    except RangeRefused:
        partial.forget()  # what is there cannot be gone on with
        raise


def _append(body: Body, url: str, partial: _Partial, total: int | None, progress: Progress) -> None:
    """Write the body behind what is there. Raises Broken when it ends early, DataError when it goes on too long."""
    there = body.start
    progress(there, total)
    with partial.path.open("ab") as file:
        for chunk in body.chunks:
            there += len(chunk)
            if total is not None and there > total:
                partial.forget()
                raise DataError(f"{url} sends more than the {total:,} bytes that are expected: it is another file")
            file.write(chunk)
            file.flush()  # a kill must not cost what has come
            progress(there, total)
    if total is not None and there < total:
        raise Broken(f"the connection ended after {there:,} of {total:,} bytes")


def _refuse_full_disk(folder: Path, num_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if num_bytes + RESERVE_BYTES > free_bytes:
        raise DataError(
            f"{folder} has {free_bytes:,} bytes free; {num_bytes:,} more are to come and {RESERVE_BYTES:,} stay in "
            "reserve. Make room or give another --root"
        )


def _ignore(*_: object) -> None:
    """Nobody is looking."""
