"""Lifted structure loss: Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raydml.losses._base import PairLoss, refuse_swapped_scales
from raydml.ops.distances import LOG_OF_ZERO, euclidean, inner_products, masked_logsumexp
from raydml.ops.tuples import Pairs


class LiftedStructure(PairLoss):
    """Lifted structure loss: a positive pair against all negatives of its two ends, or of its anchor.

    With Euclidean distances d, dot products s and LSE the logarithm of a sum of exponentials:

        original     J(a, p) = LSE(margin - d of all negatives of a and of p) + d(a, p)
                     mean over the chosen positive pairs of max(0, J)^2 / 2
        generalized  max(0, LSE over positives of d + LSE over negatives of (margin - d))
        modified     2/alpha LSE over positives of (-alpha s) + 2/beta LSE over negatives of (beta s)

    "original" is Song et al. (eq. 4); each unordered pair comes twice, which does not change a mean. The negatives of
    p are the items l with a chosen negative pair (l, p): all of its negatives where there is no miner, rows of the
    batch where p is a reference. hardest_negative takes the nearest negative of a and of p in place of all, as
    Deep_Metric of 2018 can. "generalized" is Hermans et al., In Defense of the Triplet Loss for Person
    Re-Identification, 2017, "modified" the Deep_Metric repository of 2019, whose code calls the two scales by each
    other's letter; it may fall below 0. Both average over all B anchors, where an anchor without a positive or without
    a negative adds 0 but counts.

    Embeddings are used as they come. Differences from pytorch-metric-learning: where one side is empty it puts LSE = 0;
    its penalty on the length of embeddings, which the ICML 2020 benchmark has too, is a regulariser of its own here.
    """

    def __init__(
        self,
        *,
        variant: Annotated[
            Literal["original", "generalized", "modified"],
            Field(description="the formula: of Song et al., of Hermans et al., or of Deep_Metric"),
        ] = "original",
        margin: Annotated[
            float | None,
            Field(
                gt=0,
                description="distance beyond which a negative has a weight below 1; null = 1, as in Song et al.; "
                "not for variant modified",
            ),
        ] = None,
        hardest_negative: Annotated[
            bool, Field(description="use the nearest negative of each end instead of all; for variant original only")
        ] = False,
        alpha: Annotated[
            float | None,
            Field(
                gt=0,
                description="sharpness on positives, at most beta; null = 2, as in Deep_Metric; variant modified only",
            ),
        ] = None,
        beta: Annotated[
            float | None,
            Field(gt=0, description="sharpness on negatives; null = 40, as in Deep_Metric; variant modified only"),
        ] = None,
    ) -> None:
        super().__init__()
        if hardest_negative and variant != "original":
            raise ValueError(
                f"hardest_negative = {hardest_negative}, variant = {variant}: only the original pairs two ends with "
                "their nearest negatives; write hardest_negative: false or variant: original"
            )
        unused = {"margin": margin} if variant == "modified" else {"alpha": alpha, "beta": beta}
        for setting, value in unused.items():
            if value is not None:
                raise ValueError(f"{setting} = {value}, variant = {variant}: it has no effect there; remove {setting}")
        self.variant = variant
        self.margin = 1.0 if margin is None else margin
        self.hardest_negative = hardest_negative
        self.alpha = 2.0 if alpha is None else alpha
        self.beta = 40.0 if beta is None else beta
        refuse_swapped_scales(self.alpha, self.beta)

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        if self.variant == "original":
            return self._original(euclidean(points, references), pairs)
        if self.variant == "generalized":
            distance = euclidean(points, references)
            positive = masked_logsumexp(distance, pairs.positive)
            negative = masked_logsumexp(self.margin - distance, pairs.negative)
            # An empty side is far below 0 and cancels the other.
            return (positive + negative).clamp(min=0).sum() / max(len(points), 1)
        similarity = inner_products(points, references)
        positive = masked_logsumexp(-self.alpha * similarity, pairs.positive) * (2 / self.alpha)
        negative = masked_logsumexp(self.beta * similarity, pairs.negative) * (2 / self.beta)
        has_both = pairs.positive.any(dim=1) & pairs.negative.any(dim=1)
        return torch.where(has_both, positive + negative, 0).sum() / max(len(points), 1)

    def _original(self, distance: Tensor, pairs: Pairs) -> Tensor:
        nearness = self.margin - distance
        if self.hardest_negative:
            hidden = _with_border(nearness.masked_fill(~pairs.negative, LOG_OF_ZERO))
            of_row, of_column = hidden.amax(dim=1)[:-1], hidden.amax(dim=0)[:-1]
        else:
            of_row = masked_logsumexp(nearness, pairs.negative)
            of_column = masked_logsumexp(nearness, pairs.negative, dim=0)
        lifted = torch.logaddexp(of_row[:, None], of_column) + distance
        cost = lifted.clamp(min=0).square() * pairs.positive
        return cost.sum() / (2 * pairs.positive.sum().clamp(min=1))


def _with_border(values: Tensor) -> Tensor:
    """Append a row and a column of LOG_OF_ZERO, so that an empty batch has a maximum."""
    return nn.functional.pad(values, (0, 1, 0, 1), value=LOG_OF_ZERO)
