"""Colours of a batch of images changed at random: jitter, grayscale, blur; each image by its own draw.

Images are float32 (B, 3, H, W), RGB, 0..255, and stay within that; they are changed in place, on any device. What was
drawn is in numpy arrays, so that a GPU is never waited for.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydml.data.catalog import DataError

BRIGHTNESS, CONTRAST, SATURATION, HUE = OPERATIONS = range(4)
NONE = -1  # no operation at this place
_ORDERS = np.array(list(itertools.permutations(OPERATIONS)))
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's rgb_to_grayscale (ITU-R 601-2)


@dataclass(frozen=True)
class ColorJitter:
    """torchvision's ColorJitter, done to an image with this probability.

    brightness, contrast, saturation: the factor is uniform in max(0, 1 - value)..1 + value. hue: the shift is uniform
    in -value..value turns of the colour wheel, value up to 0.5. 0 leaves an operation out. The order of the four is
    uniform. Raises DataError for values out of range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        for key, value in (
            ("brightness", self.brightness),
            ("contrast", self.contrast),
            ("saturation", self.saturation),
        ):
            if not 0 <= value < math.inf:
                raise DataError(f"color_jitter.{key}: {value} is not a number of 0 or more; 0 switches it off")
        if not 0 <= self.hue <= 0.5:
            raise DataError(f"color_jitter.hue: {self.hue} is not in 0..0.5 (turns of the colour wheel)")
        refuse_improbable("color_jitter.probability", self.probability)


@dataclass(frozen=True)
class GaussianBlur:
    """torchvision's GaussianBlur, done to an image with this probability; sigma in pixels, uniform in this range.

    Departure: the kernel reaches three of the largest sigmas, where torchvision asks for its size. Raises DataError
    for values out of range.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.sigma[0] <= self.sigma[1] < math.inf:
            raise DataError(f"blur.sigma: {self.sigma} is not 0 < low <= high, in pixels; such as (0.1, 2.0)")
        refuse_improbable("blur.probability", self.probability)

    @property
    def radius_px(self) -> int:
        return math.ceil(3 * self.sigma[1])


def refuse_improbable(key: str, value: float) -> None:
    """DataError for a probability outside 0..1."""
    if not 0 <= value <= 1:
        raise DataError(f"{key}: {value} is not a probability; a number from 0 (never) to 1 (always)")


def jitter_factors(jitter: ColorJitter, uniforms: np.ndarray) -> np.ndarray:
    """(B, 4) uniform numbers in 0..1 -> (B, 4) factors of brightness, contrast, saturation and the shift of hue."""
    spread = np.array([jitter.brightness, jitter.contrast, jitter.saturation])
    low = np.append(np.maximum(0.0, 1 - spread), -jitter.hue)
    high = np.append(1 + spread, jitter.hue)
    return low + (high - low) * uniforms


def jitter_orders(jitter: ColorJitter, uniforms: np.ndarray) -> np.ndarray:
    """(B, 2) uniform numbers in 0..1 -> (B, 4) int64: the operation at each of four places, or NONE."""
    orders = _ORDERS[np.floor(uniforms[:, 1] * len(_ORDERS)).astype(np.int64)]
    settings = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    off = [operation for operation in OPERATIONS if settings[operation] == 0]
    orders[np.isin(orders, off) | (uniforms[:, :1] >= jitter.probability)] = NONE
    return orders


def jitter(images: Tensor, factors: np.ndarray, orders: np.ndarray) -> None:
    """Brightness, contrast, saturation and hue of each image, in its own order; see the two functions above.

    The images with the same operation at a place go through it together: at most 16 operations a batch. As
    torchvision's adjust_* functions on floats; on uint8 those also cut the fraction off after every operation.
    """
    if images.device.type == "cpu":  # an image alone stays in the processor's cache: three times as fast, measured
        for row, (own_factors, own_order) in enumerate(zip(factors.tolist(), orders.tolist(), strict=True)):
            for operation in own_order:
                if operation != NONE:
                    _adjust(images[row : row + 1], operation, own_factors[operation])
        return
    of_images = torch.from_numpy(factors.astype(np.float32)).to(images.device, non_blocking=True)
    for place in range(orders.shape[1]):
        for operation, rows in _groups(orders[:, place], images.device):
            chosen = images.index_select(0, rows)
            _adjust(chosen, operation, of_images[rows, operation].view(-1, 1, 1, 1))
            images.index_copy_(0, rows, chosen)


def to_gray(images: Tensor, rows: np.ndarray) -> None:
    """Make the images with these numbers grey, in three equal channels (torchvision's RandomGrayscale)."""
    if len(rows):
        chosen = torch.from_numpy(rows).to(images.device, non_blocking=True)
        images.index_copy_(0, chosen, _gray(images.index_select(0, chosen)).expand(-1, 3, -1, -1))


def blur(images: Tensor, rows: np.ndarray, sigmas: np.ndarray, radius_px: int) -> None:
    """Blur the images with these numbers by a Gaussian of their own sigma (in pixels), the edges mirrored.

    As torchvision's gaussian_blur with a kernel of 2 radius_px + 1; the radius is cut to what mirroring allows, one
    less than the image's smaller side.
    """
    radius = min(radius_px, images.shape[2] - 1, images.shape[3] - 1)
    if not len(rows) or not radius:
        return
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigmas[:, None]) ** 2)
    taps /= taps.sum(axis=1, keepdims=True)
    weights = (
        torch.from_numpy(taps.astype(np.float32)).to(images.device, non_blocking=True).view(len(rows), -1, 1, 1, 1)
    )
    chosen = torch.from_numpy(rows).to(images.device, non_blocking=True)
    blurred = images.index_select(0, chosen)
    for dim in (2, 3):
        blurred = _convolved(blurred, weights, radius, dim)
    images.index_copy_(0, chosen, blurred)


