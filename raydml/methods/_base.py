"""The interface between a training procedure and the trainer, and the objective of a trial."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.models.network import Network
from raydml.ops.distances import full_precision, shared_measure, without_autocast
from raydml.regularizers._base import Regularizer
from raydml.samplers._base import EpochPlan, Sampler


class Objective(nn.Module):
    """The loss on what the miner chose, plus every regulariser's term.

    miner None: the loss takes all tuples of the batch. Everything is computed in float32 (or wider), also under
    autocast.
    """

    def __init__(
        self,
        loss: nn.Module,
        miner: nn.Module | None = None,
        regularizers: Mapping[str, Regularizer] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.loss = loss
        self.miner = miner
        self.regularizers = nn.ModuleDict(regularizers)
        self._measure = shared_measure(loss, miner)

    def forward(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return a scalar in the graph. Called once in a training step.

        embeddings: (B, D) of a training batch; labels: (B,) int64; generator: on the CPU, for mining.
        """
        with without_autocast(embeddings):
            regularizers = cast(Iterable[Regularizer], self.regularizers.values())
            if self.miner is None:
                total: Tensor = self.loss(embeddings, labels)
            else:
                known, mined = {}, {}
                if self._measure is not None:
                    matrix = self._measure(full_precision(embeddings), None)
                    known, mined = {"matrix": matrix}, {"matrix": matrix.detach()}
                # The choice of the tuples has no gradient.
                tuples = self.miner(embeddings.detach(), labels, generator, **mined)
                for regularizer in regularizers:
                    tuples = regularizer.rewrite(tuples, labels, generator)
                total = self.loss(embeddings, labels, tuples, **known)
            for regularizer in regularizers:
                total = total + regularizer(embeddings, labels, generator)
            return total


class MakeObjective(Protocol):
    """A function that makes a new objective of the trial for the given sizes.

    loss, miner: blocks, ``{"name": ..., **settings}``, that replace those of the trial.
    """

    def __call__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        with_regularizers: bool = True,
        loss: Mapping[str, Any] | None = None,
        miner: Mapping[str, Any] | None = None,
    ) -> Objective: ...


MakeSampler = Callable[[np.ndarray], Sampler]
"""Labels (N,) of some training images -> the trial's sampler for them."""


class Features(Protocol):
    """Applies a function of batches, images -> (B, F), to all training images as evaluation sees them: (N, F).

    The images are those of a ``Batch``. inner_layers: the function looks into the backbone, and needs the pixels.
    """

    def __call__(self, forward: Callable[[Tensor], Tensor], *, inner_layers: bool = False) -> NDArray[np.float32]: ...


class Batch(NamedTuple):
    """images: (B, 3, H, W) normalised, or (B, F), the features that a frozen backbone gave them. labels: (B,) int64,
    the targets of the plan where it has them. epoch: from 0. learner: of the plan, 0 where it has none.

    Where several processes train one network, images are the rows of one of them, and labels are of the whole batch, as
    are the features and embeddings that the network gives in training."""

    images: Tensor
    labels: Tensor
    epoch: int
    learner: int


class Method(nn.Module):
    """How a network and the objective and sampler of a trial make one training procedure.

    Before each epoch the trainer reclusters the training images where it is time to (``time_to_recluster``,
    ``recluster``) and plans the batches (``plan_epoch``). For each batch it computes the loss (``batch_loss``), at
    validation the embeddings (``embed``). At the start it groups the parameters by learning rate and weight decay
    (``parameter_groups``, ``weight_decays``). It never depends on which method it has. Calling the method embeds.

    What must survive a restart is in parameters, in buffers, or in the state of ``samplers``.
    """

    # Whether a parameter without a gradient in a batch counts as having gradient 0 after its first step, so that
    # Adam's momentum moves it on. Torch before 2.0 did so, because it set gradients to zero.
    idle_parameters_move: ClassVar[bool] = False

    samplers: dict[str, Sampler]

    def __init__(self, network: Network, samplers: Mapping[str, Sampler]) -> None:
        super().__init__()
        self.network = network
        self.samplers = dict(samplers)

    @classmethod
    def network_arguments(cls, **settings: Any) -> dict[str, Any]:  # noqa: ARG003 - most need none
        """Return the arguments of ``build_network`` that these settings require beside ``trial.model``."""
        return {}

    @classmethod
    def check_settings(cls, sampler: Mapping[str, Any], **settings: Any) -> None:
        """Raise ValueError, "what is wrong; how to cure it", for settings that exclude each other or the sampler.

        A setting that is given and has no effect is one of them: see ``refuse_without_effect``.
        sampler: its name, its batch_size or None where only the labels decide it, and its other settings where they are
        not the default.
        """

    @classmethod
    def cut_to(cls, batch_size: int, **settings: Any) -> dict[str, Any]:  # noqa: ARG003
        """Return the settings with those that are upper limits cut to what batches of this size allow."""
        return settings

    @classmethod
    def expected_steps(cls, batches_per_epoch: int, **settings: Any) -> float:  # noqa: ARG003 - most take each once
        """Return the expected number of steps in an epoch for which the trial's sampler plans batches_per_epoch."""
        return batches_per_epoch

    @classmethod
    def refuse_without_effect(cls, settings: Mapping[str, Any], names: Iterable[str], reason: str) -> None:
        """Raise ValueError where one of these settings differs from its default. reason: why they have no effect.

        A default passes, because it may not have been written.
        """
        parameters = inspect.signature(cls).parameters
        given = [
            f"{name} = {settings[name]}"
            for name in names
            if name in settings and settings[name] != parameters[name].default
        ]
        if given:
            has, it = ("has", "it") if len(given) == 1 else ("have", "them")
            cure = f"leave {it} out, or put method blocks with and without {it} into one choice (key `method`)"
            raise ValueError(f"{', '.join(given)} {has} no effect: {reason}; {cure}")

    def time_to_recluster(self, epoch: int) -> bool:  # noqa: ARG002
        """Return whether to cluster the training images before this epoch, counted from 0, is planned."""
        return False

    def recluster(self, features: Features, epoch: int, device: torch.device) -> dict[str, float]:
        """Cluster the training images, for the plans of the next epochs. Return the metrics to log."""
        raise NotImplementedError

    def plan_epoch(self, epoch: int, generator: np.random.Generator) -> EpochPlan:
        """Return the batches of this epoch, counted from 0: arrays of indices into the training images."""
        raise NotImplementedError

    def batch_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return a scalar in the graph. The images go through ``network`` or ``network.features``, not the bare trunk.

        generator: on the CPU, for mining. Called under autocast where the trial sets it; the loss is still computed in
        float32.
        """
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings (B, D) float32, between which distances are measured. images: as in a ``Batch``."""
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return every parameter of the method, by its learning rate: "backbone", "head" or "loss".

        A group of another name is the method's own: it takes the learning rate of the head and the decay that
        ``weight_decays`` gives it.
        """
        objectives = [module for module in self.modules() if isinstance(module, Objective)]
        return {
            "backbone": self.network.trained_parameters(),
            "head": list(self.network.head.parameters()),
            "loss": [parameter for objective in objectives for parameter in objective.parameters()],
        }

    def weight_decays(self) -> dict[str, float]:
        """Return the weight decay of each group of the method's own."""
        return {}

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images)
