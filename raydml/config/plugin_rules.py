"""What must fit together among methods, losses, miners, regularizers, samplers and the optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from raydml import registry
from raydml.errors import Problem
from raydml.methods._base import Method
from raydml.models.network import Head, Network

Rule = tuple[tuple[str, ...], Callable[..., Iterator[Problem]]]  # the sections it reads, and the rule
_TOGETHER = "where both vary, put them into one choice of blocks (key `loss, miner, sampler`)"


def _loss_and_miner(loss: Any, miner: Any) -> Iterator[Problem]:
    if miner is None:
        return
    accepts = _accepts(loss.name)
    yields = _yields(miner)
    if not accepts:
        message = f"loss {loss.name} learns from labels alone and takes no miner"
        yield Problem("miner.name", miner.name, message, cure=f"remove miner, or write miner: null; {_TOGETHER}")
    elif yields and yields not in accepts:
        others = (name for name in registry.names("miners") if name != miner.name)
        fitting = tuple(name for name in others if _yields(_Default(name)) in accepts)
        message = f"yields {yields}, and loss {loss.name} takes {' or '.join(accepts)}"
        cure = f"choose a miner that fits, or write miner: null; {_TOGETHER}"
        yield Problem("miner.name", miner.name, message, fitting, cure=cure)


def _accepts(loss: str) -> tuple[str, ...]:
    """The kinds of tuples a loss works on; none for one that learns from labels alone."""
    accepts: tuple[str, ...] = registry.load("losses", loss).accepts  # type: ignore[attr-defined]
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
    if accepts and sampler.settings.get("images_per_class") == 1:
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
        cls = registry.load("regularizers", name)
        path = f"regularizers.{name}"
        if cls.needs_pairs and "pairs" not in accepts:  # type: ignore[attr-defined]
            fitting = tuple(other for other in registry.names("losses") if "pairs" in _accepts(other))
            message = f"needs a loss that takes pairs, and loss {loss.name} takes {' or '.join(accepts) or 'none'}"
            yield Problem(path, settings, message, fitting, cure=f"choose such a loss, or remove {name}")
        rewrites: tuple[str, ...] = cls.rewrites  # type: ignore[attr-defined]
        if rewrites and (miner is None or _yields(miner) not in rewrites):
            fitting = tuple(other for other in registry.names("miners") if _yields(_Default(other)) in rewrites)
            given = "there is no miner" if miner is None else f"miner {miner.name} yields {_yields(miner)}"
            message = f"changes the {' or '.join(rewrites)} that a miner yields, and {given}"
            yield Problem(path, settings, message, fitting, cure=f"choose such a miner, or remove {name}")


def _regularizers_and_model(regularizers: Any, model: Any) -> Iterator[Problem]:
    if "embedding_norm" in regularizers and model.normalize == "l2":
        message = "has no effect: model.normalize is l2, so every embedding has length 1"
        cure = "remove it, or write model.normalize: none"
        yield Problem("regularizers.embedding_norm", regularizers["embedding_norm"], message, cure=cure)


def _method_and_model(method: Any, model: Any) -> Iterator[Problem]:
    num_slices = _method_class(method).network_arguments(**method.settings).get("num_slices", 1)
    if model.embedding_dim % num_slices:
        message = f"cannot be cut into the {num_slices} equal slices that method {method.name} asks for"
        nearest = max(num_slices, round(model.embedding_dim / num_slices) * num_slices)
        cure = f"write {nearest}, or another number of learners; both vary: one choice for both (`method, model`)"
        yield Problem("model.embedding_dim", model.embedding_dim, message, cure=cure)


def _method_and_sampler(method: Any, sampler: Any) -> Iterator[Problem]:
    defaults = registry.settings_model("samplers", sampler.name)().model_dump()
    changed = {key: value for key, value in sampler.settings.items() if value != defaults[key]}
    try:
        _method_class(method).check_settings(
            {"name": sampler.name, **changed, "batch_size": _batch_size(sampler)}, **method.settings
        )
    except ValueError as error:
        message, _, cure = str(error).partition("; ")
        yield Problem("method", {"name": method.name, **method.settings}, message, cure=cure)


def _method_and_data(method: Any, data: Any) -> Iterator[Problem]:
    if method.settings.get("auxiliary_flip") and not data.augmentation.flip:
        message = "has no effect: data.augmentation.flip is false, so no batch is mirrored"
        yield Problem("method.auxiliary_flip", True, message, cure="remove it, or write data.augmentation.flip: true")


def _method_class(method: Any) -> type[Method]:
    cls: type[Method] = registry.load("methods", method.name)
    return cls


def _batch_size(sampler: Any) -> int:
    """Return the images in a batch: a sampler has the setting batch_size, or classes_per_batch and images_per_class."""
    settings = sampler.settings
    size: int = settings.get("batch_size") or settings["classes_per_batch"] * settings["images_per_class"]
    return size


def _regularizers_and_sampler(regularizers: Any, sampler: Any) -> Iterator[Problem]:
    memory = regularizers.get("cross_batch_memory")
    if memory is None:
        return
    batch = _batch_size(sampler)
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
            plugin = registry.build(
                kind, name, num_classes=2, embedding_dim=2, network=network, loss=None, miner=None, **given
            )
    except ValueError as error:
        path = {"losses": "loss", "miners": "miner", "regularizers": f"regularizers.{name}"}[kind]
        return _Constructed((Problem(path, given if kind == "regularizers" else {"name": name, **given}, str(error)),))
    has_parameters = any(True for _ in plugin.parameters())
    return _Constructed((), has_parameters, getattr(plugin, "yields", ""))


PLUGIN_RULES: tuple[Rule, ...] = (
    (("loss", "miner"), _loss_and_miner),
    (("method", "model"), _method_and_model),
    (("method", "sampler"), _method_and_sampler),
    (("method", "data"), _method_and_data),
    (("loss", "sampler"), _loss_and_sampler),
    (("loss",), _loss_constructs),
    (("miner",), _miner_constructs),
    (("regularizers", "loss", "miner"), _regularizers_and_loss),
    (("regularizers", "model"), _regularizers_and_model),
    (("regularizers", "sampler"), _regularizers_and_sampler),
    (("loss", "regularizers", "optimizer"), _loss_group),
)
