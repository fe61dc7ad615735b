"""The images of a data set: paths, classes and, where they are given, splits and roles. No image file is opened.

Everything that a split or a result may depend on (paths relative to the root, class names, file sizes, given splits and
roles) goes into `Catalog.content`, so two machines with the same content hash run the same experiment.
"""

import errno
import hashlib
import json
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raydml.data.formats import is_doubtful_name, is_image_name
from raydml.ops.files import digest_of
from raydml.ops.wording import counted

_logger = logging.getLogger("raydml")
PARTS = ("train", "val", "test")
ROLES = ("query", "gallery")
WITHOUT_FILES = ("digits", "glyphs")  # data sets that need no folder
OWN_IMAGES = ("image_folder", "image_list", "parquet", "webdataset")  # data sets of the user's own images
_NUM_STAT_THREADS = 32  # more than cores: they wait for the disk
_DIGEST_DIGITS = 16  # 64 bits: among 200,000 files, two have the same by chance with a probability of one in 10^9
_STAT_CHUNK = 64  # files per task; one task per file would cost more than a local stat


class DataError(ValueError):
    """Images, a list or a split that cannot be used; the message names the cure."""


class ImageEntry(NamedTuple):
    """One image that a list or a folder names; its file has not been looked for. The fields are those of ImageFile."""

    path: str
    class_name: str
    part: str = ""
    role: str = ""
    lists: tuple[str, ...] = ()
    group: str = ""


class ImageFile(NamedTuple):
    """One image of a data set: its path relative to the root, its class and its size.

    part: "train" | "val" | "test", the part of its class, and role: "query" | "gallery"; "" where the data set gives
    none. lists: names of the test lists that have it, where the data set is scored by several. group: its second label,
    such as a super-category or a camera; "" where there is none.
    """

    path: str
    class_name: str
    num_bytes: int
    part: str = ""
    role: str = ""
    lists: tuple[str, ...] = ()
    group: str = ""


class Groups(NamedTuple):
    """The second labels of N images.

    names: N of them. are_excluded: a query does not find gallery images of its own class and group, as where groups are
    cameras or sequences; otherwise groups are another level of labels, by which the images are scored besides.
    """

    names: tuple[str, ...]
    are_excluded: bool = False

    def select(self, rows: np.ndarray) -> "Groups":
        """Return the groups of the images with these numbers."""
        return self._replace(names=tuple(self.names[row] for row in rows.tolist()))


@dataclass(frozen=True, eq=False)
class Catalog:
    """The images of a data set, sorted by class and path, none of them opened.

    paths: N paths relative to root ("digits/0000" for digits). labels: (N,) int64 ids into class_names, which are
    sorted. given_split: N of "train" | "val" | "test", or None if the data set gives no split. content: hexadecimal
    SHA-256 over (path, class name, size in bytes, given split, role, lists) of every image. roles: N of "query" |
    "gallery" | "", or None where no image has one; an image without a role is both query and gallery. protocols: how
    the test part is scored, the main protocol first. lists: name ->
    names of the classes of a test list on which a model is scored besides, as VehicleID has three. notes: sentences
    that the caller must show, on what is usable but not as published or not as it looks. differences: of a benchmark,
    the parts whose counts are not the published ones, in words. groups: those of the images, or None. description:
    what was found, in a few words: "26 classes in class folders, 930 images".
    """

    name: str
    root: Path | None
    paths: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    given_split: tuple[str, ...] | None
    content: str
    roles: tuple[str, ...] | None = None
    protocols: tuple[str, ...] = ("leave_one_out",)
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    description: str = ""
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: Groups | None = None


def catalog_of(
    name: str,
    root: Path | None,
    files: Iterable[ImageFile],
    *,
    protocols: tuple[str, ...] = ("leave_one_out",),
    notes: tuple[str, ...] = (),
    kind: str = "{classes}",
    groups_are_excluded: bool = False,
) -> Catalog:
    """Return a catalog of images in any order.

    kind: the description of the classes; {classes} stands for their number: "{classes} in class folders".
    groups_are_excluded: see `Groups`.
    """
    # The order in which a file system or a list names the images must not change the experiment.
    ordered = sorted(files, key=lambda file: (file.class_name, file.path))
    class_names = tuple(sorted({file.class_name for file in ordered}))
    ids = {class_name: index for index, class_name in enumerate(class_names)}
    lists: dict[str, set[str]] = {}
    content = hashlib.sha256()
    for file in ordered:
        decisive = [file.path, file.class_name, file.num_bytes, *filter(None, (file.part, file.role)), *file.lists]
        decisive += [{"group": file.group}] if file.group else []
        content.update(json.dumps(decisive).encode() + b"\n")
        for of_list in file.lists:
            lists.setdefault(of_list, set()).add(file.class_name)
    return Catalog(
        name=name,
        root=root,
        paths=tuple(file.path for file in ordered),
        labels=_read_only(np.array([ids[file.class_name] for file in ordered], dtype=np.int64)),
        class_names=class_names,
        given_split=tuple(file.part for file in ordered) if any(file.part for file in ordered) else None,
        content=content.hexdigest(),
        roles=tuple(file.role for file in ordered) if any(file.role for file in ordered) else None,
        protocols=protocols,
        notes=notes,
        description=f"{kind.format(classes=counted(len(class_names), 'class', 'classes'))}, "
        f"{counted(len(ordered), 'image')}",
        lists={name: tuple(sorted(classes)) for name, classes in lists.items()},
        groups=Groups(tuple(file.group for file in ordered), groups_are_excluded)
        if any(file.group for file in ordered)
        else None,
    )


