"""Backbones without an embedding head: what any training has to beat.

    backbone:resnet50            of raydml's own table (torchvision and BN-Inception), published ImageNet weights
    backbone:resnet50:none       the same with random weights;  backbone:bn_inception:PATH  weights from a file
    timm:vit_small_patch16_224   any model of timm, its published weights and preprocessing;  timm:NAME:none  random

An image is its pooled features, scaled to length 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raydml.images.preprocessing import Preprocessing
from raydml.models.backbones import BACKBONES
from raydml.models.network import ModelError, build_network, preprocessing_for

PREFIXES = ("backbone:", "timm:")
_SEED = 0


class BareBackbone(NamedTuple):
    """network: prepared images (B, 3, crop, crop) to unit features (B, F), in evaluation mode on the CPU."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing


class _UnitFeatures(nn.Module):
    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(self.trunk(images).float(), dim=1)


def open_bare(target: str, *, resize_px: int = 256, crop_px: int = 224) -> BareBackbone:
    """The backbone that "backbone:NAME[:WEIGHTS]" or "timm:NAME[:WEIGHTS]" means.

    WEIGHTS: "default" (published), "none" (random, seed 0), or for backbone: a path. resize_px, crop_px: for backbones
    of the table; timm's models say their own.

    Raises ModelError for names that do not exist or crops that do not fit, WeightsError for weights that cannot be had.
    """
    kind, _, rest = target.partition(":")
    name, _, weights = rest.partition(":")
    weights = weights or "default"
    if f"{kind}:" not in PREFIXES or not name:
        raise ModelError(f"{target!r}: a bare backbone is backbone:NAME or timm:NAME")
    if kind == "timm":
        return _of_timm(name, weights)
    if name not in BACKBONES:
        raise ModelError(f"{target!r}: backbone: {name!r}; one of {', '.join(BACKBONES)}; or timm:NAME")
    preprocessing = preprocessing_for(name, resize_px=resize_px, crop_px=crop_px)
    network = build_network(
        backbone=name,
        embedding_dim=1,  # of the head, which is left out
        layer_norm=False,
        normalize="none",
        freeze_batch_norm=False,
        weights=weights,
        seed=_SEED,
    )
    return BareBackbone(f"{kind}:{name}:{weights}", _UnitFeatures(network.trunk).eval(), preprocessing)


def _of_timm(name: str, weights: str) -> BareBackbone:
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm:{name}: timm is not installed. Cure: pip install 'raydml[timm]'") from error
    if weights not in ("default", "none"):
        raise ModelError(f"timm:{name}:{weights}: weights are default or none")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5]
        hint = f"; names like it: {', '.join(near)}" if near else ""
        raise ModelError(f"timm:{name}: timm {timm.__version__} has no such model{hint}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        trunk = timm.create_model(name, pretrained=weights == "default", num_classes=0)
    return BareBackbone(f"timm:{name}:{weights}", _UnitFeatures(trunk).eval(), _preprocessing_of(name, trunk))


def _preprocessing_of(name: str, trunk: nn.Module) -> Preprocessing:
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(trunk)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise ModelError(f"timm:{name}: it wants images of {config['input_size']}, raydml makes square RGB ones")
    return Preprocessing(
        # As timm's own transform: the short side to floor(crop / crop_pct), then the centre.
        resize_px=int(height / config["crop_pct"]),
        crop_px=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize="squash" if config.get("crop_mode") == "squash" else "short_side",
        interpolation=config["interpolation"],
    )
