"""Decoding many files once, into a pack on disk or into memory, of a size that is known before the first pixel."""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raydml.images.decoded_pixels import decode_in_order, read_headers
from raydml.images.decoding import UnreadableImage, decoded_bytes
from raydml.images.pack import Pack, Source, aligned, manifest_of, offsets_of
from raydml.images.pixels import PackedPixels
from raydml.ops.files import flush_to_disk, write_whole
from raydml.ops.progress import tell

REPORT_EVERY_S = 5.0
_PROGRESS = "progress.json"
_logger = logging.getLogger("raydml")


class Needs(NamedTuple):
    """What the headers of N files say. decoded_bytes: (N,) int64, of the pixels of each after resizing, 0 where the
    header cannot be read. file_bytes: (N,) int64. unreadable: path -> reason."""

    decoded_bytes: np.ndarray
    file_bytes: np.ndarray
    unreadable: dict[str, str]

    def total_bytes(self) -> int:
        """Of a pack of these images; exact if all that have a header can be decoded."""
        return int(aligned(self.decoded_bytes).sum())


class Progress:
    """Says every few seconds how far a long pass over files is: in the log and, for those who wait, in a file."""

    def __init__(self, doing: str, num_files: int, folder: Path | None = None) -> None:
        self._doing, self._num_files, self._folder = doing, num_files, folder
        self._begin_s = self._reported_s = time.monotonic()

    def step(self, done: int) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < REPORT_EVERY_S:
            return
        self._reported_s = now_s
        rate = done / max(now_s - self._begin_s, 1e-9)
        text = f"{self._doing} {done:,} of {self._num_files:,} images ({rate:,.0f}/s)"
        _logger.info("%s", text)
        if self._folder is not None:
            write_whole(self._folder / _PROGRESS, json.dumps({"progress": text}))


def progress_in(folder: Path) -> str:
    """What the process that writes a pack last said of its progress."""
    try:
        return str(json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))["progress"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "has just begun"


def survey(source: Source, folder: Path | None = None) -> Needs:
    """Read the header of every file. folder: where others wait for the progress."""
    decoded, files = (np.zeros(len(source.paths), dtype=np.int64) for _ in range(2))
    unreadable: dict[str, str] = {}
    progress = Progress("reads the headers of", len(source.paths), folder)
    for number, header in enumerate(read_headers(source.root, source.paths)):
        if isinstance(header, UnreadableImage):
            unreadable[header.path] = header.reason
        else:
            decoded[number], files[number] = decoded_bytes(header, source.resizing), header.num_bytes
        progress.step(number + 1)
        tell("decoding", number + 1, len(source.paths), "images")
    return Needs(decoded, files, unreadable)


def unreadable_of(source: Source) -> dict[str, str]:
    """Decode every file and keep nothing: path -> reason of those without pixels."""
    unreadable: dict[str, str] = {}
    progress = Progress("checks", len(source.paths))
    for number, image in enumerate(decode_in_order(source.root, source.paths, source.resizing)):
        progress.step(number + 1)
        tell("decoding", number + 1, len(source.paths), "images")
        if isinstance(image, UnreadableImage):
            unreadable[image.path] = image.reason
    return unreadable


def pack_in_memory(source: Source, needs: Needs) -> Pack:
    """Decode all files into memory."""
    flat = np.empty(needs.total_bytes(), dtype=np.uint8)
    skipped: dict[str, str] = {}
    sizes: list[tuple[int, int]] = []
    begin = 0
    for _, image in _decoded(source, needs, skipped):
        flat[begin : begin + image.size] = image.reshape(-1)
        sizes.append(image.shape[:2])
        begin += aligned(image.size)
    height_width = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    return Pack(PackedPixels(flat, offsets_of(height_width)[0], height_width.astype(np.int32)), skipped)


def write_pack(folder: Path, source: Source, needs: Needs, accept: Callable[[dict[str, str]], None]) -> None:
    """Decode all files into a pack in this folder, instead of any that is there; the caller holds its lock.

    accept: is given path -> reason of the files without pixels, and raises if there shall be no pack then.
    Raises OSError: the disk is full, or the like; then nothing of it is left.
    """
    token = uuid.uuid4().hex[:8]
    skipped: dict[str, str] = {}
    try:
        index = _write_pixels(folder / f"{token}.pixels", _decoded(source, needs, skipped, folder))
        accept(skipped)
        np.save(folder / f"{token}.index.npy", index)
        flush_to_disk(folder / f"{token}.index.npy")
        manifest = manifest_of(source, token=token, skipped=skipped)
        write_whole(folder / "manifest.json", json.dumps(manifest, indent=1), fsync=True)
    except BaseException:
        clear(folder)
        raise
    finally:
        (folder / _PROGRESS).unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove a stale pack and what killed writers left; the manifest goes first. Who has the old pack open keeps it."""
    (folder / "manifest.json").unlink(missing_ok=True)
    for file in folder.iterdir():
        if file.name != "lock":
            file.unlink(missing_ok=True)


def _write_pixels(file: Path, images: Iterator[tuple[int, np.ndarray]]) -> np.ndarray:
    """The images one after the other; -> (N, 3) int64: height, width, bytes of the source file.

    Written, not stored through a memory map: there a full disk would kill the process instead of raising OSError.
    """
    rows: list[tuple[int, int, int]] = []
    with open(file, "wb") as handle:
        for num_file_bytes, image in images:
            handle.write(image.data)
            handle.write(bytes(aligned(image.size) - image.size))
            rows.append((*image.shape[:2], num_file_bytes))
        handle.flush()
        os.fsync(handle.fileno())
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _decoded(
    source: Source, needs: Needs, skipped: dict[str, str], folder: Path | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(bytes of the file, pixels) of each readable image in order; the others are entered in `skipped`."""
    progress = Progress("decodes", len(source.paths), folder)
    begin_s = time.monotonic()
    for number, image in enumerate(decode_in_order(source.root, source.paths, source.resizing)):
        progress.step(number + 1)
        tell("decoding", number + 1, len(source.paths), "images")
        if isinstance(image, UnreadableImage):
            skipped[image.path] = image.reason
        elif image.size != needs.decoded_bytes[number]:
            # More than was reserved for it: the file was written to since its header was read.
            skipped[source.paths[number]] = "the file changed while it was read"
        else:
            yield int(needs.file_bytes[number]), image
    seconds = max(time.monotonic() - begin_s, 1e-9)
    _logger.info("decoded %s images once, in %.1f s (%.0f/s)", f"{number + 1:,}", seconds, (number + 1) / seconds)
