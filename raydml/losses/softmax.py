"""Softmax: Sun et al., Deep Learning Face Representation from Predicting 10,000 Classes, CVPR 2014."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from raydml.ops.distances import full_precision
from raydml.ops.tuples import Pairs, TripletRanges, Triplets


class Softmax(nn.Module):
    """Softmax: the cross-entropy of a linear classifier on the embeddings; takes no miner.

    With class vectors w and biases b, the logits of x_i are <x_i, w_c> + b_c; the loss is the mean over the batch of

        log sum_c exp(logit_ic) - logit_{i, y_i}

    The plainest way to learn an embedding: train a classifier and throw its last layer away. Embeddings, class vectors
    and biases are used as they come: on unit embeddings the length of the class vectors sets the temperature.

    Weights and biases start uniform in +-1/sqrt(embedding_dim), as torch's linear layer does, drawn from torch's own
    generator: the caller seeds it. See normalized_softmax for the form without bias and with a fixed temperature.
    """

    accepts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        bound = embedding_dim**-0.5
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))

    def forward(
        self, embeddings: Tensor, labels: Tensor, tuples: Pairs | Triplets | TripletRanges | None = None
    ) -> Tensor:
        """Scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64 in 0..num_classes-1; tuples: None."""
        if tuples is not None:
            raise ValueError("softmax learns from labels alone: set miner to null")
        with torch.autocast(embeddings.device.type, enabled=False):
            points = full_precision(embeddings)
            logits = functional.linear(points, self.weight.to(points.dtype), self.bias.to(points.dtype))
            # Sum and division, because the mean of an empty batch is NaN.
            return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
