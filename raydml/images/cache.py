"""The images of each part of a data set: decoded once and kept, or decoded at each reading where they do not fit.

They are kept in a pack that all processes of a node and all folds share (see `pack.py`): one process writes it, the
others wait. Only files of the requested parts are opened, so nothing of the development classes can hold a test image.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from raydml.data.catalog import Catalog, DataError, Groups, listed
from raydml.data.datasets import images_without_files
from raydml.data.digests import ImageRecord, Sources, changed_rows, load_sources, read_sources, refuse_changed
from raydml.data.seal import TestKey
from raydml.data.splits import Split
from raydml.images.pack import (
    UNPACKED,
    HeaderSurvey,
    ImageFiles,
    OnChanged,
    Pack,
    clear_pack,
    open_pack,
    pack_in_memory,
    survey_headers,
    unreadable_of,
    write_pack,
)
from raydml.images.pixels import DecodedPixels, Header, Pixels, decode_in_order, decoded_bytes, packed
from raydml.images.preprocessing import Interpolation, Resize, Resizing, pixels_of

OnUnreadable = Literal["refuse", "skip"]
Found = TypeVar("Found")
Made = TypeVar("Made")
WAIT_MESSAGE_EVERY_S = 10.0
_RESERVE_BYTES = 2**20  # for the index and the manifest
_NUM_TIMED = 32
_NUM_SURVEYED = 256
_logger = logging.getLogger("raydml")


class Images(NamedTuple):
    """The images of one part.

    pixels: N of them. labels: (N,) int64 in 0..C-1, the classes of this part numbered anew in catalog order. paths: N.
    skipped: (path, reason) of each image left out. roles, groups: those of the catalog, or None where it has none.
    digests: (N, 16) uint8 of the files, see data/digests.py; None where no file was read for them. folder: of the
    cache that holds the pixels, or None.
    """

    pixels: Pixels
    labels: np.ndarray
    paths: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    roles: tuple[str, ...] | None = None
    digests: np.ndarray | None = None
    groups: Groups | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Storage:
    """How and where decoded images are kept.

    resize_px, resize, interpolation: as in `Preprocessing`. cache_dir: a folder on a disk of the node; None: each
    process keeps them in its own memory. max_bytes: the limit of all packs in cache_dir, or of one in memory; None:
    what the disk has free, or half of the free memory. on_unreadable: "refuse" raises for images without pixels,
    "skip" leaves them out and lists them. on_changed: "refuse" raises for files whose bytes have changed since they
    were packed in cache_dir, "accept" takes them as they are. record: of a study, with which the bytes are compared.
    """

    resize_px: int
    resize: Resize = "short_side"
    interpolation: Interpolation = "bilinear"
    cache_dir: Path | None = None
    max_bytes: int | None = None
    on_unreadable: OnUnreadable = "refuse"
    on_changed: OnChanged = "accept"
    record: ImageRecord | None = None

    @property
    def resizing(self) -> Resizing:
        return Resizing(self.resize_px, self.resize, self.interpolation)


class SpaceShortage(NamedTuple):
    """Why images are not kept. available: the space there is, in words; cure: how to get more."""

    survey: HeaderSurvey
    available: str
    cure: str


class _KeptImages(NamedTuple):
    """pixels: of the catalog's rows `rows`. skipped: path -> reason of the other requested rows. digests: of `rows`.
    folder: of the pack, where it is in the cache."""

    pixels: Pixels
    rows: np.ndarray
    skipped: dict[str, str]
    digests: np.ndarray | None = None
    folder: Path | None = None


def load_development(
    catalog: Catalog, split: Split, storage: Storage, *, original: bool = False
) -> tuple[Images, Images]:
    """Load the train and the val images; no file of a test class is opened.

    Both are rows of one pack of all development classes, for every fold. original: the train images are decoded at
    their full resolution at each reading, as the papers do; val as usual.

    Images that do not fit are decoded at each reading, with the same pixels, and a warning says so. Then "refuse" finds
    a file with a whole header and damaged pixels only when it is read, with the same error; "skip" decodes every file
    once beforehand.

    Raises DataError: unreadable images, every one with path and reason; a class that skipping leaves with fewer than
    two images; a cache that cannot be written.
    """
    rows = np.flatnonzero(np.isin(catalog.labels, [*split.train, *split.val]))
    if catalog.root is None:
        kept_val = _without_files(catalog, rows, storage.resizing)
        kept_train = _without_files(catalog, rows, None) if original else kept_val
    elif not original:
        kept_train = kept_val = _Selection(catalog, rows, storage).kept()
    elif storage.cache_dir is not None:
        kept_val = _Selection(catalog, rows, storage).kept()
        paths = [catalog.paths[row] for row in kept_val.rows]
        kept_train = kept_val._replace(pixels=DecodedPixels(catalog.root, paths, None))
    else:  # the memory of this process is not shared: keep val alone
        is_val = np.isin(catalog.labels[rows], split.val)
        train = _Selection(catalog, rows[~is_val], storage)
        kept_train = train.not_kept(train.files(), survey_headers(train.files()), None)
        kept_val = _Selection(catalog, rows[is_val], storage).kept() if is_val.any() else kept_train
    _warn_of_skipped(len(rows), kept_train.skipped | kept_val.skipped)
    return _part(catalog, split.train, kept_train), _part(catalog, split.val, kept_val)


def estimate_packs(catalog: Catalog, split: Split, storage: Storage) -> tuple[int, int]:
    """Return about how many bytes the decoded development images and the decoded test images take.

    The headers of some development images are read, evenly over the classes; no file of a test class is opened. Images
    without a folder (their catalog holds counts alone) are taken to be photographs of 4 : 3.
    """
    is_development = np.isin(catalog.labels, [*split.train, *split.val])
    rows = np.flatnonzero(is_development)
    if catalog.root is None:
        mean_bytes = float(decoded_bytes(Header(400, 300, 0), storage.resizing))
    else:
        some = rows[:: max(1, len(rows) // _NUM_SURVEYED)]
        survey = survey_headers(_Selection(catalog, some, storage).files())
        mean_bytes = survey.total_bytes() / max(1, len(some) - len(survey.unreadable))
    return round(len(rows) * mean_bytes), round((len(is_development) - len(rows)) * mean_bytes)


def load_test(catalog: Catalog, split: Split, storage: Storage, *, key: TestKey) -> Images:
    """Load the test images and spend the key, which comes from `TestReads.record`. Otherwise as `load_development`."""
    if not isinstance(key, TestKey):
        raise DataError(f"the test classes are sealed: load_test needs a TestKey from TestReads.record, got {key!r}")
    key.spend()
    rows = np.flatnonzero(np.isin(catalog.labels, split.test))
    if catalog.root is None:
        kept = _without_files(catalog, rows, storage.resizing)
    else:
        kept = _Selection(catalog, rows, storage).kept()
    _warn_of_skipped(len(rows), kept.skipped)
    return _part(catalog, split.test, kept)


def _warn_of_skipped(num_images: int, skipped: dict[str, str]) -> None:
    if skipped:
        reasons = listed((f"{path}: {reason}" for path, reason in skipped.items()), limit=20)
        _logger.warning(
            "warning: %d of %d images cannot be read and are left out: %s", len(skipped), num_images, reasons
        )


def _part(catalog: Catalog, classes: tuple[int, ...], kept: _KeptImages) -> Images:
    """Select the images of these classes."""
    places = np.flatnonzero(np.isin(catalog.labels[kept.rows], classes))
    rows = kept.rows[places]
    labels = np.searchsorted(np.sort(np.array(classes, dtype=np.int64)), catalog.labels[rows]).astype(np.int64)
    of_part = np.flatnonzero(np.isin(catalog.labels, classes)) if kept.skipped else np.empty(0, dtype=np.int64)
    left_out = [(path, kept.skipped[path]) for path in (catalog.paths[row] for row in of_part) if path in kept.skipped]
    roles = None if catalog.roles is None else tuple(catalog.roles[row] for row in rows)
    paths = tuple(catalog.paths[row] for row in rows)
    digests = None if kept.digests is None else kept.digests[places]
    groups = None if catalog.groups is None else catalog.groups.select(rows)
    return Images(kept.pixels.select(places), labels, paths, tuple(left_out), roles, digests, groups, kept.folder)


def _without_files(catalog: Catalog, rows: np.ndarray, resizing: Resizing | None) -> _KeptImages:
    drawn = images_without_files(catalog, rows)
    images = [pixels_of(Image.fromarray(image), resizing) for image in drawn]
    return _KeptImages(packed(np.stack(images)), rows, {})


@dataclass(frozen=True)
class _Selection:
    """Rows of a catalog that are loaded together, and their storage."""

    catalog: Catalog
    rows: np.ndarray
    storage: Storage

    def files(self) -> ImageFiles:
        catalog, rows = self.catalog, self.rows
        assert catalog.root is not None
        paths = tuple(catalog.paths[row] for row in rows)
        return ImageFiles(catalog.root, paths, self.storage.resizing, self.storage.on_changed)

    def kept(self) -> _KeptImages:
        """Resized images, from a pack if there is space for one."""
        files, storage = self.files(), self.storage
        found: Pack | SpaceShortage
        if storage.cache_dir is None:
            found = _in_memory(files, storage.max_bytes)
        else:
            with usable_cache(storage.cache_dir):
                found = open_or_write(files, storage.cache_dir, storage.max_bytes, self.refuse)
        if isinstance(found, SpaceShortage):
            _logger.warning("%s", _shortage_text(found, files))
            return self.not_kept(files, found.survey, files.resizing)
        self.refuse(found.skipped)
        self.compare(found.digests)
        left = self.left(found.skipped)
        folder = None if storage.cache_dir is None else files.folder(storage.cache_dir)
        return _KeptImages(found.pixels, left, found.skipped, found.digests[np.isin(self.rows, left)], folder)

    def not_kept(self, files: ImageFiles, survey: HeaderSurvey, resizing: Resizing | None) -> _KeptImages:
        """Images that are decoded at each reading."""
        self.refuse(survey.unreadable)
        digests = None
        if self.storage.cache_dir is not None or self.storage.record is not None:
            digests = self.sources_not_kept(files).digests
            self.compare(digests)
        skipped = unreadable_of(files) if self.storage.on_unreadable == "skip" else survey.unreadable
        self.refuse(skipped)
        left = self.left(skipped)
        pixels = DecodedPixels(files.root, [self.catalog.paths[row] for row in left], resizing)
        return _KeptImages(pixels, left, skipped, None if digests is None else digests[np.isin(self.rows, left)])

    def sources_not_kept(self, files: ImageFiles) -> Sources:
        """What files contain that are in no pack. In cache_dir is written what was read, so that it is read once."""
        if self.storage.cache_dir is None:
            return read_sources(files.root, files.paths)
        file = files.folder(self.storage.cache_dir) / UNPACKED
        before = None
        with suppress(OSError, ValueError, KeyError):  # not there, or damaged: all files are read again
            before, _ = load_sources(file, len(files.paths))
        now = read_sources(files.root, files.paths, before)
        if before is not None and files.on_changed == "refuse":
            rows = changed_rows(before.digests, now.digests)
            refuse_changed(files.root, files.paths, rows, "they were first read")
        if before is None or not np.array_equal(now.stamps, before.stamps):
            with suppress(OSError):  # no room, or read-only: the same work again at the next start
                now.save(file)
        return now

    def compare(self, digests: np.ndarray) -> None:
        """Raise DataError for images with other bytes than those that the study has recorded. digests: one a row."""
        if self.storage.record is not None:
            self.storage.record.refuse_changed(self.catalog, self.rows, digests)

    def left(self, skipped: dict[str, str]) -> np.ndarray:
        """The rows whose images are not skipped."""
        return self.rows[[self.catalog.paths[row] not in skipped for row in self.rows]] if skipped else self.rows

    def refuse(self, skipped: dict[str, str]) -> None:
        """Raise DataError if images without pixels may not be skipped, or if that leaves a class without an image."""
        if skipped and self.storage.on_unreadable == "refuse":
            lines = "\n".join(f"  {path}: {reason}" for path, reason in skipped.items())
            raise DataError(
                f"{len(skipped)} of {len(self.rows)} images under {self.catalog.root} cannot be read:\n{lines}\n"
                "Repair or remove them, or leave them out: sweep ... --set machine.on_unreadable=skip"
            )
        if skipped:
            labels, class_names = self.catalog.labels, self.catalog.class_names
            gone = np.setdiff1d(labels[self.rows], labels[self.left(skipped)])
            if len(gone):
                names = [class_names[label] for label in gone]
                raise DataError(
                    f"{len(gone)} of {len(class_names)} classes have no image left after skipping unreadable ones: "
                    f"{listed(names)}. Cure: repair their images, or remove these classes"
                )


def open_or_write(
    files: ImageFiles, cache_dir: Path, max_bytes: int | None, refuse: Callable[[dict[str, str]], None]
) -> Pack | SpaceShortage:
    """Open the pack of these files, or write it; of several processes one decodes and the others wait.

    A killed writer is followed by one of the waiting processes. max_bytes: the limit of all packs in cache_dir; those
    opened longest ago are removed for a new one, and processes that have them open keep them. None: what the disk has
    free. refuse: a function of path -> reason of the files without pixels; it raises if there must be no pack then.

    Raises OSError: the folder cannot be read, made or written to. A whole pack may be in a read-only folder.
    """
    folder = files.folder(cache_dir)

    def made() -> Pack | SpaceShortage:
        survey = survey_headers(files)
        if shortage := make_room(folder, survey.total_bytes(), max_bytes):
            return SpaceShortage(survey, *shortage)
        write_pack(folder, files, survey, refuse)
        pack = open_pack(folder, files, just_written=True)
        assert pack is not None, "a pack just written is whole and current"
        return pack

    def opened(report_damage: bool) -> Pack | None:
        return open_pack(folder, files, report_damage=report_damage)

    return open_or_make(folder, opened, made, "decodes these images")


@contextmanager
def usable_cache(cache_dir: Path) -> Iterator[None]:
    """Turn an OSError of a block that uses the cache into a DataError with the cure."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"machine.cache_dir = {str(cache_dir)!r} cannot be used: {error}; give a writable folder with enough space "
            "on a local disk"
        ) from error


