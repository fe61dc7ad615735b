"""The pixels of many images of any size: packed into one array, or decoded from their files at each reading."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from raydml.images.decoding import Header, UnreadableImage, decode, read_header
from raydml.images.preprocessing import Resizing, centre_crop

Rows = Sequence[int] | np.ndarray
Result = TypeVar("Result")
_NUM_THREADS = 8  # more than cores: on a network disk they wait at the same time


class Pixels(Protocol):
    """N images, uint8 RGB, each (H, W, 3) of its own size; several threads may read at once."""

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> list[np.ndarray]:
        """The images with these numbers, read-only: uint8 (H, W, 3) each."""
        ...

    def select(self, rows: Rows) -> "Pixels":
        """The images with these numbers as a set of its own; nothing is copied or decoded."""
        ...


class PackedPixels:
    """Images one after the other in one flat array, in memory or memory-mapped.

    flat: (bytes,) uint8. offsets: (N,) int64, where each image begins. sizes: (N, 2) int32, height and width.
    """

    def __init__(self, flat: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> None:
        assert len(offsets) == len(sizes)
        self.flat, self.offsets, self.sizes = flat, offsets, sizes

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, rows: Rows) -> list[np.ndarray]:
        """Views into the flat array: no image is copied."""
        rows = np.asarray(rows, dtype=np.int64)
        images = []
        for begin, (height, width) in zip(self.offsets[rows].tolist(), self.sizes[rows].tolist(), strict=True):
            image = self.flat[begin : begin + height * width * 3].reshape(height, width, 3)
            image.flags.writeable = False
            images.append(image)
        return images

    def select(self, rows: Rows) -> "PackedPixels":
        rows = np.asarray(rows, dtype=np.int64)
        return PackedPixels(self.flat, self.offsets[rows], self.sizes[rows])


class DecodedPixels:
    """Images decoded from their files at each reading, bit for bit those of a pack with the same resizing.

    root, paths: the files. resizing None: full resolution. Eight threads open and decode files at the same time; a
    selection shares them. They do not survive a fork: each process makes its own object.
    """

    def __init__(self, root: Path, paths: Sequence[str], resizing: Resizing | None) -> None:
        self.root, self.paths, self.resizing = root, tuple(paths), resizing
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Rows) -> list[np.ndarray]:
        """Decode the images with these numbers. Raises UnreadableImage (a DataError) for the first without pixels."""
        paths = [self.paths[row] for row in rows]
        return list(self._pool.map(partial(decode, self.root, resizing=self.resizing), paths))

    def select(self, rows: Rows) -> "DecodedPixels":
        chosen = object.__new__(DecodedPixels)
        chosen.__dict__.update(self.__dict__, paths=tuple(self.paths[row] for row in rows))
        return chosen


def packed(images: np.ndarray) -> PackedPixels:
    """Wrap (N, H, W, 3) uint8 in memory as Pixels."""
    num_images, height, width = images.shape[:3]
    offsets = np.arange(num_images, dtype=np.int64) * (height * width * 3)
    sizes = np.tile(np.array([height, width], dtype=np.int32), (num_images, 1))
    return PackedPixels(np.ascontiguousarray(images).reshape(-1), offsets, sizes)


def centres(pixels: Pixels, rows: Rows, size_px: int) -> np.ndarray:
    """Copy the centre squares of these images, none smaller than size_px: uint8 (B, size_px, size_px, 3)."""
    squares = [centre_crop(image, size_px) for image in pixels.read(rows)]
    return np.stack(squares) if squares else np.empty((0, size_px, size_px, 3), dtype=np.uint8)


def decode_in_order(
    root: Path, paths: Sequence[str], resizing: Resizing | None
) -> Iterator[np.ndarray | UnreadableImage]:
    """Decode every file in the order of the paths: its pixels, or why it has none. Memory: a few images a thread."""
    return _in_order(partial(decode, root, resizing=resizing), paths)


def read_headers(root: Path, paths: Sequence[str]) -> Iterator[Header | UnreadableImage]:
    """Read the header of every file in the order of the paths: the header, or why there is none."""
    return _in_order(partial(read_header, root), paths)


def _in_order(function: Callable[[str], Result], paths: Sequence[str]) -> Iterator[Result | UnreadableImage]:
    def attempt(path: str) -> Result | UnreadableImage:
        try:
            return function(path)
        except UnreadableImage as reason:
            return reason

    num_threads = min(32, max(_NUM_THREADS, os.cpu_count() or 1))
    remaining = iter(paths)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
        # pool.map would run ahead of a slow consumer, with all images in memory.
        ahead: deque[Future[Result | UnreadableImage]] = deque()
        try:
            ahead.extend(pool.submit(attempt, path) for path in islice(remaining, 4 * num_threads))
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(attempt, path) for path in islice(remaining, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
