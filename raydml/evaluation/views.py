"""Test-time augmentation: the mean embedding of several views of each image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from raydml.images.pixels import Pixels, Rows
from raydml.images.preprocessing import Preprocessing, PreprocessingError, centre_crop
from raydml.metrics.geometry import unit_rows

#: The kinds of test-time augmentation.
TTA = ("flip", "five_crop")
_View = Callable[[np.ndarray, int], np.ndarray]
_SENTENCES = {
    "flip": "mean embedding of the centre crop and its mirror image",
    "five_crop": "mean embedding of the centre crop and the four corner crops",
}


def _mirrored(image: np.ndarray, size_px: int) -> np.ndarray:
    return centre_crop(image, size_px)[:, ::-1]


def _corner(bottom: bool, right: bool) -> _View:
    def cut(image: np.ndarray, size_px: int) -> np.ndarray:
        top = image.shape[0] - size_px if bottom else 0
        left = image.shape[1] - size_px if right else 0
        return image[top : top + size_px, left : left + size_px]

    return cut


#: Name -> views beside the centre crop, functions of an image (H, W, 3) and a side to (side, side, 3).
_VIEWS: dict[str, tuple[_View, ...]] = {
    "flip": (_mirrored,),
    "five_crop": tuple(_corner(bottom, right) for bottom in (False, True) for right in (False, True)),
}


class ViewPixels:
    """Pixels of which every image is replaced by one view of it, of size_px x size_px."""

    def __init__(self, pixels: Pixels, view: _View, size_px: int) -> None:
        self.pixels, self.view, self.size_px = pixels, view, size_px

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: Rows) -> list[np.ndarray]:
        """The views of these images: uint8 (size_px, size_px, 3) each."""
        return [self.view(image, self.size_px) for image in self.pixels.read(rows)]

    def select(self, rows: Rows) -> ViewPixels:
        """The views of these images as a set of its own."""
        return ViewPixels(self.pixels.select(rows), self.view, self.size_px)


def describe_tta(name: str) -> str:
    """Return what a kind of test-time augmentation does, in words."""
    return _SENTENCES[name]


def with_views(
    plain: NDArray[np.float32],
    pixels: Pixels,
    preprocessing: Preprocessing,
    name: str,
    embed: Callable[[Pixels], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Return the mean (N, D) of the embeddings of the centre crops and of the other views.

    Each further view takes a pass of the network over the images. Where all embeddings have length 1, their mean is
    scaled to length 1 again.

    Args:
        plain: (N, D), the embeddings of the centre crops. pixels: of the same images.
        name: one of TTA. embed: a function of pixels to embeddings (N, D) of their centre crops.

    Raises PreprocessingError for corner crops of images that are as large as the crop.
    """
    if name == "five_crop" and preprocessing.resize == "squash" and preprocessing.crop_px == preprocessing.resize_px:
        raise PreprocessingError(
            f"--tta five_crop: the model embeds whole images of {preprocessing.crop_px} x {preprocessing.crop_px} "
            "pixels, so the five crops are the same. Cure: --tta flip"
        )
    total = plain.astype(np.float64)
    is_unit = _is_unit(plain)
    for view in _VIEWS[name]:
        found = embed(ViewPixels(pixels, view, preprocessing.crop_px))
        is_unit &= _is_unit(found)
        total += found
    mean = total / (1 + len(_VIEWS[name]))
    return (unit_rows(mean) if is_unit else mean).astype(np.float32)


def _is_unit(rows: NDArray[np.float32]) -> bool:
    """Return whether all rows have length 1, as a network with a normalised output gives them."""
    return bool((np.abs(np.linalg.norm(rows.astype(np.float64), axis=1) - 1) < 1e-3).all())
