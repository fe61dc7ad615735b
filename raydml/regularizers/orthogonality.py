"""Orthogonality: the orthogonal regulariser (orth_reg) of Wang's Deep_Metric code, 2018."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from raydml.models.network import Network
from raydml.regularizers._base import Regularizer


class Orthogonality(Regularizer):
    """Orthogonality: keep the directions that the embedding layer projects onto at right angles.

    With W (D, F) the weight of the linear layer that makes the embeddings, the term is

        weight * mean over all D^2 entries of (W W^T with its diagonal set to 0)^2

    Only angles count, not lengths. It does not depend on the batch, except that an empty one costs nothing. The weight
    in the release is 0 (off) by default, and no other is published, so 1 here is only a start for a search.
    """

    def __init__(
        self,
        network: Network,
        *,
        weight: Annotated[float, Field(ge=0, description="multiplies the mean; no published value")] = 1.0,
    ) -> None:
        super().__init__()
        if network.head.linear is None:
            raise ValueError("there is no linear layer: set model.projection to linear or linear_no_bias")
        self.weight = weight
        # In a tuple, where torch does not look for submodules: the layer's parameters are the network's.
        self._linear = (network.head.linear,)

    def term(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
        rows = self._linear[0].weight.to(torch.promote_types(points.dtype, torch.float32))
        products = rows @ rows.T
        across = products - products.diagonal().diag()
        return self.weight * min(len(points), 1) * across.square().mean()
