"""What may be done at random to a training image, the draws for it, and the way from cut pixels to a network's input.

In the order of: crop, flip, grayscale, color jitter, blur, normalisation, erasing. All that is random comes from
uniform numbers that are drawn for every image whether they are used or not: switching a flip on moves no crop.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydml.data.catalog import DataError
from raydml.images import colours, crops
from raydml.images.colours import ColorJitter, GaussianBlur
from raydml.images.crops import Range
from raydml.images.preprocessing import Preprocessing


@dataclass(frozen=True)
class Erasing:
    """torchvision's RandomErasing with value 0, with this probability; it comes after normalisation, so 0 is the mean.

    scale: share of the area, uniform; ratio: height / width, log-uniform. Raises DataError for values out of range.
    """

    probability: float = 0.5
    scale: Range = (0.02, 0.33)
    ratio: Range = (0.3, 3.3)

    def __post_init__(self) -> None:
        colours.refuse_improbable("erasing.probability", self.probability)
        _refuse_shares("erasing.scale", self.scale)
        _refuse_ratios("erasing.ratio", self.ratio)


@dataclass(frozen=True)
class Augmentation:
    """What is done at random to a training image; without settings the centre crop and nothing else.

    random_resized_crop: the crop's share of the image's area, uniform in (low, high), its aspect_ratio (width / height)
    log-uniform; scaled to the size asked for. random_crop: a crop of that size at any place of the image, widened by
    padding_px repeated edge pixels on every side. flip: mirrored left to right, probability one half. grayscale: its
    probability. Each as torchvision's transform of that name.

    Grayscale comes before the jitter, as in "adv" of Roth et al. (2020), Revisiting Training Strategies; SimCLR has it
    after, which differs for grey images whose hue is shifted.

    Raises DataError for a value out of range, for two kinds of crop at once, and for a setting without effect.
    """

    random_resized_crop: Range | None = None
    aspect_ratio: Range = (3 / 4, 4 / 3)
    random_crop: bool = False
    padding_px: int = 0
    flip: bool = False
    color_jitter: ColorJitter | None = None
    grayscale: float = 0.0
    blur: GaussianBlur | None = None
    erasing: Erasing | None = None

    def __post_init__(self) -> None:
        _refuse_ratios("aspect_ratio", self.aspect_ratio)
        colours.refuse_improbable("grayscale", self.grayscale)
        if self.padding_px < 0:
            raise DataError(f"padding_px: {self.padding_px} is negative; 0 pads nothing")
        if self.padding_px and not self.random_crop:
            raise DataError(f"padding_px: {self.padding_px} has no effect without random_crop; set random_crop: true")
        if self.random_resized_crop is not None:
            _refuse_shares("random_resized_crop", self.random_resized_crop)
            if self.random_crop:
                raise DataError(
                    f"random_crop: true and random_resized_crop: {self.random_resized_crop} exclude each other; "
                    "leave one out"
                )
        elif self.aspect_ratio != (3 / 4, 4 / 3):
            raise DataError(
                f"aspect_ratio: {self.aspect_ratio} has no effect without random_resized_crop; leave it out, or give "
                "random_resized_crop: [low, high]"
            )


class Draws(NamedTuple):
    """Uniform numbers in 0..1, float64, a row for each image of a batch."""

    crop: np.ndarray  # (B, crops.NUM_UNIFORMS)
    flip: np.ndarray  # (B, 1)
    grayscale: np.ndarray  # (B, 1)
    factors: np.ndarray  # (B, 4) of the jitter
    orders: np.ndarray  # (B, 2): whether to jitter, in which order
    blur: np.ndarray  # (B, 2): whether, sigma
    erasing: np.ndarray  # (B, 1 + crops.NUM_UNIFORMS): whether, the box

    def rows(self, chosen: slice) -> "Draws":
        """The draws of some images."""
        return Draws(*(values[chosen] for values in self))


_WIDTHS = (crops.NUM_UNIFORMS, 1, 1, 4, 2, 2, 1 + crops.NUM_UNIFORMS)


def draw(num_images: int, seed: int) -> Draws:
    """Everything random of one batch. seed: 0 or more; the draws of an image do not depend on those after it."""
    # torch's CPU generator keeps the lower 32 bits of a seed only: seeds that differ above them would draw the same.
    folded = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator().manual_seed(folded)
    uniforms = torch.rand(num_images, sum(_WIDTHS), dtype=torch.float64, generator=generator).numpy()
    return Draws(*np.split(uniforms, np.cumsum(_WIDTHS)[:-1], axis=1))


def boxes(augmentation: Augmentation, draws: Draws, sizes: np.ndarray, *, crop_px: int) -> np.ndarray:
    """Where each image is cut: (B, 4) int64 top, left, height, width. sizes: (B, 2) int, height and width.

    Raises DataError for an image that is smaller than its crop.
    """
    sizes = sizes.astype(np.int64)
    if augmentation.random_resized_crop is not None:
        return crops.resized_crop_boxes(
            sizes, draws.crop, area=augmentation.random_resized_crop, aspect_ratio=augmentation.aspect_ratio
        )
    if augmentation.random_crop:
        return crops.crop_boxes(sizes, draws.crop, crop_px=crop_px, padding_px=augmentation.padding_px)
    return crops.centre_boxes(sizes, crop_px=crop_px)


def finish(
    pixels: Tensor, augmentation: Augmentation, draws: Draws, preprocessing: Preprocessing, *, out: Tensor
) -> None:
    """From cropped and scaled pixels to a network's input: flip, colours, normalisation, erasing.

    pixels: uint8 (B, crop, crop, 3), RGB, contiguous; mirrored in place. out: float32 (B, 3, crop, crop), contiguous or
    channels_last, on the same device; every value of it is written. Without augmentation it is
    ``preprocessing.normalise``, bit for bit.
    """
    if not len(pixels):
        return
    if augmentation.flip:
        _mirror(pixels, np.flatnonzero(draws.flip[:, 0] < 0.5))
    if augmentation.grayscale or augmentation.color_jitter or augmentation.blur:
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        _recolour(images, augmentation, draws)
        _normalise(images.flip(1) if preprocessing.channels == "BGR" else images, preprocessing, out)
    else:
        ordered = pixels.flip(3) if preprocessing.channels == "BGR" else pixels
        _normalise(ordered.permute(0, 3, 1, 2), preprocessing, out)
    if augmentation.erasing is not None:
        _erase(out, augmentation.erasing, draws.erasing)


def _mirror(pixels: Tensor, rows: np.ndarray) -> None:
    """Mirror the images with these numbers left to right, in place; pixels: uint8 (B, H, W, 3), contiguous."""
    if pixels.device.type == "cpu":
        for row in rows.tolist():  # seen as one channels_last image it takes a fourth of the time
            image = pixels[row : row + 1].permute(0, 3, 1, 2)
            image.copy_(image.flip(3))
    else:
        chosen = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
        pixels[chosen] = pixels[chosen].flip(2)


def _recolour(images: Tensor, augmentation: Augmentation, draws: Draws) -> None:
    grey = np.flatnonzero(draws.grayscale[:, 0] < augmentation.grayscale)
    colours.to_gray(images, grey)
    jitter = augmentation.color_jitter
    if jitter is not None:
        factors = colours.jitter_factors(jitter, draws.factors)
        colours.jitter(images, factors, colours.jitter_orders(jitter, draws.orders))
    blur = augmentation.blur
    if blur is not None:
        blurred = np.flatnonzero(draws.blur[:, 0] < blur.probability)
        sigmas = blur.sigma[0] + (blur.sigma[1] - blur.sigma[0]) * draws.blur[blurred, 1]
        colours.blur(images, blurred, sigmas, blur.radius_px)


def _normalise(images: Tensor, preprocessing: Preprocessing, out: Tensor) -> None:
    scale, shift = preprocessing.scale_and_shift(out.device)
    out.copy_(images)
    rows = out.permute(0, 2, 3, 1)
    if rows.is_contiguous():  # channels last: one line of an image at a time, where three values would be slow
        width = rows.shape[2]
        rows.flatten(2).mul_(scale.view(3).repeat(width)).add_(shift.view(3).repeat(width))
    else:
        out.mul_(scale).add_(shift)


def _erase(images: Tensor, erasing: Erasing, uniforms: np.ndarray) -> None:
    height, width = images.shape[2:]
    sizes = np.tile(np.array([height, width]), (len(images), 1))
    erased = crops.erased_boxes(sizes, uniforms[:, 1:], area=erasing.scale, aspect_ratio=erasing.ratio)
    erased[uniforms[:, 0] >= erasing.probability] = 0
    if not erased.any():
        return
    on_device = torch.from_numpy(erased).to(images.device, non_blocking=True)
    top, left, num_rows, num_columns = on_device.T.reshape(4, -1, 1)
    rows, columns = (torch.arange(length, device=images.device) for length in (height, width))
    in_rows, in_columns = (rows >= top) & (rows < top + num_rows), (columns >= left) & (columns < left + num_columns)
    images.masked_fill_((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)


def _refuse_shares(key: str, value: Range) -> None:
    if not 0 < value[0] <= value[1] <= 1:
        raise DataError(f"{key}: {value} is not 0 < low <= high <= 1, shares of the image's area; such as (0.16, 1.0)")


def _refuse_ratios(key: str, value: Range) -> None:
    if not 0 < value[0] <= value[1] < math.inf:
        raise DataError(f"{key}: {value} is not 0 < low <= high; such as (0.75, 1.3333)")
