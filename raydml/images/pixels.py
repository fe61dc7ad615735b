"""The pixels of many images of any size: packed into one array, or decoded each time they are asked for."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from raydml.images.preprocessing import centre_crop

Rows = Sequence[int] | np.ndarray


class Pixels(Protocol):
    """N images, uint8 RGB, each (H, W, 3) of its own size; read by several threads at once."""

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


def packed(images: np.ndarray) -> PackedPixels:
    """(N, H, W, 3) uint8 in memory as Pixels."""
    num_images, height, width = images.shape[:3]
    offsets = np.arange(num_images, dtype=np.int64) * (height * width * 3)
    sizes = np.tile(np.array([height, width], dtype=np.int32), (num_images, 1))
    return PackedPixels(np.ascontiguousarray(images).reshape(-1), offsets, sizes)


def centres(pixels: Pixels, rows: Rows, size_px: int) -> np.ndarray:
    """uint8 (B, size_px, size_px, 3), a copy: the centre squares of these images, none smaller than size_px."""
    squares = [centre_crop(image, size_px) for image in pixels.read(rows)]
    return np.stack(squares) if squares else np.empty((0, size_px, size_px, 3), dtype=np.uint8)
