"""What images a data set has: paths, classes and, where they are given, splits and roles. No image file is opened.

Everything a split or a result may depend on (paths relative to the root, class names, file sizes, given splits and
roles) goes into `Catalog.content`, so two machines with the same content number run the same experiment.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PARTS = ("train", "val", "test")
ROLES = ("query", "gallery")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_NUM_STAT_THREADS = 32  # they wait for the disk, not for a core
_STAT_CHUNK = 64  # files a thread asks for at a time; one future a file would cost more than a local stat


class DataError(ValueError):
    """The images, the list or the split asked for cannot be used; the message names the cure."""


class Entry(NamedTuple):
    """One image as a list or a folder names it, not yet looked for on the disk; the fields are those of `Row`."""

    path: str
    class_name: str
    part: str = ""
    role: str = ""


class Row(NamedTuple):
    """One image of a data set: its path relative to the root, its class, its size and time on disk, and, where the
    data set gives them, the part its class belongs to ("train" | "val" | "test") and its role ("query" | "gallery")."""

    path: str
    class_name: str
    num_bytes: int
    modified_ns: int
    part: str = ""
    role: str = ""


@dataclass(frozen=True, eq=False)
class Catalog:
    """The images of a data set, sorted by class and path, none of them opened.

    paths: N paths relative to root ("digits/0000" for digits). labels: (N,) int64 ids into class_names, which
    are sorted. given_split: N of "train" | "val" | "test", or None when the split is to be made. roles: N of "query" |
    "gallery" | "", or None where no image has one; images without a role are queries and gallery at once.
    protocols: how the test part is scored, the first one being the main one. modified_ns: (N,) int64, the files' times.
    notes: sentences the caller must show: what is not as published although it can be used.
    content: hexadecimal SHA-256 over (path, class name, size in bytes, given split, role) of every image.
    """

    name: str
    root: Path | None
    paths: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    given_split: tuple[str, ...] | None
    content: str
    modified_ns: np.ndarray
    roles: tuple[str, ...] | None = None
    protocols: tuple[str, ...] = ("leave_one_out",)
    notes: tuple[str, ...] = ()


def catalog_of(
    name: str,
    root: Path | None,
    rows: Iterable[Row],
    *,
    protocols: tuple[str, ...] = ("leave_one_out",),
    notes: tuple[str, ...] = (),
) -> Catalog:
    """A catalog of rows in any order."""
    # The order in which a file system or a list names the images must not change the experiment.
    ordered = sorted(rows, key=lambda row: (row.class_name, row.path))
    class_names = tuple(sorted({row.class_name for row in ordered}))
    ids = {class_name: index for index, class_name in enumerate(class_names)}
    content = hashlib.sha256()
    for row in ordered:
        decisive = [row.path, row.class_name, row.num_bytes, *filter(None, (row.part, row.role))]
        content.update(json.dumps(decisive).encode() + b"\n")
    return Catalog(
        name=name,
        root=root,
        paths=tuple(row.path for row in ordered),
        labels=_fixed(np.array([ids[row.class_name] for row in ordered], dtype=np.int64)),
        class_names=class_names,
        given_split=tuple(row.part for row in ordered) if any(row.part for row in ordered) else None,
        content=content.hexdigest(),
        modified_ns=_fixed(np.array([row.modified_ns for row in ordered], dtype=np.int64)),
        roles=tuple(row.role for row in ordered) if any(row.role for row in ordered) else None,
        protocols=protocols,
        notes=notes,
    )


def _fixed(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def is_hidden(name: str) -> bool:
    """A file or folder that archives and desktops leave behind: hidden, macOS's `._x` and `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def found_on_disk(root: Path, entries: Sequence[Entry]) -> tuple[list[Row], list[str]]:
    """The entries whose file is there, with size and time, and the paths of the others.

    A missing path is followed by the reason in brackets where it is another than that nothing is there. Links are
    followed. Many threads ask at once: on a network disk one answer takes a millisecond, 60,000 in a row a minute.
    """
    folder = str(root)
    starts = range(0, len(entries), _STAT_CHUNK)

    def ask(start: int) -> list[Row | str]:
        return [_found(folder, entry) for entry in entries[start : start + _STAT_CHUNK]]

    with ThreadPoolExecutor(_NUM_STAT_THREADS, thread_name_prefix="stat") as pool:
        answers = [answer for chunk in pool.map(ask, starts) for answer in chunk]
    return (
        [answer for answer in answers if isinstance(answer, Row)],
        [answer for answer in answers if isinstance(answer, str)],
    )


def _found(folder: str, entry: Entry) -> Row | str:
    try:
        status = os.stat(os.path.join(folder, entry.path))
    except FileNotFoundError:
        return entry.path
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        return f"{entry.path!r} ({os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error})"
    if not stat.S_ISREG(status.st_mode):
        return f"{entry.path} ({os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else 'Not a regular file'})"
    return Row(entry.path, entry.class_name, status.st_size, status.st_mtime_ns, entry.part, entry.role)


def listed(names: Iterable[object], limit: int = 10) -> str:
    """The first `limit` of the names and how many more there are, for a message."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def refuse_small_classes(class_names: Sequence[str], counts: np.ndarray, cause: str = "") -> None:
    """Raise DataError naming every class with fewer than two images; counts is (C,)."""
    small = [f"{name} ({count})" for name, count in zip(class_names, counts, strict=True) if count < 2]
    if small:
        raise DataError(
            f"{len(small)} of {len(class_names)} classes have fewer than two images{cause}: {listed(small)}; "
            "a query needs another image of its class to find. Add images to these classes or remove them"
        )
