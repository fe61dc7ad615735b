"""A pack: the decoded images of many files one after the other in one file, memory-mapped by every process of a node.

    <cache_dir>/images-<key>/manifest.json      written last: a folder without it holds no pack
                             <token>.index.npy  (N, 3) int64: height, width, bytes of the source file
                             <token>.pixels     uint8 (H, W, 3) each, every image beginning at a multiple of 64 bytes
                             lock               held by the process that writes

The key is a hash of the root, the files in their order, the resizing and the format. It does not depend on the split:
every fold selects rows of the same pack. A pack is current while the files have the times and sizes that it was made
from. Its bytes carry no checksum: that would read the whole pack at each start. Its size is known from the headers of
the files, before the first pixel is decoded.
"""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from raydml.images.pixels import PackedPixels, UnreadableImage, decode, decode_in_order, decoded_bytes, read_headers
from raydml.images.preprocessing import Resizing
from raydml.ops.files import flush_to_disk, write_whole
from raydml.ops.progress import with_progress

_FORMAT = 2  # raise it when an image is turned into pixels in another way: packs of other formats are not opened
_ALIGNMENT_BYTES = 64
Bytes = TypeVar("Bytes", int, np.ndarray)
_DAMAGED = (FileNotFoundError, ValueError, KeyError, TypeError, EOFError, IndexError)
_logger = logging.getLogger("raydml")


class Pack(NamedTuple):
    """pixels: of the files that could be read, in the order of the paths. skipped: path -> reason of the others."""

    pixels: PackedPixels
    skipped: dict[str, str]


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The files that a pack is made from, and how their images are resized.

    root, paths: the files, N of them. modified_ns: (N,) int64, their times as listed. content: a hash over (among
    others) their sizes as listed.
    """

    root: Path
    paths: tuple[str, ...]
    modified_ns: np.ndarray
    content: str
    resizing: Resizing

    def folder(self, cache_dir: Path) -> Path:
        """The folder of the pack of these files."""
        return cache_dir / f"images-{_hash_of([_FORMAT, str(self.root.resolve()), self.resizing, self.paths])}"

    def modified(self) -> str:
        """A hash of the files' times."""
        return hashlib.sha256(self.modified_ns.tobytes()).hexdigest()[:16]


class HeaderSurvey(NamedTuple):
    """What the headers of N files contain. decoded_bytes: (N,) int64, of the pixels of each after resizing, 0 for an
    unreadable header. file_bytes: (N,) int64. unreadable: path -> reason."""

    decoded_bytes: np.ndarray
    file_bytes: np.ndarray
    unreadable: dict[str, str]

    def total_bytes(self) -> int:
        """Bytes of a pack of these images, if all that have a header can be decoded."""
        return int(_aligned(self.decoded_bytes).sum())


def survey_headers(files: ImageFiles) -> HeaderSurvey:
    """Read the header of every file."""
    num_files = len(files.paths)
    pixel_bytes, file_bytes = (np.zeros(num_files, dtype=np.int64) for _ in range(2))
    unreadable: dict[str, str] = {}
    headers = with_progress("reading headers", read_headers(files.root, files.paths), num_files, "images")
    for number, header in enumerate(headers):
        if isinstance(header, UnreadableImage):
            unreadable[header.path] = header.reason
        else:
            pixel_bytes[number], file_bytes[number] = decoded_bytes(header, files.resizing), header.num_bytes
    return HeaderSurvey(pixel_bytes, file_bytes, unreadable)


def unreadable_of(files: ImageFiles) -> dict[str, str]:
    """Decode every file and keep nothing: path -> reason of those without pixels."""
    images = decode_in_order(files.root, files.paths, files.resizing)
    checked = with_progress("checking images", images, len(files.paths), "images")
    return {image.path: image.reason for image in checked if isinstance(image, UnreadableImage)}


