"""What a method is: the questions the trainer asks it."""

import numpy as np
import torch
from torch import Tensor, nn

from raydml.data.samplers import ClassBalanced, EpochPlan, Uniform
from raydml.model import Network


class Method(nn.Module):
    """How a network, a loss, a miner and a sampler make one training procedure.

    The trainer asks each epoch which batches to show (``plan_epoch``), each batch what its loss is
    (``batch_loss``), at validation what an image's embedding is (``embed``), and once which parameters learn
    at which pace (``parameter_groups``). It never asks which method it has. Calling the method embeds.
    """

    def __init__(
        self, network: Network, loss: nn.Module, miner: nn.Module | None, sampler: ClassBalanced | Uniform
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss
        self.miner = miner
        self.sampler = sampler

    def plan_epoch(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch: arrays of indices into the training images."""
        raise NotImplementedError

    def batch_loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, 3, H, W) normalised, labels (B,) int64 in 0..C-1 -> a scalar in the graph.

        generator: on the CPU, for mining. Called under autocast when the trial asks for it;
        the loss's own arithmetic is done in float32.
        """
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) normalised -> embeddings (B, D) float32 that distances are measured between."""
        raise NotImplementedError

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every parameter of the method, by the learning rate it takes: "backbone", "head" or "loss"."""
        return {
            "backbone": list(self.network.trunk.parameters()),
            "head": list(self.network.head.parameters()),
            "loss": list(self.loss.parameters()),
        }

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images)
