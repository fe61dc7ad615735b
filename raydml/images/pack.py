"""A pack: the decoded images of many files one after the other in one file, memory-mapped by every process of a node.

    <cache_dir>/images-<key>/manifest.json      written last: a folder without it holds no pack
                             <token>.index.npy  (N, 3) int64: height, width, CRC-32 of the pixels
                             <token>.sources.npz  of the files: see data/digests.py; and the stamp of .pixels
                             <token>.pixels     uint8 (H, W, 3) each, every image beginning at a multiple of 64 bytes
                             lock               held by the process that writes

The key is a hash of the root, the files in their order, the resizing and the format. It does not depend on the split:
every fold selects rows of the same pack. A pack is current while its files have the bytes that it was made from. Only
files that were written to since they were read are read again. Likewise the pack: while nothing has written to it, its
images are compared with their sums when a process first reads them, and all of them at its opening otherwise. Its size
is known from the headers of the files, before the first pixel is decoded.
"""

import hashlib
import json
import logging
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from raydml.data.catalog import DataError
from raydml.data.digests import (
    SourceReader,
    Sources,
    changed_rows,
    load_sources,
    read_sources,
    refuse_changed,
    stamp_of_file,
)
from raydml.images.pixels import (
    PackedPixels,
    UnreadableImage,
    decode,
    decode_in_order,
    decoded_bytes,
    open_regular,
    read_headers,
)
from raydml.images.preprocessing import Resizing
from raydml.ops.files import flush_to_disk, write_whole
from raydml.ops.progress import with_progress

_FORMAT = 3  # raise it when an image is turned into pixels in another way: packs of other formats are not opened
_ALIGNMENT_BYTES = 64
Bytes = TypeVar("Bytes", int, np.ndarray)
_DAMAGED = (FileNotFoundError, ValueError, KeyError, TypeError, EOFError, IndexError, RecursionError)
UNPACKED = "unpacked.npz"  # in place of a pack that finds no space: what the files contained
OnChanged = Literal["refuse", "accept"]
_logger = logging.getLogger("raydml")
_checked: dict[Path, np.ndarray] = {}  # pixels file -> which of its images this process has compared with their sums


