"""Files that a reader sees whole or not at all, and their digests; disks without room."""

import errno
import hashlib
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK_BYTES = 1 << 20
_MAX_UNPACKED_BYTES, _MAX_RATIO = 100_000_000, 200
_RESERVE_BYTES = 1 << 20  # for the small files beside a large one
#: Errors of a disk, whatever is written to it, and their cures.
CURES_OF_DISKS = {
    errno.ENOSPC: "free disk space, or write to another disk",
    errno.EDQUOT: "free disk space, raise the quota, or write to another disk",
    errno.EFBIG: "write to another disk: this one takes no file of that size",
    errno.EROFS: "mount the disk for writing, or name another folder",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the network folder again",
}


def write_whole(
    path: Path, content: str | bytes | Callable[[Path], object], *, fsync: bool = False, several_writers: bool = False
) -> Path:
    """Write a file under another name in the same folder, rename it to `path`, and return `path`.

    A reader sees the old file or the new one. The other name is removed when anything raises.

    content: text (UTF-8, line feeds as they are, the bytes of file names that are not UTF-8 escaped), bytes, or a
    function that writes the file it is given. fsync: wait until the content is on the disk before it gets its name.
    several_writers: more than one process may write this file at the same time; each then writes under a name of its
    own.

    Raises OSError with the name of the file for a disk that is full or fails, also where `content` is a library's
    function that reports that as an error of its own.
    """
    token = f".{uuid.uuid4().hex}" if several_writers else ""
    aside = path.with_name(f".{path.name}{token}.partial")
    try:
        if isinstance(content, str):
            aside.write_bytes(content.encode("utf-8", "backslashreplace"))
        elif isinstance(content, bytes):
            aside.write_bytes(content)
        else:
            content(aside)
        if fsync:
            flush_to_disk(aside)
        os.replace(aside, path)
    except Exception as error:
        fault = _fault_of_disk(error, aside)
        if fault is None or fault.filename is not None:
            raise
        raise OSError(fault.errno, fault.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def _fault_of_disk(error: BaseException, file: Path) -> OSError | None:
    """Return the error of the disk behind an exception that was raised while a file was written; None for any other.

    torch reports a full disk as a RuntimeError about positions, safetensors as a text, and numpy without a number.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause if cause.errno in CURES_OF_DISKS else None
        if found := re.search(r"\(os error (\d+)\)", str(cause)):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        cause = cause.__cause__ or cause.__context__
    if not file.exists():
        return None
    try:  # the library has hidden it, but the disk is still full: what was written is there
        with open(file, "ab") as handle:
            handle.write(bytes(_BLOCK_BYTES))
    except OSError as fault:
        return fault
    return None


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into. A new or empty folder is written under another name, and appears when complete.

    Nothing of it is left when anything raises. A folder that has files is written into as it is.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and any(folder.iterdir()):
        yield folder
        return
    # An empty folder may be a mounted one, or in a folder that cannot be written: its place is not taken by another.
    existed = folder.is_dir()
    aside = (folder / "new" if existed else folder).with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    aside.mkdir()
    try:
        yield aside
        if existed:
            for path in sorted(aside.iterdir()):
                os.replace(path, folder / path.name)
        else:
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def require_space(place: Path, num_bytes: int, what: str) -> None:
    """Raise OSError (ENOSPC) where the disk of a file or folder, which need not exist, has no room for so many bytes.

    what: the object that is about to be written, for the message.
    """
    above = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(above).free
    if num_bytes + _RESERVE_BYTES > free_bytes:
        sizes = f"{what} needs {num_bytes / 1e6:,.1f} MB, and {free_bytes / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(place))


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_zip_bomb(path: Path) -> bool:
    """Return whether a zip archive would unpack to more than 100 MB and 200 times its size; false for other files."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        unpacked_bytes = sum(member.file_size for member in archive.infolist())
    return unpacked_bytes > max(_MAX_UNPACKED_BYTES, _MAX_RATIO * path.stat().st_size)


def digest_of(path: Path) -> str:
    """Hex digits of the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
