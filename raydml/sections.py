"""The blocks a trial is made of: data, model, plugins, sampler, optimizer, schedule.

Closed sets (samplers, optimizers, schedules) are one class each, chosen by ``name``: a setting that the chosen one
does not use is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from raydml import plugins
from raydml.model import BACKBONES, Normalisation
from raydml.problems import ABSENT, ConfigError, Problem, nearest_name, problems_from, unknown_name

STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
Range = Annotated[tuple[Positive, Positive], BeforeValidator(_as_tuple)]
OptionalPath = Annotated[Path | None, BeforeValidator(_as_path)]


class Section(BaseModel):
    """A block of the configuration."""

    model_config = STRICT


# --- plugin blocks: {name: margin, beta: 1.2} ------------------------------------------------------------------------


class PluginBlock(BaseModel):
    """A plugin by name with all its settings, also those left at their defaults.

    ``block.name``, ``block.settings``; ``model_dump()`` gives ``{"name": ..., **settings}`` again.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    kind: ClassVar[str]
    name: str

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, block: Any) -> Any:
        if isinstance(block, PluginBlock):
            return block
        if not isinstance(block, Mapping):
            cure = f"write {{name: {block}}}" if isinstance(block, str) else "write {name: ...}"
            raise ConfigError([Problem("", block, "must be a block of keys", cure=cure)])
        choices = plugins.names(cls.kind)
        if "name" not in block:
            raise ConfigError([Problem("name", ABSENT, "is required and missing", choices, cure="add this key")])
        name = block["name"]
        if name not in choices:
            raise ConfigError([unknown_name("name", name, choices, f"one of the {cls.kind}")])
        model = plugins.settings_model(cls.kind, name)
        settings = {key: value for key, value in block.items() if key != "name"}
        try:
            return {"name": name, **model.model_validate(settings).model_dump()}
        except ValidationError as error:
            raise ConfigError(problems_from(error, model, settings)) from error

    @property
    def settings(self) -> dict[str, Any]:
        """Setting -> value: what the plugin's constructor takes after the ``*``."""
        return dict(self.__pydantic_extra__ or {})


class MethodBlock(PluginBlock):
    kind = "methods"


class LossBlock(PluginBlock):
    kind = "losses"


class MinerBlock(PluginBlock):
    kind = "miners"


def _filled_in(block: object) -> object:
    """Regulariser -> its settings, those left at their defaults included. Raises ConfigError with every mistake."""
    if not isinstance(block, Mapping):
        cure = "write {mdr: {weight: 0.6}}, or {} for none"
        raise ConfigError([Problem("", block, "must be a block of regularisers by name", cure=cure)])
    choices = plugins.names("regularizers")
    filled: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for name, settings in block.items():
        if name not in choices:
            nearest = nearest_name(name, choices)
            cure = f"write {nearest}" if nearest else "write one of the choices"
            if name == "name":
                nearest, cure = None, f"write the name as the key: {{{settings}: {{...}}}}"
            message = "is not one of the regularizers"
            problems.append(Problem(str(name), settings, message, choices, nearest, cure))
            continue
        given = {} if settings is None else settings
        if not isinstance(given, Mapping):
            problems.append(Problem(name, given, "must be a block of settings", cure=f"write {name}: {{}}"))
            continue
        model = plugins.settings_model("regularizers", name)
        try:
            filled[name] = model.model_validate(dict(given)).model_dump()
        except ValidationError as error:
            problems += [problem.under(name) for problem in problems_from(error, model, given)]
    if problems:
        raise ConfigError(problems)
    return filled


# By name, because each may stand there once; the order they are written in says nothing.
RegularizerBlocks = Annotated[dict[str, dict[str, Any]], BeforeValidator(_filled_in)]


# --- images and network ----------------------------------------------------------------------------------------------


class SplitSettings(Section):
    """Which classes train, validate and are sealed; see ``data.datasets.make_split``."""

    test_fraction: Fraction = 0.5
    val_fraction: Fraction = 0.5
    num_folds: Annotated[int, Field(ge=2)] = 4
    fold: Index | None = None
    order: Literal["sorted", "shuffled"] = "shuffled"
    seed: Index = 0


