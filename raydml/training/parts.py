"""The parts that train, built from a trial: method, objective, sampler, optimiser and learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from raydml import registry
from raydml.config.trial import Trial
from raydml.methods._base import Method, Objective
from raydml.models.backbones import TIMM
from raydml.models.network import Network, build_network
from raydml.samplers._base import Sampler
from raydml.training.gradient_cache import train_in_chunks
from raydml.training.randomness import seed_for
from raydml.training.rank_group import RankGroup
from raydml.training.rank_layers import spread_over_ranks
from raydml.training.uncompiled import without_compiler


def network_arguments(trial: Trial) -> dict[str, Any]:
    """Return the keywords of ``build_network`` for the network of a trial, without weights and seed."""
    method: type[Method] = registry.load("methods", trial.method.name)
    size = {"crop_px": trial.data.crop_px} if trial.model.backbone.startswith(TIMM) else {}
    return {**trial.model.model_dump(exclude={"weights"}), **size, **method.network_arguments(**trial.method.settings)}


def plain_network_arguments(trial: Trial) -> dict[str, Any]:
    """Return those of the network that a trial keeps: its adapters are part of the weights (`plain_state_dict`)."""
    arguments = network_arguments(trial)
    return {**arguments, "train": "all"} if hasattr(trial.model.train, "lora") else arguments


def build_method(
    trial: Trial, train_labels: np.ndarray, device: torch.device, ranks: RankGroup | None = None
) -> Method:
    """Return the trial's method with its network, objectives and samplers, on the device, initialised from its seed.

    train_labels: (N,) int64 in 0..C-1. ranks: those that train it together; None for one.
    """
    network = build_network(
        **network_arguments(trial), weights=trial.model.weights, seed=seed_for(trial.seed, "network_init")
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_for(trial.seed, "loss_init"))
        method: Method = registry.build(
            "methods",
            trial.method.name,
            network=network,
            train_labels=train_labels,
            num_epochs=trial.epochs,
            make_objective=partial(make_objective, trial, network),
            make_sampler=partial(make_sampler, trial),
            **trial.method.settings,
        )
    method.to(device)
    if trial.channels_last:
        method.network.to(memory_format=torch.channels_last)
    if ranks is not None:
        spread_over_ranks(method.network, ranks)
    if trial.chunk_size is not None:
        train_in_chunks(method.network, trial.chunk_size, ranks or RankGroup())
    if trial.compile:
        method.network.trunk.compile()  # in place: the names in the state dict stay as they are
    return method


def make_objective(
    trial: Trial,
    network: Network,
    num_classes: int,
    embedding_dim: int,
    *,
    with_regularizers: bool = True,
    loss: Mapping[str, Any] | None = None,
    miner: Mapping[str, Any] | None = None,
) -> Objective:
    """Return a new objective: the trial's loss, miner and regularisers for this number of classes and dimensions.

    loss, miner: blocks that replace those of the trial. A loss that replaces the trial's and learns from labels alone
    has no miner.
    """
    sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}
    loss_block = loss or trial.loss.model_dump()
    miner_block = miner or (trial.miner.model_dump() if trial.miner else None)
    new_loss = _build_block("losses", loss_block, **sizes)

    def make_loss(dim: int) -> nn.Module:
        """Return one more such loss, for embeddings of other dimensions."""
        made: nn.Module = _build_block("losses", loss_block, num_classes=num_classes, embedding_dim=dim)
        return made

    if loss is not None and not new_loss.accepts:
        miner_block = None
    new_miner = None if miner_block is None else _build_block("miners", miner_block)
    parts = {**sizes, "network": network, "loss": new_loss, "make_loss": make_loss, "miner": new_miner}
    regularizers = {
        name: registry.build("regularizers", name, **parts, **settings)
        for name, settings in sorted(trial.regularizers.items())
        if with_regularizers
    }
    return Objective(new_loss, new_miner, regularizers)


def _build_block(kind: str, block: Mapping[str, Any], **sizes: int) -> Any:
    settings = {key: value for key, value in block.items() if key != "name"}
    return registry.build(kind, block["name"], **sizes, **settings)


def make_sampler(trial: Trial, labels: np.ndarray) -> Sampler:
    """Return the trial's sampler for images with these labels (N,). Raises DataError where it cannot make batches."""
    sampler: Sampler = registry.build("samplers", trial.sampler.name, labels=labels, **trial.sampler.settings)
    return sampler


def build_trial_optimizer(trial: Trial, method: Method) -> torch.optim.Optimizer:
    """Return the trial's optimiser of every parameter of the method. Raises ValueError if one would be left out."""
    groups = method.parameter_groups()
    learns = {id(parameter) for parameter in method.network.trained_parameters()}
    held = {id(parameter) for parameter in method.network.trunk.parameters()} - learns
    named = [(name, parameter) for name, parameter in method.named_parameters() if id(parameter) not in held]
    check_every_parameter_learns(named, groups)
    settings = trial.optimizer
    rates = {
        "backbone": settings.backbone_learning_rate or settings.learning_rate,
        "head": settings.learning_rate,
        "loss": settings.loss_learning_rate or settings.learning_rate,
    }
    return build_optimizer(
        settings.name,
        groups,
        learning_rates=rates,
        weight_decay=settings.weight_decay,
        loss_weight_decay=settings.loss_weight_decay,
        own_weight_decays=method.weight_decays(),
        rate_factors=_layer_factors(method.network, settings.layer_decay),
        **settings.model_dump(include={"momentum"}),  # sgd and rmsprop have it
    )


