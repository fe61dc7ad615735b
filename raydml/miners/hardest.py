"""Batch-hard mining: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, arXiv 2017."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from raydml.ops.distances import full_precision, squared_euclidean
from raydml.ops.tuples import Triplets, all_pairs


class Hardest(nn.Module):
    """One triplet an anchor, of its farthest positive and its nearest negative ("batch hard").

    T = B: triplet i has anchor i, and is invalid where i has no positive or no negative in the batch. Euclidean
    distances of the embeddings as they come. Deterministic.
    """

    yields: ClassVar[str] = "triplets"

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,  # noqa: ARG002 - all miners are called alike
    ) -> Triplets:
        """T = B triplets. embeddings: (B, D); labels: (B,) int64; the generator is not used."""
        anchor = torch.arange(len(labels), device=labels.device)
        if len(labels) == 0:
            return Triplets(anchor, anchor, anchor, anchor.bool())
        positives, negatives = all_pairs(labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            distance = squared_euclidean(full_precision(embeddings))  # squares have the order of distances
        return Triplets(
            anchor=anchor,
            positive=distance.masked_fill(~positives, -torch.inf).argmax(dim=1),
            negative=distance.masked_fill(~negatives, torch.inf).argmin(dim=1),
            valid=positives.any(dim=1) & negatives.any(dim=1),
        )
