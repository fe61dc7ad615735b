"""The usual procedure: one network, one loss, one sampler."""

import numpy as np
import torch
from torch import Tensor, nn

from raydml.data.samplers import ClassBalanced, EpochPlan, Uniform
from raydml.methods._base import Method
from raydml.model import Network


class Plain(Method):
    """One network trained with one loss: the sampler's batches, the miner's tuples."""

    def __init__(
        self, network: Network, loss: nn.Module, miner: nn.Module | None, sampler: ClassBalanced | Uniform
    ) -> None:
        super().__init__(network, loss, miner, sampler)

    def plan_epoch(self, generator: np.random.Generator) -> EpochPlan:
        return self.sampler.plan(generator)

    def batch_loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        embeddings = self.network(images)
        with torch.autocast(images.device.type, enabled=False):
            if self.miner is None:
                return self.loss(embeddings, labels)
            # Which tuples are taken is a choice, not a function to learn through.
            tuples = self.miner(embeddings.detach(), labels, generator)
            return self.loss(embeddings, labels, tuples)

    def embed(self, images: Tensor) -> Tensor:
        return self.network(images)
