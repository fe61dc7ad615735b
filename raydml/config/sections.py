"""The blocks of a trial: plugins by name, data, model, optimizer, schedule.

Optimizer and schedule are closed sets, one class each, chosen by ``name``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from raydml import registry
from raydml.errors import ConfigError, Problem, unknown_name
from raydml.images.augmentation_settings import Augmentation
from raydml.images.preprocessing import Interpolation, Resize
from raydml.models.backbones import BACKBONES, HUB, TIMM, ModelError
from raydml.models.choices import AdaptedPart, HeadInit, Normalisation, Pooling, Projection
from raydml.models.lookup import facts_of, with_prefix_of_timm
from raydml.ops.addresses import is_address

STRICT = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def as_tuple(value: object) -> object:
    """Return a list as a tuple, and anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: object) -> object:
    if is_address(value):
        raise ValueError("is an address, and must be a folder. Cure: mount the store, and name the folder")
    return Path(value).expanduser() if isinstance(value, str) else value


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1), BeforeValidator(as_tuple)]
OptionalPath = Annotated[Path | None, BeforeValidator(_as_path)]


class Section(BaseModel):
    """A block of the configuration: frozen, strict types, no unknown keys."""

    model_config = STRICT
    #: Settings that were added after the first studies, and their defaults.
    later: ClassVar[Mapping[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _without_later_settings(self, serialised: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was added later, where it has no effect: fingerprints stay as they were."""
        plain: dict[str, Any] = serialised(self)
        later = self.later
        return {key: value for key, value in plain.items() if key not in later or value != later[key]}

    @staticmethod
    def rules(_sections: Mapping[str, Any], /) -> list[Problem]:
        """Return what does not fit together among the values of the keys, each valid by itself."""
        return []

    @model_validator(mode="after")
    def _fits_together(self) -> Section:
        problems = self.rules(dict(self))
        if problems:
            raise ConfigError(problems)
        return self


class PluginBlock(BaseModel):
    """A plugin by name with all its settings, those left at their defaults included: see `registry.checked_settings`.

    ``block.name``, ``block.settings``; ``model_dump()`` returns ``{"name": ..., **settings}``.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")
    kind: ClassVar[str]
    name: str

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, block: Any) -> Any:
        return block if isinstance(block, PluginBlock) else registry.checked_block(cls.kind, block)

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords that the plugin's constructor takes after the ``*``."""
        return dict(self.__pydantic_extra__ or {})


class MethodBlock(PluginBlock):
    kind = "methods"


class LossBlock(PluginBlock):
    kind = "losses"


class MinerBlock(PluginBlock):
    kind = "miners"


class SamplerBlock(PluginBlock):
    kind = "samplers"


class SearcherBlock(PluginBlock):
    kind = "searchers"


def _with_defaults(block: object) -> object:
    """Return regulariser -> all its settings. Raises ConfigError with every mistake."""
    if not isinstance(block, Mapping):
        cure = "write {mdr: {weight: 0.6}}, or {} for none"
        raise ConfigError([Problem("", block, "must be a block of regularisers by name", cure=cure)])
    choices = registry.names("regularizers")
    filled: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for name, settings in block.items():
        if name not in choices:
            problem = unknown_name(str(name), name, choices, "one of the regularizers")._replace(value=settings)
            if name == "name":
                problem = problem._replace(nearest=None, cure=f"write the name as the key: {{{settings}: {{...}}}}")
            problems.append(problem)
            continue
        given = {} if settings is None else settings
        if not isinstance(given, Mapping):
            problems.append(Problem(name, given, "must be a block of settings", cure=f"write {name}: {{}}"))
            continue
        try:
            filled[name] = registry.checked_settings("regularizers", name, given)
        except ConfigError as error:
            problems += [problem.under(name) for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return filled


# A mapping: each regulariser at most once, in any order.
RegularizerBlocks = Annotated[dict[str, dict[str, Any]], BeforeValidator(_with_defaults)]


_EXTRA_NAME = "^[a-z][a-z0-9_]*$"
#: With these words other metrics begin.
_WORDS_OF_METRICS = frozenset(
    (
        *("val", "test", "untrained", "group", "binary", "int8", "small", "medium", "large", "query", "one", "leave"),
        *("recall", "precision", "map", "mrr", "r", "nmi", "ami", "pair", "intra", "inter", "density", "rho"),
    )
)


class SplitSettings(Section):
    """The classes that train, validate and are sealed; see ``data.splits.make_split``.

    val_fraction: of the classes that are not sealed; 0: all of them train, and the weights are those of the last epoch.
    test_fraction: 0 with val_fraction 0: nothing is sealed, all classes train.
    """

    test_fraction: Share = 0.5
    val_fraction: Share = 0.5
    num_folds: Annotated[int, Field(ge=2)] = 4
    fold: Index | None = None
    order: Literal["sorted", "shuffled"] = "shuffled"
    seed: Index = 0


def _prefix_of_metrics(name: str) -> str:
    if not re.fullmatch(_EXTRA_NAME, name) or name.split("_")[0] in _WORDS_OF_METRICS:
        cure = "use small letters, digits and underscores, and begin with a letter, such as street or second_shop"
        raise ConfigError([Problem("", name, "is no name of an extra test, with which its metrics begin", cure=cure)])
    return name


class ExtraTest(Section):
    """Another sealed set on which finalize scores each tested model; its metrics begin with ``name_``.

    root: the folder of its images, relative to ``machine.data_root``. data: the kind of data set; the other keys are
    those of ``data``. All classes are scored, or those of the test part where it gives a split.
    """

    name: Annotated[str, AfterValidator(_prefix_of_metrics), Field(json_schema_extra={"pattern": _EXTRA_NAME})]
    data: Literal["image_folder", "image_list", "parquet", "webdataset"]
    root: str = "."
    list_file: str | None = None
    min_images_per_class: Count = 1
    group: str | None = None
    exclude_same: Literal["nothing", "group"] = "nothing"
    path: str | None = None
    image: str = "image"
    label: str = "label"


class Data(Section):
    """The images, and how a file becomes an input.

    content: hash of the catalog, filled in at the start, so that a change is found. list_file: CSV of an image_list,
    relative to ``machine.data_root``. resize: the short side becomes ``resize_px``, or both sides (squash).
    cache: training crops are cut from the resized images, decoded once per machine; off: from each file at its full
    resolution, decoded every time, as the papers do that crop before they resize.
    min_images_per_class: smaller classes of the user's own images are left out. group: a second label of each image: a
    column of an image_list, or parent for the folder above a class folder. Final evaluations score by it as well,
    unless exclude_same is group: a query then does not find gallery images of its own class and group, as in
    re-identification, where the groups are cameras. path: of parquet and webdataset, a file, a folder or a pattern such
    as shard-{000..003}.tar, relative to ``machine.data_root``; image, label: the columns or keys that are read.
    extra_tests: further sealed sets, which finalize scores as well.
    """

    name: Literal[
        "digits",
        "glyphs",
        "image_folder",
        "image_list",
        "parquet",
        "webdataset",
        "cub200",
        "cars196",
        "sop",
        "inshop",
        "vehicleid_small",
        "vehicleid_medium",
        "vehicleid_large",
        "vehicleid",
    ]
    list_file: str | None = None
    min_images_per_class: Count = 1
    group: str | None = None
    exclude_same: Literal["nothing", "group"] = "nothing"
    path: str | None = None
    image: str = "image"
    label: str = "label"
    extra_tests: Annotated[tuple[ExtraTest, ...], BeforeValidator(as_tuple)] = ()
    content: str = ""
    resize_px: Count
    resize: Resize = "short_side"
    interpolation: Interpolation = "bilinear"
    crop_px: Count
    cache: Literal["on", "off"] = "on"
    split: SplitSettings = SplitSettings()
    augmentation: Augmentation = Augmentation()

    def images_key(self) -> str:
        """Return what decides which images there are; trials with the same key share a catalog."""
        return self.model_dump_json(include=set(IMAGES_KEYS))

    def images_settings(self) -> dict[str, Any]:
        """Return the keywords of `datasets.open_catalog`."""
        return {key: getattr(self, key) for key in _LATER_DATA}

    @model_serializer(mode="wrap")
    def _without_later_settings(self, serialised: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what was added after the first studies, where it has no effect: fingerprints stay as they were."""
        plain: dict[str, Any] = serialised(self)
        if not plain.get("extra_tests"):
            plain.pop("extra_tests", None)
        return {key: value for key, value in plain.items() if key not in _LATER_DATA or value != _LATER_DATA[key]}


_LATER_DATA: dict[str, Any] = {
    "min_images_per_class": 1,
    "group": None,
    "exclude_same": "nothing",
    "path": None,
    "image": "image",
    "label": "label",
}
#: The settings that decide which images there are.
IMAGES_KEYS = ("name", "list_file", *_LATER_DATA)


def _known_backbone(name: str) -> str:
    if name.startswith(TIMM):
        try:
            facts_of(name)
        except ModelError as error:
            names = "python -c 'import timm; print(timm.list_models())' lists the names"
            cure = "" if name.startswith(f"{TIMM}{HUB}") else names  # of the hub: the error has it
            raise ConfigError([Problem("", name, f"is not a backbone: {error}", cure=cure)]) from error
    elif name not in BACKBONES:
        problem = unknown_name("", name, (*BACKBONES, f"{TIMM}NAME"), "one of the backbones")
        if (meant := with_prefix_of_timm(name)) is not None:
            problem = problem._replace(nearest=meant, cure=f"write {meant}")
        raise ConfigError([problem])
    return name


def _with_any_dimension(block: dict[str, Any]) -> dict[str, Any]:
    """Put a number in the place of ``embedding_dim: null``.

    For a backbone that is not known: that one problem is reported, and not a second one of the dimension.
    """
    return {**block, "embedding_dim": 128} if block.get("embedding_dim", 0) is None else block


class LastBlocks(Section):
    """How many of the last blocks of a backbone learn, with what follows them; see docs/backbones.md."""

    last_blocks: Count


class LowRank(Section):
    """Adapters of so many dimensions; see docs/backbones.md."""

    rank: Count = 8
    alpha: Positive = 16.0
    targets: AdaptedPart = "attention"


class Lora(Section):
    """Low-rank adapters learn, and the backbone keeps its weights."""

    lora: LowRank


def _kind_of_train(value: object) -> str:
    """Return a tag that is no key of the block, so that messages can tell the two apart."""
    if isinstance(value, Lora) or (isinstance(value, Mapping) and "lora" in value):
        return "Lora"
    return "LastBlocks" if isinstance(value, (Mapping, LastBlocks)) else "name"


_Train = Annotated[
    Annotated[Literal["all", "head"], Tag("name")]
    | Annotated[LastBlocks, Tag("LastBlocks")]
    | Annotated[Lora, Tag("Lora")],
    Discriminator(_kind_of_train),
]


class Model(Section):
    """Backbone and embedding head. weights: default (published ImageNet weights), none (random), or a path.

    backbone: one of the table, or timm:NAME, any network of timm. pooling: how the backbone's last map, or its tokens,
    become a vector; null, or left out: the network's own, which is the average in the table. The head is [layer norm],
    [dropout of the features], projection (none: embedding_dim is the backbone's number of features), [bn_neck:
    BatchNorm], normalisation. embedding_dim: null is the backbone's number of features. head_init: initial values of
    the projection.
    freeze_batch_norm: true by default with pretrained weights, false without. train: what learns beside the head: all
    of the backbone, nothing (head), {last_blocks: N}, or adapters, {lora: {rank: 8, alpha: 16, targets: attention}}.
    drop_path, gradient_checkpointing: of timm's networks, the probability of leaving out a block, and less memory for
    more time.
    """

    later: ClassVar[Mapping[str, Any]] = {
        "train": "all",
        "drop_path": 0.0,
        "gradient_checkpointing": False,
        "bn_neck": False,
    }

    backbone: Annotated[
        str,
        AfterValidator(_known_backbone),
        Field(json_schema_extra={"anyOf": [{"enum": list(BACKBONES)}, {"pattern": f"^{TIMM}"}]}),
    ]
    weights: str = "default"
    embedding_dim: Annotated[Count, Field(json_schema_extra={"type": ["integer", "null"]})] = 128
    layer_norm: bool = False
    normalize: Normalisation = "l2"
    freeze_batch_norm: bool = True
    pooling: Annotated[Pooling, Field(json_schema_extra={"enum": [*get_args(Pooling), None]})] = "average"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    projection: Projection = "linear"
    head_init: HeadInit = "torch"
    train: _Train = "all"
    drop_path: Share = 0.0
    gradient_checkpointing: bool = False
    bn_neck: bool = False

    @model_validator(mode="before")
    @classmethod
    def _with_what_follows_from_others(cls, block: Any) -> Any:
        if not isinstance(block, Mapping):
            return block
        found = dict(block)
        if found.get("pooling", "") is None:
            del found["pooling"]
        if "freeze_batch_norm" not in found:
            found["freeze_batch_norm"] = found.get("weights", "default") != "none"
        name = found.get("backbone")
        if not isinstance(name, str) or not (name.startswith(TIMM) or name in BACKBONES):
            return _with_any_dimension(found)
        is_timm = name.startswith(TIMM)
        if (is_timm and "pooling" not in found) or found.get("embedding_dim", 0) is None:
            try:
                facts = facts_of(name)
            except ModelError:
                return _with_any_dimension(found)
            found.setdefault("pooling", facts.own_pooling)
            if found.get("embedding_dim", 0) is None:
                found["embedding_dim"] = facts.features(found["pooling"]) or facts.feature_dim
        return found


class _Optimizer(Section):
    """Learning rates and decays, the same for every optimizer."""

    later: ClassVar[Mapping[str, Any]] = {"layer_decay": 1.0, "ema": None}

    learning_rate: Annotated[Positive, Field(description="of all parameters without a rate of their own")] = 1e-4
    backbone_learning_rate: Annotated[
        Positive | None, Field(description="of the pretrained layers; null: learning_rate")
    ] = None
    loss_learning_rate: Annotated[
        Positive | None, Field(description="of the parameters of the loss and the regularizers; null: learning_rate")
    ] = None
    weight_decay: Annotated[NotNegative, Field(description="of the network")] = 0.0
    loss_weight_decay: Annotated[
        NotNegative, Field(description="of the parameters of the loss and the regularizers")
    ] = 0.0
    gradient_clip: Annotated[
        Positive | None, Field(description="largest norm of the gradient of all parameters; null: no limit")
    ] = None
    layer_decay: Annotated[
        float,
        Field(gt=0, le=1, description="multiplies the backbone's rate once for each layer below its last; 1: no decay"),
    ] = 1.0
    ema: Annotated[
        float | None,
        Field(gt=0, lt=1, description="decay of an average of the weights, which is evaluated and kept; null: none"),
    ] = None


class AdamW(_Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019)."""

    name: Literal["adamw"] = "adamw"


class Adam(_Optimizer):
    """Adam (Kingma & Ba, ICLR 2015); its weight decay is added to the gradient."""

    name: Literal["adam"]


class Sgd(_Optimizer):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    momentum: Annotated[Momentum, Field(description="share of the last step that is kept")] = 0.0


class RmsProp(_Optimizer):
    """RMSprop (Tieleman & Hinton, 2012): steps divided by the root of the mean squared gradient."""

    name: Literal["rmsprop"]
    momentum: Annotated[Momentum, Field(description="share of the last step that is kept")] = 0.0


Optimizer = Annotated[AdamW | Adam | Sgd | RmsProp, Field(discriminator="name")]


class _Schedule(Section):
    """The first epochs, the same for every schedule."""

    warmup_epochs: Annotated[Index, Field(description="epochs in which the rates rise linearly from zero")] = 0
    new_layer_warmup_epochs: Annotated[
        Index, Field(description="epochs at the start in which only head and loss learn")
    ] = 0
    new_layer_factor: Annotated[
        Positive,
        Field(description="multiplies the rates in those epochs; after them the optimizer starts without momentum"),
    ] = 1.0


class ConstantSchedule(_Schedule):
    """The learning rate does not change."""

    name: Literal["constant"] = "constant"


class CosineSchedule(_Schedule):
    """The learning rate falls to zero along half a cosine."""

    name: Literal["cosine"]


class StepSchedule(_Schedule):
    """The learning rate is multiplied by ``gamma`` after each number of epochs in ``milestones``."""

    name: Literal["step"]
    milestones: Annotated[Counts, Field(description="numbers of epochs, in rising order")]
    gamma: Annotated[float, Field(gt=0, le=1, description="multiplies the rate at each milestone")] = 0.1


class ExponentialSchedule(_Schedule):
    """The learning rate is multiplied by ``gamma`` after every epoch."""

    name: Literal["exponential"]
    gamma: Annotated[float, Field(gt=0, le=1, description="multiplies the rate after every epoch")]


Schedule = Annotated[
    ConstantSchedule | CosineSchedule | StepSchedule | ExponentialSchedule, Field(discriminator="name")
]
