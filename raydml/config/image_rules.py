"""What must fit together among images, augmentation and backbones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from raydml.errors import Problem
from raydml.models.backbones import BACKBONES

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
    scale, blur, erasing = augmentation.random_resized_crop, augmentation.blur, augmentation.erasing
    shares = {"random_resized_crop": scale, "erasing.scale": erasing and erasing.scale}
    for key, share in shares.items():
        if share is not None and not share[0] <= share[1] <= 1:
            message = "must be the smallest and the largest share of the area, at most 1"
            yield Problem(f"{root}.{key}", list(share), message, cure="write for example [0.2, 1.0]")
    ranges = {
        "aspect_ratio": augmentation.aspect_ratio,
        "blur.sigma": blur and blur.sigma,
        "erasing.ratio": erasing and erasing.ratio,
    }
    for key, bounds in ranges.items():
        if bounds is not None and bounds[0] > bounds[1]:
            yield Problem(f"{root}.{key}", list(bounds), "must rise", cure=f"write {list(bounds[::-1])}")
    if scale is None and augmentation.aspect_ratio != type(augmentation)().aspect_ratio:
        message = "has no effect without random_resized_crop"
        yield Problem(f"{root}.aspect_ratio", list(augmentation.aspect_ratio), message, cure="remove it")
    if data.cache == "off" and (scale is None or data.resize == "squash"):
        message = "has no effect but longer loading: only a random_resized_crop can be cut before the image is resized"
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
        message = f"would allow crops of {data.crop_px} px without a pixel of the image"
        yield Problem(f"{root}.padding_px", augmentation.padding_px, message, cure=f"write at most {data.crop_px - 1}")
    jitter = augmentation.color_jitter
    if jitter is not None and not (jitter.brightness or jitter.contrast or jitter.saturation or jitter.hue):
        yield Problem(f"{root}.color_jitter", jitter.model_dump(), "changes nothing", cure="give one of its settings")


def _data_and_model(data: Any, model: Any) -> Iterator[Problem]:
    facts = BACKBONES[model.backbone]
    if not facts.takes_crop(data.crop_px):
        message = f"backbone {model.backbone} takes crops of {facts.crops} px"
        nearest = facts.nearest_crop_px(data.crop_px)
        cure = f"write crop_px: {nearest} and a resize_px at least as large, or choose another backbone"
        yield Problem("data.crop_px", data.crop_px, message, cure=cure)


def _model(model: Any) -> Iterator[Problem]:
    facts = BACKBONES[model.backbone]
    if model.weights == "default" and facts.weights_file is None:
        message = f"backbone {model.backbone} has no published weights to fetch"
        yield Problem("model.weights", model.weights, message, ("none", "PATH"), cure=facts.weights_cure)
    if model.weights == "none" and model.freeze_batch_norm:
        message = "freezes statistics that nothing has trained: weights is none"
        yield Problem("model.freeze_batch_norm", True, message, cure="remove it, or start from trained weights")
    if model.pooling != "average" and not facts.has_pooling:
        message = f"has no effect: backbone {model.backbone} has no map to pool"
        yield Problem("model.pooling", model.pooling, message, cure="remove it, or choose another backbone")


def _projection(model: Any) -> Iterator[Problem]:
    if model.projection != "none":
        return
    feature_dim = BACKBONES[model.backbone].feature_dim
    if model.embedding_dim != feature_dim:
        message = f"backbone {model.backbone} has {feature_dim} features, and projection none keeps them as they are"
        cure = f"write embedding_dim: {feature_dim}, or projection: linear or linear_no_bias"
        yield Problem("model.embedding_dim", model.embedding_dim, message, cure=cure)
    if model.head_init != "torch":
        message = "has no effect: with projection none there is no layer to initialise"
        yield Problem("model.head_init", model.head_init, message, cure="remove it, or projection: linear")


def _projection_and_regularizers(model: Any, regularizers: Any) -> Iterator[Problem]:
    if model.projection == "none" and "orthogonality" in regularizers:
        message = "needs a linear layer in the head, and model.projection is none"
        cure = "remove it, or write model.projection: linear or linear_no_bias"
        yield Problem("regularizers.orthogonality", regularizers["orthogonality"], message, cure=cure)


IMAGE_RULES: tuple[Rule, ...] = (
    (("data",), _data),
    (("data",), _augmentation),
    (("data", "model"), _data_and_model),
    (("model",), _model),
    (("model",), _projection),
    (("model", "regularizers"), _projection_and_regularizers),
)