class Augmentation(Section):
    """What happens to a training image. random_resized_crop: smallest and largest share of the area, or null."""

    random_resized_crop: Range | None = None
    flip: bool = False
    shift_px: Index = 0


class Data(Section):
    """Which images. ``content`` is the hash of the catalog: filled in at the start, so a change is noticed.

    list_file: CSV of an image_list, relative to ``machine.data_root``.
    """

    name: Literal["digits", "image_folder", "image_list"]
    list_file: str | None = None
    content: str = ""
    resize_px: Count
    crop_px: Count
    split: SplitSettings = SplitSettings()
    augmentation: Augmentation = Augmentation()


def _known_backbone(name: str) -> str:
    if name not in BACKBONES:
        raise ConfigError([unknown_name("", name, tuple(BACKBONES), "one of the backbones")])
    return name


class Model(Section):
    """Backbone and embedding head. weights: default (published ImageNet weights), none (random), or a path.

    freeze_batch_norm is true unless said otherwise where the weights are pretrained, and false where they are not.
    """

    backbone: Annotated[str, AfterValidator(_known_backbone), Field(json_schema_extra={"enum": list(BACKBONES)})]
    weights: str = "default"
    embedding_dim: Count = 128
    layer_norm: bool = False
    normalize: Normalisation = "l2"
    freeze_batch_norm: bool = True

    @model_validator(mode="before")
    @classmethod
    def _freeze_only_what_is_trained(cls, block: Any) -> Any:
        if isinstance(block, Mapping) and "freeze_batch_norm" not in block:
            return {**block, "freeze_batch_norm": block.get("weights", "default") != "none"}
        return block


# --- batches and steps -----------------------------------------------------------------------------------------------


class ClassBalancedSampler(Section):
    """A batch of P classes x K images; batches_per_epoch null: as many as show every class and about every image."""

    name: Literal["class_balanced"]
    classes_per_batch: Annotated[int, Field(ge=2)] = 8
    images_per_class: Count = 4
    batches_per_epoch: Count | None = None


class UniformSampler(Section):
    """Shuffled images without regard to their classes; the last, smaller batch is dropped."""

    name: Literal["uniform"]
    batch_size: Annotated[int, Field(ge=2)] = 32


class _Optimizer(Section):
    """backbone_learning_rate and loss_learning_rate are ``learning_rate`` unless given.

    weight_decay acts on the network, loss_weight_decay on the parameters of the loss and the regularizers.
    """

    learning_rate: Positive = 1e-4
    backbone_learning_rate: Positive | None = None
    loss_learning_rate: Positive | None = None
    weight_decay: NotNegative = 0.0
    loss_weight_decay: NotNegative = 0.0
    gradient_clip: Positive | None = None


class AdamW(_Optimizer):
    name: Literal["adamw"] = "adamw"
    momentum: ClassVar[float] = 0.0  # not a setting here


class Adam(_Optimizer):
    name: Literal["adam"]
    momentum: ClassVar[float] = 0.0  # not a setting here


class Sgd(_Optimizer):
    name: Literal["sgd"]
    momentum: Momentum = 0.0


class RmsProp(_Optimizer):
    name: Literal["rmsprop"]
    momentum: Momentum = 0.0


class _Schedule(Section):
    """warmup_epochs: linear from zero. new_layer_warmup_epochs: only head and loss learn at first."""

    warmup_epochs: Index = 0
    new_layer_warmup_epochs: Index = 0


class Constant(_Schedule):
    name: Literal["constant"] = "constant"
    milestones: ClassVar[tuple[int, ...]] = ()  # not settings here
    gamma: ClassVar[float] = 1.0


class Cosine(_Schedule):
    name: Literal["cosine"]
    milestones: ClassVar[tuple[int, ...]] = ()  # not settings here
    gamma: ClassVar[float] = 1.0


class Step(_Schedule):
    """The learning rate is multiplied by ``gamma`` once ``milestones`` epochs, one after the other, are done."""

    name: Literal["step"]
    milestones: Counts
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
