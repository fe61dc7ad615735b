"""What must fit together: rules between the sections of a trial, each with the values and a cure.

Each rule names the sections it reads and is asked only where those are valid by themselves, so that one wrong section
does not hide what is wrong between the others. A hyperparameter that would have no effect is refused, not ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from raydml import plugins
from raydml.model import BACKBONES, Head, Network
from raydml.problems import Problem

_Rule = Callable[..., Iterator[Problem]]
_TOGETHER = "where both vary, put them into one choice of blocks (key `loss, miner, sampler`)"


def problems_of(sections: Mapping[str, Any]) -> list[Problem]:
    """All that does not fit together among the given sections of a trial (key -> valid value)."""
    return [
        problem
        for names, rule in _RULES
        if all(name in sections for name in names)
        for problem in rule(*(sections[name] for name in names))
    ]


def problems_of_stages(sections: Mapping[str, Any]) -> list[Problem]:
    """A stage cannot take more configurations than the stage before it hands over."""
    problems = []
    confirm, finalize, search = sections.get("confirm"), sections.get("finalize"), sections.get("search")
    if finalize is not None:
        limit, setting = (
            (confirm.top, "confirm.top") if confirm else (sections.get("keep_checkpoints"), "keep_checkpoints")
        )
        if limit is not None and finalize.top > limit:
            message = f"is more than {setting}: {limit} configuration(s) are left to test"
            cure = f"write at most {limit}, or raise {setting}"
            problems.append(Problem("finalize.top", finalize.top, message, cure=cure))
        if confirm is None and finalize.top > 1 and sections.get("max_checkpoint_gib") is not None:
            message = "may have to test checkpoints that max_checkpoint_gib has dropped"
            cure = "write 1, add a confirm stage, or remove max_checkpoint_gib"
            problems.append(Problem("finalize.top", finalize.top, message, cure=cure))
    if search is not None and search.scheduler == "sync" and search.max_concurrent is not None:
        message = "cannot be held by scheduler sync: trials that wait at a rung count, and the others would never start"
        cure = "remove max_concurrent (machine.cpus_per_trial also limits how many run at once), or scheduler: asha"
        problems.append(Problem("search.max_concurrent", search.max_concurrent, message, cure=cure))
    return problems


def problems_of_machine(sections: Mapping[str, Any]) -> list[Problem]:
    """Shares of a GPU that Ray can hand out, and a device that they can give."""
    gpus, device = sections.get("gpus_per_trial"), sections.get("device")
    if gpus is None or gpus == "auto":
        return []
    if gpus > 1 and gpus != int(gpus):
        cure = f"write {int(gpus)}, {int(gpus) + 1}, or a share below 1 such as 0.5"
        return [Problem("gpus_per_trial", gpus, "must be a share up to 1 or a whole number", cure=cure)]
    if (device == "cuda" and gpus == 0) or (device == "cpu" and gpus > 0):
        cure = "device: auto, or gpus_per_trial: auto"
        return [Problem("gpus_per_trial", gpus, f"contradicts device: {device}", cure=cure)]
    return []


# --- losses, miners, samplers ----------------------------------------------------------------------------------------


def _loss_and_miner(loss: Any, miner: Any) -> Iterator[Problem]:
    if miner is None:
        return
    accepts = _accepts(loss.name)
    yields = _yields(miner)
    if not accepts:
        message = f"loss {loss.name} learns from labels alone and takes no miner"
        yield Problem("miner.name", miner.name, message, cure=f"remove miner, or write miner: null; {_TOGETHER}")
    elif yields and yields not in accepts:
        others = (name for name in plugins.names("miners") if name != miner.name)
        fitting = tuple(name for name in others if _yields(_Default(name)) in accepts)
        message = f"yields {yields}, and loss {loss.name} takes {' or '.join(accepts)}"
        cure = f"choose a miner that fits, or write miner: null; {_TOGETHER}"
        yield Problem("miner.name", miner.name, message, fitting, cure=cure)


def _accepts(loss: str) -> tuple[str, ...]:
    """The kinds of tuples a loss works on; none for one that learns from labels alone."""
    accepts: tuple[str, ...] = plugins.load("losses", loss).accepts  # type: ignore[attr-defined]
    return accepts


def _yields(miner: Any) -> str:
    """The kind of tuples that a miner with these settings hands over; "" where it cannot be built."""
    return _construct("miners", miner.name, miner.settings).yields


class _Default(NamedTuple):
    """A miner's block with every setting at its default."""

    name: str
    settings: Mapping[str, Any] = MappingProxyType({})


