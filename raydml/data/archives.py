"""Unpack a zip or tar.gz file that nobody vouches for: all of one folder of it, or nothing.

Members go into a hidden folder aside, which is renamed when the archive has been read to its end. Links, devices and
sparse files are refused, as is every name that could lead out of the folder: with no link on the way, a name without
`..` stays inside.
"""

import gzip
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from raydml.data.catalog import DataError, listed
from raydml.ops.files import flush_to_disk

CHUNK_BYTES = 1 << 18
MAX_HEADER_BYTES = 1 << 20  # tarfile reads a header's text in one piece, however long the header says it is
MAX_NUM_MEMBERS = 1_000_000
RESERVE_BYTES = 64 << 20  # left free on the disk for everybody else
_DAMAGES = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, struct.error, NotImplementedError,
    UnicodeDecodeError,
)  # fmt: skip


@dataclass(frozen=True)
class _Member:
    name: str
    is_folder: bool
    num_bytes: int
    open: Callable[[], IO[bytes]]


def unpack(
    archive: Path,
    root: Path,
    folder: str,
    *,
    max_bytes: int,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[str, ...]:
    """Put the top folder `folder` of an archive to root/folder, whole or not at all.

    archive: a zip or tar.gz file, told by its first bytes. max_bytes: how much it may hold uncompressed. progress:
    called with the bytes of the archive read so far and their number. Modes, owners and times of the members are not
    taken over. Folders that interrupted calls left aside are removed first: two calls at once are the caller's to
    prevent. Returns the names of other top entries, which are checked as all are, but not written.

    Raises DataError: root/folder exists, the archive is no archive, is damaged or ends early, has no such folder, or
    has a member that is refused: a name that is absolute, has `..`, a drive or a backslash; a link, device or sparse
    file; two members for one file; more bytes than max_bytes or the disk allow; an encrypted member.
    """
    target = root / folder
    if os.path.lexists(target):
        raise DataError(f"{target} exists already. Remove it, or give another --root")
    _remove_leftovers(root, folder)
    free_bytes = shutil.disk_usage(root).free - RESERVE_BYTES
    limit = _Limit(archive, min(max_bytes, free_bytes), "the free space" if free_bytes < max_bytes else "its maximum")
    aside = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=root))
    try:
        left_out = _write_members(archive, aside, folder, limit, progress)
        if not (aside / folder).is_dir():
            raise DataError(f"{archive} has no folder {folder!r}, only {listed(map(repr, left_out)) or 'nothing'}")
        os.sync()  # once for all: fsync of each of 120,000 files takes longer than unpacking them
        (aside / folder).rename(target)
        flush_to_disk(root)
    except _DAMAGES as error:
        raise DataError(
            f"{archive} is damaged ({type(error).__name__}: {error}). Remove it and fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot unpack {archive} into {root}: {error}") from error
    finally:
        shutil.rmtree(aside)
    return left_out


def _prefix(folder: str) -> str:
    return f".{folder}-extracting-"


def _remove_leftovers(root: Path, folder: str) -> None:
    for path in root.iterdir():
        if path.name.startswith(_prefix(folder)) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


@dataclass(frozen=True)
class _Limit:
    """How many bytes an archive may unpack to, and why."""

    archive: Path
    num_bytes: int
    reason: str

    def refuse_beyond(self, num_bytes: int) -> None:
        if num_bytes > self.num_bytes:
            raise DataError(f"{self.archive} unpacks to more than {self.num_bytes:,} bytes, {self.reason}: refused")


def _write_members(
    archive: Path, aside: Path, folder: str, limit: _Limit, progress: Callable[[int, int | None], None] | None
) -> tuple[str, ...]:
    left_out: dict[str, None] = {}
    num_bytes, total_bytes = 0, archive.stat().st_size
    with archive.open("rb") as file:
        for number, member in enumerate(_members(archive, file, limit)):
            parts = _safe_parts(member)
            num_bytes += member.num_bytes
            limit.refuse_beyond(num_bytes)
            if number >= MAX_NUM_MEMBERS:
                raise DataError(f"{archive} has more than {MAX_NUM_MEMBERS:,} members: refused")
            if parts and parts[0] == folder:
                _write(member, aside.joinpath(*parts))
            elif parts:
                left_out[parts[0]] = None
            if progress:
                progress(file.tell(), total_bytes)
    return tuple(left_out)


