"""Decoded images of one part of the classes: each file is decoded once, packed, and memory-mapped by every trial.

A pack holds the images of the parts that are loaded together (train, then val; or test alone) as uint8
(N, S, S, 3) in one .npy file. Only files of these parts are opened: the pack of the development classes cannot
hold a test image. Folds of the same development classes copy from each other's packs instead of decoding again;
they cost disk (one pack a fold), not time.

    <cache_dir>/images-<development classes>/{lock, <parts>.json, <parts>-<token>.npy}
"""

import hashlib
import json
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from raydml.data.datasets import Catalog, DataError, Split, digit_images, refuse_small_classes
from raydml.data.seal import TestKey
from raydml.model import square

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ON_UNREADABLE = ("refuse", "skip")
_FORMAT = 1  # raise it when the way an image becomes pixels changes: old packs are then not opened
_CHUNK = 256  # images decoded ahead of the writer; bounds the memory
# What Pillow raises for a damaged file, depending on where the damage is.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class Images(NamedTuple):
    """pixels: uint8 (N, S, S, 3), read-only (a memory map where there is a cache). labels: (N,) int64 in 0..C-1, the
    classes of this part numbered anew in catalog order. paths: N. skipped: (path, reason) of each image left out."""

    pixels: np.ndarray
    labels: np.ndarray
    paths: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()


def load_development(
    catalog: Catalog, split: Split, *, resize_px: int, cache_dir: Path | None, on_unreadable: str
) -> tuple[Images, Images]:
    """The train and the val images; no file of a test class is opened.

    Each image: EXIF rotation applied, RGB, short side scaled to resize_px, centre square (`model.square`); the
    digits are scaled the same way from their 8 pixels. cache_dir None: decoded into memory.
    on_unreadable: "refuse" raises for unreadable images, "skip" leaves them out and lists them in `skipped`.

    Raises DataError: unreadable images, every one with path and reason; a class left with fewer than two images
    by skipping; too little disk space; a cache that cannot be written.
    """
    train, val = _load(catalog, (split.train, split.val), resize_px, cache_dir, on_unreadable)
    return train, val


def load_test(
    catalog: Catalog, split: Split, *, resize_px: int, cache_dir: Path | None, on_unreadable: str, key: TestKey
) -> Images:
    """The test images, for a key from `TestReads.record`, which this spends. Otherwise as `load_development`."""
    if not isinstance(key, TestKey):
        raise DataError(f"the test classes are sealed: load_test needs a TestKey from TestReads.record, got {key!r}")
    key.spend()
    (test,) = _load(catalog, (split.test,), resize_px, cache_dir, on_unreadable)
    return test


def _load(
    catalog: Catalog,
    parts: tuple[tuple[int, ...], ...],
    resize_px: int,
    cache_dir: Path | None,
    on_unreadable: str,
) -> list[Images]:
    if on_unreadable not in ON_UNREADABLE:
        raise DataError(f"machine.on_unreadable = {on_unreadable!r}; choices: {', '.join(ON_UNREADABLE)}")
    if resize_px < 1:
        raise DataError(f"data.resize_px = {resize_px} must be at least 1 pixel")
    rows = [np.flatnonzero(np.isin(catalog.labels, classes)) for classes in parts]
    wanted = np.concatenate(rows)
    skipped: dict[str, str] = {}
    if catalog.name == "digits":
        digits = digit_images()[0][wanted]
        pixels = np.stack([square(Image.fromarray(digit), resize_px) for digit in digits])
    elif cache_dir is None:
        decoded = list(_decode(catalog, wanted, resize_px, skipped))
        _refuse_unreadable(catalog, parts, wanted, skipped, on_unreadable)
        pixels = np.stack(decoded)
    else:
        try:
            pack = _Pack(catalog, parts, wanted, resize_px, cache_dir)
            pixels, skipped = pack.open_or_make(on_unreadable)
        except OSError as error:
            raise DataError(
                f"machine.cache_dir = {str(cache_dir)!r} cannot be used: {error}; give a writable local folder "
                "with enough space, or leave it out to keep the images in memory"
            ) from error
    pixels.setflags(write=False)
    return list(_cut(catalog, parts, rows, pixels, skipped))


