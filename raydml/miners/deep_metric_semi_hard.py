"""Deep_Metric's semi-hard mining: Wang, the Deep_Metric code of 2018 (github.com/bnu-wangxun/Deep_Metric); no paper."""

import math

from torch import Generator, Tensor

from raydml.miners._base import PairMiner
from raydml.ops.distances import inner_products
from raydml.ops.tuples import Pairs


class DeepMetricSemiHard(PairMiner):
    """Deep_Metric's semi-hard mining: leave out pairs harder than every pair of the other side.

    For anchor i and dot products s: a positive stays when s > the least similar negative, a negative stays when
    s < the most similar positive. Both compare with the unmined extremes. An anchor without positives or without
    negatives keeps nothing, nor does one whose negatives are all nearer than its positives. Deterministic.

    This is not the semi-hard mining of FaceNet: it takes away hopeless pairs, and leaves easy ones to the loss. In the
    code the weight loss follows, with alpha 2 and beta 40 in our letters. Embeddings are used as they come.
    """

    def __init__(self) -> None:
        super().__init__()
        self.measure = inner_products

    def choose_from(self, matrix: Tensor, pairs: Pairs, generator: Generator | None) -> Pairs:
        # Without negatives the easiest is at infinity, above which no positive lies; likewise without positives.
        easiest_negative = matrix.masked_fill(~pairs.negative, math.inf).amin(dim=1, keepdim=True)
        easiest_positive = matrix.masked_fill(~pairs.positive, -math.inf).amax(dim=1, keepdim=True)
        return Pairs(
            positive=pairs.positive & (matrix > easiest_negative), negative=pairs.negative & (matrix < easiest_positive)
        )
