"""The blocks of a trial about batches and steps: sampler, optimizer, schedule.

Each is a closed set of one class each, chosen by ``name``: a setting that the chosen one does not use is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydml.config.sections import Count, Counts, Index, Momentum, NotNegative, Positive, Section

BatchSize = Annotated[int, Field(ge=2)]


class ClassBalancedSampler(Section):
    """A batch of P classes x K images; batches_per_epoch null: as many as show every class and about every image."""

    name: Literal["class_balanced"]
    classes_per_batch: Annotated[int, Field(ge=2)] = 8
    images_per_class: Count = 4
    batches_per_epoch: Count | None = None


class UniformSampler(Section):
    """Shuffled images without regard to their classes; the last, smaller batch is dropped."""

    name: Literal["uniform"]
    batch_size: BatchSize = 32


class BalancedWithReplacementSampler(Section):
    """Few classes a batch, images of each with replacement: the classification baseline (BMVC19)."""

    name: Literal["balanced_with_replacement"]
    batch_size: BatchSize = 75
    images_per_class: Count = 25


class RandomIdentitySampler(Section):
    """Each class once an epoch with a few of its images: Deep_Metric. drop_last: leave out the last, smaller batch."""

    name: Literal["random_identity"]
    batch_size: BatchSize = 80
    images_per_class: Count = 5
    drop_last: bool = True


class IdentityChunksSampler(Section):
    """The images of each class in chunks, a chunk each of the classes that still have some: the code of the MS loss."""

    name: Literal["identity_chunks"]
    batch_size: BatchSize = 80
    images_per_class: Count = 5
    batches_per_epoch: Count | None = None


class ClassGroupsSampler(Section):
    """Groups of images of a class, each of another class than the two before it: MIC."""

    name: Literal["class_groups"]
    batch_size: BatchSize = 112
    images_per_class: Annotated[int, Field(ge=2)] = 4


class RandomClassesSampler(Section):
    """Every batch from all classes in random order, up to images_per_class different images of each: MDR."""

    name: Literal["random_classes"]
    batch_size: BatchSize = 128
    images_per_class: Count = 4
    batches_per_epoch: Count = 100


Sampler = Annotated[
    ClassBalancedSampler
    | UniformSampler
    | BalancedWithReplacementSampler
    | RandomIdentitySampler
    | IdentityChunksSampler
    | ClassGroupsSampler
    | RandomClassesSampler,
    Field(discriminator="name"),
]


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