def open_or_make(
    folder: Path, opened: Callable[[bool], Found | None], made: Callable[[], Made], work: str
) -> Found | Made:
    """Open what a folder of the cache holds, or make it; of several processes one makes it and the others wait.

    opened: returns what is there, None for nothing; it is told whether to log a warning of damage. made: makes it in
    the empty folder and returns it, or what else the caller wants where there is no room. work: what the process that
    makes it does, in words. Raises what the two raise, and OSError for a folder that cannot be made.
    """
    found = opened(False)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        _acquire(lock, folder, work)
        try:
            found = opened(True)  # another process may have made it meanwhile
            if found is None:
                clear_pack(folder)
                return made()
        finally:
            lock.release()
    with suppress(OSError):  # a read-only folder: nothing there is ever removed, so its last use does not matter
        os.utime(folder / "manifest.json")
    return found


def _acquire(lock: FileLock, folder: Path, work: str) -> None:
    """Wait for the lock of a folder, with a message every few seconds. It ends with its holder, also by a kill.

    work: what the holder does, in words.
    """
    while True:
        try:
            lock.acquire(timeout=WAIT_MESSAGE_EVERY_S)
            return
        except Timeout:
            files = (file for kind in ("*.pixels", "*.npy") for file in folder.glob(kind))
            num_bytes = sum(file.stat().st_size for file in files)
            _logger.info("waiting: another process %s (%s so far)", work, _gib(num_bytes))


