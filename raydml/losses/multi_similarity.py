"""Multi-similarity loss: Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from raydml.losses._base import PairLoss, opposed_soft_maxima, refuse_swapped_scales
from raydml.ops.distances import inner_products
from raydml.ops.tuples import Pairs


class MultiSimilarity(PairLoss):
    """Multi-similarity loss: soft maxima over an anchor's positive and negative similarities.

    For anchor i with chosen positives P and negatives N and dot products s:

        (1/alpha) log(1 + sum_P exp(-alpha (s - base))) + (1/beta) log(1 + sum_N exp(beta (s - base)))

    averaged over all B anchors: those with nothing chosen add 0 but count. An empty side adds 0.

    Defaults are those of the authors' release; the paper has alpha 2, beta 50, base 1, as widely reported and not
    checked. Published results come from the multi_similarity miner (epsilon 0.1): without a miner every pair of the
    batch counts.

    Embeddings are used as they come, as in the release. Departure: an item is left out of its own positives
    by index, not by "s < 1 - 1e-5", so exact copies of an image remain positives of each other.
    """

    def __init__(
        self,
        *,
        alpha: Annotated[
            float, Field(gt=0, description="sharpness on positives, at most beta; 2 in the release")
        ] = 2.0,
        beta: Annotated[
            float, Field(gt=0, description="sharpness on negatives; 40 in the release; 50 in the paper, unchecked")
        ] = 40.0,
        base: Annotated[
            float, Field(description="origin of both similarity scales; 0.5 in the release; 1 in the paper, unchecked")
        ] = 0.5,
    ) -> None:
        super().__init__()
        refuse_swapped_scales(alpha, beta)
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.measure = inner_products

    def cost_of(self, matrix: Tensor, pairs: Pairs) -> Tensor:
        return opposed_soft_maxima(matrix, pairs, self.alpha, self.beta, self.base)