def open_pack(folder: Path, files: ImageFiles, *, try_skipped: bool = True) -> Pack | None:
    """Open the pack of these files, or return None if there is no whole and current one.

    Image files are read in two cases only. Those that had no pixels are tried again (a failure of a disk or a missing
    permission may have passed; not with try_skipped False). Where only `content` differs (an image of another part has
    changed, or another list names the same files) sizes are compared.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["modified"] != files.modified():
            return None
        skipped = dict(manifest["skipped"])
        index = np.load(folder / manifest["index"])
        file = folder / manifest["pixels"]
        offsets, num_bytes = _offsets_of(index[:, :2])
        if file.stat().st_size != num_bytes or len(index) != sum(path not in skipped for path in files.paths):
            return None
        flat = np.memmap(file, dtype=np.uint8, mode="r") if num_bytes else np.empty(0, dtype=np.uint8)
    except _DAMAGED:
        return None
    if try_skipped and any(_is_readable(files, path) for path in skipped):
        return None
    if manifest["content"] != files.content and not _same_sizes(files, skipped, index[:, 2]):
        return None
    # As a plain array over the same pages: each slice of an np.memmap does work of its own.
    return Pack(PackedPixels(np.asarray(flat), offsets, index[:, :2].astype(np.int32)), skipped)


def pack_in_memory(files: ImageFiles, survey: HeaderSurvey) -> Pack:
    """Decode all files into memory."""
    flat = np.empty(survey.total_bytes(), dtype=np.uint8)
    skipped: dict[str, str] = {}
    sizes: list[tuple[int, int]] = []
    begin = 0
    for _, image in _decoded(files, survey, skipped):
        flat[begin : begin + image.size] = image.reshape(-1)
        sizes.append(image.shape[:2])
        begin += _aligned(image.size)
    height_width = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    return Pack(PackedPixels(flat, _offsets_of(height_width)[0], height_width.astype(np.int32)), skipped)


def write_pack(folder: Path, files: ImageFiles, survey: HeaderSurvey, refuse: Callable[[dict[str, str]], None]) -> None:
    """Decode all files into a pack in this folder, in place of any other; the caller holds its lock.

    refuse: a function of path -> reason of the files without pixels; it raises if there must be no pack then.
    Raises OSError: the disk is full, or the like. After an exception nothing of the pack is left.
    """
    token = uuid.uuid4().hex[:8]
    index_file, pixels_file = folder / f"{token}.index.npy", folder / f"{token}.pixels"
    skipped: dict[str, str] = {}
    manifest = {
        "format": _FORMAT,
        "index": index_file.name,
        "pixels": pixels_file.name,
        "modified": files.modified(),
        "content": files.content,
        "root": str(files.root),  # this and the next two: for a person who looks into the folder
        "num_files": len(files.paths),
        "resizing": files.resizing._asdict(),
    }
    try:
        index = _write_pixels(pixels_file, _decoded(files, survey, skipped))
        refuse(skipped)
        np.save(index_file, index)
        flush_to_disk(index_file)
        text = json.dumps({**manifest, "skipped": sorted(skipped.items())}, indent=1)
        write_whole(folder / "manifest.json", text, fsync=True)
    except BaseException:
        clear_pack(folder)
        raise


def clear_pack(folder: Path) -> None:
    """Remove a stale pack and what killed writers left; the manifest goes first. An open pack stays readable."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.name != "lock":
            file.unlink(missing_ok=True)


def _write_pixels(file: Path, images: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
    """Write the images one after the other; return (N, 3) int64: height, width, bytes of the source file.

    Not through a memory map: there a full disk would kill the process instead of raising OSError.
    """
    rows: list[tuple[int, int, int]] = []
    with open(file, "wb") as handle:
        for num_file_bytes, image in images:
            handle.write(image.data)
            handle.write(bytes(_aligned(image.size) - image.size))
            rows.append((*image.shape[:2], num_file_bytes))
    flush_to_disk(file)
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _decoded(files: ImageFiles, survey: HeaderSurvey, skipped: dict[str, str]) -> Iterator[tuple[int, np.ndarray]]:
    """(bytes of the file, pixels) of each readable image in order; the others are entered in `skipped`."""
    num_files, begin_s = len(files.paths), time.monotonic()
    images = with_progress("decoding", decode_in_order(files.root, files.paths, files.resizing), num_files, "images")
    for number, image in enumerate(images):
        if isinstance(image, UnreadableImage):
            skipped[image.path] = image.reason
        elif image.size != survey.decoded_bytes[number]:
            # The file was written to since its header was read, and another size was reserved for its image.
            skipped[files.paths[number]] = "the file changed while it was read"
        else:
            yield int(survey.file_bytes[number]), image
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


def _same_sizes(files: ImageFiles, skipped: dict[str, str], num_bytes: np.ndarray) -> bool:
    kept = [path for path in files.paths if path not in skipped]
    with ThreadPoolExecutor(16, thread_name_prefix="stat") as pool:
        return list(pool.map(lambda path: _size_bytes(files.root / path), kept)) == num_bytes.tolist()


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1  # gone since it was listed


def _hash_of(value: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
