"""Batch-hard mining: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, arXiv 2017."""

import torch
from torch import Generator, Tensor

from raydml.miners._base import TripletMiner
from raydml.ops.distances import squared_euclidean
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
        return Triplets(
            anchor=anchor,
            positive=distance.masked_fill(~positives, -torch.inf).argmax(dim=1),
            negative=distance.masked_fill(~negatives, torch.inf).argmin(dim=1),
            valid=positives.any(dim=1) & negatives.any(dim=1),
        )