class Pack(NamedTuple):
    """pixels: of the files that could be read, in the order of the paths. skipped: path -> reason of the others.
    digests: (N, 16) uint8, of all files (see data/digests.py)."""

    pixels: PackedPixels
    skipped: dict[str, str]
    digests: np.ndarray


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The files that a pack is made from, and how their images are resized.

    root, paths: the files, N of them. on_changed: "refuse" raises for files whose bytes have changed since a pack was
    made of them; "accept" takes them as they are.
    """

    root: Path
    paths: tuple[str, ...]
    resizing: Resizing
    on_changed: OnChanged = "accept"

    def folder(self, cache_dir: Path) -> Path:
        """The folder of the pack of these files."""
        return cache_dir / f"images-{_hash_of([_FORMAT, str(self.root.resolve()), self.resizing, self.paths])}"

    def sources_now(self, before: Sources) -> Sources:
        """What the files contain that had pixels before; zeros for the others.

        Raises DataError for other bytes than before, unless they are accepted, and for files that are not there.
        """
        known = np.flatnonzero(before.digests.any(axis=1))
        paths = [self.paths[row] for row in known]
        now = Sources(np.zeros_like(before.stamps), np.zeros_like(before.digests))
        now.stamps[known], now.digests[known] = read_sources(
            self.root, paths, Sources(before.stamps[known], before.digests[known])
        )
        if self.on_changed == "refuse":
            rows = changed_rows(before.digests, now.digests)
            refuse_changed(self.root, self.paths, rows, "they were first decoded")
        return now


class HeaderSurvey(NamedTuple):
    """What the headers of N files contain. decoded_bytes: (N,) int64, of the pixels of each after resizing, 0 for an
    unreadable header. unreadable: path -> reason."""

    decoded_bytes: np.ndarray
    unreadable: dict[str, str]

    def total_bytes(self) -> int:
        """Bytes of a pack of these images, if all that have a header can be decoded."""
        return int(_aligned(self.decoded_bytes).sum())


def survey_headers(files: ImageFiles) -> HeaderSurvey:
    """Read the header of every file."""
    num_files = len(files.paths)
    pixel_bytes = np.zeros(num_files, dtype=np.int64)
    unreadable: dict[str, str] = {}
    headers = with_progress("reading headers", read_headers(files.root, files.paths), num_files, "images")
    for number, header in enumerate(headers):
        if isinstance(header, UnreadableImage):
            unreadable[header.path] = header.reason
        else:
            pixel_bytes[number] = decoded_bytes(header, files.resizing)
    return HeaderSurvey(pixel_bytes, unreadable)


def unreadable_of(files: ImageFiles) -> dict[str, str]:
    """Decode every file and keep nothing: path -> reason of those without pixels."""
    images = decode_in_order(files.root, files.paths, files.resizing)
    checked = with_progress("checking images", images, len(files.paths), "images")
    return {image.path: image.reason for image in checked if isinstance(image, UnreadableImage)}


def open_pack(
    folder: Path, files: ImageFiles, *, just_written: bool = False, report_damage: bool = False
) -> Pack | None:
    """Open the pack of these files, or return None if there is no whole and current one.

    Image files are read in two cases only: those that were written to since they were read, and those that had no
    pixels (a failure of a disk or a missing permission may have passed). None is looked at where the pack was just
    written. report_damage: log a warning about a pack that is damaged.

    Raises DataError: see `ImageFiles.sources_now`.
    """
    if not (folder / "manifest.json").exists():
        return None
    try:
        manifest = _read_manifest(folder)
        if "sources" not in manifest:  # of an older version, without sums
            return None
        skipped = dict(manifest["skipped"])
        index = _read_index(folder, manifest)
        sources, more = load_sources(folder / manifest["sources"], len(files.paths))
        file = folder / manifest["pixels"]
        offsets, num_bytes = _offsets_of(index[:, :2])
        if file.stat().st_size != num_bytes or len(index) != sum(path not in skipped for path in files.paths):
            raise ValueError("its size has changed")
        flat = np.memmap(file, dtype=np.uint8, mode="r") if num_bytes else np.empty(0, dtype=np.uint8)
        stamp = stamp_of_file(file)
    except _DAMAGED as error:
        if report_damage:
            _warn_of_damage(folder, str(error))
        return None
    now = sources if just_written else files.sources_now(sources)
    if not np.array_equal(now.digests, sources.digests):
        return None
    if not just_written and any(_is_readable(files, path) for path in skipped):
        return None
    # As a plain array over the same pages: each slice of an np.memmap does work of its own.
    pixels = PackedPixels(np.asarray(flat), offsets, index[:, :2].astype(np.int32))
    sums = _PixelSums(folder, files, [path for path in files.paths if path not in skipped], offsets, index[:, 2], file)
    if untouched := bool((stamp == more.get("pack", 0)).all()):
        pixels.check = sums.checked
    elif num_bad := sums.num_bad(pixels):
        if report_damage:
            _warn_of_damage(folder, f"{num_bad} of its {len(index)} images have other pixels")
        return None
    if not untouched or not np.array_equal(now.stamps, sources.stamps):
        with suppress(OSError):  # a read-only folder: the same work again at the next opening
            now.save(folder / manifest["sources"], pack=stamp)
    return Pack(pixels, skipped, now.digests)


def _warn_of_damage(folder: Path, reason: str) -> None:
    _logger.warning("warning: the cached images in %s are damaged (%s): they are decoded anew", folder, reason)


def _read_manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["format"] != _FORMAT or ("sources" in manifest and manifest.pop("sum") != _hash_of(manifest)):
        raise ValueError("its manifest has changed")
    return dict(manifest)


def _read_index(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    content = (folder / manifest["index"]).read_bytes()
    if zlib.crc32(content) != manifest["index_crc32"]:
        raise ValueError("its index has changed")
    return np.asarray(np.load(BytesIO(content)))


class _PixelSums:
    """The sums of a pack's images; each image is compared with its own when this process first reads it."""

    def __init__(
        self, folder: Path, files: ImageFiles, paths: list[str], offsets: np.ndarray, sums: np.ndarray, file: Path
    ) -> None:
        self._folder, self._files, self._paths, self._offsets, self._sums = folder, files, paths, offsets, sums
        self._reported: set[int] = set()
        self._done = _checked.setdefault(file, np.zeros(len(sums), dtype=bool))

    def num_bad(self, pixels: PackedPixels) -> int:
        """Compare all images; return how many differ."""
        for row, total in enumerate(self._sums):
            (image,) = pixels.read([row])
            self._done[row] = zlib.crc32(image.data) == total
        return int((~self._done).sum())

    def checked(self, offset: int, image: np.ndarray) -> np.ndarray:
        """Return an image of the pack; one that differs from its sum is decoded again, and the pack is given up."""
        row = int(np.searchsorted(self._offsets, offset))
        if self._done[row]:
            return image
        if zlib.crc32(image.data) == self._sums[row]:
            self._done[row] = True
            return image
        path = self._paths[row]
        if row not in self._reported:
            self._reported.add(row)
            _logger.warning(
                "warning: %s is damaged in the cached images of %s: its file is decoded at each reading, and all of "
                "them are decoded anew at the next start",
                path,
                self._folder,
            )
        with suppress(OSError):
            (self._folder / "manifest.json").unlink(missing_ok=True)
        right = decode(self._files.root, path, self._files.resizing)
        if zlib.crc32(right.data) != self._sums[row]:
            raise DataError(
                f"{path} is damaged in the cached images of {self._folder}, and the file under {self._files.root} has "
                "changed since it was decoded. Cure: restore the file"
            )
        return right