def _loss_and_sampler(loss: Any, sampler: Any) -> Iterator[Problem]:
    accepts = _accepts(loss.name)
    if accepts and sampler.name == "class_balanced" and sampler.images_per_class == 1:
        message = f"leaves no positive pair in a batch, and loss {loss.name} learns from pairs or triplets"
        yield Problem("sampler.images_per_class", 1, message, cure=f"write at least 2; {_TOGETHER}")


def _loss_constructs(loss: Any) -> Iterator[Problem]:
    yield from _construct("losses", loss.name, loss.settings).problems


def _miner_constructs(miner: Any) -> Iterator[Problem]:
    if miner is not None:
        yield from _construct("miners", miner.name, miner.settings).problems


def _regularizers_and_loss(regularizers: Any, loss: Any, miner: Any) -> Iterator[Problem]:
    accepts = _accepts(loss.name)
    for name, settings in regularizers.items():
        cls = plugins.load("regularizers", name)
        path = f"regularizers.{name}"
        if cls.needs_pairs and "pairs" not in accepts:  # type: ignore[attr-defined]
            fitting = tuple(other for other in plugins.names("losses") if "pairs" in _accepts(other))
            message = f"needs a loss that takes pairs, and loss {loss.name} takes {' or '.join(accepts) or 'none'}"
            yield Problem(path, settings, message, fitting, cure=f"choose such a loss, or remove {name}")
        rewrites: tuple[str, ...] = cls.rewrites  # type: ignore[attr-defined]
        if rewrites and (miner is None or _yields(miner) not in rewrites):
            fitting = tuple(other for other in plugins.names("miners") if _yields(_Default(other)) in rewrites)
            given = "there is no miner" if miner is None else f"miner {miner.name} yields {_yields(miner)}"
            message = f"changes the {' or '.join(rewrites)} that a miner yields, and {given}"
            yield Problem(path, settings, message, fitting, cure=f"choose such a miner, or remove {name}")


def _regularizers_and_model(regularizers: Any, model: Any) -> Iterator[Problem]:
    if "embedding_norm" in regularizers and model.normalize == "l2":
        message = "has no effect: model.normalize is l2, so every embedding has length 1"
        cure = "remove it, or write model.normalize: none"
        yield Problem("regularizers.embedding_norm", regularizers["embedding_norm"], message, cure=cure)


def _regularizers_and_sampler(regularizers: Any, sampler: Any) -> Iterator[Problem]:
    memory = regularizers.get("cross_batch_memory")
    if memory is None:
        return
    batch = sampler.batch_size if sampler.name == "uniform" else sampler.classes_per_batch * sampler.images_per_class
    if memory["size"] < batch:
        message = f"is less than the {batch} images of a batch, which the memory holds first of all"
        cure = f"write at least {batch}, better many times as much"
        yield Problem("regularizers.cross_batch_memory.size", memory["size"], message, cure=cure)


def _loss_group(loss: Any, regularizers: Any, optimizer: Any) -> Iterator[Problem]:
    """Settings of the optimiser for parameters that are not there."""
    made = [_construct("losses", loss.name, loss.settings)]
    made += [_construct("regularizers", name, settings) for name, settings in regularizers.items()]
    if any(one.problems or one.has_parameters for one in made):
        return
    own = "loss and regularizers have" if regularizers else f"loss {loss.name} has"
    message = f"has no effect: {own} no parameters of {'their' if regularizers else 'its'} own"
    cure = "remove it, or put loss and optimizer into one choice of blocks (key `loss, optimizer`)"
    if optimizer.loss_learning_rate is not None:
        yield Problem("optimizer.loss_learning_rate", optimizer.loss_learning_rate, message, cure=cure)
    if optimizer.loss_weight_decay:
        yield Problem("optimizer.loss_weight_decay", optimizer.loss_weight_decay, message, cure=cure)


class _Constructed(NamedTuple):
    """What building a plugin for a tiny trial told: problems, parameters to learn, tuples that a miner yields."""

    problems: tuple[Problem, ...] = ()
    has_parameters: bool = False
    yields: str = ""