def make_room(
    new: Path, num_bytes: int, max_bytes: int | None, in_use: Collection[Path] = ()
) -> tuple[str, str] | None:
    """Make room for a new folder of the cache; return what is available and the cure where there is not enough.

    max_bytes: of all folders together; those opened longest ago are removed. None: what the disk has free. in_use:
    folders that are not removed.
    """
    cache_dir = new.parent
    if max_bytes is not None:
        used = sum(map(_removable_bytes, in_use))
        if num_bytes + used > max_bytes:
            beside = f", of which the images take {_gib(used)}" if used else ""
            return f"machine.max_cache_gib allows {_gib(max_bytes)}{beside}", "raise machine.max_cache_gib"
        _remove_oldest(cache_dir, {new, *in_use}, max_bytes - num_bytes - used)
    free_bytes = shutil.disk_usage(cache_dir).free
    if num_bytes + _RESERVE_BYTES > free_bytes:
        available = f"machine.cache_dir = {str(cache_dir)!r} has {_gib(free_bytes)} free"
        return available, "free space there or name another folder"
    return None


def _remove_oldest(cache_dir: Path, kept: Collection[Path], allowed_bytes: int) -> None:
    """Remove packs until those that are not `kept` take at most allowed_bytes, those opened longest ago first.

    Kept features count as packs, and so does what a killed writer left, which goes first. A folder that is being
    written is left alone.
    """
    folders = [folder for kind in ("images-*", "features-*") for folder in cache_dir.glob(kind) if folder not in kept]
    num_bytes = {folder: _removable_bytes(folder) for folder in folders}
    for folder in sorted(folders, key=_last_use):
        if sum(num_bytes.values()) <= allowed_bytes:
            return
        if num_bytes[folder]:
            with suppress(Timeout), FileLock(folder / "lock", timeout=0):
                _logger.info("%s: removed, its %s are needed for others", folder, _gib(num_bytes.pop(folder)))
                clear_pack(folder)


