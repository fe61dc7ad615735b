"""The objective of a trial: a loss on the tuples of a miner, and the terms of regularisers."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from raydml.regularizers._base import Regularizer


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

    def forward(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Return a scalar in the graph. Called once in a training step.

        embeddings: (B, D) of a training batch; labels: (B,) int64; generator: on the CPU, for mining.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            regularizers = cast(Iterable[Regularizer], self.regularizers.values())
            if self.miner is None:
                total: Tensor = self.loss(embeddings, labels)
            else:
                # The choice of the tuples has no gradient.
                tuples = self.miner(embeddings.detach(), labels, generator)
                for regularizer in regularizers:
                    tuples = regularizer.rewrite(tuples, labels, generator)
                total = self.loss(embeddings, labels, tuples)
            for regularizer in regularizers:
                total = total + regularizer(embeddings, labels, generator)
            return total


class MakeObjective(Protocol):
    """A function that makes a new objective of the trial for the given sizes."""

    def __call__(self, num_classes: int, embedding_dim: int, *, with_regularizers: bool = True) -> Objective: ...
