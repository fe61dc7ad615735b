"""The blocks of a trial about steps: optimizer and schedule.

Each is a closed set of one class each, chosen by ``name``: a setting that the chosen one does not use is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydml.config.sections import Counts, Index, Momentum, NotNegative, Positive, Section


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


class Adam(_Optimizer):
    name: Literal["adam"]


class Sgd(_Optimizer):
    name: Literal["sgd"]
    momentum: Momentum = 0.0


class RmsProp(_Optimizer):
    name: Literal["rmsprop"]
    momentum: Momentum = 0.0


Optimizer = Annotated[AdamW | Adam | Sgd | RmsProp, Field(discriminator="name")]


class _Schedule(Section):
    """warmup_epochs: linear from zero. new_layer_warmup_epochs: only head and loss learn at first.

    new_layer_factor multiplies the learning rates in those epochs; after them the optimizer begins anew, without
    momentum.
    """

    warmup_epochs: Index = 0
    new_layer_warmup_epochs: Index = 0
    new_layer_factor: Positive = 1.0


class Constant(_Schedule):
    name: Literal["constant"] = "constant"


class Cosine(_Schedule):
    name: Literal["cosine"]


class Step(_Schedule):
    """The learning rate is multiplied by ``gamma`` once ``milestones`` epochs, one after the other, are done."""

    name: Literal["step"]
    milestones: Counts
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1


Schedule = Annotated[Constant | Cosine | Step, Field(discriminator="name")]
