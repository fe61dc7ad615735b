"""What the losses against learned vectors of the classes share."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from raydml.ops.distances import products_with_unit


def class_vectors(num_classes: int, embedding_dim: int) -> nn.Parameter:
    """Return vectors (C, D), uniform in +-1/sqrt(D) as in torch's linear layer, from torch's global generator.

    All losses on class cosines start from them, so that one learning rate serves all: only the direction of a vector
    counts there, and its length decides how fast the direction turns.
    """
    bound = embedding_dim**-0.5
    return nn.Parameter(torch.empty(num_classes, embedding_dim).uniform_(-bound, bound))


def class_cosines(points: Tensor, vectors: Tensor) -> Tensor:
    """Return the cosines (B, C) of points (B, D) with vectors (C, D), both normalised by max(norm, 1e-12)."""
    return products_with_unit(functional.normalize(points), vectors.to(points.dtype))


def subtract_margin(similarity: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the similarities (B, C) to the classes with a margin taken from those to the own class."""
    own = labels[:, None]
    return similarity.scatter_add(1, own, similarity.new_full(own.shape, -margin))


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy averaged over the batch; 0 for an empty batch, whose mean would be NaN."""
    return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