def pack_in_memory(files: ImageFiles, survey: HeaderSurvey) -> Pack:
    """Decode all files into memory."""
    reader = SourceReader(open_regular)
    flat = np.empty(survey.total_bytes(), dtype=np.uint8)
    skipped: dict[str, str] = {}
    sizes: list[tuple[int, int]] = []
    begin = 0
    for image in _decoded(files, survey, skipped, reader):
        flat[begin : begin + image.size] = image.reshape(-1)
        sizes.append(image.shape[:2])
        begin += _aligned(image.size)
    height_width = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    pixels = PackedPixels(flat, _offsets_of(height_width)[0], height_width.astype(np.int32))
    return Pack(pixels, skipped, _sources_read(reader, files, skipped).digests)


def write_pack(folder: Path, files: ImageFiles, survey: HeaderSurvey, refuse: Callable[[dict[str, str]], None]) -> None:
    """Decode all files into a pack in this folder, in place of any other; the caller holds its lock.

    refuse: a function of path -> reason of the files without pixels; it raises if there must be no pack then.
    Raises OSError: the disk is full, or the like. After an exception nothing of the pack is left.
    """
    token = uuid.uuid4().hex[:8]
    index_file, pixels_file = folder / f"{token}.index.npy", folder / f"{token}.pixels"
    sources_file, reader = folder / f"{token}.sources.npz", SourceReader(open_regular)
    skipped: dict[str, str] = {}
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "index": index_file.name,
        "pixels": pixels_file.name,
        "sources": sources_file.name,
        "root": str(files.root),  # this and the next two: for a person who looks into the folder
        "num_files": len(files.paths),
        "resizing": files.resizing._asdict(),
    }
    try:
        index = _write_pixels(pixels_file, _decoded(files, survey, skipped, reader))
        refuse(skipped)
        np.save(index_file, index)
        flush_to_disk(index_file)
        sources = _sources_read(reader, files, skipped)
        sources.save(sources_file, pack=stamp_of_file(pixels_file))
        manifest |= {"index_crc32": zlib.crc32(index_file.read_bytes()), "skipped": sorted(skipped.items())}
        text = json.dumps({**manifest, "sum": _hash_of(manifest)}, indent=1)
        write_whole(folder / "manifest.json", text, fsync=True)
        (folder / UNPACKED).unlink(missing_ok=True)
    except BaseException:
        clear_pack(folder)
        raise


def _sources_read(reader: SourceReader, files: ImageFiles, skipped: dict[str, str]) -> Sources:
    """What the files contained that gave pixels; zeros for the others."""
    sources = reader.sources(files.root, files.paths)
    without = [path in skipped for path in files.paths]
    sources.stamps[without], sources.digests[without] = 0, 0
    return sources


def clear_pack(folder: Path) -> None:
    """Remove a stale pack and what killed writers left; the manifest goes first. An open pack stays readable."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.name not in ("lock", UNPACKED):
            file.unlink(missing_ok=True)


def _write_pixels(file: Path, images: Iterator[np.ndarray]) -> np.ndarray:
    """Write the images one after the other; return (N, 3) int64: height, width, CRC-32 of the pixels.

    Not through a memory map: there a full disk would kill the process instead of raising OSError.
    """
    rows: list[tuple[int, int, int]] = []
    with open(file, "wb") as handle:
        for image in images:
            handle.write(image.data)
            handle.write(bytes(_aligned(image.size) - image.size))
            rows.append((*image.shape[:2], zlib.crc32(image.data)))
    flush_to_disk(file)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _decoded(
    files: ImageFiles, survey: HeaderSurvey, skipped: dict[str, str], reader: SourceReader
) -> Iterator[np.ndarray]:
    """The pixels of each readable image in order; the others are entered in `skipped`."""
    num_files, begin_s = len(files.paths), time.monotonic()
    decoded = decode_in_order(files.root, files.paths, files.resizing, reader.open)
    images = with_progress("decoding", decoded, num_files, "images")
    for number, image in enumerate(images):
        if isinstance(image, UnreadableImage):
            skipped[image.path] = image.reason
        elif image.size != survey.decoded_bytes[number]:
            # The file was written to since its header was read, and another size was reserved for its image.
            skipped[files.paths[number]] = "the file changed while it was read"
        else:
            yield image
    seconds = max(time.monotonic() - begin_s, 1e-9)
    _logger.info("decoded %s images once, in %.1f s (%.0f/s)", f"{num_files:,}", seconds, num_files / seconds)


def _aligned(num_bytes: Bytes) -> Bytes:
    """The space that images of this many bytes take up in a pack."""
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _offsets_of(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """sizes: (N, 2) int64, height and width -> (N,) int64 where each image begins, and the bytes of all."""
    num_bytes = _aligned(sizes.prod(axis=1) * 3)
    ends = np.cumsum(num_bytes, dtype=np.int64)
    return ends - num_bytes, int(ends[-1]) if len(ends) else 0


def _is_readable(files: ImageFiles, path: str) -> bool:
    try:
        decode(files.root, path, files.resizing)
    except UnreadableImage:
        return False
    return True


def _hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
