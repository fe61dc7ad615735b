"""The images of each part of a data set: decoded once and kept, or decoded anew each time where they do not fit.

Where they are kept they lie in a pack that all processes of a node and all folds share (see `pack.py`). Only files of
the parts that are asked for are opened: nothing of the development classes can hold a test image.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from raydml.data.catalog import Catalog, DataError, listed, refuse_small_classes
from raydml.data.datasets import digit_images
from raydml.data.seal import TestKey
from raydml.data.splits import Split
from raydml.images.decoded_pixels import DecodedPixels, decode_in_order
from raydml.images.decoding import Resizing, scaled
from raydml.images.free_memory import free_memory_bytes
from raydml.images.pack import Pack, Source
from raydml.images.packing import Needs, pack_in_memory, survey, unreadable_of
from raydml.images.pixels import Pixels, packed
from raydml.images.preprocessing import Interpolation, Resize, upright_rgb
from raydml.images.shared_pack import NoRoom, gib, open_or_write

OnUnreadable = Literal["refuse", "skip"]
_logger = logging.getLogger("raydml")
_NUM_TIMED = 32


class Images(NamedTuple):
    """The images of one part.

    pixels: N of them. labels: (N,) int64 in 0..C-1, the classes of this part numbered anew in catalog order. paths: N.
    skipped: (path, reason) of each image left out. roles: N of those of the catalog, or None where it has none.
    """

    pixels: Pixels
    labels: np.ndarray
    paths: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    roles: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Storage:
    """How and where decoded images are kept.

    resize_px, resize, interpolation: as in `Preprocessing`. cache_dir: a folder on a disk of the node; None: each
    process keeps them in its own memory. max_bytes: what one pack may take; None: what the disk has free, or half of
    the free memory. on_unreadable: "refuse" raises for images without pixels, "skip" leaves them out and lists them.

    Raises DataError for settings that cannot be.
    """

    resize_px: int
    resize: Resize = "short_side"
    interpolation: Interpolation = "bilinear"
    cache_dir: Path | None = None
    max_bytes: int | None = None
    on_unreadable: OnUnreadable = "refuse"

    def __post_init__(self) -> None:
        for key, value, choices in (
            ("data.resize", self.resize, get_args(Resize)),
            ("data.interpolation", self.interpolation, get_args(Interpolation)),
            ("machine.on_unreadable", self.on_unreadable, get_args(OnUnreadable)),
        ):
            if value not in choices:
                raise DataError(f"{key} = {value!r}; choices: {', '.join(choices)}")
        if self.resize_px < 1:
            raise DataError(f"data.resize_px = {self.resize_px} must be at least 1 pixel")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise DataError(f"machine.max_cache_gib: {self.max_bytes} bytes hold no image; leave it out for no limit")

    @property
    def resizing(self) -> Resizing:
        return Resizing(self.resize_px, self.resize, self.interpolation)


class _Kept(NamedTuple):
    """pixels: of the catalog's rows `rows`. skipped: path -> reason of the others that were asked for."""

    pixels: Pixels
    rows: np.ndarray
    skipped: dict[str, str]


