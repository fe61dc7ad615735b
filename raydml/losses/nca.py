"""NCA loss: Goldberger et al., Neighbourhood Components Analysis, NeurIPS 2004."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydml.losses._base import PairLoss
from raydml.ops.distances import masked_logsumexp, squared_euclidean
from raydml.ops.tuples import Pairs


class NCA(PairLoss):
    """Neighbourhood components analysis: a random near neighbour should be of the anchor's class.

    With squared Euclidean distances q, an anchor picks a neighbour with probability proportional to exp(-alpha q); the
    loss is

        -log( sum over positives of exp(-alpha q) / sum over positives and negatives of exp(-alpha q) )

    averaged over the anchors with a chosen positive. This is the logarithmic objective that the paper gives beside the
    expected number of hits, and the one of pytorch-metric-learning, where alpha is softmax_scale.

    nearest: how many of an anchor's chosen items, the nearest, take part; where no positive is among them the nearest
    positive does. Deep_Metric of 2018 has 32 with alpha 16; the defaults are the paper's, all items and alpha 1.

    Embeddings are used as they come. Departure from Deep_Metric: among fewer than `nearest` items all take part.
    """

    def __init__(
        self,
        *,
        alpha: Annotated[
            float, Field(gt=0, description="sharpness on squared distances; 1 in Goldberger et al., 16 in Deep_Metric")
        ] = 1.0,
        nearest: Annotated[
            Annotated[int, Field(ge=1)] | None,
            Field(description="number of nearest items that take part; null = all, as in Goldberger et al."),
        ] = None,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.nearest = nearest

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        squares = squared_euclidean(points, references)
        # Otherwise all items are among the nearest.
        if self.nearest is not None and self.nearest < squares.shape[1]:
            pairs = _nearest_pairs(squares.detach(), pairs, self.nearest)
        logits = -self.alpha * squares
        # -log(P / (P + N)) is softplus(log N - log P), which does not round small costs away.
        cost = functional.softplus(masked_logsumexp(logits, pairs.negative) - masked_logsumexp(logits, pairs.positive))
        has_positive = pairs.positive.any(dim=1)
        return torch.where(has_positive, cost, 0).sum() / has_positive.sum().clamp(min=1)


def _nearest_pairs(squares: Tensor, pairs: Pairs, num_nearest: int) -> Pairs:
    """Return the num_nearest nearest pairs of each anchor, and always its nearest positive.

    squares: (B, M) without gradient, M > num_nearest.
    """
    chosen = squares.masked_fill(~(pairs.positive | pairs.negative), torch.inf)
    near = squares < chosen.kthvalue(num_nearest + 1, dim=1, keepdim=True).values
    nearest_positive = squares.masked_fill(~pairs.positive, torch.inf).amin(dim=1, keepdim=True)
    return Pairs(pairs.positive & (near | (squares <= nearest_positive)), pairs.negative & near)
