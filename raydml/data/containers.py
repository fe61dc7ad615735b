"""The user's own images inside larger files (Parquet, Arrow, WebDataset tars): unpacked once a machine, then as files.

    <cache_dir>/unpacked-<key>/<source file>/0000123.jpg    the bytes as they are in the source
                               list.json                    path, class, group and size of each image
                unpacked-<key>.lock                         held by the process that unpacks
                unpacked-sources-<paths>.npz                stamp and digest of each source: it is read when it changes

The key is a hash of the paths and the bytes of the sources and of what is read from them. A folder appears when all of
it is on the disk; one whose files no longer have their sizes is written again. Everything that holds for images in
folders (digests of their bytes, packs, the seal of the test classes, refusals of damaged images) then holds here too.
No image is decoded here, and no pickled object is ever loaded.

`machine.max_cache_gib` does not count these folders, and nothing removes them: unlike a pack, which stays readable for
the processes that have it open, their files are opened by path, whenever a pack is written or images do not fit into
one.
"""

import atexit
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from raydml.data.catalog import DataError, ImageEntry, ImageFile, find_files, listed
from raydml.data.digests import Sources, load_sources, read_sources, stamp_of_file
from raydml.data.formats import suffix_of
from raydml.data.parquet_images import PARQUET_SUFFIXES, parquet_samples
from raydml.data.samples import Columns, Sample
from raydml.data.webdataset_images import TAR_SUFFIXES, webdataset_samples
from raydml.ops.files import folder_written_whole, require_space, write_whole
from raydml.ops.progress import report_progress
from raydml.ops.wording import counted

_logger = logging.getLogger("raydml")
_FORMAT = 2  # raise it when other files are written
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_NUM_SOURCES = 100_000
_REPORT_EVERY = 256
_SIGNATURES = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"GIF8", ".gif"),
    (b"RIFF", ".webp"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)


class ContainerKind(NamedTuple):
    """A kind of file with images in it. samples: a function from a file and columns to what is in it."""

    suffixes: tuple[str, ...]
    samples: Callable[[Path, Columns], Iterator[Sample]]
    in_words: str


CONTAINERS = {
    "parquet": ContainerKind(PARQUET_SUFFIXES, parquet_samples, "Parquet or Arrow"),
    "webdataset": ContainerKind(TAR_SUFFIXES, webdataset_samples, "tar"),
}


class UnpackedImages(NamedTuple):
    """folder: the root of the files. num_sources: the files that they were in."""

    folder: Path
    files: list[ImageFile]
    num_sources: int


def unpacked_images(
    kind: str, root: Path, path: str | None, columns: Columns, cache_dir: Path | None
) -> UnpackedImages:
    """Return the images in the files of a container data set, which are unpacked where they have not been.

    kind: of CONTAINERS. path: a file, a folder or a pattern, relative to root: shards/train-{000..003}.tar,
    data/*.parquet; None: all such files below root. cache_dir: where they are unpacked; None: in a temporary
    folder that is removed when the process ends.

    Raises DataError: no such file, damaged or truncated files, missing columns, values of other types; the message
    names file, column and row.
    """
    sources = _sources(kind, root, path)
    parent = cache_dir or _temporary_folder()
    try:
        decisive = json.dumps([_FORMAT, kind, columns, _contents(kind, sources, parent)]).encode()
        folder = parent / f"unpacked-{hashlib.sha256(decisive).hexdigest()[:16]}"
        if (files := _whole(folder)) is None:
            parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if (files := _whole(folder, report=True)) is None:  # another process may have unpacked it meanwhile
                    _remove(folder)
                    with folder_written_whole(folder) as aside:
                        _unpack(CONTAINERS[kind], sources, columns, aside)
                    files = _whole(folder)
    except OSError as error:
        raise DataError(
            f"the images of {_key(kind, root, path)} cannot be unpacked into {parent}: {error}. Cure: a writable "
            "folder with enough space (machine.cache_dir)"
        ) from error
    assert files is not None, "what was just unpacked is whole"
    return UnpackedImages(folder, files, len(sources))


def _contents(kind: str, sources: Mapping[str, Path], parent: Path) -> list[tuple[str, str, str]]:
    """Return name, path and digest of each source. A file whose stamp was kept in `parent` is not read again."""
    paths = [os.path.realpath(file) for file in sources.values()]
    kept = parent / f"unpacked-sources-{hashlib.sha256(json.dumps([kind, paths]).encode()).hexdigest()[:16]}.npz"
    root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))

    def known() -> Sources | None:
        with suppress(FileNotFoundError, ValueError):  # none, or damaged: all files are read
            return load_sources(kept, len(paths))[0]
        return None

    found = known()
    if found is None or not np.array_equal(found.stamps, [stamp_of_file(Path(path)) for path in paths]):
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):  # of many processes one reads
            found = read_sources(root, paths, known())
            found.save(kept)
    rows = zip(sources, paths, found.digests, strict=True)
    return [(name, path, digest.tobytes().hex()) for name, path, digest in rows]


