"""What a method is: the questions the trainer asks it."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from raydml.model import Network
from raydml.regularizers._base import Regularizer
from raydml.samplers.epoch_plan import EpochPlan, Sampler


class Method(nn.Module):
    """How a network, a loss, a miner, regularisers and a sampler make one training procedure.

    The trainer asks each epoch which batches to show (``plan_epoch``), each batch what its loss is
    (``batch_loss``), at validation what an image's embedding is (``embed``), and once which parameters learn
    at which pace (``parameter_groups``). It never asks which method it has. Calling the method embeds.
    """

    def __init__(
        self,
        network: Network,
        loss: nn.Module,
        miner: nn.Module | None,
        sampler: Sampler,
        regularizers: Mapping[str, Regularizer] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.miner = miner
        self.sampler = sampler
        self.regularizers = nn.ModuleDict(regularizers)

    def plan_epoch(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch: arrays of indices into the training images."""
        raise NotImplementedError

    def batch_loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, 3, H, W) normalised, labels (B,) int64 in 0..C-1 -> a scalar in the graph.

        generator: on the CPU, for mining. Called under autocast when the trial asks for it;
        the loss's own arithmetic is done in float32.
        """
        raise NotImplementedError

    def objective(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The loss on what the miner chose, plus every regulariser's term: a scalar in the graph.

        embeddings: (B, D) of a training batch; labels: (B,) int64; generator: on the CPU. Once a training step.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            regularizers = cast(Iterable[Regularizer], self.regularizers.values())
            if self.miner is None:
                total: Tensor = self.loss(embeddings, labels)
            else:
                # Which tuples are taken is a choice, not a function to learn through.
                tuples = self.miner(embeddings.detach(), labels, generator)
                for regularizer in regularizers:
                    tuples = regularizer.rewrite(tuples, labels, generator)
                total = self.loss(embeddings, labels, tuples)
            for regularizer in regularizers:
                total = total + regularizer(embeddings, labels, generator)
            return total

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) normalised -> embeddings (B, D) float32 that distances are measured between."""
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter of the method, by the learning rate it takes: "backbone", "head" or "loss"."""
        return {
            "backbone": list(self.network.trunk.parameters()),
            "head": list(self.network.head.parameters()),
            "loss": [*self.loss.parameters(), *self.regularizers.parameters()],
        }

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images)