def load_development(
    catalog: Catalog, split: Split, storage: Storage, *, original: bool = False
) -> tuple[Images, Images]:
    """The train and the val images; no file of a test class is opened.

    Both are rows of one pack of all development classes, whichever fold is val. original: the train images are
    decoded at their full resolution each time they are read, as the papers do; val as usual.

    Images that do not fit where they are to be kept are decoded anew each time, with the same pixels; a warning says
    so. Then "refuse" finds a file whose header is whole and whose pixels are not only when it is read, with the same
    error; "skip" decodes every file once beforehand.

    Raises DataError: unreadable images, every one with path and reason; a class that skipping leaves with fewer than
    two images; a cache that cannot be written.
    """
    rows = np.flatnonzero(np.isin(catalog.labels, [*split.train, *split.val]))
    if catalog.root is None:
        kept_val = _digits(rows, storage.resizing)
        kept_train = _digits(rows, None) if original else kept_val
    elif not original:
        kept_train = kept_val = _stored(catalog, rows, storage)
    elif storage.cache_dir is not None:
        kept_val = _stored(catalog, rows, storage)
        paths = [catalog.paths[row] for row in kept_val.rows]
        kept_train = kept_val._replace(pixels=DecodedPixels(catalog.root, paths, None))
    else:  # nobody shares what this process keeps in its memory: val alone
        is_val = np.isin(catalog.labels[rows], split.val)
        kept_val = _stored(catalog, rows[is_val], storage)
        train = _source(catalog, rows[~is_val], storage)
        kept_train = _decoded(catalog, rows[~is_val], train, survey(train), None, storage.on_unreadable)
    _tell_skipped(len(rows), kept_train.skipped | kept_val.skipped)
    return _part(catalog, split.train, kept_train), _part(catalog, split.val, kept_val)


def load_test(catalog: Catalog, split: Split, storage: Storage, *, key: TestKey) -> Images:
    """The test images, for a key from `TestReads.record`, which this spends. Otherwise as `load_development`."""
    if not isinstance(key, TestKey):
        raise DataError(f"the test classes are sealed: load_test needs a TestKey from TestReads.record, got {key!r}")
    key.spend()
    rows = np.flatnonzero(np.isin(catalog.labels, split.test))
    kept = _digits(rows, storage.resizing) if catalog.root is None else _stored(catalog, rows, storage)
    _tell_skipped(len(rows), kept.skipped)
    return _part(catalog, split.test, kept)


def _tell_skipped(num_images: int, skipped: dict[str, str]) -> None:
    if skipped:
        reasons = listed((f"{path}: {reason}" for path, reason in skipped.items()), limit=20)
        _logger.warning(
            "warning: %d of %d images cannot be read and are left out: %s", len(skipped), num_images, reasons
        )


def _part(catalog: Catalog, classes: tuple[int, ...], kept: _Kept) -> Images:
    """Those of what is kept that belong to these classes."""
    places = np.flatnonzero(np.isin(catalog.labels[kept.rows], classes))
    rows = kept.rows[places]
    labels = np.searchsorted(np.sort(np.array(classes, dtype=np.int64)), catalog.labels[rows]).astype(np.int64)
    of_part = np.flatnonzero(np.isin(catalog.labels, classes)) if kept.skipped else np.empty(0, dtype=np.int64)
    left_out = [(path, kept.skipped[path]) for path in (catalog.paths[row] for row in of_part) if path in kept.skipped]
    roles = None if catalog.roles is None else tuple(catalog.roles[row] for row in rows)
    paths = tuple(catalog.paths[row] for row in rows)
    return Images(kept.pixels.select(places), labels, paths, tuple(left_out), roles)


def _digits(rows: np.ndarray, resizing: Resizing | None) -> _Kept:
    images = [scaled(upright_rgb(Image.fromarray(digit)), resizing) for digit in digit_images()[0][rows]]
    return _Kept(packed(np.stack([np.asarray(image) for image in images])), rows, {})


def _stored(catalog: Catalog, rows: np.ndarray, storage: Storage) -> _Kept:
    """These rows of the catalog scaled, out of a pack if there is room for one."""
    source = _source(catalog, rows, storage)
    found: Pack | NoRoom
    if storage.cache_dir is None:
        found = _in_memory(source, storage.max_bytes)
    else:
        try:
            found = open_or_write(
                source,
                storage.cache_dir,
                storage.max_bytes,
                lambda skipped: _refuse_unreadable(catalog, rows, skipped, storage.on_unreadable),
            )
        except OSError as error:
            raise DataError(
                f"machine.cache_dir = {str(storage.cache_dir)!r} cannot be used: {error}; give a writable "
                "folder with enough space on a local disk"
            ) from error
    if isinstance(found, NoRoom):
        _logger.warning("%s", _without_room(found, source))
        return _decoded(catalog, rows, source, found.needs, source.resizing, storage.on_unreadable)
    _refuse_unreadable(catalog, rows, found.skipped, storage.on_unreadable)
    return _Kept(found.pixels, _left(catalog, rows, found.skipped), found.skipped)


