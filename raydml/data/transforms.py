"""Augmentation of a whole batch on its device; every random number comes from one CPU generator."""

import math

import torch
from torch import Tensor

# torchvision's RandomResizedCrop: aspect ratios, log-uniform, and how often it tries before it gives up.
ASPECT_RATIOS = (3 / 4, 4 / 3)
_NUM_TRIES = 10


@torch.no_grad()
def augment(
    images: Tensor,
    *,
    crop_px: int,
    random_resized_crop_scale: tuple[float, float] | None,
    flip: bool,
    shift_px: int,
    generator: torch.Generator,
) -> Tensor:
    """Crop, shift and flip each image of a batch by its own draw: uint8 (B, S, S, 3) -> float32 (B, crop, crop, 3).

    Values stay in 0..255, not rounded. random_resized_crop_scale: (smallest, largest) share of the area, as in
    torchvision's RandomResizedCrop, or None for the centre crop. shift_px: the crop is moved by whole pixels,
    up to so many each way and uniformly; where it leaves the image, edge pixels are repeated. With no resized
    crop and shift_px = (S - crop_px) / 2 this is the plain random crop. flip: mirrored left to right with
    probability one half.

    generator: on the CPU, whatever the device of the images, so that CPU and GPU see the same crops.
    Raises ValueError for a crop larger than the image, a scale outside 0 < low <= high <= 1, a negative shift,
    or a generator of another device.

    Departure: torchvision's antialias=False is followed to keep one gather per batch. A crop is shrunk at most by
    S / crop_px (256 -> 224: 1.14), where the antialiasing filter does next to nothing.
    """
    size_px = _checked_size(images, crop_px, random_resized_crop_scale, shift_px, generator)
    num_images = len(images)
    if random_resized_crop_scale is None:
        corner = torch.full((num_images, 2), (size_px - crop_px) // 2)
        extent = torch.full((num_images, 2), crop_px)
    else:
        corner, extent = draw_crops(num_images, size_px, random_resized_crop_scale, generator)
    if shift_px:
        corner = corner + torch.randint(-shift_px, shift_px + 1, (num_images, 2), generator=generator)
    mirrored = torch.zeros(num_images, dtype=torch.bool)
    if flip:
        mirrored = torch.rand(num_images, generator=generator) < 0.5
    return crop_and_resize(images, corner, extent, mirrored, crop_px=crop_px)


def draw_crops(
    num_images: int, size_px: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Corners (B, 2) and extents (B, 2), both (y, x) int64, of random crops inside a square of size_px.

    As torchvision's RandomResizedCrop.get_params: area uniform in scale, aspect ratio log-uniform in 3/4..4/3,
    the first of 10 tries that fits, else the whole (square) image.
    """
    draws = torch.rand(num_images, _NUM_TRIES, 2, generator=generator, dtype=torch.float64)
    area = size_px * size_px * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    ratio = torch.exp(low + (high - low) * draws[..., 1])
    tries = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=-1).round().long()
    fits = ((tries > 0) & (tries <= size_px)).all(dim=-1)
    first = fits.int().argmax(dim=1)
    extent = tries[torch.arange(num_images), first]
    extent = torch.where(fits.any(dim=1, keepdim=True), extent, torch.full_like(extent, size_px))
    places = torch.rand(num_images, 2, generator=generator, dtype=torch.float64)
    return (places * (size_px - extent + 1)).long(), extent


def crop_and_resize(images: Tensor, corner: Tensor, extent: Tensor, mirrored: Tensor, *, crop_px: int) -> Tensor:
    """Cut one box from each image and scale it to crop_px: (B, S, S, 3) -> float32 (B, crop_px, crop_px, 3).

    corner, extent: (B, 2) int64 (y, x) in pixels; mirrored: (B,) bool; these may lie on the CPU. Bilinear without
    antialiasing, as torchvision's resized_crop(antialias=False) for a box inside the image; a box that reaches
    beyond it finds the edge pixels repeated. Exact, bit for bit, when extent equals crop_px.
    """
    steps = torch.arange(crop_px, dtype=torch.float64) + 0.5
    # Multiplied before divided: exactly the whole numbers where extent equals crop_px.
    inside = extent[:, :, None] * steps / crop_px - 0.5
    inside = inside.clamp(min=0)  # interpolation does not look over a crop's border ...
    places = corner[:, :, None] + torch.minimum(inside, extent[:, :, None] - 1.0)
    places = places.clamp(0, images.shape[1] - 1)  # ... and the image repeats its own
    columns = torch.where(mirrored[:, None], places[:, 1].flip(1), places[:, 1])
    return _interpolate(_interpolate(images, places[:, 0], dim=1), columns, dim=2)


def _interpolate(images: Tensor, places: Tensor, *, dim: int) -> Tensor:
    """(B, H, W, 3) read along dim (1 rows, 2 columns) at the places (B, P), in pixels -> float32, P long in dim."""
    lower = places.floor()
    shape = [len(images), 1, 1, 1]
    shape[dim] = places.shape[1]
    weight = (places - lower).float().view(shape)
    below = lower.long().view(shape).to(images.device, non_blocking=True)
    wide = list(images.shape)
    wide[dim] = places.shape[1]
    first = images.gather(dim, below.expand(wide)).float()
    if not weight.any():  # the places are on the CPU: no wait for the device
        return first
    above = (below + 1).clamp(max=images.shape[dim] - 1)
    second = images.gather(dim, above.expand(wide)).float()
    return first + (second - first) * weight.to(images.device, non_blocking=True)


def _checked_size(
    images: Tensor,
    crop_px: int,
    scale: tuple[float, float] | None,
    shift_px: int,
    generator: torch.Generator,
) -> int:
    size_px = images.shape[1]
    if images.ndim != 4 or images.shape[2] != size_px or images.dtype != torch.uint8:
        raise ValueError(f"images are uint8 (B, S, S, 3), got {images.dtype} {tuple(images.shape)}")
    if not 0 < crop_px <= size_px:
        raise ValueError(f"data.crop_px = {crop_px} is not in 1..{size_px} (data.resize_px); lower it")
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"data.augmentation.random_resized_crop = {scale} is not 0 < low <= high <= 1")
    if shift_px < 0:
        raise ValueError(f"data.augmentation.shift_px = {shift_px} is negative; 0 switches shifts off")
    if generator.device.type != "cpu":
        raise ValueError(f"the generator is on {generator.device}; a CPU generator draws the same for every device")
    return size_px