def _cut(
    catalog: Catalog,
    parts: Sequence[tuple[int, ...]],
    rows: Sequence[np.ndarray],
    pixels: np.ndarray,
    skipped: dict[str, str],
) -> Iterator[Images]:
    """Each part is one slice of the pack: views, no copies."""
    start = 0
    for classes, part_rows in zip(parts, rows, strict=True):
        kept = np.array([row for row in part_rows if catalog.paths[row] not in skipped], dtype=np.int64)
        labels = np.searchsorted(np.sort(np.array(classes)), catalog.labels[kept]).astype(np.int64)
        left_out = [(path, skipped[path]) for path in (catalog.paths[row] for row in part_rows) if path in skipped]
        paths = tuple(catalog.paths[row] for row in kept)
        yield Images(pixels[start : start + len(kept)], labels, paths, tuple(left_out))
        start += len(kept)
    assert start == len(pixels), "the pack holds other images than the catalog names"


def _decode(catalog: Catalog, rows: np.ndarray, resize_px: int, unreadable: dict[str, str]) -> Iterator[np.ndarray]:
    """The readable images in order; the others are entered in `unreadable` as path: reason."""
    assert catalog.root is not None
    root = catalog.root
    num_threads = min(4, max(2, os.cpu_count() or 2))  # Pillow decodes without the interpreter lock
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        for start in range(0, len(rows), _CHUNK):
            paths = [catalog.paths[row] for row in rows[start : start + _CHUNK]]
            results = pool.map(lambda path: _read(root / path, resize_px), paths)
            for path, result in zip(paths, results, strict=True):
                if isinstance(result, str):
                    unreadable[path] = result
                else:
                    yield result