def _in_memory(source: Source, max_bytes: int | None) -> Pack | NoRoom:
    needs = survey(source)
    allowed_bytes = free_memory_bytes() // 2 if max_bytes is None else max_bytes
    if needs.total_bytes() <= allowed_bytes:
        return pack_in_memory(source, needs)
    name = "half of the free memory is" if max_bytes is None else "machine.max_cache_gib allows"
    return NoRoom(needs, f"{name} {gib(allowed_bytes)}", "set machine.cache_dir to a folder on a local disk")


def _without_room(found: NoRoom, source: Source) -> str:
    """What is missing, what it costs (timed on a few images) and the cure."""
    num_images = len(source.paths)
    few = [source.paths[row] for row in range(0, num_images, -(-num_images // _NUM_TIMED))]
    begin_s = time.monotonic()
    list(decode_in_order(source.root, few, source.resizing))
    all_s = (time.monotonic() - begin_s) / len(few) * num_images
    return (
        f"{num_images:,} images at data.resize_px = {source.resizing.resize_px} need "
        f"{gib(found.needs.total_bytes())}, but {found.room}. They are not kept: every trial decodes each image again "
        f"every time it needs it, about {all_s:,.0f} s for all of them where nobody else uses the processors. "
        f"Cure: {found.cure}, or lower data.resize_px"
    )


def _decoded(
    catalog: Catalog, rows: np.ndarray, source: Source, needs: Needs, resizing: Resizing | None, on_unreadable: str
) -> _Kept:
    """These rows of the catalog, decoded each time they are read."""
    _refuse_unreadable(catalog, rows, needs.unreadable, on_unreadable)
    skipped = unreadable_of(source) if on_unreadable == "skip" else needs.unreadable
    _refuse_unreadable(catalog, rows, skipped, on_unreadable)
    left = _left(catalog, rows, skipped)
    return _Kept(DecodedPixels(source.root, [catalog.paths[row] for row in left], resizing), left, skipped)


def _source(catalog: Catalog, rows: np.ndarray, storage: Storage) -> Source:
    assert catalog.root is not None
    paths = tuple(catalog.paths[row] for row in rows)
    return Source(catalog.root, paths, catalog.modified_ns[rows], catalog.content, storage.resizing)


def _left(catalog: Catalog, rows: np.ndarray, skipped: dict[str, str]) -> np.ndarray:
    """The rows whose images are not skipped."""
    return rows[[catalog.paths[row] not in skipped for row in rows]] if skipped else rows


def _refuse_unreadable(catalog: Catalog, rows: np.ndarray, skipped: dict[str, str], on_unreadable: str) -> None:
    if skipped and on_unreadable == "refuse":
        lines = "\n".join(f"  {path}: {reason}" for path, reason in skipped.items())
        raise DataError(
            f"{len(skipped)} of {len(rows)} images under {catalog.root} cannot be read:\n{lines}\n"
            "Repair or remove them, or leave them out with machine.on_unreadable: skip"
        )
    if skipped:
        num_classes = len(catalog.class_names)
        before = np.bincount(catalog.labels[rows], minlength=num_classes)
        after = np.bincount(catalog.labels[_left(catalog, rows, skipped)], minlength=num_classes)
        shrunk = np.flatnonzero(after < before)  # benchmarks have classes of one image, which is no harm done here
        names = [catalog.class_names[label] for label in shrunk]
        refuse_small_classes(names, after[shrunk], " left after skipping unreadable ones")
