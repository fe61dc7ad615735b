"""Normalised softmax: Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from raydml.ops.distances import full_precision, products_with_unit
from raydml.ops.tuples import Pairs, TripletRanges, Triplets


class NormalizedSoftmax(nn.Module):
    """Normalised softmax: classify against unit class vectors at a low temperature; takes no miner.

    Cross-entropy of the logits <x_i, w_c / max(|w_c|, 1e-12)> / temperature, averaged over the batch
    (no bias). Embeddings are used as they come, so that the network decides whether
    they are unit vectors.

    The class matrix starts uniform in +-1/sqrt(embedding_dim), drawn from torch's own generator: the caller seeds it.
    Its rows are normalised in the forward pass only; gradients flow through that, and weight decay acts on the raw
    rows, as in the reference.
    """

    accepts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        temperature: Annotated[
            float, Field(gt=0, description="divides the cosines; 0.05 in all published runs of the authors")
        ] = 0.05,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        bound = embedding_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim).uniform_(-bound, bound))

    def forward(
        self, embeddings: Tensor, labels: Tensor, tuples: Pairs | Triplets | TripletRanges | None = None
    ) -> Tensor:
        """Scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64 in 0..num_classes-1; tuples: None."""
        if tuples is not None:
            raise ValueError("normalized_softmax learns from labels alone: set miner to null")
        with torch.autocast(embeddings.device.type, enabled=False):
            points = full_precision(embeddings)
            logits = products_with_unit(points, self.weight.to(points.dtype)) / self.temperature
            # Sum and division, because the mean of an empty batch is NaN.
            return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
