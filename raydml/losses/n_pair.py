"""N-pair loss: Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016."""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydml.losses._base import PairLoss
from raydml.ops.distances import inner_products, masked_logsumexp
from raydml.ops.tuples import Pairs


class NPair(PairLoss):
    """N-pair loss: a positive against all negatives of its anchor at once, in dot products.

    For a positive pair (a, p) and the negatives n of its anchor, with dot products s:

        log(1 + sum over n of exp(s(a, n) - s(a, p)))

    averaged over the chosen positive pairs, plus l2 times the mean over the same pairs of |a|^2 + |p|^2. The paper
    draws one pair for each class and takes as negatives the positives of the others: choose the n_pair miner for that.
    Without a miner every positive pair counts against all of its anchor's negatives; the ICML 2020 benchmark does so
    with one positive an anchor, and its penalty is the mean length of all embeddings.

    Embeddings are used as they come; the paper does not normalise them, which is why it needs the penalty: choose
    embeddings without normalisation, or l2 = 0. The default of l2 is that of the baselines which the MIC authors
    released. pytorch-metric-learning has no penalty and takes as negatives the other classes' positives.
    """

    def __init__(
        self,
        *,
        l2: Annotated[
            float,
            Field(ge=0, description="weight of the squared length of embeddings; 0.02 in the MIC authors' baselines"),
        ] = 0.02,
    ) -> None:
        super().__init__()
        self.l2 = l2

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        others = points if references is None else references.to(points.dtype)
        similarity = inner_products(points, others)
        # log(1 + sum of e^s / e^p) is softplus(LSE - p), which neither overflows nor rounds small costs away.
        negative = masked_logsumexp(similarity, pairs.negative)
        cost = functional.softplus(negative[:, None] - similarity)
        if self.l2 > 0:
            squares = points.square().sum(dim=1)[:, None] + others.square().sum(dim=1)
            cost = cost + self.l2 * squares
        return (cost * pairs.positive).sum() / pairs.positive.sum().clamp(min=1)
