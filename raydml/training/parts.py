"""The parts that train, built from a trial: method, objective, sampler and optimiser."""

from functools import partial
from typing import Any

import numpy as np
import torch

from raydml import registry
from raydml.config.trial import Trial
from raydml.methods._base import Method, Objective
from raydml.models.network import Network, build_network
from raydml.samplers._base import Sampler
from raydml.training.optimizers import build_optimizer, check_every_parameter_learns
from raydml.training.randomness import seed_for


def network_arguments(trial: Trial) -> dict[str, Any]:
    """Return the keywords of ``build_network`` for the network of a trial, without weights and seed."""
    method: type[Method] = registry.load("methods", trial.method.name)
    return {**trial.model.model_dump(exclude={"weights"}), **method.network_arguments(**trial.method.settings)}


def build_method(trial: Trial, train_labels: np.ndarray, device: torch.device) -> Method:
    """Return the trial's method with its network, objectives and samplers, on the device, initialised from its seed.

    train_labels: (N,) int64 in 0..C-1.
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
    if trial.compile:
        method.network.trunk.compile()  # in place: the names in the state dict stay as they are
    return method


def make_objective(
    trial: Trial, network: Network, num_classes: int, embedding_dim: int, *, with_regularizers: bool = True
) -> Objective:
    """Return a new objective: the trial's loss, miner and regularisers for this number of classes and dimensions."""
    sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}
    loss = registry.build("losses", trial.loss.name, **sizes, **trial.loss.settings)
    miner = registry.build("miners", trial.miner.name, **trial.miner.settings) if trial.miner else None
    regularizers = {
        name: registry.build("regularizers", name, **sizes, network=network, loss=loss, miner=miner, **settings)
        for name, settings in sorted(trial.regularizers.items())
        if with_regularizers
    }
    return Objective(loss, miner, regularizers)


def make_sampler(trial: Trial, labels: np.ndarray) -> Sampler:
    """Return the trial's sampler for images with these labels (N,). Raises DataError where it cannot make batches."""
    sampler: Sampler = registry.build("samplers", trial.sampler.name, labels=labels, **trial.sampler.settings)
    return sampler


def build_trial_optimizer(trial: Trial, method: Method) -> torch.optim.Optimizer:
    """Return the trial's optimiser of every parameter of the method. Raises ValueError if one would be left out."""
    groups = method.parameter_groups()
    check_every_parameter_learns(method.named_parameters(), groups)
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
        **settings.model_dump(include={"momentum"}),  # sgd and rmsprop have it
    )
