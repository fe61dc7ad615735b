"""Random changes of training images: their random numbers, crops, colours, and the network's input.

The order is: crop, flip, grayscale, color jitter, blur, normalisation, erasing. All randomness is a table of uniform
numbers with one row an image. The same numbers are drawn whatever the settings are, so switching a flip on moves no
crop. They depend on no size either: they give the same relative crop of a photograph and of its scaled copy.

A box is (top, left, height, width) in pixels. It may reach beyond its image, where edge pixels are repeated.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydml.data.catalog import DataError
from raydml.images.augmentation_settings import Augmentation, ColorJitter, Erasing, GaussianBlur
from raydml.images.preprocessing import Interpolation, Preprocessing, scaled

NUM_TRIES = 10  # as torchvision: how many random boxes are drawn before the fallback
NUM_UNIFORMS = 2 * NUM_TRIES + 2  # of a crop: areas, aspect ratios, place (y, x)

# How far each kernel reaches, in pixels of the smaller of the two images.
_SUPPORTS: dict[Interpolation, float] = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}


class Draws(NamedTuple):
    """Uniform numbers in 0..1, float64, one row for each image of a batch."""

    crop: np.ndarray  # (B, NUM_UNIFORMS)
    flip: np.ndarray  # (B, 1)
    grayscale: np.ndarray  # (B, 1)
    factors: np.ndarray  # (B, 4) of the jitter
    orders: np.ndarray  # (B, 2): whether to jitter, in which order
    blur: np.ndarray  # (B, 2): whether, sigma
    erasing: np.ndarray  # (B, 1 + NUM_UNIFORMS): whether, the box

    def rows(self, chosen: slice) -> "Draws":
        """The draws of some images."""
        return Draws(*(values[chosen] for values in self))

    def unmirrored(self) -> "Draws":
        """The same draws for a batch that is not mirrored."""
        return self._replace(flip=np.ones_like(self.flip))


_WIDTHS = (NUM_UNIFORMS, 1, 1, 4, 2, 2, 1 + NUM_UNIFORMS)


def draw(num_images: int, seed: int) -> Draws:
    """Draw all random numbers of a batch; those of an image do not depend on the images after it. seed: 0 or more."""
    # torch's CPU generator keeps the lower 32 bits of a seed only: seeds that differ above them would draw the same.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    generator = torch.Generator().manual_seed(hashed)
    uniforms = torch.rand(num_images, sum(_WIDTHS), dtype=torch.float64, generator=generator).numpy()
    return Draws(*np.split(uniforms, np.cumsum(_WIDTHS)[:-1], axis=1))


def choose_boxes(augmentation: Augmentation, draws: Draws, sizes: np.ndarray, *, crop_px: int) -> np.ndarray:
    """Choose where each image is cut: boxes (B, 4) int64. sizes: (B, 2) int, height and width.

    Raises DataError for an image that is smaller than its crop.
    """
    sizes = sizes.astype(np.int64)
    if augmentation.random_resized_crop is not None:
        return resized_crop_boxes(
            sizes, draws.crop, area=augmentation.random_resized_crop, aspect_ratio=augmentation.aspect_ratio
        )
    if augmentation.random_crop:
        return random_crop_boxes(sizes, draws.crop, crop_px=crop_px, padding_px=augmentation.padding_px)
    return place_boxes(sizes, _drawn_places(augmentation, draws), crop_px=crop_px)


def resized_crop_boxes(
    sizes: np.ndarray, uniforms: np.ndarray, *, area: tuple[float, float], aspect_ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes (B, 4) int64 as torchvision's RandomResizedCrop.get_params draws them.

    sizes: (B, 2) int, height and width of each image. uniforms: (B, NUM_UNIFORMS) in 0..1. area: share of the image's
    area, uniform. aspect_ratio: width / height, log-uniform. The first of 10 tries that fits; else the largest central
    box of the nearest allowed ratio. Departure: that box is never empty (torchvision's is for a 1-pixel image when
    every allowed ratio is 2 or more).
    """
    tries = _tries(sizes, uniforms, area, aspect_ratio)
    fits = np.all((tries > 0) & (tries <= sizes[:, None]), axis=2)
    return np.where(
        np.any(fits, axis=1)[:, None], _first_fit(sizes, tries, fits, uniforms), _central(sizes, aspect_ratio)
    )