def _safe_parts(member: _Member) -> tuple[str, ...]:
    """The steps of a member's path; () for the archive's own top. Raises DataError for a name that may lead out."""
    name = member.name
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    # What Windows would read into a name is refused everywhere: an archive is as good or bad on every machine.
    leads_out = name.startswith("/") or ".." in parts or PureWindowsPath(name).drive or set(name) & {"\\", "\0"}
    if leads_out or not (parts or member.is_folder):
        raise DataError(f"member {name!r} of the archive has a name that is not a plain relative path: refused")
    return parts


def _write(member: _Member, path: Path) -> None:
    """Exclusive creation is what refuses two members for one file, also where the file system folds letter case."""
    try:
        if member.is_folder:
            path.mkdir(parents=True, exist_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file, member.open() as content:
            shutil.copyfileobj(content, file, CHUNK_BYTES)
            num_bytes = file.tell()
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(
            f"the archive holds {member.name!r} twice, as a file and a folder, or under two spellings that this file "
            "system takes for one: refused"
        ) from error
    if num_bytes != member.num_bytes:
        raise EOFError(f"{member.name!r} has {num_bytes:,} bytes where {member.num_bytes:,} are announced")


def _members(archive: Path, file: IO[bytes], limit: _Limit) -> Iterator[_Member]:
    start = file.read(4)
    file.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return _tar_members(file, limit)
    if start.startswith(b"PK"):
        return _zip_members(file)
    raise DataError(
        f"{archive} is neither a zip nor a tar.gz file: it starts with {start!r}. Remove it; was it a web page?"
    )


def _zip_members(file: IO[bytes]) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"member {info.filename!r} of the archive is a link or a device: refused")
            if info.flag_bits & 0x1:
                raise DataError(f"member {info.filename!r} of the archive is encrypted: refused")
            if info.filename != info.orig_filename:  # zipfile cuts a name at its first NUL
                raise DataError(f"member {info.orig_filename!r} of the archive has an unclean name: refused")

            def content(info: zipfile.ZipInfo = info) -> IO[bytes]:
                return archive.open(info)

            yield _Member(info.filename, info.is_dir(), info.file_size, content)


class _StrictHeader(tarfile.TarInfo):
    """tarfile takes a broken header behind the first member for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictHeader":
        try:
            return super().fromtarfile(tarfile_)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"bad header: {error}") from error


class _Bounded:
    """The uncompressed bytes of a tar.gz file, refused beyond the limit; what tarfile needs of a file, and no more."""

    def __init__(self, stream: gzip.GzipFile, limit: _Limit) -> None:
        self._stream = stream
        self._limit = limit

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise DataError(f"{self._limit.archive} has a header of {size:,} bytes: refused")
        data = self._stream.read(size)
        self._limit.refuse_beyond(self._stream.tell())
        return data

    def seek(self, position: int) -> int:
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


def _tar_members(file: IO[bytes], limit: _Limit) -> Iterator[_Member]:
    stream: Any = _Bounded(gzip.GzipFile(fileobj=file), limit)
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=_StrictHeader) as archive:
        for info in archive:
            if not (info.isreg() or info.isdir()) or info.issparse():
                raise DataError(f"member {info.name!r} of the archive is a link, a device or sparse: refused")

            def content(info: tarfile.TarInfo = info) -> IO[bytes]:
                opened = archive.extractfile(info)
                assert opened is not None, "a regular file has content"
                return opened

            yield _Member(info.name, info.isdir(), info.size, content)
    while stream.read(CHUNK_BYTES):  # to the end, where gzip keeps its checksum
        pass
