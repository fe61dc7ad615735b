"""The blocks of a trial about images and the network: data, model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from raydml.config.sections import Count, Fraction, Index, Section
from raydml.errors import ConfigError, unknown_name
from raydml.images.augmentation import Augmentation
from raydml.images.preprocessing import Interpolation, Resize
from raydml.models.backbones import BACKBONES, Pooling
from raydml.models.head import HeadInit, Normalisation, Projection


class SplitSettings(Section):
    """Which classes train, validate and are sealed; see ``data.splits.make_split``."""

    test_fraction: Fraction = 0.5
    val_fraction: Fraction = 0.5
    num_folds: Annotated[int, Field(ge=2)] = 4
    fold: Index | None = None
    order: Literal["sorted", "shuffled"] = "shuffled"
    seed: Index = 0


class Data(Section):
    """Which images, and how a file becomes an input.

    content: hash of the catalog, filled in at the start, so that a change is noticed. list_file: CSV of an image_list,
    relative to ``machine.data_root``. resize: the short side becomes ``resize_px``, or both sides (squash).
    cache: training crops are cut from the resized images, decoded once per machine; off: from each file at its full
    resolution, decoded every time, as the papers do that crop before they resize.
    """

    name: Literal[
        "digits",
        "image_folder",
        "image_list",
        "cub200",
        "cars196",
        "sop",
        "inshop",
        "vehicleid_small",
        "vehicleid_medium",
        "vehicleid_large",
    ]
    list_file: str | None = None
    content: str = ""
    resize_px: Count
    resize: Resize = "short_side"
    interpolation: Interpolation = "bilinear"
    crop_px: Count
    cache: Literal["on", "off"] = "on"
    split: SplitSettings = SplitSettings()
    augmentation: Augmentation = Augmentation()


def _known_backbone(name: str) -> str:
    if name not in BACKBONES:
        raise ConfigError([unknown_name("", name, tuple(BACKBONES), "one of the backbones")])
    return name


class Model(Section):
    """Backbone and embedding head. weights: default (published ImageNet weights), none (random), or a path.

    pooling: what becomes of the backbone's last map. The head is [layer norm], [dropout of the features], projection
    (none: embedding_dim is the backbone's number of features), normalisation. head_init: the projection's first values.
    freeze_batch_norm is true unless said otherwise where the weights are pretrained, and false where they are not.
    """

    backbone: Annotated[str, AfterValidator(_known_backbone), Field(json_schema_extra={"enum": list(BACKBONES)})]
    weights: str = "default"
    embedding_dim: Count = 128
    layer_norm: bool = False
    normalize: Normalisation = "l2"
    freeze_batch_norm: bool = True
    pooling: Pooling = "average"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    projection: Projection = "linear"
    head_init: HeadInit = "torch"

    @model_validator(mode="before")
    @classmethod
    def _freeze_only_what_is_trained(cls, block: Any) -> Any:
        if isinstance(block, Mapping) and "freeze_batch_norm" not in block:
            return {**block, "freeze_batch_norm": block.get("weights", "default") != "none"}
        return block
