"""Optimisers, their parameter groups, and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

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
    **settings: float,
) -> torch.optim.Optimizer:
    """Return an optimiser with one group per entry of ``groups`` (empty ones are left out).

    Each group carries its ``name`` and, under ``base_lr``, the learning rate that a schedule scales. A group that is
    not in ``learning_rates`` has that of the head, and its decay from ``own_weight_decays``. Weight decay acts on the
    network; the parameters of the loss have their own, 0 by default: a margin's beta or a proxy need not be near zero
    (Roth et al., "Revisiting Training Strategies", ICML 2020, give the criterion its own group without decay), but the
    class vectors of BMVC 2019 and the levels of AAAI 2021 decay. settings: further keywords of the optimiser, such as
    momentum.
    """
    decays = {"backbone": weight_decay, "head": weight_decay, "loss": loss_weight_decay, **own_weight_decays}
    rates = {group: learning_rates.get(group, learning_rates["head"]) for group in groups}
    listed: list[dict[str, object]] = [
        {
            "params": list(parameters),
            "name": group,
            "lr": rates[group],
            "base_lr": rates[group],
            "weight_decay": decays[group],
        }
        for group, parameters in groups.items()
        if parameters
    ]
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
    number of milestones (epochs, counted from 0) reached.
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
    assert name == "step", name
    return warmup * gamma ** sum(milestone <= epoch for milestone in milestones)
