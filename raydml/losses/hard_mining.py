"""Hard-mining loss: Wang, the Deep_Metric code (github.com/bnu-wangxun/Deep_Metric), 2019; no paper."""

from torch import Tensor

from raydml.losses._base import PairLoss, mean_weights
from raydml.ops.distances import inner_products
from raydml.ops.tuples import Pairs


class HardMining(PairLoss):
    """Hard-mining loss: mean negative similarity minus mean positive similarity of the mined pairs.

    For anchor i with chosen positives P and negatives N and dot products s:

        mean_P (1 - s) + mean_N s

    averaged over all B anchors: those with nothing chosen add 0 but count. An empty side adds 0.

    The loss is linear, without margin and settings, and below 0 where negatives point away: it depends on the mining.
    The release has the multi_similarity miner (epsilon 0.1) before it; its "triplet" file is the same loss with another
    epsilon. Without a miner every pair of the batch pulls alike.

    Embeddings are used as they come, as in the release. Departure: an item is left out of its own positives by index,
    not by "s < 1".
    """

    def __init__(self) -> None:
        super().__init__()
        self.measure = inner_products

    def cost_of(self, matrix: Tensor, pairs: Pairs) -> Tensor:
        positive, negative = (mean_weights(mask, matrix.dtype) for mask in pairs)
        ones = pairs.positive.any(dim=1).sum()  # the 1 of each mean over 1 - s
        return (((negative - positive) * matrix).sum() + ones) / max(len(matrix), 1)
