"""Weight loss: Wang, the Deep_Metric code of 2018 (github.com/bnu-wangxun/Deep_Metric); no paper."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from raydml.losses._base import PairLoss, opposed_soft_maxima, refuse_swapped_scales
from raydml.ops.distances import inner_products
from raydml.ops.tuples import Pairs


class Weight(PairLoss):
    """Weight loss: the unpublished forerunner of the multi-similarity loss, twice its value.

    For anchor i with chosen positives P and negatives N and dot products s:

        (2/alpha) log(1 + sum_P exp(-alpha (s - base))) + (2/beta) log(1 + sum_N exp(beta (s - base)))

    averaged over all B anchors: those with nothing chosen add 0 but count. An empty side adds 0.

    The code calls the two scales by each other's letter. Its hard mining is the multi_similarity miner (epsilon 0.1).
    With the deep_metric_semi_hard miner this is the code's "semi-hard" loss, with the inverse_gaussian miner its
    "distance weighted" loss (which has beta 50).

    Embeddings are used as they come, as in the release.
    """

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(gt=0, description="sharpness on positives, at most beta; 2 in the code")] = 2.0,
        beta: Annotated[
            float, Field(gt=0, description="sharpness on negatives; 40 in the code's run script, 10 in its class")
        ] = 40.0,
        base: Annotated[
            float, Field(description="the similarity that both sides are measured from; 0.5 in the code")
        ] = 0.5,
    ) -> None:
        super().__init__()
        refuse_swapped_scales(alpha, beta)
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.measure = inner_products

    def cost_of(self, matrix: Tensor, pairs: Pairs) -> Tensor:
        return 2 * opposed_soft_maxima(matrix, pairs, self.alpha, self.beta, self.base)
