"""Backbones without an embedding head: what a training has to beat.

    backbone:resnet50            a backbone of raydml's table (torchvision and BN-Inception), published ImageNet weights
    backbone:resnet50:none       the same with random weights;  backbone:bn_inception:PATH  weights from a file
    timm:vit_small_patch16_224   any model of timm, its published weights and preprocessing;  timm:NAME:none  random
    timm:NAME:PATH               the same with weights from a file
    timm:hf-hub:OWNER/NAME       a network of timm that somebody has published on the Hugging Face hub

The embedding of such a backbone is its pooled features, scaled to length 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raydml.errors import did_you_mean
from raydml.images.preprocessing import Preprocessing
from raydml.models.backbones import BACKBONES, HUB, TIMM, ModelError
from raydml.models.lookup import facts_of
from raydml.models.pretrained import WeightsError, published_weights

if TYPE_CHECKING:  # a target is checked before torch and timm are imported
    from torch import nn

PREFIXES = ("backbone:", "timm:")
_SEED = 0


class BareTarget(NamedTuple):
    """The parts of "backbone:NAME[:WEIGHTS]" or "timm:NAME[:WEIGHTS]".

    weights: "default" (published), "none" (random, seed 0), or a path.
    """

    kind: str
    name: str
    weights: str

    def __str__(self) -> str:
        return ":".join(self)


class BareBackbone(NamedTuple):
    """A backbone without an embedding head, and its preprocessing.

    network: prepared images (B, 3, crop, crop) to unit features (B, F), in evaluation mode on the CPU.
    """

    name: str
    network: nn.Module
    preprocessing: Preprocessing


def parse_target(text: str) -> BareTarget:
    """Return the parts of a target, after every check that needs neither torch nor a network.

    Raises ModelError for an unknown name, WeightsError for a backbone without published weights or a missing file.
    """
    kind, _, rest = text.partition(":")
    prefix = HUB if kind == "timm" and rest.startswith(HUB) else ""
    name, _, weights = rest.removeprefix(prefix).partition(":")
    name = f"{prefix}{name}" if name else ""
    target = BareTarget(kind, name, weights or "default")
    if f"{kind}:" not in PREFIXES or not name:
        raise ModelError(f"{text!r}: a bare backbone is backbone:NAME or timm:NAME")
    if kind == "timm":
        return _with_weights(target, text)
    if name not in BACKBONES:
        hint = did_you_mean(name, BACKBONES) or "."
        raise ModelError(f"{text}: no backbone {name!r}{hint} Choices: {', '.join(BACKBONES)}; or timm:NAME")
    facts = BACKBONES[name]
    if target.weights == "default" and facts.weights_file is None:
        published = ", ".join(f"backbone:{other}" for other, one in BACKBONES.items() if one.weights_file)
        by_path = f", or get {facts.weights_by_path} and write {kind}:{name}:PATH" if facts.weights_by_path else ""
        raise WeightsError(
            f"{text}: {name} has no published weights. Cure: one that has ({published}){by_path}, or "
            f"{kind}:{name}:none for random weights"
        )
    return _with_weights(target, text)


def _with_weights(target: BareTarget, text: str) -> BareTarget:
    """Return a target whose file of weights is there, if it names one. Raises WeightsError."""
    if target.weights not in ("default", "none") and not Path(target.weights).is_file():
        raise WeightsError(
            f"{text}: no such file: {target.weights}. Cure: a .pth or .safetensors file, default or none"
        )
    return target


def open_bare(text: str, *, resize_px: int = 256, crop_px: int = 224) -> BareBackbone:
    """Return the backbone of a target. resize_px, crop_px: for raydml's own; timm's models define their own.

    Raises ModelError for unknown names or crops that do not fit, WeightsError for weights that are not available.
    """
    target = parse_target(text)
    if target.kind == "timm":
        return _of_timm(target)
    from raydml.models.network import preprocessing_for

    weights, file_name = target.weights, BACKBONES[target.name].weights_file
    if weights == "default" and file_name is not None:
        weights = str(published_weights(file_name, _random(target)))
    trunk = _trunk(target.name, weights)
    preprocessing = preprocessing_for(target.name, resize_px=resize_px, crop_px=crop_px)
    return BareBackbone(str(target), _with_unit_features(trunk), preprocessing)


def _trunk(backbone: str, weights: str) -> nn.Module:
    """Return a backbone with the pooling that it was trained with."""
    from raydml.models.network import build_network

    network = build_network(
        backbone=backbone,
        embedding_dim=1,  # of the head, which is left out
        layer_norm=False,
        normalize="none",
        freeze_batch_norm=False,
        weights=weights,
        seed=_SEED,
        pooling=facts_of(backbone).own_pooling,  # type: ignore[arg-type]
    )
    return network.trunk


def _random(target: BareTarget) -> str:
    return f"{target.kind}:{target.name}:none for random weights"


def _with_unit_features(trunk: nn.Module) -> nn.Module:
    """Return a module, in evaluation mode, that scales the features of a backbone to length 1."""
    import torch

    class UnitFeatures(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = trunk

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(self.trunk(images).float(), dim=1)

    return UnitFeatures().eval()


def _of_timm(target: BareTarget) -> BareBackbone:
    from raydml.models.timm_source import source_of

    facts_of(f"{TIMM}{target.name}")  # an unknown name has no weights either
    weights = target.weights
    if weights == "default":
        weights = str(source_of(target.name).fetched_weights(_random(target)))
    trunk = _trunk(f"{TIMM}{target.name}", weights)
    preprocessing = _preprocessing_of(target.name, trunk.get_submodule("model"))
    return BareBackbone(str(target), _with_unit_features(trunk), preprocessing)


def _preprocessing_of(name: str, trunk: nn.Module) -> Preprocessing:
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(trunk)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ModelError(f"timm:{name} takes images of {config['input_size']}; raydml makes square RGB images only")
    return Preprocessing(
        # As in timm's own transform: the short side to floor(crop / crop_pct), then the centre.
        resize_px=int(height / config["crop_pct"]),
        crop_px=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize="squash" if config.get("crop_mode") == "squash" else "short_side",
        interpolation=config["interpolation"],
    )
