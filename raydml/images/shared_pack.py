"""One pack for all processes of a node: opened where it is there, else written by one of them while the others wait."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from raydml.data.catalog import DataError
from raydml.images.pack import Pack, Source, open_pack
from raydml.images.packing import REPORT_EVERY_S, Needs, clear, progress_in, survey, write_pack

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_POLL_S = 0.1
_RESERVE_BYTES = 2**20  # for the index and the manifest
_logger = logging.getLogger("raydml")


class NoRoom(NamedTuple):
    """Why the images are not kept. room: what there is, in words; cure: what gives more."""

    needs: Needs
    room: str
    cure: str


def open_or_write(
    source: Source, cache_dir: Path, max_bytes: int | None, accept: Callable[[dict[str, str]], None]
) -> Pack | NoRoom:
    """The pack of these files; of several processes that ask at once, one decodes.

    max_bytes: what all packs in cache_dir may take together: those opened longest ago make room for a new one, and who
    has them open keeps them. None: what the disk has free. accept: is given path -> reason of the files
    without pixels before a pack is put in its place, and raises if there shall be none. A writer
    that is killed is followed by one of those who wait.
    Raises OSError: the folder cannot be read, made or written to. A whole pack may lie in a read-only folder.
    """
    folder = source.folder(cache_dir)
    pack = open_pack(folder, source)
    if pack is None:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            pack = open_pack(folder, source)  # written while this process waited?
            if pack is None:
                clear(folder)
                needs = survey(source, folder)
                if max_bytes is not None:
                    _make_room(cache_dir, folder, max_bytes - needs.total_bytes())
                if no_room := _no_room(needs, cache_dir, max_bytes):
                    return no_room
                write_pack(folder, source, needs, accept)
                pack = open_pack(folder, source, try_skipped=False)  # they were tried a moment ago
                assert pack is not None, "a pack just written is whole and current"
    with suppress(OSError):  # in a read-only folder nothing is removed, so nobody asks when it was used
        os.utime(folder / "manifest.json")
    return pack


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3f} GiB"


def _make_room(cache_dir: Path, new: Path, allowed_bytes: int) -> None:
    """Remove packs until the others take no more than this, those opened longest ago first, `new` never.

    A pack that somebody writes at this moment is left alone. Nothing is removed where that would not help.
    """
    if allowed_bytes < 0:
        return
    others = {manifest.parent: manifest.stat().st_mtime_ns for manifest in cache_dir.glob("images-*/manifest.json")}
    others.pop(new, None)
    taken_bytes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in others}
    for folder in sorted(others, key=lambda folder: others[folder]):
        if sum(taken_bytes.values()) <= allowed_bytes:
            return
        with open(folder / "lock", "ab") as handle:
            if _taken(handle):
                _logger.info("%s: %s of images make room for others", folder, gib(taken_bytes.pop(folder)))
                clear(folder)


def _no_room(needs: Needs, cache_dir: Path, max_bytes: int | None) -> NoRoom | None:
    free_bytes = shutil.disk_usage(cache_dir).free
    if max_bytes is not None and needs.total_bytes() > max_bytes:
        return NoRoom(needs, f"machine.max_cache_gib allows {gib(max_bytes)}", "raise machine.max_cache_gib")
    if needs.total_bytes() + _RESERVE_BYTES > free_bytes:
        room = f"machine.cache_dir = {str(cache_dir)!r} has {gib(free_bytes)} free"
        return NoRoom(needs, room, "free space there or name another folder")
    return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in this folder; the lock ends with its holder, also by a kill."""
    if fcntl is None:
        raise DataError("machine.cache_dir needs POSIX file locks; leave it out to keep the images in memory")
    with open(folder / "lock", "ab") as handle:
        reported_s = time.monotonic()
        while not _taken(handle):
            if time.monotonic() - reported_s >= REPORT_EVERY_S:
                _logger.info("waiting: another process %s", progress_in(folder))
                reported_s = time.monotonic()
            time.sleep(_POLL_S)
        yield


def _taken(handle: BinaryIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
