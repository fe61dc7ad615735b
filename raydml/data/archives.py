"""Unpacking a zip or tar.gz file that may be hostile: one folder of it, completely or not at all.

`tarfile` (with its data filter) and `zipfile` write the members; this module refuses what they would accept or repair.
"""

import gzip
import os
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, Any, NamedTuple

from raydml.data.catalog import DataError, listed
from raydml.ops.files import flush_to_disk

_CHUNK_BYTES = 1 << 18
MAX_HEADER_BYTES = 1 << 20  # tarfile reads the text of a header in one piece, however long the header claims to be
MAX_NUM_MEMBERS = 1_000_000
RESERVE_BYTES = 64 << 20  # left free on the disk for other processes
_DAMAGES = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, struct.error, NotImplementedError,
    ValueError,
)  # fmt: skip


class _Member(NamedTuple):
    """One member of an archive. extract: writes it below the folder for extraction."""

    name: str
    is_folder: bool
    num_bytes: int
    extract: Callable[[], object]


class _Limit(NamedTuple):
    """The most bytes that an archive may hold uncompressed, and the message for one that holds more."""

    num_bytes: int
    refusal: str

    def check(self, num_bytes: int) -> None:
        if num_bytes > self.num_bytes:
            raise DataError(self.refusal)


def unpack(
    archive: Path, root: Path, folder: str, *, max_bytes: int, progress: Callable[[int, int | None], None] | None = None
) -> tuple[str, ...]:
    """Put the top folder `folder` of an archive at root/folder, completely or not at all.

    The members go into a hidden folder first, which is renamed when the archive has been read to its end. Hidden
    folders that interrupted calls left behind are removed; the caller must prevent two calls at once. Modes, owners and
    times of the members are ignored.

    archive: a zip or tar.gz file, recognised by its first bytes. max_bytes: the most it may hold uncompressed.
    progress: called with the bytes of the archive read so far and their total. Returns the names of the other top
    entries, which are checked like all members but not written.

    Raises DataError: root/folder exists; the file is no archive, is damaged, ends early or has no such folder; or a
    member is refused: a name that is absolute or has `..`, a drive or a backslash; a link, a device or a sparse file;
    a second member for the same file; more bytes than max_bytes or the disk allow; an encrypted member.
    """
    target = root / folder
    if os.path.lexists(target):
        raise DataError(f"{target} exists already. Remove it, or give another --root")
    prefix = f".{folder}-extracting-"
    for path in root.iterdir():
        if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    try:
        others = _extract(archive, aside, folder, max_bytes, progress)
        if not (aside / folder).is_dir():
            raise DataError(f"{archive} has no folder {folder!r}, only {listed(map(repr, others)) or 'nothing'}")
        os.sync()  # once for all files: an fsync of each of 120,000 files takes longer than unpacking them
        (aside / folder).rename(target)
        flush_to_disk(root)
    except DataError:
        raise
    except _DAMAGES as error:
        raise DataError(
            f"{archive} is damaged ({type(error).__name__}: {error}). Remove it and fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot unpack {archive} into {root}: {error}") from error
    finally:
        shutil.rmtree(aside)
    return others


def _extract(
    archive: Path, aside: Path, folder: str, max_bytes: int, progress: Callable[[int, int | None], None] | None
) -> tuple[str, ...]:
    """Write the members of `folder` into `aside` and return the names of the other top entries."""
    free_bytes = shutil.disk_usage(aside).free - RESERVE_BYTES
    reason = "the free space" if free_bytes < max_bytes else "its maximum"
    max_bytes = min(max_bytes, free_bytes)
    limit = _Limit(max_bytes, f"{archive} unpacks to more than {max_bytes:,} bytes, {reason}: refused")
    others: dict[str, None] = {}
    num_bytes, total_bytes = 0, archive.stat().st_size
    with archive.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        if start.startswith(b"\x1f\x8b"):
            members = _tar_members(file, aside, limit)
        elif start.startswith(b"PK"):
            members = _zip_members(file, aside)
        else:
            raise DataError(
                f"{archive} is neither a zip nor a tar.gz file: it starts with {start!r}. Remove it; was it a web page?"
            )
        for number, member in enumerate(members):
            parts = _safe_parts(member)
            num_bytes += member.num_bytes
            limit.check(num_bytes)
            if number >= MAX_NUM_MEMBERS:
                raise DataError(f"{archive} has more than {MAX_NUM_MEMBERS:,} members: refused")
            if parts and parts[0] == folder:
                _extract_new(member, aside.joinpath(*parts))
            elif parts:
                others[parts[0]] = None
            if progress:
                progress(file.tell(), total_bytes)
    return tuple(others)


def _safe_parts(member: _Member) -> tuple[str, ...]:
    """Return the components of a member's path, () for the top of the archive; refuse a name that may lead outside.

    Names that only Windows would misread are refused everywhere, so an archive is good or bad on every machine.
    """
    name = member.name
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    leads_out = name.startswith("/") or ".." in parts or PureWindowsPath(name).drive or set(name) & {"\\", "\0"}
    if leads_out or not (parts or member.is_folder):
        raise DataError(f"member {name!r} of the archive has a name that is not a plain relative path: refused")
    return parts


def _extract_new(member: _Member, path: Path) -> None:
    """Extract a member unless its path exists; the file system decides which spellings are the same path."""
    try:
        if os.path.lexists(path) and not (member.is_folder and path.is_dir()):
            raise FileExistsError
        member.extract()
        if not member.is_folder and path.stat().st_size != member.num_bytes:
            raise EOFError(
                f"{member.name!r} has {path.stat().st_size:,} bytes where {member.num_bytes:,} are announced"
            )
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(
            f"the archive holds {member.name!r} twice, as a file and a folder, or under two spellings of one path on "
            "this file system: refused"
        ) from error


def _zip_members(file: IO[bytes], aside: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"member {info.filename!r} of the archive is a link or a device: refused")
            if info.flag_bits & 0x1:
                raise DataError(f"member {info.filename!r} of the archive is encrypted: refused")
            if info.filename != info.orig_filename:  # cut at a NUL, or taken from an extra field
                name = info.orig_filename
                raise DataError(f"member {name!r} of the archive has a name that is not a plain relative path: refused")
            yield _Member(info.filename, info.is_dir(), info.file_size, partial(archive.extract, info, aside))


def _tar_members(file: IO[bytes], aside: Path, limit: _Limit) -> Iterator[_Member]:
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            f"Python {sys.version.split()[0]} cannot unpack a tar.gz file safely. Use Python 3.10.12, 3.11.4 or newer"
        )
    stream: Any = _BoundedGzip(file, limit)
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=StrictHeader) as archive:
        for info in archive:
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise DataError(f"member {info.name!r} of the archive is a link, a device or sparse: refused")
            extract = partial(archive.extract, info, aside, set_attrs=False, filter="data")
            yield _Member(info.name, info.isdir(), info.size, extract)
    while stream.read(_CHUNK_BYTES):  # to the end, where gzip keeps its checksum
        pass


class StrictHeader(tarfile.TarInfo):
    """A header whose damage is an error: tarfile takes one behind the first member for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictHeader":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"bad header: {error}") from error


class _BoundedGzip(gzip.GzipFile):
    """A gzip stream that refuses to decompress more than a limit in all or a very long header at once."""

    def __init__(self, file: IO[bytes], limit: _Limit) -> None:
        super().__init__(fileobj=file)
        self._limit = limit

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise DataError(f"the archive has a header of {size:,} bytes: refused")
        data = super().read(size)
        self._limit.check(self.tell())
        return data
