"""Crops of images of any size: where they lie, cut out, and scaled to one size.

A box is (top, left, height, width) in pixels; it may reach beyond its image, where edge pixels are repeated. Boxes are
computed from uniform numbers in 0..1 that know nothing of sizes: the same numbers give the same relative crop of an
original photograph and of its scaled copy.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydml.data.catalog import DataError
from raydml.images.preprocessing import Interpolation

Range = tuple[float, float]
NUM_TRIES = 10  # as torchvision: how often a random box is drawn before it is given up
NUM_UNIFORMS = 2 * NUM_TRIES + 2  # areas, ratios, place (y, x)

# How far each kernel reaches, in pixels of the smaller of the two images.
_SUPPORTS: dict[Interpolation, float] = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}


def resized_crop_boxes(sizes: np.ndarray, uniforms: np.ndarray, *, area: Range, aspect_ratio: Range) -> np.ndarray:
    """Boxes (B, 4) int64 as torchvision's RandomResizedCrop.get_params draws them.

    sizes: (B, 2) int, height and width of each image. uniforms: (B, NUM_UNIFORMS) in 0..1. area: share of the image's
    area, uniform. aspect_ratio: width / height, log-uniform. The first of 10 tries that fits; else the largest central
    box of the nearest allowed ratio. Departure: that box is never empty (torchvision's is for a 1-pixel image when
    every allowed ratio is 2 or more).
    """
    tries = _tries(sizes, uniforms, area, aspect_ratio)
    fits = np.all((tries > 0) & (tries <= sizes[:, None]), axis=2)
    extents = tries[np.arange(len(sizes)), fits.argmax(axis=1)]
    boxes = np.concatenate([_places(sizes - extents, uniforms), extents], axis=1)
    central = _central_boxes(sizes, aspect_ratio)
    return np.where(np.any(fits, axis=1)[:, None], boxes, central)


def erased_boxes(sizes: np.ndarray, uniforms: np.ndarray, *, area: Range, aspect_ratio: Range) -> np.ndarray:
    """Boxes (B, 4) int64 as torchvision's RandomErasing.get_params draws them; (0, 0, 0, 0) where no try fits.

    As ``resized_crop_boxes``, but aspect_ratio is height / width and a box is smaller than the image on both sides.
    """
    tries = _tries(sizes, uniforms, area, aspect_ratio)[..., ::-1]
    fits = np.all(tries < sizes[:, None], axis=2)
    extents = tries[np.arange(len(sizes)), fits.argmax(axis=1)]
    boxes = np.concatenate([_places(sizes - extents, uniforms), extents], axis=1)
    return np.where(np.any(fits, axis=1)[:, None], boxes, 0)


def crop_boxes(sizes: np.ndarray, uniforms: np.ndarray, *, crop_px: int, padding_px: int) -> np.ndarray:
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


def cut(image: np.ndarray, box: Sequence[int] | np.ndarray) -> np.ndarray:
    """A box of a uint8 image (H, W, 3) as a contiguous copy (height, width, 3)."""
    top, left, height, width = (int(value) for value in box)
    bottom, right = top + height, left + width
    if top >= 0 and left >= 0 and bottom <= image.shape[0] and right <= image.shape[1]:
        return np.array(image[top:bottom, left:right], order="C")
    rows = np.arange(top, bottom).clip(0, image.shape[0] - 1)
    columns = np.arange(left, right).clip(0, image.shape[1] - 1)
    return np.asarray(image).take(rows, axis=0).take(columns, axis=1)


def scaled(image: np.ndarray, size_px: int, interpolation: Interpolation) -> Tensor:
    """A contiguous uint8 image (H, W, 3) -> uint8 (size_px, size_px, 3), antialiased; on the CPU.

    Bilinear and bicubic are bit for bit torchvision's ``resize`` of a uint8 tensor; lanczos, which torch does not have,
    is that of a PIL image up to Pillow 12. An image of that size already is returned as it is.
    """
    height, width = image.shape[:2]
    if height == width == size_px:
        return torch.from_numpy(image)
    if interpolation == "lanczos":
        # Two calls, or Pillow 13 scales the columns of some tall images first: up to 29 grey levels away, measured.
        rows = Image.fromarray(image).resize((size_px, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(rows.resize((size_px, size_px), Image.Resampling.LANCZOS)))
    # Permuting after [None] makes a true channels_last tensor: four times faster than the other way round.
    channels_first = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        channels_first, size=(size_px, size_px), mode=interpolation, antialias=True
    )
    return resized[0].permute(1, 2, 0)


def scaled_together(images: Tensor, sizes: np.ndarray, size_px: int, interpolation: Interpolation) -> Tensor:
    """Many images at once, on any device: uint8 (B, H, W, 3) -> uint8 (B, size_px, size_px, 3), antialiased.

    sizes: (B, 2) int, height and width of each image; what lies beyond them in ``images`` is not looked at. Two batched
    matrix products with Pillow's kernels, first along the rows and rounded in between as Pillow and torch do: within
    one grey level of ``scaled``, two for about one value in a thousand, because its weights are whole numbers (torch's
    and Pillow's differ from each other by as much). Memory: ``images``
    as float32, and the weights.
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
    """weights @ pixels, rounded to 0..255, also where the process lets matrix products round to TF32 (10 bits).

    Whole numbers up to 255 survive that; the weights do in two parts, the second one being what the first leaves over.
    """
    coarse = weights.to(torch.bfloat16).float()
    return torch.bmm(coarse, pixels).baddbmm_(weights - coarse, pixels).add_(0.5).floor_().clamp_(0, 255)


def _weights(
    lengths: np.ndarray, longest: int, size_px: int, interpolation: Interpolation, device: torch.device
) -> Tensor:
    """(B, size_px, longest) float32: how much each of an image's pixels counts for each pixel of the scaled image.

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


def _tries(sizes: np.ndarray, uniforms: np.ndarray, area: Range, aspect_ratio: Range) -> np.ndarray:
    """(B, NUM_TRIES, 2) int64: sqrt(area / ratio) and sqrt(area * ratio) of each try, in whole pixels."""
    areas = sizes.prod(axis=1)[:, None] * (area[0] + (area[1] - area[0]) * uniforms[:, :NUM_TRIES])
    low, high = np.log(aspect_ratio)
    ratios = np.exp(low + (high - low) * uniforms[:, NUM_TRIES : 2 * NUM_TRIES])
    return np.rint(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=2))).astype(np.int64)


def _places(spare: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """(B, 2) int64, top and left: uniform in 0..spare, both included."""
    return np.floor(uniforms[:, -2:] * (spare + 1)).astype(np.int64)


def _central_boxes(sizes: np.ndarray, aspect_ratio: Range) -> np.ndarray:
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
