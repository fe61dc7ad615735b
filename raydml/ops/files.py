"""Files that a reader sees whole or not at all, and their digests."""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def write_whole(
    path: Path, content: str | bytes | Callable[[Path], object], *, fsync: bool = False, several_writers: bool = False
) -> Path:
    """Write a file under another name in the same folder, rename it to `path`, and return `path`.

    A reader sees the old file or the new one. The other name is removed when anything raises.

    content: text (UTF-8, line feeds as they are, the bytes of file names that are not UTF-8 escaped), bytes, or a
    function that writes the file it is given. fsync: wait until the content is on the disk before it gets its name.
    several_writers: more than one process may write this file at the same time; each then writes under a name of its
    own.
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
    finally:
        aside.unlink(missing_ok=True)
    return path


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """Hex digits of the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
