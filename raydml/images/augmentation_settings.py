"""The settings of the random changes of training images; augmentation.py makes the changes.

This module needs no torch: a configuration is checked without it.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

_Probability = Annotated[float, Field(ge=0, le=1)]
_Strength = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Bounds = Annotated[
    tuple[_Positive, _Positive], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ColorJitter(_Settings):
    """Torchvision's ColorJitter, applied to an image with this probability.

    brightness, contrast, saturation: the factor is uniform in max(0, 1 - value)..1 + value. hue: the shift is uniform
    in -value..value turns of the colour wheel. 0 leaves an operation out. The order of the four is uniform.
    """

    brightness: _Strength = 0.0
    contrast: _Strength = 0.0
    saturation: _Strength = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    probability: _Probability = 1.0


class GaussianBlur(_Settings):
    """Torchvision's GaussianBlur, applied to an image with this probability.

    sigma: in pixels of the crop, uniform in this range. Departure: the kernel reaches three of the largest sigmas,
    where torchvision has its size as a setting.
    """

    sigma: _Bounds = (0.1, 2.0)
    probability: _Probability = 0.5


class Erasing(_Settings):
    """Torchvision's RandomErasing, applied to an image with this probability: a box becomes the mean colour.

    scale: share of the image's area, uniform. ratio: height / width, log-uniform.
    """

    probability: _Probability = 0.5
    scale: _Bounds = (0.02, 0.33)
    ratio: _Bounds = (0.3, 3.3)


class Augmentation(_Settings):
    """The random changes of a training image; by default there are none, and the crop is the centre.

    random_resized_crop: share of the image's area, uniform in this range; the crop is scaled to ``crop_px``.
    aspect_ratio: width / height of that crop, log-uniform. random_crop: a crop of ``crop_px`` at any place of the
    image, after padding_px repeated edge pixels were added on every side. five_crops: the centre or one of the four
    corners, each equally often. flip: left to right, with probability one half. grayscale: the probability. Each is
    torchvision's transform of that name.

    Grayscale comes before the jitter, as in "adv" of Roth et al. (2020), Revisiting Training Strategies. SimCLR has it
    after, which differs for grey images whose hue is shifted.
    """

    random_resized_crop: _Bounds | None = None
    aspect_ratio: _Bounds = (3 / 4, 4 / 3)
    random_crop: bool = False
    padding_px: Annotated[int, Field(ge=0)] = 0
    five_crops: bool = False
    flip: bool = False
    color_jitter: ColorJitter | None = None
    grayscale: _Probability = 0.0
    blur: GaussianBlur | None = None
    erasing: Erasing | None = None

    @model_serializer(mode="wrap")
    def _without_later_settings(self, serialised: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was added after the first studies, where it has no effect: fingerprints stay as they were."""
        plain: dict[str, Any] = serialised(self)
        return {key: value for key, value in plain.items() if key != "five_crops" or value}
