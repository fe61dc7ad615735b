"""Batch-hard mining: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, arXiv 2017."""

import torch
from torch import Generator, Tensor

from raydml.miners._base import TripletMiner
from raydml.ops.distances import BEYOND_ALL, hidden, squared_euclidean
from raydml.ops.tuples import Triplets, all_pairs


class Hardest(TripletMiner):
    """One triplet an anchor, of its farthest positive and its nearest negative ("batch hard").

    T = B: triplet i has anchor i, and is invalid where i has no positive or no negative in the batch. Euclidean
    distances of the embeddings as they come. Deterministic.
    """

    def choose(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Triplets:
        """Return T = B triplets."""
        anchor = torch.arange(len(labels), device=labels.device)
        positives, negatives = all_pairs(labels)
        distance = squared_euclidean(points)  # squares have the order of distances
        farthest, positive = hidden(distance, positives, -BEYOND_ALL).max(dim=1)
        nearest, negative = hidden(distance, negatives, BEYOND_ALL).min(dim=1)
        return Triplets(anchor, positive, negative, valid=(farthest >= 0) & (nearest < BEYOND_ALL / 2))