def _read(file: Path, resize_px: int) -> np.ndarray | str:
    """The pixels of one file, or the reason why there are none."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                return f"pixels of mode {image.mode} are not 8 bits deep; convert the file"
            return np.ascontiguousarray(square(image, resize_px))
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        return " ".join(f"{type(error).__name__}: {error}".replace(str(file), file.name).split())


def _refuse_unreadable(
    catalog: Catalog,
    parts: Sequence[tuple[int, ...]],
    rows: np.ndarray,
    unreadable: dict[str, str],
    on_unreadable: str,
) -> None:
    if unreadable and on_unreadable == "refuse":
        lines = "\n".join(f"  {path}: {reason}" for path, reason in unreadable.items())
        raise DataError(
            f"{len(unreadable)} of {len(rows)} images under {catalog.root} cannot be read:\n{lines}\n"
            "Repair or remove them, or leave them out with machine.on_unreadable: skip"
        )
    kept = [row for row in rows if catalog.paths[row] not in unreadable]
    classes = sorted(c for part in parts for c in part)
    counts = np.bincount(catalog.labels[kept], minlength=len(catalog.class_names))[classes]
    refuse_small_classes([catalog.class_names[c] for c in classes], counts, " left after skipping unreadable ones")


class _Pack:
    """One packed file with its manifest; the manifest is written last and names the file."""

    def __init__(
        self,
        catalog: Catalog,
        parts: tuple[tuple[int, ...], ...],
        rows: np.ndarray,
        resize_px: int,
        cache_dir: Path,
    ) -> None:
        assert catalog.root is not None
        self.catalog, self.parts, self.rows, self.resize_px = catalog, parts, rows, resize_px
        # Two folders may hold files of the same names and sizes, so the root belongs to the key.
        source = [_FORMAT, catalog.content, str(catalog.root.resolve()), resize_px]
        self.folder = cache_dir / f"images-{_digest([source, sorted(c for part in parts for c in part)])}"
        self.name = _digest([source, parts])
        self.manifest_file = self.folder / f"{self.name}.json"
        # A file edited without changing its size is noticed by its time.
        self.modified = _digest(sorted((catalog.paths[r], _modified_ns(catalog.root / catalog.paths[r])) for r in rows))

    def open_or_make(self, on_unreadable: str) -> tuple[np.ndarray, dict[str, str]]:
        """The memory map and what was skipped; of several processes that ask at once, one decodes."""
        found = self._open(self.manifest_file, on_unreadable)
        if found is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / "lock"):
                found = self._open(self.manifest_file, on_unreadable)  # made while this process waited?
                if found is None:
                    self._make(on_unreadable)
                    found = self._open(self.manifest_file, on_unreadable)
        assert found is not None
        return found[0], dict(found[1]["skipped"])

    def _open(self, manifest_file: Path, on_unreadable: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        """A complete and current pack, or None: absent, half-written, stale, or with gaps that are not wished."""
        try:
            manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
            if manifest["modified"] != self.modified or (manifest["skipped"] and on_unreadable == "refuse"):
                return None
            file = self.folder / manifest["pixels"]
            if file.stat().st_size != manifest["pixels_bytes"]:
                return None
            pixels = np.load(file, mmap_mode="r")
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        size_px = self.resize_px
        expected = (len(self.rows) - len(manifest["skipped"]), size_px, size_px, 3)
        return (pixels, manifest) if pixels.shape == expected and pixels.dtype == np.uint8 else None

    def _make(self, on_unreadable: str) -> None:
        """Written aside, renamed, manifest last. The caller holds the lock."""
        size_px = self.resize_px
        needed_bytes = len(self.rows) * size_px * size_px * 3
        free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes < needed_bytes + 2**20:
            raise DataError(
                f"machine.cache_dir = {str(self.folder.parent)!r} has {free_bytes / 1e9:.3f} GB free, but "
                f"{len(self.rows)} images of {size_px} x {size_px} pixels need {needed_bytes / 1e9:.3f} GB; give "
                "another folder, lower data.resize_px, or leave machine.cache_dir out to keep the images in memory"
            )
        skipped: dict[str, str] = {}
        token = uuid.uuid4().hex[:8]
        aside, final = self.folder / f"{self.name}-{token}.part", self.folder / f"{self.name}-{token}.npy"
        try:
            images = self._copy(on_unreadable, skipped) or _decode(self.catalog, self.rows, size_px, skipped)
            _write_array(aside, images, (len(self.rows), size_px, size_px, 3))
            _refuse_unreadable(self.catalog, self.parts, self.rows, skipped, on_unreadable)
            os.replace(aside, final)
        finally:
            aside.unlink(missing_ok=True)
        manifest = {
            "pixels": final.name,
            "pixels_bytes": final.stat().st_size,
            "modified": self.modified,
            "skipped": sorted(skipped.items()),
            "resize_px": size_px,
            "classes": [[self.catalog.class_names[c] for c in sorted(part)] for part in self.parts],
            "paths": self._kept(skipped),
        }
        manifest_aside = aside.with_suffix(".json.part")
        with open(manifest_aside, "w", encoding="utf-8") as handle:
            json.dump(manifest, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(manifest_aside, self.manifest_file)
        for old in self.folder.glob(f"{self.name}-*"):  # of killed writers, and the stale pack
            if old != final:
                old.unlink(missing_ok=True)

    def _kept(self, skipped: dict[str, str]) -> list[str]:
        return [path for path in (self.catalog.paths[row] for row in self.rows) if path not in skipped]

    def _copy(self, on_unreadable: str, skipped: dict[str, str]) -> Iterator[np.ndarray] | None:
        """The images out of the pack of another fold of the same development classes, if there is one."""
        for manifest_file in sorted(self.folder.glob("*.json")):
            found = self._open(manifest_file, on_unreadable)
            if found is not None:
                pixels, manifest = found
                skipped.update(manifest["skipped"])
                place = {path: index for index, path in enumerate(manifest["paths"])}
                return (pixels[place[path]] for path in self._kept(skipped))
        return None


def _write_array(file: Path, images: Iterable[np.ndarray], most: tuple[int, ...]) -> None:
    """An .npy file of as many images as come, at most most[0]; written in sequence, so a full disk is an error
    that Python reports (through a memory map it would kill the process)."""
    header = {"descr": "|u1", "fortran_order": False}
    count = 0
    with open(file, "wb") as handle:
        np.lib.format.write_array_header_1_0(handle, {**header, "shape": most})
        begin = handle.tell()
        for image in images:
            handle.write(image.tobytes())
            count += 1
        handle.seek(0)
        np.lib.format.write_array_header_1_0(handle, {**header, "shape": (count, *most[1:])})
        assert handle.tell() == begin, "NumPy pads its headers to one length"
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    if fcntl is None:
        raise DataError("machine.cache_dir needs POSIX file locks; leave it out to keep the images in memory")
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        yield


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _modified_ns(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return -1  # gone since it was listed; decoding will say so