def _layer_factors(network: Network, decay: float) -> dict[int, float]:
    """Return the factor of the backbone's learning rate for each parameter of the trunk, by its identity.

    That of the last layer is 1, and that of each layer before it is multiplied by decay once more: decay^(depth - i),
    as in Bao et al., "BEiT", ICLR 2022, where the rate that falls is that of the head. Empty for a decay of 1.
    """
    if decay == 1:
        return {}
    layers = network.layers()
    depth = max(layers.values())
    return {parameter: decay ** (depth - layer) for parameter, layer in layers.items()}


# Betas, epsilon and RMSprop's alpha are torch's defaults, as in all the systems we reproduce.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


def build_optimizer(
    name: str,
    groups: Mapping[str, Sequence[nn.Parameter]],
    *,
    learning_rates: Mapping[str, float],
    weight_decay: float,
    loss_weight_decay: float = 0.0,
    own_weight_decays: Mapping[str, float] = MappingProxyType({}),
    rate_factors: Mapping[int, float] = MappingProxyType({}),
    **settings: float,
) -> torch.optim.Optimizer:
    """Return an optimiser with one group per entry of ``groups`` (empty ones are left out), or see rate_factors.

    Each group carries its ``name`` and, under ``base_lr``, the learning rate that a schedule scales. A group that is
    not in ``learning_rates`` has that of the head, and its decay from ``own_weight_decays``. Weight decay acts on the
    network; the parameters of the loss have their own, 0 by default: a margin's beta or a proxy need not be near zero
    (Roth et al., "Revisiting Training Strategies", ICML 2020, give the criterion its own group without decay), but the
    class vectors of BMVC 2019 and the levels of AAAI 2021 decay. rate_factors: identity of a parameter -> factor of the
    learning rate, where it is not 1; a group whose parameters have several is several groups of its name. settings:
    further keywords of the optimiser, such as momentum.
    """
    decays = {"backbone": weight_decay, "head": weight_decay, "loss": loss_weight_decay, **own_weight_decays}
    rates = {group: learning_rates.get(group, learning_rates["head"]) for group in groups}
    listed: list[dict[str, object]] = []
    for group, parameters in groups.items():
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_factor.setdefault(rate_factors.get(id(parameter), 1.0), []).append(parameter)
        for factor, those in by_factor.items():
            rate = rates[group] * factor
            listed.append({"params": those, "name": group, "lr": rate, "base_lr": rate, "weight_decay": decays[group]})
    with without_compiler():
        return OPTIMIZERS[name](listed, **settings)


def check_every_parameter_learns(
    named_parameters: Iterable[tuple[str, nn.Parameter]], groups: Mapping[str, Sequence[nn.Parameter]]
) -> None:
    """Raise ValueError naming every parameter that is in no group, or in more than one."""
    homes: dict[int, list[str]] = {}
    for group, parameters in groups.items():
        for parameter in parameters:
            homes.setdefault(id(parameter), []).append(group)
    names = {id(parameter): name for name, parameter in named_parameters}
    orphans = [name for key, name in names.items() if key not in homes]
    shared = [f"{name} ({', '.join(homes[key])})" for key, name in names.items() if len(homes.get(key, ())) > 1]
    if orphans:
        raise ValueError(
            f"parameters in no optimiser group, so they would never learn: {', '.join(orphans)}. "
            f"The method's parameter_groups() must place each in one of {', '.join(groups)}"
        )
    if shared:
        raise ValueError(f"parameters in more than one optimiser group: {', '.join(shared)}")


def learning_rate_factor(
    name: str,
    *,
    epoch: int,
    batch: int,
    num_batches: int,
    num_epochs: int,
    warmup_epochs: int,
    milestones: Sequence[int] = (),
    gamma: float = 1.0,
) -> float:
    """Return the factor of the learning rates for one step; it depends on the step alone, so there is no state.

    epoch and batch count from 0. Linear warm-up from 1/(number of warm-up steps) to 1, times: ``constant`` 1;
    ``cosine`` from 1 after the warm-up to 0 at the end of ``num_epochs``; ``step`` gamma to the power of the
    number of milestones (epochs, counted from 0) reached; ``exponential`` gamma to the power of the epoch, as the
    release of MIC has it.
    """
    progress = epoch + batch / num_batches
    warmup = 1.0
    if progress < warmup_epochs:
        warmup = min(1.0, (epoch * num_batches + batch + 1) / (warmup_epochs * num_batches))
    if name == "constant":
        return warmup
    if name == "cosine":
        span = max(num_epochs - warmup_epochs, 1)
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress - warmup_epochs) / span)))
    if name == "exponential":
        return warmup * gamma**epoch
    assert name == "step", name
    return warmup * gamma ** sum(milestone <= epoch for milestone in milestones)
