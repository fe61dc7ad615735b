"""Backbones of timm, ``timm:NAME``: any of its networks as a trunk, with its own weights, image size and pooling."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raydml.data.catalog import listed
from raydml.models.adapters import adaptable_layers
from raydml.models.backbones import TIMM, BackboneFacts, ModelError
from raydml.models.choices import Pooling
from raydml.models.pooling import GeM
from raydml.models.pretrained import WeightsError, differences
from raydml.models.timm_source import source_of
from raydml.models.trunk_parts import block_ends, has_batch_norm, layers_of

_SMALLEST_PX = 32  # of networks without a fixed size: their five halvings leave one pixel


class _Found(NamedTuple):
    """Facts about a network of timm, found without memory for its weights.

    feature_dim: of its own pooling. map_dim: channels of its last map, or of its tokens. is_map: whether it has a map.
    num_prefix: tokens that are no patch. own: its pooling. patch_px: where the crop may be any multiple of it, else
    None. size_px, is_fixed: the image that it was made for, and whether it takes no other. The others as in
    `BackboneFacts`.
    """

    feature_dim: int
    map_dim: int
    is_map: bool
    num_prefix: int
    own: Pooling
    patch_px: int | None
    size_px: int
    is_fixed: bool
    stages: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_blocks: int
    takes_drop_path: bool
    can_checkpoint: bool
    has_batch_norm: bool
    has_layers: bool
    adaptable: Mapping[str, tuple[str, ...]]
    why_not_adaptable: str


class TimmTrunk(nn.Module):
    """A network of timm as a trunk: images (B, 3, H, W) -> features (B, F).

    pooling: how its last map, or its tokens, become a vector; its own is done by timm. "average", "max" and "gem" are
    over the map, or over the tokens of patches; "cls" is the class token, "cls_mean" that token and the mean of the
    patches, behind each other.
    """

    def __init__(self, model: nn.Module, pooling: Pooling, own: Pooling) -> None:
        super().__init__()
        self.model = model
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 0) or 0)
        self.is_channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.pooling: Pooling = pooling
        self.is_own = pooling == own
        self.gem = GeM() if pooling == "gem" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        if self.is_own:
            features: Tensor = self.model(images)
            return features
        found: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        if found.ndim == 4:
            maps = found.permute(0, 3, 1, 2) if self.is_channels_last else found
            return self._pooled(maps)
        prefix, patches = found[:, : self.num_prefix_tokens], found[:, self.num_prefix_tokens :]
        if self.pooling == "cls":
            return prefix[:, 0]
        if self.pooling == "cls_mean":
            return torch.cat((prefix[:, 0], patches.mean(dim=1)), dim=1)
        return self._pooled(patches.transpose(1, 2)[..., None])

    def _pooled(self, maps: Tensor) -> Tensor:
        """Return (B, C) of maps (B, C, H, W)."""
        if self.pooling == "gem":
            pooled: Tensor = self.gem(maps)
            return pooled.flatten(1)
        flat = maps.flatten(2)
        return flat.max(dim=2).values if self.pooling == "max" else flat.mean(dim=2)


@lru_cache(maxsize=256)
def facts_of_timm(backbone: str) -> BackboneFacts:
    """Return the facts about ``timm:NAME``. Raises ModelError for a name that timm does not have."""
    name = backbone.removeprefix(TIMM)
    found = _look_at(name)
    dims = {"average": found.map_dim, "max": found.map_dim, "gem": found.map_dim}
    if not found.is_map and found.num_prefix:
        dims |= {"cls": found.map_dim, "cls_mean": 2 * found.map_dim}
    dims[found.own] = found.feature_dim
    sizes = f"multiples of {found.patch_px}" if found.patch_px else ""
    return BackboneFacts(
        build=partial(_build, name, found.own),
        feature_dim=found.feature_dim,
        minimum_crop_px=found.patch_px or (found.size_px if found.is_fixed else _SMALLEST_PX),
        fixed_crop_px=found.size_px if found.is_fixed and not found.patch_px else None,
        weights_file=source_of(name).address,
        classifier=(),
        stages=tuple(f"model.{stage}" for stage in found.stages),
        mean=found.mean,
        std=found.std,
        fits=partial(_fits, found),
        which_fit=sizes,
        poolings=dims,
        own_pooling=found.own,
        is_timm=True,
        num_blocks=found.num_blocks,
        takes_drop_path=found.takes_drop_path,
        can_checkpoint=found.can_checkpoint,
        has_batch_norm=found.has_batch_norm,
        has_layers=found.has_layers,
        adaptable=found.adaptable,
        why_not_adaptable=found.why_not_adaptable,
    )


def _fits(found: _Found, crop_px: int) -> bool:
    return found.patch_px is None or crop_px % found.patch_px == 0


@lru_cache(maxsize=256)
def _look_at(name: str) -> _Found:
    import timm
    from timm.data import resolve_model_data_config

    source = source_of(name)
    if not timm.is_model(source.architecture):
        near = difflib.get_close_matches(source.architecture.partition(".")[0], timm.list_models(), n=5, cutoff=0.5)
        hint = f" Names like it: {', '.join(near)}." if near else ""
        raise ModelError(f"timm {timm.__version__} has no network {source.architecture!r}.{hint}")
    if not source.is_of_hub and timm.is_model_pretrained(name) is False and "." in name:
        arch, _, tag = name.partition(".")
        tags = ", ".join(timm.list_models(f"{arch}.*", pretrained=True)[:8]) or "none"
        raise ModelError(f"timm {timm.__version__} has no weights {tag!r} of {arch!r}. Names with weights: {tags}")
    try:
        with torch.device("meta"), torch.no_grad():
            model = source.create().eval()
            config: dict[str, Any] = resolve_model_data_config(model)
            channels, height, width = config["input_size"]
            images = torch.empty(1, 3, height, width)
            own, last = model(images), model.forward_features(images)
            adaptable, why_not_adaptable = adaptable_layers(model, images)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
        raise ModelError(f"{TIMM}{name} cannot be a backbone: {type(error).__name__}: {error}") from error
    if channels != 3 or height != width or not isinstance(last, Tensor) or own.ndim != 2:
        raise ModelError(f"{TIMM}{name} cannot be a backbone: it does not make one vector of a square RGB image")
    is_map = last.ndim == 4
    is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch_px = int(patch[0]) if isinstance(patch, tuple) and patch[0] == patch[1] else None
    is_free = not is_map and patch_px is not None and _takes(name, img_size=4 * patch_px)
    stages = _stages(model, is_map)
    kinds: Mapping[str, Pooling] = {"token": "cls", "map": "attention"}
    kind = getattr(model, "global_pool", "avg")
    pooling = kinds.get(kind, "average") if isinstance(kind, str) else "average"
    trunk = TimmTrunk(model, pooling, pooling)
    return _Found(
        feature_dim=int(own.shape[1]),
        map_dim=int(last.shape[-1] if not is_map or is_last else last.shape[1]),
        is_map=is_map,
        num_prefix=int(getattr(model, "num_prefix_tokens", 0) or 0),
        own=pooling,
        patch_px=patch_px if is_free else None,
        size_px=height,
        is_fixed=bool(model.pretrained_cfg.get("fixed_input_size")),
        stages=stages,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        num_blocks=len(block_ends(trunk, tuple(f"model.{stage}" for stage in stages))),
        takes_drop_path=_takes(name, drop_path_rate=0.1),
        can_checkpoint=_can_checkpoint(model),
        has_batch_norm=has_batch_norm(trunk),
        adaptable=adaptable,
        why_not_adaptable=why_not_adaptable,
        has_layers=hasattr(model, "group_matcher") and len(set(layers_of(trunk, ()).values())) > 1,
    )


def _takes(name: str, **settings: Any) -> bool:
    """Return whether a network can be built with a setting, such as another size of its images."""
    try:
        with torch.device("meta"):
            source_of(name).create(**settings)
    except (TypeError, AssertionError, RuntimeError):
        return False
    return True


def _can_checkpoint(model: nn.Module) -> bool:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        return False
    return True


def _stages(model: nn.Module, is_map: bool) -> tuple[str, ...]:
    """Return the modules whose outputs are the four stages; none where timm does not list them."""
    blocks = getattr(model, "blocks", None)
    if not is_map and isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) >= 4:
        return tuple(f"blocks.{len(blocks) * quarter // 4 - 1}" for quarter in (1, 2, 3, 4))
    info = getattr(model, "feature_info", None)
    names = [row["module"] for row in info][-4:] if isinstance(info, list) else []
    known = {name for name, _ in model.named_modules()}
    return tuple(names) if len(names) == 4 and set(names) <= known else ()


def _build(
    name: str,
    own: Pooling,
    pooling: Pooling,
    *,
    crop_px: int | None = None,
    drop_path: float = 0.0,
    state: Mapping[str, Tensor] | None = None,
    origin: str = "",
) -> TimmTrunk:
    """Return a network of timm, with the weights of a state dict or random ones.

    crop_px: the side of its images; None for its own. origin: of the weights. Raises WeightsError where they do not
    fit, or are not complete.
    """
    found, source = _look_at(name), source_of(name)
    settings: dict[str, Any] = {}
    if found.patch_px is not None and crop_px is not None:
        settings["img_size"] = crop_px
    if drop_path:
        settings["drop_path_rate"] = drop_path
    if state is None:
        return TimmTrunk(source.create(**settings), pooling, own)
    with _warnings_of_timm() as warnings:
        try:
            model = source.create(pretrained_cfg_overlay={"state_dict": dict(state)}, **settings)
        except (RuntimeError, KeyError) as error:
            raise _misfit(name, settings, state, origin) from error
    if warnings:
        raise _misfit(name, settings, state, origin)
    return TimmTrunk(model, pooling, own)


def _misfit(name: str, settings: Mapping[str, Any], state: Mapping[str, Tensor], origin: str) -> WeightsError:
    """Return the error for weights of another network: how many tensors differ, and the first of each kind."""
    model = source_of(name).create(**settings)
    own, given = (
        {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
        for tensors in (model.state_dict(), state)
    )
    kinds = zip(("missing", "unknown to it", "of another shape"), differences(own, given), strict=True)
    said = [f"{kind}: {listed(keys, 2)}" for kind, keys in kinds if keys]
    return WeightsError(
        f"weights: {origin} does not fit {TIMM}{name}: it has {len(own)} tensors; {'; '.join(said)}. Cure: weights of "
        "this network, in timm's names, or the backbone that the file is of"
    )


@contextmanager
def _warnings_of_timm() -> Iterator[list[str]]:
    """Collect timm's log messages of tensors that are missing, or that a network does not have."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (said := record.getMessage()).startswith(("Missing keys", "Unexpected keys")):
                found.append(said)

    logger, handler = logging.getLogger("timm.models._builder"), Collector(logging.INFO)
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = before[0]
        logger.setLevel(before[1])
