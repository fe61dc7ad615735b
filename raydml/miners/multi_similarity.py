"""Multi-similarity mining: Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019."""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from raydml.ops.distances import dot_products
from raydml.ops.tuples import Pairs, all_pairs


class MultiSimilarityMiner(nn.Module):
    """Multi-similarity mining: keep pairs harder than the anchor's hardest opposite pair, within epsilon.

    For anchor i and dot products s: a negative stays when s + epsilon > the least similar positive, a
    positive stays when s - epsilon < the most similar negative. Both compare with the unmined extremes, so
    either both sides keep something or neither does; an anchor without positives or without negatives keeps
    nothing. Deterministic.

    The hard mining of Wang's Deep_Metric code, in front of its binomial, hard-mining, lifted-structure and weight
    losses, is the same rule, with epsilon 0.1 too.

    Embeddings are used as they come. Departure: an item is left out of its own positives by index, not by
    "s < 1 - 1e-5".
    """

    yields: ClassVar[str] = "pairs"

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Field(ge=0, description="slack in similarity; 0.1 in the authors' release")] = 0.1,
    ) -> None:
        super().__init__()
        self.epsilon = epsilon

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,  # noqa: ARG002 - all miners are called alike
        pairs: Pairs | None = None,
        references: Tensor | None = None,
    ) -> Pairs:
        """Masks (B, M). embeddings: (B, D); labels: (B,) int64; pairs: candidates, None = all of the batch;
        references: (M, D), embeddings of the candidates' columns, None = the batch. The generator is not used."""
        pairs = all_pairs(labels) if pairs is None else pairs
        if pairs.positive.numel() == 0:
            return pairs
        with torch.autocast(embeddings.device.type, enabled=False):
            similarity = dot_products(embeddings, references)
            hardest_positive = similarity.masked_fill(~pairs.positive, math.inf).amin(dim=1, keepdim=True)
            hardest_negative = similarity.masked_fill(~pairs.negative, -math.inf).amax(dim=1, keepdim=True)
            return Pairs(
                positive=pairs.positive & (similarity - self.epsilon < hardest_negative),
                negative=pairs.negative & (similarity + self.epsilon > hardest_positive),
            )
