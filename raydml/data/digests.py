"""The bytes of image files: a digest of each, and a stamp that shows whether a file was written to since it was read.

`Catalog.content` hashes paths, classes and sizes, and no file is opened for it. Two pictures of equal size that are
exchanged leave it as it is; a digest of the bytes does not.
"""

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from raydml.data.catalog import Catalog, DataError, listed
from raydml.ops.files import write_whole
from raydml.ops.wording import counted

_DIGEST_BYTES = 16  # 128 bits of the SHA-256
_BLOCK_BYTES = 1 << 20
_NUM_THREADS = 32  # more than cores: they wait for the disk
_CHUNK = 64
_RECENT_NS = 2 * 10**9  # clocks of file systems are this coarse: a later write may leave the stamp as it is


class Sources(NamedTuple):
    """What N files contained when they were read.

    stamps: (N, 4) int64: size, modification time, change time, inode; the times in ns. Zeros: to be read again next
    time. digests: (N, 16) uint8, zeros for a file that could not be read.
    """

    stamps: np.ndarray
    digests: np.ndarray

    def save(self, file: Path, **more: Any) -> None:
        """Write the arrays, and others beside them, to one file; its members have checksums."""

        def write(aside: Path) -> None:
            with open(aside, "wb") as handle:
                np.savez(handle, stamps=self.stamps, digests=self.digests, **more)

        write_whole(file, write, several_writers=True)


def load_sources(file: Path, num_files: int) -> tuple[Sources, dict[str, np.ndarray]]:
    """Read what `Sources.save` wrote. Raises OSError or ValueError for a damaged file."""
    arrays = _arrays_of(file)
    sources = Sources(arrays.pop("stamps"), arrays.pop("digests"))
    if sources.stamps.shape != (num_files, 4) or sources.digests.shape != (num_files, _DIGEST_BYTES):
        raise ValueError(f"{file} is of other files")
    return sources, arrays


