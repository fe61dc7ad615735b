"""Binomial deviance: Yi et al., Deep Metric Learning for Practical Person Re-Identification, arXiv 1407.4979, 2014."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydml.losses._base import PairLoss, mean_weights, refuse_swapped_scales
from raydml.ops.distances import inner_products
from raydml.ops.tuples import Pairs


class BinomialDeviance(PairLoss):
    """Binomial deviance: a logistic loss on every pair, sharper on negatives than on positives.

    For anchor i with chosen positives P and negatives N and dot products s:

        mean_P log(1 + exp(-alpha (s - base))) + mean_N log(1 + exp(beta (s - base)))

    averaged over all B anchors: those with nothing chosen add 0 but count. An empty side adds 0.

    This is the form of Wang's Deep_Metric code, whose constants are the defaults. The paper takes both means over the
    batch instead of the anchor, and writes beta as alpha times a cost of negatives. Deep_Metric calls the two scales by
    each other's letter. Behind its hard mining (the multi_similarity miner with epsilon 0.1) it uses divide_by_scale.

    Embeddings are used as they come, as in Deep_Metric. Departure: an item is left out of its own positives by index,
    not by "s < 1".
    """

    def __init__(
        self,
        *,
        alpha: Annotated[float, Field(gt=0, description="scale of positives, at most beta; 2 in Deep_Metric")] = 2.0,
        beta: Annotated[float, Field(gt=0, description="scale of negatives; 40 in Deep_Metric")] = 40.0,
        base: Annotated[
            float, Field(description="the similarity where a pair turns from easy to hard; 0.5 in Deep_Metric")
        ] = 0.5,
        divide_by_scale: Annotated[
            bool,
            Field(
                description="multiply the sides by 2/alpha and 2/beta, so that both have slope 2 at most; off in "
                "Deep_Metric, but on behind its mining"
            ),
        ] = False,
    ) -> None:
        super().__init__()
        refuse_swapped_scales(alpha, beta)
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.divide_by_scale = divide_by_scale
        self.measure = inner_products

    def cost_of(self, matrix: Tensor, pairs: Pairs) -> Tensor:
        similarity = matrix - self.base
        scale = torch.full_like(similarity, self.beta).masked_fill_(pairs.positive, -self.alpha)
        positive, negative = (mean_weights(mask, similarity.dtype) for mask in pairs)
        if self.divide_by_scale:
            positive, negative = positive * (2 / self.alpha), negative * (2 / self.beta)
        deviance = functional.softplus(scale * similarity)
        return ((positive + negative) * deviance).sum() / max(len(matrix), 1)
