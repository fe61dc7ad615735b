"""Soft-hard mining: Roth et al., Revisiting Training Strategies and Generalization Performance in DML, ICML 2020."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from raydml.ops.distances import full_precision, squared_euclidean
from raydml.ops.random_columns import draw_columns
from raydml.ops.tuples import Triplets, all_pairs


class SoftHard(nn.Module):
    """One triplet an anchor, of a hard positive and a hard negative at random.

    T = B: triplet i has anchor i, a positive at random of those farther than the nearest negative, or of all where none
    is; and, drawn independently, a negative at random of those nearer than the farthest positive, or of all where none
    is. Less at the mercy of outliers than the very hardest. Invalid where the anchor has no positive or no negative in
    the batch.

    Euclidean distances of the embeddings as they come; both comparisons are strict. In the authors' older code, from
    the time of MIC (ICCV 2019), this is what "semihard" means.
    """

    yields: ClassVar[str] = "triplets"

    @torch.no_grad()
    def forward(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Triplets:
        """T = B triplets. embeddings: (B, D); labels: (B,) int64; generator: draws 2 B numbers."""
        anchor = torch.arange(len(labels), device=labels.device)
        if len(labels) == 0:
            return Triplets(anchor, anchor, anchor, anchor.bool())
        positives, negatives = all_pairs(labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            distance = squared_euclidean(full_precision(embeddings))  # squares have the order of distances
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