def _convolved(images: Tensor, weights: Tensor, radius: int, dim: int) -> Tensor:
    # One pass a tap: a grouped convolution computes the same, but on a GPU may round to TF32.
    length = images.shape[dim]
    border = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
    padded = torch.nn.functional.pad(images, border, mode="reflect")
    total = padded.narrow(dim, 0, length) * weights[:, 0]
    for tap in range(1, 2 * radius + 1):
        total.addcmul_(padded.narrow(dim, tap, length), weights[:, tap])
    return total


def _groups(operations: np.ndarray, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Each operation with the numbers of the images that go through it, on the device."""
    by_operation = np.argsort(operations, kind="stable")
    counts = [int((operations == operation).sum()) for operation in (NONE, *OPERATIONS)]
    rows = torch.from_numpy(by_operation).to(device, non_blocking=True).split(counts)
    return ((operation, rows[operation + 1]) for operation in OPERATIONS if counts[operation + 1])


def _adjust(images: Tensor, operation: int, factor: Tensor | float) -> None:
    """One operation, in place; factor: one number for all of these images, or (B, 1, 1, 1)."""
    if operation == BRIGHTNESS:
        images.mul_(factor).clamp_(0, 255)
    elif operation == CONTRAST:
        red, green, blue = images.mean(dim=(2, 3), keepdim=True).split(1, dim=1)
        mean = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
        images.mul_(factor).add_((1 - factor) * mean).clamp_(0, 255)
    elif operation == SATURATION:
        gray = _gray(images).mul_(1 - factor)
        images.mul_(factor).add_(gray).clamp_(0, 255)
    else:
        _shift_hue(images, factor)


def _gray(images: Tensor) -> Tensor:
    """(B, 1, H, W)"""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _shift_hue(images: Tensor, turns: Tensor | float) -> None:
    """Through HSV and back, without dividing by the value; in place, equal to torchvision's adjust_hue.

    With the hue in sixths of a turn, 0 to 6, a channel is the smallest one plus the chroma times a trapezoid of that:
    https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB
    """
    red, green, blue = images.split(1, dim=1)
    low = torch.minimum(red, green).minimum(blue)
    high = torch.maximum(red, green).maximum(blue)
    # 1 where a channel is the largest, else 0. Masks that are multiplied, and made without comparing: eq, where,
    # aminmax and remainder_ take four to ten times as long on a CPU.
    is_red = (red - high).sign_().add_(1)
    is_green = (green - high).sign_().add_(1).mul_(1 - is_red)
    is_blue = (1 - is_red).sub_(is_green)
    sixths = (green - blue).mul_(is_red).addcmul_(blue - red, is_green).addcmul_(red - green, is_blue)
    chroma = high.sub_(low)
    sixths.div_(chroma.clamp(min=1e-6)).add_(is_green, alpha=2).add_(is_blue, alpha=4).add_(6 * turns)
    sixths.sub_((sixths / 6).floor_(), alpha=6)
    torch.addcmul(low, chroma, (sixths - 3).abs_().sub_(1).clamp_(0, 1), out=images[:, 0:1])
    torch.addcmul(low, chroma, (sixths - 2).abs_().neg_().add_(2).clamp_(0, 1), out=images[:, 1:2])
    torch.addcmul(low, chroma, (sixths - 4).abs_().neg_().add_(2).clamp_(0, 1), out=images[:, 2:3])
