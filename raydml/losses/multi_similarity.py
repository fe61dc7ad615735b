"""Multi-similarity loss: Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019."""

import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor, nn

from raydml.tuples import Pairs, all_pairs


class MultiSimilarity(nn.Module):
    """Multi-similarity loss: soft maxima over an anchor's positive and negative similarities.

    For anchor i with chosen positives P and negatives N and dot products s:

        (1/alpha) log(1 + sum_P exp(-alpha (s - base))) + (1/beta) log(1 + sum_N exp(beta (s - base)))

    averaged over all B anchors: those with nothing chosen add 0 but count. An empty side adds 0.

    alpha: sharpness on positives. beta: sharpness on negatives. base: the similarity both are measured from.
    Defaults are those of the authors' release (alpha 2, beta 40, base 0.5); the paper's text gives alpha 2,
    beta 50, base 1. Published results come from the multi_similarity miner (epsilon 0.1): without a miner
    every pair of the batch counts.

    Embeddings are used as they come, as in the release. Departure: an item is left out of its own positives
    by index, not by "s < 1 - 1e-5", so exact copies of an image remain positives of each other.
    """

    accepts: ClassVar[tuple[str, ...]] = ("pairs",)

    def __init__(
        self,
        *,
        alpha: Annotated[float, Gt(0)] = 2.0,
        beta: Annotated[float, Gt(0)] = 40.0,
        base: float = 0.5,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.base = base

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: Pairs | None = None) -> Tensor:
        """Scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64; None = all pairs."""
        pairs = all_pairs(labels) if tuples is None else tuples
        if not isinstance(pairs, Pairs):
            raise ValueError("multi_similarity works on pairs: choose a miner that yields pairs, or none")
        # Multiplied by beta, a similarity rounded to bfloat16 would be off by more than its exponent can
        # bear.
        with torch.autocast(embeddings.device.type, enabled=False):
            points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            similarity = points @ points.T - self.base
            positive = _log_one_plus_sum_exp(-self.alpha * similarity, pairs.positive) / self.alpha
            negative = _log_one_plus_sum_exp(self.beta * similarity, pairs.negative) / self.beta
            return (positive + negative).sum() / max(len(labels), 1)


def _log_one_plus_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    """(B, B) to (B,): log(1 + sum of exp over the masked entries of a row), without overflow."""
    one = values.new_zeros(len(values), 1)  # exp(0), and the reason why no row is ever empty
    return torch.logsumexp(torch.cat([one, values.masked_fill(~mask, -math.inf)], dim=1), dim=1)
