"""The way from an image file to a network's input: resizing, the centre crop, normalisation; saved with the weights."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from PIL import ExifTags, Image

if TYPE_CHECKING:  # torch is slow to import, and a configuration is checked without it
    import torch
    from torch import Tensor

Resize = Literal["short_side", "squash"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]
MAX_ASPECT = 8  # a strip of 1 x 3,000 pixels, its short side scaled to 256, would take 590 MB
_STRIP_PIXELS = 1 << 18  # 768 KiB: an image of 500 x 500 is one strip
_TURNS = {  # EXIF 2.32, tag 0x0112, and what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHERE_EXIF_IS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # type: ignore[arg-type]


class PreprocessingError(ValueError):
    """Settings of a preprocessing that exclude each other, or an array that is no image."""


class Resizing(NamedTuple):
    """How the size of an image is changed; see `Preprocessing`."""

    resize_px: int
    resize: Resize
    interpolation: Interpolation


@dataclass(frozen=True)
class Preprocessing:
    """The preparation of an image that a network was trained with; saved with its weights.

    resize: "short_side" scales the short side to ``resize_px`` and keeps the aspect ratio (cut to 1 : 8, see
    ``resized``), "squash" scales both sides to it. interpolation: the filter for that, always antialiased (``scaled``).
    crop_px: the side of the central square that is embedded. mean, std: in the units of ``value_range``: pixels 0..255
    are first scaled to 0..value_range, then ``(x - mean) / std`` for each channel, in the order of ``channels``.
    """

    resize_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str = "RGB"
    value_range: float = 1.0
    resize: Resize = "short_side"
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.crop_px <= self.resize_px:
            raise PreprocessingError(
                f"crop_px: {self.crop_px} does not fit into resize_px: {self.resize_px}; "
                f"give crop_px between 1 and {self.resize_px}, or enlarge resize_px"
            )
        for key, value, choices in (
            ("channels", self.channels, ("RGB", "BGR")),
            ("resize", self.resize, get_args(Resize)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in choices:
                raise PreprocessingError(f"{key}: {value!r}; one of {', '.join(choices)}")

    @property
    def resizing(self) -> Resizing:
        return Resizing(self.resize_px, self.resize, self.interpolation)

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, with lists for tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Preprocessing:
        """Invert to_dict. Raises PreprocessingError or TypeError for values that it never gives."""
        for key in ("mean", "std"):
            numbers = values.get(key)
            if not (isinstance(numbers, list) and len(numbers) == 3 and all(map(_is_finite, numbers))):
                raise PreprocessingError(f"{key}: {numbers!r}; three numbers")
        for key in ("resize_px", "crop_px"):
            if type(values.get(key)) is not int:
                raise PreprocessingError(f"{key}: {values.get(key)!r}; a whole number")
        if not _is_finite(values.get("value_range", 1.0)):
            raise PreprocessingError(f"value_range: {values['value_range']!r}; a number")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})  # type: ignore[arg-type]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Normalise pixels 0..255, RGB, uint8 or float (B, H, W, 3): float32 (B, 3, H, W), on the same device."""
        images = pixels.permute(0, 3, 1, 2).float()
        if self.channels == "BGR":
            images = images.flip(1)
        scale, shift = self.scale_and_shift(images.device)
        return images * scale + shift

    def scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(1, 3, 1, 1) each, float32: ``pixels * scale + shift`` normalises 0..255 in the order of ``channels``."""
        return _scale_and_shift(self, device)

    def for_evaluation(self, pixels: Tensor) -> Tensor:
        """Crop and normalise resized images, uint8 (B, H, W, 3): float32 (B, 3, crop_px, crop_px)."""
        top, left = _centre(pixels.shape[1], self.crop_px), _centre(pixels.shape[2], self.crop_px)
        return self.normalise(pixels[:, top : top + self.crop_px, left : left + self.crop_px])

    def read(self, image: Image.Image | Path | str | np.ndarray) -> np.ndarray:
        """Resize and crop one image for ``for_evaluation``: uint8 (crop_px, crop_px, 3), RGB.

        image: a path, a PIL image (its EXIF rotation is applied), or a uint8 array (H, W, 3) or (H, W). Raises
        PreprocessingError for an array of another kind, an image without pixels and more than 8 bits a channel, and
        OSError for an unreadable file.
        """
        if isinstance(image, np.ndarray):
            if 0 in image.shape:
                raise PreprocessingError(f"the image has no pixels: its shape is {image.shape}")
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
                raise PreprocessingError(
                    f"an image array is uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}"
                )
            return self._centre_of(Image.fromarray(image))
        if isinstance(image, Image.Image):
            return self._centre_of(image)
        with Image.open(image) as opened:
            return self._centre_of(opened)

    def _centre_of(self, image: Image.Image) -> np.ndarray:
        if 0 in image.size:
            raise PreprocessingError(f"the image has no pixels: its width and height are {image.size}")
        return centre_crop(pixels_of(image, self.resizing), self.crop_px)


def deep_mode(image: Image.Image) -> str:
    """The mode of an image with more than 8 bits a channel, "" for any other. Works before its pixels are loaded."""
    if image.mode.startswith(("I", "F")):
        return image.mode
    tiles = getattr(image, "tile", None) or []
    if any(tile.codec_name == "SGI16" for tile in tiles):
        return f"{image.mode};16B"
    rawmodes = [tile.args if isinstance(tile.args, str) else tile.args[0] for tile in tiles if tile.args]
    # 16 bits a pixel (not a channel) is BGR;16 in a BMP.
    deep = [mode for mode in rawmodes if isinstance(mode, str) and ";16" in mode and not mode.startswith("BGR")]
    return deep[0] if deep else ""


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert any 8-bit PIL image to RGB with its EXIF rotation applied; an upright RGB image is returned as it is.

    Transparency is dropped, not blended, as ``convert`` does. An EXIF block that cannot be parsed counts as none, as in
    every browser: the pixels are whole. Raises PreprocessingError for more than 8 bits a channel: the file does not say
    what is black and white, and Pillow would cut grey off at 255. Unlike ImageOps.exif_transpose this makes no needless
    copy and writes no new EXIF block, which fails for malformed blocks.
    """
    if deep := deep_mode(image):
        raise PreprocessingError(f"pixels of mode {deep} are not 8 bits a channel; convert the image first")
    image.load()  # a PNG may carry its EXIF block behind the pixels; a TIFF is turned while it is loaded
    turn = _TURNS.get(_orientation(image))
    upright = image
    if turn is not None:
        upright = image.transpose(turn)
        for key in _WHERE_EXIF_IS:  # the result must not be turned once more
            upright.info.pop(key, None)
    if upright.mode == "RGB":
        return upright
    if upright.mode == "P" and isinstance(upright.info.get("transparency"), bytes):
        upright = upright.convert("RGBA")  # Pillow warns about the direct way; the colours are the same
    return upright.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """The number in the file, 1 to 8 if it is valid; 1 (upright) where there is none."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return 1
    return value if isinstance(value, int) else 1


def pixels_of(image: Image.Image, resizing: Resizing | None) -> np.ndarray:
    """Turn an 8-bit PIL image of any mode into upright RGB of the right size: uint8 (H, W, 3).

    The only way from an image to pixels: in training, evaluation, galleries, exported models and served ones. Raises
    PreprocessingError as ``upright_rgb`` does.
    """
    return resized(upright_rgb(image), resizing)


def resized(image: Image.Image, resizing: Resizing | None) -> np.ndarray:
    """Scale the short side (or both sides) of an RGB image to resize_px, antialiased, with torchvision's rounding.

    short_side: an image longer than MAX_ASPECT times its short side is first cut to that, centrally, which bounds
    the result to resize_px x MAX_ASPECT * resize_px; torchvision has no such bound. None: the image as it is. Returns
    uint8 (H, W, 3) with the values of ``scaled``.
    """
    if resizing is None:
        return np.asarray(image)
    size = resized_size(image.size, resizing)
    if resizing.resize == "short_side" and (box := _centre_box(image.size)) != (0, 0, *image.size):
        image = image.crop(box)
    if size == image.size:
        return np.asarray(image)
    width, height = image.size
    num_rows = max(1, _STRIP_PIXELS // width)
    if num_rows >= height:
        return scaled(np.array(image), size, resizing.interpolation)
    # The rows of a large photograph are narrowed strip by strip. The pixels are the same, because every kernel scales
    # along the rows first; but no second copy of the photograph is made, and a strip stays in the processor's cache.
    narrow = np.empty((height, size[0], 3), dtype=np.uint8)
    for top in range(0, height, num_rows):
        bottom = min(top + num_rows, height)
        strip = np.array(image.crop((0, top, width, bottom)))
        narrow[top:bottom] = scaled(strip, (size[0], bottom - top), resizing.interpolation)
    return scaled(narrow, size, resizing.interpolation)


def scaled(pixels: np.ndarray, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    """Scale contiguous RGB pixels on the CPU to (width, height), antialiased: uint8 (height, width, 3).

    bilinear, bicubic: torch's kernel for uint8, bit for bit torchvision's ``resize`` of a uint8 tensor on every
    processor and with any number of threads. lanczos: Pillow, because torch has no such kernel. Both scale along the
    rows first and round to whole grey levels in between. Pixels of that size already are returned as they are.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if interpolation == "lanczos":
        # Two calls, because Pillow 12.3 scales the columns of some tall images first: up to 29 grey levels away.
        rows = Image.fromarray(pixels).resize((size[0], height), Image.Resampling.LANCZOS)
        return np.array(rows.resize(size, Image.Resampling.LANCZOS))
    import torch

    # Permuting after [None] makes a true channels_last tensor: four times faster than the other way round.
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    images = torch.nn.functional.interpolate(images, size=size[::-1], mode=interpolation, antialias=True)
    result: np.ndarray = images[0].permute(1, 2, 0).numpy()
    return result