def _construct(kind: str, name: str, settings: Mapping[str, Any]) -> _Constructed:
    return _construct_once(kind, name, json.dumps(dict(settings), sort_keys=True))


@lru_cache(maxsize=4096)
def _construct_once(kind: str, name: str, settings: str) -> _Constructed:
    """Rules between a plugin's own settings live in its constructor, as ValueErrors."""
    given = json.loads(settings)
    try:
        with torch.random.fork_rng(devices=[]):
            network = Network(nn.Identity(), Head(2, 2, layer_norm=False, normalize="none"), freeze_batch_norm=False)
            plugin = plugins.build(
                kind, name, num_classes=2, embedding_dim=2, network=network, loss=None, miner=None, **given
            )
    except ValueError as error:
        path = {"losses": "loss", "miners": "miner", "regularizers": f"regularizers.{name}"}[kind]
        return _Constructed((Problem(path, given if kind == "regularizers" else {"name": name, **given}, str(error)),))
    has_parameters = any(True for _ in plugin.parameters())
    return _Constructed((), has_parameters, getattr(plugin, "yields", ""))


# --- images and backbones --------------------------------------------------------------------------------------------


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
    scale = data.augmentation.random_resized_crop
    if scale is not None and not scale[0] <= scale[1] <= 1:
        path = "data.augmentation.random_resized_crop"
        message = "must be the smallest and the largest share of the area, at most 1"
        yield Problem(path, list(scale), message, cure="write for example [0.2, 1.0]")
    if data.augmentation.shift_px >= data.crop_px:
        message = f"would push the whole image of {data.crop_px} px out of sight"
        cure = f"write at most {data.crop_px - 1}"
        yield Problem("data.augmentation.shift_px", data.augmentation.shift_px, message, cure=cure)


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


# --- epochs ----------------------------------------------------------------------------------------------------------


def _schedule_and_epochs(schedule: Any, epochs: int) -> Iterator[Problem]:
    for key, value in (
        ("warmup_epochs", schedule.warmup_epochs),
        ("new_layer_warmup_epochs", schedule.new_layer_warmup_epochs),
    ):
        if value >= epochs and value > 0:
            message = f"leaves nothing of the trial's {epochs} epochs"
            yield Problem(f"schedule.{key}", value, message, cure=f"write at most {epochs - 1}, or raise epochs")
    if schedule.name == "step":
        milestones = list(schedule.milestones)
        if milestones != sorted(set(milestones)):
            yield Problem("schedule.milestones", milestones, "must rise", cure="write each epoch once, in order")
        if max(milestones) >= epochs:
            message = f"the last milestone has no effect in a trial of {epochs} epochs"
            cure = f"write milestones up to {epochs - 1}, or raise epochs"
            yield Problem("schedule.milestones", milestones, message, cure=cure)


def _recall_at(recall_at: tuple[int, ...]) -> Iterator[Problem]:
    if list(recall_at) != sorted(set(recall_at)):
        yield Problem("recall_at", list(recall_at), "must rise", cure="write each number once, in order")


def _select_on(recall_at: tuple[int, ...], select_on: str) -> Iterator[Problem]:
    k = select_on.removeprefix("val_recall_at_")
    if k.isdigit() and int(k) not in recall_at:
        message = f"is not measured: recall_at is [{', '.join(str(number) for number in recall_at)}]"
        yield Problem("select_on", select_on, message, cure=f"add {k} to recall_at, or select on val_map_at_r")


_RULES: tuple[tuple[tuple[str, ...], _Rule], ...] = (
    (("loss", "miner"), _loss_and_miner),
    (("loss", "sampler"), _loss_and_sampler),
    (("loss",), _loss_constructs),
    (("miner",), _miner_constructs),
    (("regularizers", "loss", "miner"), _regularizers_and_loss),
    (("regularizers", "model"), _regularizers_and_model),
    (("regularizers", "sampler"), _regularizers_and_sampler),
    (("loss", "regularizers", "optimizer"), _loss_group),
    (("data",), _data),
    (("data", "model"), _data_and_model),
    (("model",), _model),
    (("schedule", "epochs"), _schedule_and_epochs),
    (("recall_at",), _recall_at),
    (("recall_at", "select_on"), _select_on),
)