def _whole(folder: Path, report: bool = False) -> list[ImageFile] | None:
    """Return the files of an unpacked folder; None where there is none, or where files or their sizes are not right.

    report: warn of the latter.
    """
    try:
        rows = json.loads((folder / "list.json").read_text(encoding="utf-8"))
        files, missing = find_files(folder, [ImageEntry(*row[:-1]) for row in rows])
        sizes = {row[0]: row[-1] for row in rows}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError) as error:
        wrong = [f"list.json ({error})"]
    else:
        wrong = missing + [file.path for file in files if file.num_bytes != sizes[file.path]]
        if not wrong:
            return files
    if report:
        _logger.warning(
            "warning: %s of unpacked images are missing or have changed (%s); all are unpacked again into %s",
            counted(len(wrong), "file"), listed(wrong), folder,
        )  # fmt: skip
    return None


def _remove(folder: Path) -> None:
    """Remove a folder, and what a process that was killed while it unpacked left of it."""
    for left in (folder, *folder.parent.glob(f".{folder.name}.*.partial")):
        if left.exists():
            shutil.rmtree(left)


def _key(kind: str, root: Path, path: str | None) -> str:
    return f"{kind} {str(root / path) if path else str(root)!r}"


@cache
def _temporary_folder() -> Path:
    """Make the folder of this process for images without a cache; it is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="raydml-unpacked-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _sources(kind: str, root: Path, path: str | None) -> dict[str, Path]:
    """Return the files by their names: paths below root, or plain names of others."""
    suffixes, in_words = CONTAINERS[kind].suffixes, CONTAINERS[kind].in_words
    place = Path(os.path.normpath(root / Path(path).expanduser())) if path else root
    if place.is_dir():
        # The datasets library writes cache-*.arrow beside its data.
        found = [
            file
            for file in sorted(place.rglob("*"))
            if file.name.lower().endswith(suffixes) and not file.name.startswith(("cache-", ".")) and file.is_file()
        ]
    else:
        found = [file for one in _expanded(str(place)) for file in _matching(Path(one))]
    if not found:
        what = f"no {in_words} file ({', '.join(suffixes)}) in {place}" if place.is_dir() else f"there is no {place}"
        raise DataError(f"data.path = {path!r}: {what}. Cure: a file, a folder or a pattern, relative to {root}")
    names = {
        (file.relative_to(root) if file.is_relative_to(root) else Path(file.name)).as_posix(): file for file in found
    }
    if len(names) < len(found):
        raise DataError(f"data.path = {path!r}: several files outside of {root} have one name. Cure: --data-root")
    return names


def _expanded(pattern: str) -> list[str]:
    """Return the names that a range of numbers stands for: a-{08..10}.tar is a-08.tar, a-09.tar and a-10.tar."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if int(last) < int(first) or int(last) - int(first) >= _MAX_NUM_SOURCES:
        raise DataError(
            f"data.path: {found.group()} is no range of at most {_MAX_NUM_SOURCES:,} rising numbers. Cure: the smaller "
            "number first, such as {000..003}"
        )
    numbers = (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))
    return [one for number in numbers for one in _expanded(pattern[: found.start()] + number + pattern[found.end() :])]


def _matching(file: Path) -> list[Path]:
    if file.exists():
        return [file]
    if any(mark in file.name for mark in "*?["):
        return sorted(one for one in file.parent.glob(file.name) if one.is_file())
    raise DataError(
        f"data.path: there is no {file}. Cure: the name of a file that is there, a folder or a pattern, relative to "
        "machine.data_root"
    )


def _unpack(kind: ContainerKind, sources: dict[str, Path], columns: Columns, folder: Path) -> None:
    total_bytes = sum(file.stat().st_size for file in sources.values())
    require_space(folder / "list.json", total_bytes, f"the images in {counted(len(sources), 'file')}")
    rows: list[list[Any]] = []
    seen: dict[str, str] = {}  # type of a label -> the first image with such a label
    for number, (name, file) in enumerate(sources.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for sample in kind.samples(file, columns):
            path = f"{name}/{sample.number:07d}{_suffix(sample)}"
            (folder / path).write_bytes(sample.image)
            rows.append([path, sample.label, "", "", [], sample.group, len(sample.image)])
            seen.setdefault(type(sample.label).__name__, path)
            if len(rows) % _REPORT_EVERY == 0:
                report_progress("unpacking", number, len(sources), "files")
        report_progress("unpacking", number + 1, len(sources), "files")
    if not rows:
        raise DataError(f"there is no image in {listed(sources)}. Cure: other files in data.path, or write them again")
    if len(seen) > 1:
        raise DataError(
            f"some labels are numbers ({seen['int']}) and some are texts ({seen['str']}). Cure: write one kind"
        )
    _name_numbers(rows, 1)
    _name_numbers(rows, 5)
    os.sync()  # once for all images: the list says that they are there
    write_whole(folder / "list.json", json.dumps(rows), fsync=True)


def _name_numbers(rows: list[list[Any]], place: int) -> None:
    """Replace numbers by texts of equal length, so that their order as texts is that of the numbers."""
    width = max((len(str(row[place])) for row in rows if isinstance(row[place], int)), default=0)
    for row in rows:
        if isinstance(row[place], int):
            row[place] = f"{row[place]:0{width}d}"


def _suffix(sample: Sample) -> str:
    by_bytes = next((suffix for start, suffix in _SIGNATURES if sample.image.startswith(start)), "")
    return by_bytes or suffix_of(sample.name) or ".bin"