def resized_size(size: tuple[int, int], resizing: Resizing) -> tuple[int, int]:
    """(width, height) after ``resized``: torchvision's Resize cuts the fraction of the long side off."""
    if resizing.resize == "squash":
        return resizing.resize_px, resizing.resize_px
    left, top, right, bottom = _centre_box(size)
    short = min(size)
    return int(resizing.resize_px * (right - left) / short), int(resizing.resize_px * (bottom - top) / short)


def _centre_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the part of (width, height) that is kept: all, or the centre at 1 : MAX_ASPECT."""
    longest = MAX_ASPECT * min(size)
    width, height = min(size[0], longest), min(size[1], longest)
    left, top = _centre(size[0], width), _centre(size[1], height)
    return left, top, left + width, top + height


def centre_crop(pixels: np.ndarray, crop_px: int) -> np.ndarray:
    """The centre of (H, W, 3) as a view (crop_px, crop_px, 3), rounded as torchvision's CenterCrop does."""
    top, left = _centre(pixels.shape[0], crop_px), _centre(pixels.shape[1], crop_px)
    return pixels[top : top + crop_px, left : left + crop_px]


def _centre(size_px: int, crop_px: int) -> int:
    return round((size_px - crop_px) / 2)


@lru_cache(maxsize=32)  # a copy to the device for each batch would make the host wait for it
def _scale_and_shift(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    import torch

    with torch.inference_mode(False):  # the constants are used in training too, wherever they are made first
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        scale = preprocessing.value_range / 255 / std
        shift = -torch.tensor(preprocessing.mean, dtype=torch.float64) / std
        return scale.float().view(1, -1, 1, 1).to(device), shift.float().view(1, -1, 1, 1).to(device)
