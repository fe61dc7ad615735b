"""CosFace: Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from raydml.ops.distances import full_precision, products_with_unit
from raydml.ops.tuples import Pairs, TripletRanges, Triplets


class CosFace(nn.Module):
    """CosFace: classify by cosine, the own class's cosine handicapped by a margin; takes no miner.

    Cross-entropy of the logits scale * (cos(x_i, w_c) - margin * [c = y_i]), averaged over the batch: equation 4.
    Embeddings and class vectors are normalised inside the loss, both by max(norm, 1e-12); no bias.

    The class matrix starts uniform in +-1/sqrt(embedding_dim), as in normalized_softmax, so that one learning rate
    serves both: only directions count, and the length of a vector decides how fast its direction turns. The paper does
    not say how it starts; pytorch-metric-learning, which agrees in all else, draws from N(0, 1).
    """

    accepts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: Annotated[float, Field(gt=0, description="multiplies the cosines; 64 in the paper")] = 64.0,
        margin: Annotated[
            float, Field(ge=0, lt=2, description="taken from the own class's cosine; 0.35 in the paper")
        ] = 0.35,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        bound = embedding_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim).uniform_(-bound, bound))

    def forward(
        self, embeddings: Tensor, labels: Tensor, tuples: Pairs | Triplets | TripletRanges | None = None
    ) -> Tensor:
        """Scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64 in 0..num_classes-1; tuples: None."""
        if tuples is not None:
            raise ValueError("cosface learns from labels alone: set miner to null")
        with torch.autocast(embeddings.device.type, enabled=False):
            points = full_precision(embeddings)
            cosine = products_with_unit(functional.normalize(points), self.weight.to(points.dtype))
            own = labels[:, None]
            logits = self.scale * cosine.scatter_add(1, own, cosine.new_full(own.shape, -self.margin))
            # Sum and division, because the mean of an empty batch is NaN.
            return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