def _arrays_of(file: Path) -> dict[str, np.ndarray]:
    try:
        with open(file, "rb") as handle, np.load(handle, allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # numpy and zipfile let a dozen kinds of errors out of a damaged file
        raise ValueError(f"{file} is damaged: {error}") from error


class SourceReader:
    """Opens files for reading, and keeps the stamp and the digest of each; several threads may open at once."""

    def __init__(self, open_file: Callable[[Path], BinaryIO]) -> None:
        self._open_file = open_file
        self._read: dict[Path, tuple[tuple[int, ...], bytes]] = {}

    def open(self, file: Path) -> BinaryIO:
        """Open a file at its beginning, after its bytes were read once."""
        handle = self._open_file(file)
        try:
            self._read[file] = _stamp_of(os.fstat(handle.fileno())), _digest_of(handle)
            handle.seek(0)
        except BaseException:
            handle.close()
            raise
        return handle

    def sources(self, root: Path, paths: Sequence[str]) -> Sources:
        """The stamps and digests of these files, zeros for those that were not read."""
        nothing = (0,) * 4, bytes(_DIGEST_BYTES)
        return _sources_of([self._read.get(root / path, nothing) for path in paths])


def _sources_of(read: Sequence[tuple[tuple[int, ...], bytes]]) -> Sources:
    stamps = np.array([stamp for stamp, _ in read], dtype=np.int64).reshape(-1, 4)
    digests = np.frombuffer(bytearray().join(digest for _, digest in read), dtype=np.uint8)
    stamps[stamps[:, 1:3].max(axis=1, initial=0) > time.time_ns() - _RECENT_NS] = 0
    return Sources(stamps, digests.reshape(-1, _DIGEST_BYTES))


def stamp_of_file(file: Path) -> np.ndarray:
    """The stamp of one file, as in `Sources`: (4,) int64."""
    return np.array(_stamp_of(os.stat(file)), dtype=np.int64)


def _stamp_of(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _digest_of(handle: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while block := handle.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.digest()[:_DIGEST_BYTES]


def read_sources(root: Path, paths: Sequence[str], known: Sources | None = None) -> Sources:
    """Return what the files contain now; a file is read unless its stamp is that of `known`.

    Raises DataError: files, or the folder itself, that are not there any more.
    """
    stamps = _stamps_of(root, paths)
    digests = np.zeros((len(paths), _DIGEST_BYTES), dtype=np.uint8)
    unknown = np.arange(len(paths))
    if known is not None:
        trusted = (stamps == known.stamps).all(axis=1) & known.digests.any(axis=1)
        digests[trusted] = known.digests[trusted]
        unknown = np.flatnonzero(~trusted)
    if len(unknown):
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="digest") as pool:
            read = _sources_of(list(pool.map(lambda row: _read_one(root / paths[row]), unknown)))
        stamps[unknown], digests[unknown] = read
    return Sources(stamps, digests)


def _read_one(file: Path) -> tuple[tuple[int, ...], bytes]:
    try:
        with open(file, "rb") as handle:
            return _stamp_of(os.fstat(handle.fileno())), _digest_of(handle)
    except OSError:
        return (0,) * 4, bytes(_DIGEST_BYTES)  # no network can see it either


def _stamps_of(root: Path, paths: Sequence[str]) -> np.ndarray:
    folder = str(root)

    def stamps_from(start: int) -> list[tuple[int, ...] | str]:
        return [_stamp_or_reason(folder, path) for path in paths[start : start + _CHUNK]]

    with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="stat") as pool:
        found = [one for chunk in pool.map(stamps_from, range(0, len(paths), _CHUNK)) for one in chunk]
    if missing := [one for one in found if isinstance(one, str)]:
        refuse_vanished_root(root)
        raise DataError(
            f"{len(missing)} of {counted(len(paths), 'image')} under {root} cannot be found any more: "
            f"{listed(missing)}. Cure: put them back, or mount their disk again"
        )
    return np.array(found, dtype=np.int64).reshape(-1, 4)


def _stamp_or_reason(folder: str, path: str) -> tuple[int, ...] | str:
    try:
        status = os.stat(os.path.join(folder, path))
    except FileNotFoundError:
        return path
    except OSError as error:
        return f"{path} ({error.strerror})"
    return _stamp_of(status) if stat.S_ISREG(status.st_mode) else f"{path} (not a regular file)"


def refuse_vanished_root(root: Path) -> None:
    """Raise DataError where the folder of the images is not there, or not readable."""
    try:
        os.listdir(root)
    except OSError as error:
        raise DataError(
            f"the folder of the images, {root}, cannot be read: {error.strerror}. Its disk is "
            f"{_mount_of(root)}. Cure: mount it again or give the folder's new place (--data-root DIR)"
        ) from error


def _mount_of(path: Path) -> str:
    """The mount that a path is on, in words."""
    for folder in (path.absolute(), *path.absolute().parents):
        try:
            if os.path.ismount(folder):
                return f"mounted at {folder}" if folder != Path("/") else "not mounted (only / is, above this folder)"
        except OSError:
            continue
    return "unknown"


def changed_rows(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """The rows whose digest, (N, 16) uint8, was known and is another one now. Zeros are unknown."""
    return np.flatnonzero((before != now).any(axis=1) & before.any(axis=1) & now.any(axis=1))


def refuse_changed(root: Path, paths: Sequence[str], rows: np.ndarray, since: str) -> None:
    """Raise DataError that names the first of the files at these rows, unless there are none.

    since: when they were other, in words.
    """
    if len(rows):
        raise DataError(
            f"the contents of {len(rows)} of {counted(len(paths), 'image')} under {root} have changed since {since}: "
            f"{listed(paths[row] for row in rows)}. Results on other pictures cannot be compared with those before. "
            "Cure: restore these files, or make another study of the changed images (`sweep` with another --name)"
        )


class ImageRecord:
    """The digests of a study's images as they were when each was first opened: a folder of the study.

    Test images are opened, and recorded, once they are read with a key. A file has rows of the catalog, whose `content`
    names it, and their paths and digests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_study(cls, folder: Path) -> "ImageRecord":
        """The record of the study in a folder."""
        return cls(folder / "image_digests")

    def has(self, content: str) -> bool:
        """Whether images of the catalog with this ``content`` are recorded."""
        return any(self._files_of(content))

    def _files_of(self, content: str) -> Iterator[Path]:
        return self.folder.glob(f"{content[:16]}-*.npz")

    def missing_in(self, catalog: Catalog, content: str) -> list[str]:
        """The recorded paths of images of another catalog, with this ``content``, that a catalog does not have."""
        recorded: list[str] = []
        for file in sorted(self._files_of(content)):
            with suppress(ValueError, KeyError):  # damaged: this is for a message alone
                recorded += os.fsdecode(_arrays_of(file)["paths"].tobytes()).split("\0")
        return sorted({*recorded} - {*catalog.paths})

    def refuse_changed(self, catalog: Catalog, rows: np.ndarray, digests: np.ndarray) -> None:
        """Compare images with the record, and record those that are new in it.

        rows: (n,) of the catalog. digests: (n, 16), of these. Raises DataError: other bytes, a damaged record.
        """
        assert catalog.root is not None
        known = np.zeros((len(catalog.paths), _DIGEST_BYTES), dtype=np.uint8)
        for file in sorted(self._files_of(catalog.content)):
            try:
                saved = _arrays_of(file)
                known[saved["rows"]] = saved["digests"]
            except (ValueError, KeyError, IndexError) as error:
                raise DataError(
                    f"{file}, the record of the study's images, is damaged. Cure: delete it; the images are then "
                    "recorded as they are now"
                ) from error
        paths = [catalog.paths[row] for row in rows]
        refuse_changed(catalog.root, paths, changed_rows(known[rows], digests), "the study first opened them")
        new = ~known[rows].any(axis=1) & digests.any(axis=1)
        if new.any():
            text = "\0".join(path for path, is_new in zip(paths, new, strict=True) if is_new)
            of_paths = np.frombuffer(os.fsencode(text), dtype=np.uint8)
            name = hashlib.sha256(rows[new].tobytes()).hexdigest()[:8]
            self.folder.mkdir(parents=True, exist_ok=True)

            def write(aside: Path) -> None:
                with open(aside, "wb") as handle:
                    np.savez(handle, rows=rows[new], digests=digests[new], paths=of_paths)

            write_whole(self.folder / f"{catalog.content[:16]}-{name}.npz", write, several_writers=True)
