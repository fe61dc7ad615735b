"""The usual procedure: one network, one loss, one sampler."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from raydml.methods._base import Method
from raydml.model import Network
from raydml.regularizers._base import Regularizer
from raydml.samplers.epoch_plan import EpochPlan, Sampler


class Plain(Method):
    """One network trained with one loss: the sampler's batches, the miner's tuples, the regularisers' terms."""

    def __init__(
        self,
        network: Network,
        loss: nn.Module,
        miner: nn.Module | None,
        sampler: Sampler,
        regularizers: Mapping[str, Regularizer] = MappingProxyType({}),
    ) -> None:
        super().__init__(network, loss, miner, sampler, regularizers)

    def plan_epoch(self, generator: np.random.Generator) -> EpochPlan:
        return self.sampler.plan(generator)

    def batch_loss(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return self.objective(self.network(images), labels, generator)

    def embed(self, images: Tensor) -> Tensor:
        return self.network(images)