def erased_boxes(
    sizes: np.ndarray, uniforms: np.ndarray, *, area: tuple[float, float], aspect_ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes (B, 4) int64 as torchvision's RandomErasing.get_params draws them; (0, 0, 0, 0) where no try fits.

    As ``resized_crop_boxes``, but aspect_ratio is height / width and a box is smaller than the image on both sides.
    """
    tries = _tries(sizes, uniforms, area, aspect_ratio)[..., ::-1]
    fits = np.all(tries < sizes[:, None], axis=2)
    return np.where(np.any(fits, axis=1)[:, None], _first_fit(sizes, tries, fits, uniforms), 0)


def random_crop_boxes(sizes: np.ndarray, uniforms: np.ndarray, *, crop_px: int, padding_px: int) -> np.ndarray:
    """Boxes (B, 4) int64 of crop_px x crop_px as torchvision's RandomCrop(padding=padding_px) draws them, every place
    equally often. Raises DataError for an image that is smaller than the crop, padding included."""
    _refuse_smaller(sizes, crop_px, padding_px)
    corners = _places(sizes + 2 * padding_px - crop_px, uniforms) - padding_px
    return np.concatenate([corners, np.full_like(corners, crop_px)], axis=1)


def centre_boxes(sizes: np.ndarray, *, crop_px: int) -> np.ndarray:
    """The central boxes (B, 4) int64 of crop_px x crop_px, rounded as torchvision's CenterCrop does. Raises DataError
    for an image that is smaller."""
    _refuse_smaller(sizes, crop_px, 0)
    corners = np.rint((sizes - crop_px) / 2).astype(np.int64)
    return np.concatenate([corners, np.full_like(corners, crop_px)], axis=1)


def place_boxes(sizes: np.ndarray, places: np.ndarray, *, crop_px: int) -> np.ndarray:
    """Boxes (B, 4) int64 of crop_px x crop_px at named places. Raises DataError for an image that is smaller.

    places: (B,) int, 0 for the centre, 1 to 4 for the corners: top left, top right, bottom left, bottom right.
    """
    boxes = centre_boxes(sizes, crop_px=crop_px)
    spare = sizes.astype(np.int64) - crop_px
    is_low, is_right = np.isin(places, (3, 4)), np.isin(places, (2, 4))
    corners = np.stack([np.where(is_low, spare[:, 0], 0), np.where(is_right, spare[:, 1], 0)], axis=1)
    boxes[:, :2] = np.where((places > 0)[:, None], corners, boxes[:, :2])
    return boxes


class View(NamedTuple):
    """A crop that is not random. place: see `place_boxes`. mirrored: left to right."""

    place: int
    mirrored: bool


def views_of(augmentation: Augmentation) -> tuple[View, ...]:
    """Return every view of an image that an augmentation can make, the centre first; () where views are random."""
    if augmentation != Augmentation(five_crops=augmentation.five_crops, flip=augmentation.flip):
        return ()
    mirrors = (False, True) if augmentation.flip else (False,)
    return tuple(View(place, mirrored) for place in range(_num_places(augmentation)) for mirrored in mirrors)


def drawn_views(augmentation: Augmentation, draws: Draws) -> np.ndarray:
    """Return the view of each image of a batch, as its place in `views_of`: (B,) int64."""
    places = _drawn_places(augmentation, draws)
    return places * 2 + _is_mirrored(draws) if augmentation.flip else places


def _num_places(augmentation: Augmentation) -> int:
    return 5 if augmentation.five_crops else 1


def _drawn_places(augmentation: Augmentation, draws: Draws) -> np.ndarray:
    return np.floor(draws.crop[:, 0] * _num_places(augmentation)).astype(np.int64)


def _is_mirrored(draws: Draws) -> np.ndarray:
    return draws.flip[:, 0] < 0.5


def _tries(
    sizes: np.ndarray, uniforms: np.ndarray, area: tuple[float, float], aspect_ratio: tuple[float, float]
) -> np.ndarray:
    """(B, NUM_TRIES, 2) int64: sqrt(area / ratio) and sqrt(area * ratio) of each try, in whole pixels."""
    areas = sizes.prod(axis=1)[:, None] * (area[0] + (area[1] - area[0]) * uniforms[:, :NUM_TRIES])
    low, high = np.log(aspect_ratio)
    ratios = np.exp(low + (high - low) * uniforms[:, NUM_TRIES : 2 * NUM_TRIES])
    return np.rint(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=2))).astype(np.int64)


def _first_fit(sizes: np.ndarray, tries: np.ndarray, fits: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """(B, 4) int64: the first try that fits, at a random place; without meaning where none fits."""
    extents = tries[np.arange(len(sizes)), fits.argmax(axis=1)]
    return np.concatenate([_places(sizes - extents, uniforms), extents], axis=1)


def _places(spare: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """(B, 2) int64, top and left: uniform in 0..spare, both included."""
    return np.floor(uniforms[:, -2:] * (spare + 1)).astype(np.int64)


def _central(sizes: np.ndarray, aspect_ratio: tuple[float, float]) -> np.ndarray:
    """(B, 4) int64: the largest central boxes whose width / height is in this range."""
    height, width = sizes[:, 0], sizes[:, 1]
    too_tall, too_wide = width / height < min(aspect_ratio), width / height > max(aspect_ratio)
    heights = np.where(too_tall, np.rint(width / min(aspect_ratio)), height)
    widths = np.where(too_wide, np.rint(height * max(aspect_ratio)), width)
    extents = np.maximum(np.stack([heights, widths], axis=1).astype(np.int64), 1)
    return np.concatenate([(sizes - extents) // 2, extents], axis=1)


def _refuse_smaller(sizes: np.ndarray, crop_px: int, padding_px: int) -> None:
    smaller = np.any(sizes + 2 * padding_px < crop_px, axis=1)
    if smaller.any():
        height, width = sizes[smaller.argmax()].tolist()
        needed = -(-(crop_px - min(height, width)) // 2)
        raise DataError(
            f"an image of {width} x {height} px (padding_px: {padding_px}) is smaller than crop_px: {crop_px}; lower "
            f"crop_px, enlarge resize_px, or use random_crop with padding_px of {needed} or more"
        )


def cut_box(image: np.ndarray, box: Sequence[int] | np.ndarray) -> np.ndarray:
    """Copy a box out of a uint8 image (H, W, 3): contiguous (height, width, 3)."""
    top, left, height, width = (int(value) for value in box)
    bottom, right = top + height, left + width
    if top >= 0 and left >= 0 and bottom <= image.shape[0] and right <= image.shape[1]:
        return np.array(image[top:bottom, left:right], order="C")
    rows = np.arange(top, bottom).clip(0, image.shape[0] - 1)
    columns = np.arange(left, right).clip(0, image.shape[1] - 1)
    return np.asarray(image).take(rows, axis=0).take(columns, axis=1)


def scale_one(image: np.ndarray, size_px: int, interpolation: Interpolation) -> Tensor:
    """Scale a contiguous uint8 image (H, W, 3) on the CPU: uint8 (size_px, size_px, 3), by ``scaled``."""
    return torch.from_numpy(scaled(image, (size_px, size_px), interpolation))


def scale_together(images: Tensor, sizes: np.ndarray, size_px: int, interpolation: Interpolation) -> Tensor:
    """Scale many images at once, on any device: uint8 (B, H, W, 3) -> uint8 (B, size_px, size_px, 3), antialiased.

    sizes: (B, 2) int, height and width of each image; pixels of ``images`` beyond them are ignored. Two batched matrix
    products with Pillow's kernels, first along the rows, rounded in between as Pillow and torch do. The result is
    within one grey level of ``scale_one``, and within two for about one value in a thousand, because the weights there
    are whole numbers (torch's and Pillow's differ from each other by as much). Memory: ``images`` as float32, and the
    weights.
    """
    num_images, height, width, _ = images.shape
    with torch.autocast(images.device.type, enabled=False):
        along_rows = _weights(sizes[:, 1], width, size_px, interpolation, images.device)
        along_columns = _weights(sizes[:, 0], height, size_px, interpolation, images.device)
        channels_inside = images.permute(0, 1, 3, 2).to(torch.float32, memory_format=torch.contiguous_format)
        rows = channels_inside.view(num_images, height * 3, width)
        narrow = _grey_levels(along_rows, rows.transpose(1, 2)).transpose(1, 2)
        columns = narrow.reshape(num_images, height, 3 * size_px)
        small = _grey_levels(along_columns, columns).view(num_images, size_px, 3, size_px)
    return small.permute(0, 1, 3, 2).to(torch.uint8).contiguous()


def _grey_levels(weights: Tensor, pixels: Tensor) -> Tensor:
    """weights @ pixels, rounded to 0..255, exact also where matrix products may round to TF32 (10 bits).

    Whole numbers up to 255 survive that. The weights do in two parts: their bfloat16 value and the remainder.
    """
    coarse = weights.to(torch.bfloat16).float()
    return torch.bmm(coarse, pixels).baddbmm_(weights - coarse, pixels).add_(0.5).floor_().clamp_(0, 255)


def _weights(
    lengths: np.ndarray, longest: int, size_px: int, interpolation: Interpolation, device: torch.device
) -> Tensor:
    """(B, size_px, longest) float32: the weight of each pixel of an image for each pixel of the scaled image.

    Centres and support as in Pillow's Resample.c (precompute_coeffs), in float64; each row sums to 1.
    """
    factors = (lengths / size_px)[:, None]
    stretch = np.maximum(factors, 1.0)
    centres = (np.arange(size_px) + 0.5) * factors
    reach = _SUPPORTS[interpolation] * stretch
    first = np.maximum(np.trunc(centres - reach + 0.5), 0)
    last = np.minimum(np.trunc(centres + reach + 0.5), lengths[:, None])
    facts = np.stack([centres, np.broadcast_to(stretch, centres.shape), first, last]).astype(np.float32)
    # Not pinned, yet nothing waits for the device: so small a copy is staged at once.
    centre, width, begin, end = torch.from_numpy(facts).to(device, non_blocking=True)[..., None]
    places = torch.arange(longest, device=device, dtype=torch.float32) + 0.5
    weights = _kernel((places - centre) / width, interpolation)
    weights *= (places > begin) & (places < end)
    return weights / weights.sum(dim=2, keepdim=True)


def _kernel(distances: Tensor, interpolation: Interpolation) -> Tensor:
    if interpolation == "lanczos":
        return torch.sinc(distances) * torch.sinc(distances / 3) * (distances.abs() < 3)
    far = distances.abs()
    if interpolation == "bilinear":
        return (1 - far).clamp_(min=0)
    # Keys (1981) with a = -0.5
    near = (1.5 * far - 2.5) * far * far + 1
    wide = ((-0.5 * far + 2.5) * far - 4) * far + 2
    return torch.where(far < 1, near, torch.where(far < 2, wide, 0.0))


def finish(
    pixels: Tensor, augmentation: Augmentation, draws: Draws, preprocessing: Preprocessing, *, out: Tensor
) -> None:
    """Turn crops into a network's input: flip, colours, normalisation, erasing.

    pixels: uint8 (B, crop, crop, 3), RGB, contiguous; mirrored in place. out: float32 (B, 3, crop, crop), contiguous or
    channels_last, on the same device; every value of it is written. Without augmentation the result is
    ``preprocessing.normalise``, bit for bit.
    """
    if not len(pixels):
        return
    if augmentation.flip:
        _mirror(pixels, np.flatnonzero(_is_mirrored(draws)))
    if augmentation.grayscale or augmentation.color_jitter or augmentation.blur:
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        _recolour(images, augmentation, draws)
        images.mul_(255)
        _normalise(images.flip(1) if preprocessing.channels == "BGR" else images, preprocessing, out)
    else:
        ordered = pixels.flip(3) if preprocessing.channels == "BGR" else pixels
        _normalise(ordered.permute(0, 3, 1, 2), preprocessing, out)
    if augmentation.erasing is not None:
        _erase(out, augmentation.erasing, draws.erasing)


def _mirror(pixels: Tensor, rows: np.ndarray) -> None:
    """Mirror the images with these numbers left to right, in place; pixels: uint8 (B, H, W, 3), contiguous."""
    if pixels.device.type == "cpu":
        for row in rows.tolist():  # as one channels_last image: a fourth of the time
            image = pixels[row : row + 1].permute(0, 3, 1, 2)
            image.copy_(image.flip(3))
    else:
        chosen = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
        pixels[chosen] = pixels[chosen].flip(2)


_ORDERS = list(itertools.permutations(range(4)))  # of brightness, contrast, saturation and hue


def _recolour(images: Tensor, augmentation: Augmentation, draws: Draws) -> None:
    """Grayscale, colour jitter and blur of each image by its own draws, in place; float32 (B, 3, H, W), RGB, 0..1."""
    from torchvision.transforms.v2 import functional  # 2 s, which a trial that changes no colours need not wait for

    adjust = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    jitter, blur = augmentation.color_jitter, augmentation.blur
    factors = [] if jitter is None else jitter_factors(jitter, draws.factors).tolist()
    orders = [[]] * len(images) if jitter is None else jitter_orders(jitter, draws.orders)
    for row, image in enumerate(images):
        if draws.grayscale[row, 0] < augmentation.grayscale:
            image = functional.rgb_to_grayscale(image, 3)
        for operation in orders[row]:
            image = adjust[operation](image, factors[row][operation])
        if blur is not None and draws.blur[row, 0] < blur.probability:
            image = blurred(image, blur, draws.blur[row, 1])
        images[row] = image


def jitter_factors(jitter: ColorJitter, uniforms: np.ndarray) -> np.ndarray:
    """(B, 4) uniform numbers in 0..1 -> (B, 4) factors of brightness, contrast, saturation and the shift of hue."""
    strengths = np.array([jitter.brightness, jitter.contrast, jitter.saturation])
    low = np.append(np.maximum(0.0, 1 - strengths), -jitter.hue)
    high = np.append(1 + strengths, jitter.hue)
    return low + (high - low) * uniforms


def jitter_orders(jitter: ColorJitter, uniforms: np.ndarray) -> list[list[int]]:
    """(B, 2) uniform numbers in 0..1 -> the operations of each image in their order, as columns of jitter_factors."""
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return [
        [operation for operation in _ORDERS[int(order * len(_ORDERS))] if strengths[operation]]
        if chosen < jitter.probability
        else []
        for chosen, order in uniforms.tolist()
    ]


def blurred(image: Tensor, blur: GaussianBlur, uniform: float) -> Tensor:
    """Blur an image (3, H, W) with a sigma chosen by a uniform number in 0..1; the edges are mirrored.

    The radius of the kernel is cut to what mirroring allows, one less than the image's smaller side.
    """
    from torchvision.transforms.v2 import functional  # slow to import

    radius = min(math.ceil(3 * blur.sigma[1]), *(side - 1 for side in image.shape[1:]))
    sigma = float(blur.sigma[0] + (blur.sigma[1] - blur.sigma[0]) * uniform)
    for kernel in ([2 * radius + 1, 1], [1, 2 * radius + 1]):  # two passes: 2.6 times as fast as one 13 x 13 kernel
        image = functional.gaussian_blur(image, kernel, [sigma] * 2)
    return image


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
    """Set a box of each chosen image to 0, the mean of normalised pixels, in place."""
    sizes = np.tile(images.shape[2:], (len(images), 1))
    boxes = erased_boxes(sizes, uniforms[:, 1:], area=erasing.scale, aspect_ratio=erasing.ratio)
    for row in np.flatnonzero(uniforms[:, 0] < erasing.probability):
        top, left, height, width = boxes[row].tolist()
        images[row, :, top : top + height, left : left + width] = 0
