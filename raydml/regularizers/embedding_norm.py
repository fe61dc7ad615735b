"""Embedding norm: Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from raydml.regularizers._base import Regularizer


class EmbeddingNorm(Regularizer):
    """Embedding norm: keep embeddings short beside a loss that could win by making them long.

    The term is weight * mean_i |e_i|^power over the batch. It belongs to losses of raw dot products (n_pair, angular,
    lifted_structure), with embeddings that the network does not normalise; on unit embeddings it is a constant.

    Power 2 is the form of Sohn; the MIC authors' baselines take 0.02 times |e_a|^2 + |e_p|^2 averaged over their pairs,
    which is power 2 with weight 0.04 where every item is in one pair. The ICML 2020 benchmark does not square: power 1,
    weight 0.005, the defaults here. The gradient of the norm is taken as 0 at the origin.
    """

    def __init__(
        self,
        *,
        weight: Annotated[
            float, Field(ge=0, description="multiplies the mean; 0.005 in the ICML 2020 benchmark, for power 1")
        ] = 0.005,
        power: Annotated[
            Literal[1, 2], Field(description="of the norm: 1 in the ICML 2020 benchmark, 2 in Sohn's paper")
        ] = 1,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.power = power

    def term(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
        sizes = points.square() if self.power == 2 else torch.linalg.vector_norm(points, dim=1)
        return self.weight * sizes.sum() / max(len(points), 1)
