"""Threshold consistency: Zhang et al., Threshold-Consistent Margin Loss for Open-World DML, ICLR 2024."""

from typing import Annotated

from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional

from raydml.ops.distances import as_numbers
from raydml.regularizers._base import Regularizer

_Cosine = Annotated[float, Field(ge=-1, le=1)]
_Weight = Annotated[float, Field(ge=0)]


class ThresholdConsistency(Regularizer):
    """Threshold consistency: hold hard pairs near fixed similarities, so that one threshold serves all.

    With s the cosines of the pairs of a batch,

        positive_weight * mean of (positive_margin - s) over the positive pairs with s <= positive_margin
        + negative_weight * mean of (s - negative_margin) over the negative pairs with s >= negative_margin

    A mean over no pairs is 0. It stands beside a loss (TCM in the paper, equation 5), which it does not replace: pairs
    beyond the margins cost nothing.
    """

    def __init__(
        self,
        *,
        positive_margin: Annotated[
            _Cosine, Field(description="cosine up to which a positive pair is hard; 0.9 in the paper")
        ] = 0.9,
        negative_margin: Annotated[
            _Cosine, Field(description="cosine from which a negative pair is hard; 0.5 in the paper")
        ] = 0.5,
        positive_weight: Annotated[_Weight, Field(description="multiplies the mean over the positive pairs")] = 1.0,
        negative_weight: Annotated[_Weight, Field(description="multiplies the mean over the negative pairs")] = 1.0,
    ) -> None:
        super().__init__()
        self.margins = positive_margin, negative_margin
        self.weights = positive_weight, negative_weight

    def term(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
        units = functional.normalize(points)
        cosines = units @ units.T
        same = labels[:, None] == labels
        is_pair = cosines.new_ones(cosines.shape).triu(diagonal=1) > 0
        above, below = self.margins[0] - cosines, cosines - self.margins[1]
        total = points[:0].sum()
        for weight, excess, pairs in zip(self.weights, (above, below), (same, ~same), strict=True):
            hard = pairs & is_pair & (excess >= 0)
            number = as_numbers(hard.sum(), points.dtype).clamp(min=1)
            total = total + weight * excess.masked_fill(~hard, 0).sum() / number
        return total