_noted: set[str] = set()


def log_notes(notes: Iterable[str]) -> None:
    """Log notes on images that are usable but not as they look, each once per process."""
    for note in notes:
        if note not in _noted:
            _noted.add(note)
            _logger.warning("note: %s", note)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def is_hidden(name: str) -> bool:
    """Return whether archives and desktops leave files or folders of this name behind: hidden ones and `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def images_below(
    root: Path, place: str, onerror: Callable[[OSError], object], passed_over: list[str] | None = None
) -> Iterator[str]:
    """Yield the images below root/place, at any depth: paths relative to root with "/".

    An image is a file with an image suffix. Hidden files and `__MACOSX` are ignored. Links are followed, into each
    folder once, by the first of its paths in order. onerror: called with the error of a folder that cannot be listed.
    passed_over: a list that receives the names of the files that may be images and are not decoded.
    """
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root / place, onerror=onerror, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        inside = Path(folder).relative_to(root)
        for name in files:
            if is_hidden(name):
                continue
            if is_image_name(name):
                yield (inside / name).as_posix()
            elif passed_over is not None and is_doubtful_name(name):
                passed_over.append(name)


def find_files(root: Path, entries: Sequence[ImageEntry]) -> tuple[list[ImageFile], list[str]]:
    """Return the entries whose file exists, with size, and the paths of the others.

    A path is followed by the reason in brackets unless the file just does not exist. Links are followed. Many threads
    look at once: on a network disk one look takes a millisecond, and 60,000 in a row a minute.
    """
    folder = str(root)
    starts = range(0, len(entries), _STAT_CHUNK)

    def find_chunk(start: int) -> list[ImageFile | str]:
        return [_find_file(folder, entry) for entry in entries[start : start + _STAT_CHUNK]]

    with ThreadPoolExecutor(_NUM_STAT_THREADS, thread_name_prefix="stat") as pool:
        found = [one for chunk in pool.map(find_chunk, starts) for one in chunk]
    return [one for one in found if isinstance(one, ImageFile)], [one for one in found if isinstance(one, str)]


def digests_of_files(catalog: Catalog) -> dict[str, str]:
    """Return path -> the first 16 hex digits of the SHA-256 of the file's content; empty for data without files.

    Every file is read, by many threads at once. A file that cannot be read is left out: no network can see it.
    """
    root = catalog.root
    if root is None:
        return {}

    def digest(path: str) -> str:
        try:
            return digest_of(root / path)[:_DIGEST_DIGITS]
        except OSError:
            return ""

    with ThreadPoolExecutor(_NUM_STAT_THREADS, thread_name_prefix="digest") as pool:
        found = dict(zip(catalog.paths, pool.map(digest, catalog.paths), strict=True))
    return {path: one for path, one in found.items() if one}


def _find_file(folder: str, entry: ImageEntry) -> ImageFile | str:
    try:
        status = os.stat(os.path.join(folder, entry.path))
    except FileNotFoundError:
        return entry.path
    except (OSError, ValueError) as error:  # ValueError: a name that no file system can hold
        return f"{entry.path!r} ({os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error})"
    if not stat.S_ISREG(status.st_mode):
        return f"{entry.path} ({os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else 'Not a regular file'})"
    return ImageFile(entry.path, entry.class_name, status.st_size, *entry[2:])


def listed(names: Iterable[object], limit: int = 10) -> str:
    """Return the first `limit` of the names and the number of the others, for a message."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def without_small_classes(files: Sequence[ImageFile], min_images: int) -> tuple[list[ImageFile], tuple[str, ...]]:
    """Return the images of classes with at least min_images, and notes on classes that are left out or have one image.

    Raises DataError where no class has as many.
    """
    counts = Counter(file.class_name for file in files)
    kept = [file for file in files if counts[file.class_name] >= min_images]
    notes = []
    if small := sorted(name for name, count in counts.items() if count < min_images):
        if not kept:
            raise DataError(
                f"data.min_images_per_class = {min_images}: no class has as many images; the largest has "
                f"{max(counts.values())}. Cure: a smaller number"
            )
        notes.append(
            f"{len(small):,} of {len(counts):,} classes have fewer than data.min_images_per_class = {min_images} "
            f"images and are left out, with {counted(len(files) - len(kept), 'image')}: {listed(small)}"
        )
    if alone := sorted(name for name, count in counts.items() if count == 1 >= min_images):
        notes.append(
            f"{len(alone):,} of {len(counts):,} classes have one image: {listed(alone)}. They train, as negatives, "
            "and are in the gallery; as queries they have nothing to find, are left out of the means, and are counted. "
            "data.min_images_per_class: 2 leaves them out altogether"
        )
    return kept, tuple(notes)
