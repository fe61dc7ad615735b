"""Soft-hard mining: Roth et al., Revisiting Training Strategies and Generalization Performance in DML, ICML 2020."""

import torch
from torch import Generator, Tensor

from raydml.miners._base import TripletMiner
from raydml.ops.distances import squared_euclidean
from raydml.ops.random_columns import draw_columns
from raydml.ops.tuples import Triplets, all_pairs


class SoftHard(TripletMiner):
    """One triplet an anchor, of a hard positive and a hard negative at random.

    T = B: triplet i has anchor i, a positive at random of those farther than the nearest negative, or of all where none
    is; and, drawn independently, a negative at random of those nearer than the farthest positive, or of all where none
    is. Outliers have less influence than in the hardest pairs. Invalid where the anchor has no positive or no negative
    in the batch.

    Euclidean distances of the embeddings as they come; both comparisons are strict. In the authors' older code, from
    the time of MIC (ICCV 2019), this is what "semihard" means.
    """

    def choose(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Triplets:
        """Return T = B triplets; draw 2 B numbers."""
        anchor = torch.arange(len(labels), device=labels.device)
        positives, negatives = all_pairs(labels)
        distance = squared_euclidean(points)  # squares have the order of distances
        nearest_negative = distance.masked_fill(~negatives, torch.inf).amin(dim=1, keepdim=True)
        farthest_positive = distance.masked_fill(~positives, -torch.inf).amax(dim=1, keepdim=True)
        hard_positives = positives & (distance > nearest_negative)
        hard_negatives = negatives & (distance < farthest_positive)
        # Either both sides have a hard one or neither has: both say that some positive is farther than some negative.
        hard = hard_positives.any(dim=1, keepdim=True)
        return Triplets(
            anchor=anchor,
            positive=draw_columns(torch.where(hard, hard_positives, positives), generator)[:, 0],
            negative=draw_columns(torch.where(hard, hard_negatives, negatives), generator)[:, 0],
            valid=positives.any(dim=1) & negatives.any(dim=1),
        )
