"""Multi-similarity mining: Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019."""

from typing import Annotated

from pydantic import Field
from torch import Generator, Tensor

from raydml.miners._base import PairMiner
from raydml.ops.distances import BEYOND_ALL, hidden, inner_products
from raydml.ops.tuples import Pairs


class MultiSimilarityMiner(PairMiner):
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

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Field(ge=0, description="slack in similarity; 0.1 in the authors' release")] = 0.1,
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.measure = inner_products

    def choose_from(self, matrix: Tensor, pairs: Pairs, generator: Generator | None) -> Pairs:
        # Without positives the hardest is beyond all similarities; likewise without negatives.
        hardest_positive = hidden(matrix, pairs.positive, BEYOND_ALL).amin(dim=1, keepdim=True)
        hardest_negative = hidden(matrix, pairs.negative, -BEYOND_ALL).amax(dim=1, keepdim=True)
        return Pairs(
            positive=pairs.positive & (matrix - self.epsilon < hardest_negative),
            negative=pairs.negative & (matrix + self.epsilon > hardest_positive),
        )
