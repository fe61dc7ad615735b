"""The usual procedure: one network, one loss, one sampler."""

import numpy as np
import torch
from torch import Tensor

from raydml.methods._base import Batch, MakeObjective, MakeSampler, Method
from raydml.models.network import Network
from raydml.samplers._base import EpochPlan


class Plain(Method):
    """One network trained with one loss: the sampler's batches, the miner's tuples, the regularisers' terms."""

    def __init__(
        self, network: Network, train_labels: np.ndarray, make_objective: MakeObjective, make_sampler: MakeSampler
    ) -> None:
        super().__init__(network, {"classes": make_sampler(train_labels)})
        self.objective = make_objective(int(train_labels.max()) + 1, network.head.embedding_dim)

    def plan_epoch(self, epoch: int, generator: np.random.Generator) -> EpochPlan:  # noqa: ARG002
        return self.samplers["classes"].plan(generator)

    def batch_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.objective(self.network(batch.images), batch.labels, generator)

    def embed(self, images: Tensor) -> Tensor:
        return self.network(images)
