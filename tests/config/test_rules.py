"""What must fit together in a trial's model: each rule with its path, its words and a cure that works."""

import copy
import math
from typing import Any

import pytest

from raydml.config.trial import parse_trial
from raydml.models.backbones import BACKBONES
from raydml.models.network import build_network
from raydml.training import parts
from tests.config.problems import problems_of

CONVNET = {"backbone": "convnet", "weights": "none"}
TRIAL = {
    "data": {"name": "digits", "resize_px": 256, "crop_px": 224},
    "model": CONVNET,
    "loss": {"name": "margin"},
    "miner": {"name": "distance_weighted"},
    "sampler": {"name": "class_balanced"},
}


def trial_with(model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return copy.deepcopy({**TRIAL, "model": model, **sections})


ORTHOGONAL = {"regularizers": {"orthogonality": {"weight": 1.0}}}
WHOLE = {**CONVNET, "embedding_dim": 128, "projection": "none"}
BN_INCEPTION = {"backbone": "bn_inception"}


def crop(pixels: int) -> dict[str, Any]:
    return {"data": {**TRIAL["data"], "crop_px": pixels}}


@pytest.mark.parametrize(
    ("model", "sections", "path", "message", "cure"),
    [
        (WHOLE | {"embedding_dim": 64}, {}, "model.embedding_dim", "convnet has 128 features", "embedding_dim: 128"),
        ({**WHOLE, "head_init": "xavier_normal"}, {}, "model.head_init", "has no effect", "remove it"),
        (WHOLE, ORTHOGONAL, "regularizers.orthogonality", "projection is none", "model.projection: linear"),
        ({"backbone": "vit_b_16", "pooling": "max"}, {}, "model.pooling", "has no effect", "remove it"),
        (BN_INCEPTION, {}, "model.weights", "no published weights to fetch", "get bn_inception-52deb4733.pth"),
        (BN_INCEPTION | {"weights": "none"}, crop(240), "data.crop_px", "223 to 230", "write crop_px: 230 and"),
        ({"backbone": "resnet18"}, crop(8), "data.crop_px", "at least 32 px", "write crop_px: 32 and"),
        ({"backbone": "vit_b_16"}, crop(200), "data.crop_px", "exactly 224 px", "write crop_px: 224 and"),
        ({**CONVNET, "dropout": 1.0}, {}, "model.dropout", "must be < 1", "give a number < 1"),
        ({**CONVNET, "dropout": -0.1}, {}, "model.dropout", "must be >= 0", "give a number >= 0"),
        ({**CONVNET, "pooling": "median"}, {}, "model.pooling", "is not one of the choices", "write one"),
        ({**CONVNET, "projection": "linear_no_bais"}, {}, "model.projection", "is not one", "write linear_no_bias"),
        ({**CONVNET, "head_init": "xavier"}, {}, "model.head_init", "is not one", "write xavier_normal"),
        ({**CONVNET, "num_slices": 4}, {}, "model.num_slices", "is an unknown key", "remove it"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(model, sections, path, message, cure) -> None:
    (problem,) = problems_of(parse_trial, trial_with(model, **sections)).values()
    assert problem.path == path
    assert message in problem.message
    assert cure in problem.cure


@pytest.mark.parametrize(
    ("augmentation", "key", "message"),
    [
        ({"random_resized_crop": [0.0, 1.0]}, "random_resized_crop.0", "> 0"),
        ({"random_resized_crop": [0.8, 1.5]}, "random_resized_crop", "at most 1"),
        ({"random_resized_crop": [0.1, 1.0], "aspect_ratio": [2.0, 1.0]}, "aspect_ratio", "must rise"),
        ({"random_resized_crop": [0.1, 1.0], "aspect_ratio": [1.0, math.nan]}, "aspect_ratio.1", "finite"),
        ({"random_resized_crop": [0.1, 1.0], "random_crop": True}, "random_crop", "excludes random_resized_crop"),
        ({"aspect_ratio": [0.5, 2.0]}, "aspect_ratio", "no effect without random_resized_crop"),
        ({"random_crop": True, "padding_px": -1}, "padding_px", ">= 0"),
        ({"padding_px": 4}, "padding_px", "no effect without random_crop"),
        ({"grayscale": 1.1}, "grayscale", "<= 1"),
        ({"color_jitter": {"brightness": -0.1}}, "color_jitter.brightness", ">= 0"),
        ({"color_jitter": {"contrast": math.inf}}, "color_jitter.contrast", "finite"),
        ({"color_jitter": {"hue": 0.6}}, "color_jitter.hue", "<= 0.5"),
        ({"color_jitter": {"hue": 0.1, "probability": 1.2}}, "color_jitter.probability", "<= 1"),
        ({"color_jitter": {}}, "color_jitter", "changes nothing"),
        ({"blur": {"sigma": [0.0, 2.0]}}, "blur.sigma.0", "> 0"),
        ({"blur": {"sigma": [2.0, 1.0]}}, "blur.sigma", "must rise"),
        ({"erasing": {"probability": 2}}, "erasing.probability", "<= 1"),
        ({"erasing": {"scale": [0.5, 0.2]}}, "erasing.scale", "at most 1"),
        ({"erasing": {"scale": [0.5, 1.2]}}, "erasing.scale", "at most 1"),
        ({"erasing": {"ratio": [2.0, 1.0]}}, "erasing.ratio", "must rise"),
    ],
)
def test_an_augmentation_that_cannot_be_is_refused(augmentation, key, message) -> None:
    raw = trial_with(CONVNET, data={**TRIAL["data"], "augmentation": augmentation})
    (problem,) = problems_of(parse_trial, raw).values()
    assert problem.path == f"data.augmentation.{key}"
    assert message in problem.message


@pytest.mark.parametrize(
    "model",
    [
        CONVNET,
        {**CONVNET, "pooling": "max", "dropout": 0.01, "head_init": "kaiming_normal"},
        {**WHOLE, "layer_norm": True},
        {**CONVNET, "embedding_dim": 64, "projection": "linear_no_bias", "head_init": "xavier_normal"},
    ],
)
def test_what_is_accepted_can_be_built(model) -> None:
    trial = parse_trial(trial_with(model))
    network = build_network(**trial.model.model_dump(), seed=0)
    assert network.head.embedding_dim == trial.model.embedding_dim
    assert set(model) - {"weights"} <= set(parts.network_arguments(trial))


def test_the_head_of_the_classification_baseline_is_accepted_at_both_dimensions() -> None:
    for dim, projection in ((2048, "none"), (512, "linear_no_bias")):
        model = {"backbone": "resnet50", "embedding_dim": dim, "projection": projection, "layer_norm": True}
        assert parse_trial(trial_with(model)).model.head_init == "torch"


def test_left_out_the_new_settings_change_nothing() -> None:
    model = parse_trial(trial_with(CONVNET)).model
    assert (model.pooling, model.dropout, model.projection, model.head_init) == ("average", 0.0, "linear", "torch")


def test_bn_inception_with_a_path_freezes_its_statistics() -> None:
    model = parse_trial(trial_with({"backbone": "bn_inception", "weights": "bn_inception-52deb4733.pth"})).model
    assert model.freeze_batch_norm is True
    assert all(BACKBONES[model.backbone].takes_crop(crop_px) for crop_px in (224, 227))
