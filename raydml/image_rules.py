"""What must fit together among images, augmentation and backbones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from raydml.model import BACKBONES
from raydml.problems import Problem

Rule = tuple[tuple[str, ...], Callable[..., Iterator[Problem]]]  # the sections it reads, and the rule


def _data(data: Any) -> Iterator[Problem]:
    if data.crop_px > data.resize_px:
        message = f"is larger than resize_px, {data.resize_px}: the crop is cut out of the resized image"
        yield Problem("data.crop_px", data.crop_px, message, cure=f"write at most {data.resize_px}, or raise resize_px")
    if data.name == "image_list" and data.list_file is None:
        cure = "name the CSV, relative to machine.data_root"
        yield Problem("data.list_file", None, "is required by image_list", cure=cure)
    if data.name != "image_list" and data.list_file is not None:
        message = f"is not used by {data.name}; it is by image_list"
        yield Problem("data.list_file", data.list_file, message, cure="remove it, or set data.name to image_list")
    split = data.split
    if split.fold is not None and split.fold >= split.num_folds:
        message = f"there are {split.num_folds} folds (num_folds), counted from 0"
        yield Problem("data.split.fold", split.fold, message, cure=f"write 0 to {split.num_folds - 1}, or null")


def _augmentation(data: Any) -> Iterator[Problem]:
    augmentation, root = data.augmentation, "data.augmentation"
    scale = augmentation.random_resized_crop
    if scale is not None and not scale[0] <= scale[1] <= 1:
        message = "must be the smallest and the largest share of the area, at most 1"
        yield Problem(f"{root}.random_resized_crop", list(scale), message, cure="write for example [0.2, 1.0]")
    if scale is None and augmentation.aspect_ratio != type(augmentation)().aspect_ratio:
        message = "has no effect without random_resized_crop"
        yield Problem(f"{root}.aspect_ratio", list(augmentation.aspect_ratio), message, cure="remove it")
    if data.cache == "off" and (scale is None or data.resize == "squash"):
        message = "would change nothing but the time: only a random_resized_crop can be cut before the image is resized"
        if data.resize == "squash":
            message = "contradicts resize: squash, which resizes before it crops"
        yield Problem("data.cache", "off", message, cure="remove it")
    if scale is not None and augmentation.random_crop:
        message = "excludes random_resized_crop: a crop is either resized or not"
        yield Problem(f"{root}.random_crop", True, message, cure="remove one of them")
    if augmentation.padding_px and not augmentation.random_crop:
        message = "has no effect without random_crop"
        yield Problem(f"{root}.padding_px", augmentation.padding_px, message, cure="remove it, or random_crop: true")
    if augmentation.padding_px >= data.crop_px:
        message = f"would push the whole image of {data.crop_px} px out of sight"
        yield Problem(f"{root}.padding_px", augmentation.padding_px, message, cure=f"write at most {data.crop_px - 1}")
    ranges = {"aspect_ratio": augmentation.aspect_ratio}
    if augmentation.blur is not None:
        ranges["blur.sigma"] = augmentation.blur.sigma
    if augmentation.erasing is not None:
        ranges |= {
            "erasing.scale": augmentation.erasing.scale,
            "erasing.ratio": augmentation.erasing.ratio,
        }
    for key, (low, high) in ranges.items():
        if low > high:
            yield Problem(f"{root}.{key}", [low, high], "must rise", cure=f"write [{high}, {low}]")
    jitter = augmentation.color_jitter
    if jitter is not None and not (jitter.brightness or jitter.contrast or jitter.saturation or jitter.hue):
        yield Problem(f"{root}.color_jitter", jitter.model_dump(), "changes nothing", cure="give one of its settings")


def _data_and_model(data: Any, model: Any) -> Iterator[Problem]:
    facts = BACKBONES[model.backbone]
    smallest = facts.minimum_crop_px
    if facts.fixed_crop_px not in (None, data.crop_px):
        message = f"backbone {model.backbone} takes images of exactly {facts.fixed_crop_px} px"
        cure = f"write crop_px: {facts.fixed_crop_px} and a resize_px at least as large, or choose another backbone"
        yield Problem("data.crop_px", data.crop_px, message, cure=cure)
    elif data.crop_px < smallest:
        message = f"backbone {model.backbone} needs at least {smallest} px"
        cure = f"write crop_px and resize_px of at least {smallest}, or choose backbone convnet"
        yield Problem("data.crop_px", data.crop_px, message, cure=cure)


def _model(model: Any) -> Iterator[Problem]:
    if model.weights == "default" and BACKBONES[model.backbone].weights_file is None:
        message = f"backbone {model.backbone} has no published weights"
        yield Problem("model.weights", model.weights, message, ("none", "PATH"), cure="write weights: none")
    if model.weights == "none" and model.freeze_batch_norm:
        message = "freezes statistics that nothing has trained: weights is none"
        yield Problem("model.freeze_batch_norm", True, message, cure="remove it, or start from trained weights")


IMAGE_RULES: tuple[Rule, ...] = (
    (("data",), _data),
    (("data",), _augmentation),
    (("data", "model"), _data_and_model),
    (("model",), _model),
)