def _last_use(folder: Path) -> int:
    """When a folder of the cache was last opened, in ns; 0 where its writer was killed."""
    try:
        return (folder / "manifest.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _removable_bytes(folder: Path) -> int:
    sizes = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has removed it
            sizes += 0 if file.name in ("lock", UNPACKED) else file.stat().st_size
    return sizes


def _shortage_text(found: SpaceShortage, files: ImageFiles) -> str:
    """The missing space, its cost (timed on a few images) and the cure."""
    num_images = len(files.paths)
    few = [files.paths[row] for row in range(0, num_images, -(-num_images // _NUM_TIMED))]
    begin_s = time.monotonic()
    list(decode_in_order(files.root, few, files.resizing))
    all_s = (time.monotonic() - begin_s) / len(few) * num_images
    return (
        f"{num_images:,} images at data.resize_px = {files.resizing.resize_px} need "
        f"{_gib(found.survey.total_bytes())}, but {found.available}. They are not kept: every trial decodes each image "
        f"again at each use, about {all_s:,.0f} s for all of them if no other process uses the processors. "
        f"Cure: {found.cure}, or lower data.resize_px"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3f} GiB"


def _in_memory(files: ImageFiles, max_bytes: int | None) -> Pack | SpaceShortage:
    survey = survey_headers(files)
    if shortage := room_in_memory(survey.total_bytes(), max_bytes):
        return SpaceShortage(survey, *shortage)
    return pack_in_memory(files, survey)


def room_in_memory(num_bytes: int, max_bytes: int | None) -> tuple[str, str] | None:
    """Return what is available in memory and the cure where it is not enough, as `make_room` does for the cache."""
    allowed_bytes = free_memory_bytes() // 2 if max_bytes is None else max_bytes
    if num_bytes <= allowed_bytes:
        return None
    limit = "half of the free memory is" if max_bytes is None else "machine.max_cache_gib allows"
    return f"{limit} {_gib(allowed_bytes)}", "set machine.cache_dir to a folder on a local disk"


def free_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory of the machine (MemAvailable on Linux, else free pages), at most what the container's limit leaves.

    proc, cgroup: the kernel's folders; version 2 of control groups only.
    """
    free_bytes = [_available_bytes(proc)]
    limit, used = (_text_of(cgroup / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():  # "max" means no limit
        free_bytes.append(max(0, int(limit) - int(used)))
    return min(free_bytes)


def _available_bytes(proc: Path) -> int:
    for line in _text_of(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
