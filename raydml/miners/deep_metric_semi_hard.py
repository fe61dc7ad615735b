"""Deep_Metric's semi-hard mining: Wang, the Deep_Metric code of 2018 (github.com/bnu-wangxun/Deep_Metric); no paper."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from raydml.ops.distances import dot_products
from raydml.ops.tuples import Pairs, all_pairs


class DeepMetricSemiHard(nn.Module):
    """Deep_Metric's semi-hard mining: leave out pairs harder than every pair of the other side.

    For anchor i and dot products s: a positive stays when s > the least similar negative, a negative stays when
    s < the most similar positive. Both compare with the unmined extremes. An anchor without positives or without
    negatives keeps nothing, nor does one whose negatives are all nearer than its positives. Deterministic.

    This is not the semi-hard mining of FaceNet: it takes away hopeless pairs, and leaves easy ones to the loss. In the
    code the weight loss follows, with alpha 2 and beta 40 in our letters. Embeddings are used as they come.
    """

    yields: ClassVar[str] = "pairs"

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
            # Without negatives the easiest is at infinity, above which no positive lies; likewise without positives.
            easiest_negative = similarity.masked_fill(~pairs.negative, math.inf).amin(dim=1, keepdim=True)
            easiest_positive = similarity.masked_fill(~pairs.positive, -math.inf).amax(dim=1, keepdim=True)
            return Pairs(
                positive=pairs.positive & (similarity > easiest_negative),
                negative=pairs.negative & (similarity < easiest_positive),
            )
