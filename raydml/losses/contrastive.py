"""Contrastive loss: Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydml.losses._base import TripletLoss, Tuples, both_sides, pair_squares, with_slope
from raydml.ops.distances import SMALLEST_SQUARE, as_numbers, entries_at, euclidean, inner_products
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, counts, per_tuple


class Contrastive(TripletLoss):
    """Contrastive loss: draw positives inside one distance, push negatives beyond another.

    With Euclidean distances d and dot products s, a positive and a negative pair cost

        linear      max(0, d - positive_margin)           max(0, negative_margin - d)
        squared     max(0, d - positive_margin)^2 / 2     max(0, negative_margin - d)^2 / 2
        similarity  max(0, 1 - s)                         s where s > negative_margin, else 0

    "linear", the default, is the form of the ICML 2020 benchmark, whose results today's papers compare with, and of
    pytorch-metric-learning. "squared" is that of Hadsell et al. (eq. 4, where positive_margin is 0). "similarity" is
    that of the Deep_Metric repository, in which the margin selects the negatives and is not subtracted.

    average_over: "all" is the mean over the chosen positive pairs plus the mean over the chosen negative pairs, each 0
    where there is none (Hadsell et al. sum); "active" leaves out pairs that cost nothing, as pytorch-metric-learning
    does, so that many easy negatives do not dilute the others; "anchors" sums the costs of all pairs of an anchor and
    averages over the B anchors, as Deep_Metric does; "anchor_means" adds for each anchor the means over its active
    positives and over its active negatives and averages over the B anchors, a switch in Deep_Metric of 2018.

    Embeddings are used as they come. Departures: no 1e-6 is added to the differences; where two embeddings coincide the
    gradient is 0; an item is left out of its own positives by its index, not by "s < 1".
    """

    def __init__(
        self,
        *,
        form: Annotated[
            Literal["linear", "squared", "similarity"],
            Field(
                description="form of the hinges: linear (ICML 2020 benchmark), squared (Hadsell et al.) or similarity "
                "(Deep_Metric)"
            ),
        ] = "linear",
        positive_margin: Annotated[
            float, Field(ge=0, description="distance up to which a positive costs nothing; 0 in Hadsell et al.")
        ] = 0.0,
        negative_margin: Annotated[
            Annotated[float, Field(gt=0)] | None,
            Field(
                description="distance beyond which a negative costs nothing, or similarity below which it does; "
                "null = 1 as in the benchmark, 0.5 for form similarity as in Deep_Metric"
            ),
        ] = None,
        average_over: Annotated[
            Literal["all", "active", "anchors", "anchor_means"] | None,
            Field(
                description="how costs are averaged: over all pairs, over pairs with a cost, or over the sums or "
                "means of the anchors; null = all, or anchors for form similarity"
            ),
        ] = None,
    ) -> None:
        super().__init__()
        if form == "similarity" and positive_margin > 0:
            raise ValueError(
                f"form = {form}, positive_margin = {positive_margin}: the similarity form has no margin for positives; "
                "write positive_margin: 0 or another form"
            )
        similarity = form == "similarity"
        self.form = form
        self.positive_margin = positive_margin
        self.negative_margin = (0.5 if similarity else 1.0) if negative_margin is None else negative_margin
        if not similarity and positive_margin > self.negative_margin:
            raise ValueError(
                f"positive_margin = {positive_margin}, negative_margin = {self.negative_margin}: positives must come "
                "nearer than negatives; write a positive_margin below the negative_margin"
            )
        self.average_over = ("anchors" if similarity else "all") if average_over is None else average_over
        self.measure = inner_products if similarity else euclidean

    def cost(self, points: Tensor, labels: Tensor, tuples: Tuples, references: Tensor | None) -> Tensor:
        assert isinstance(tuples, Triplets)
        if self.form == "similarity":
            columns = torch.stack([tuples.positive, tuples.negative])
            return self._average(entries_at(inner_products(points), tuples.anchor, columns), tuples, len(labels))
        distance = pair_squares(points, tuples).clamp(min=SMALLEST_SQUARE).sqrt()
        return self._average(distance, tuples, len(labels))

    def cost_of(self, matrix: Tensor, tuples: Pairs | TripletRanges) -> Tensor:
        return self._average(matrix, tuples, len(matrix))

    def _average(self, measured: Tensor, tuples: Tuples, num_anchors: int) -> Tensor:
        """Return the loss. measured: the similarities or distances, (2, T) for listed triplets, else (B, M)."""
        to_positive, to_negative = both_sides(measured.detach(), tuples)
        num_positive, num_negative = counts(tuples)
        pulled, pull = self._side(*self._pulled(to_positive), num_positive, tuples, num_anchors)
        pushed, push = self._side(*self._pushed(to_negative), num_negative, tuples, num_anchors)
        slope = torch.stack([pull, push]) if isinstance(tuples, Triplets) else pull.add_(push)
        return with_slope(measured, pulled + pushed, slope)

    def _side(
        self, cost: Tensor, slope: Tensor, count: Tensor, tuples: Tuples, num_anchors: int
    ) -> tuple[Tensor, Tensor]:
        """Return the average of the costs of the positives, or of the negatives, and its slope."""
        weight = self._weight(cost, count, tuples, num_anchors)
        return (cost * weight).sum(), slope.mul_(weight)

    def _pulled(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cost of each pair as a positive, and its slope."""
        if self.form == "similarity":
            hinge = (1 - measured).clamp_(min=0)
            return hinge, -hinge.sign()
        hinge = (measured - self.positive_margin).clamp_(min=0)
        return (hinge, hinge.sign()) if self.form == "linear" else (hinge.square() / 2, hinge)

    def _pushed(self, measured: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cost of each pair as a negative, and its slope."""
        if self.form == "similarity":
            slope = as_numbers(measured > self.negative_margin, measured.dtype)
            return measured * slope, slope
        hinge = (self.negative_margin - measured).clamp_(min=0)
        return (hinge, -hinge.sign()) if self.form == "linear" else (hinge.square() / 2, -hinge)

    def _weight(self, cost: Tensor, count: Tensor, tuples: Tuples, num_anchors: int) -> Tensor:
        """Return the weight of each cost in the average. count: how often each pair counts."""
        count = as_numbers(count, cost.dtype)
        if self.average_over == "all":
            return count.div_(count.sum().clamp(min=1))
        if self.average_over == "anchors":
            return count.div_(max(num_anchors, 1))
        active = cost.sign().mul_(count)
        if self.average_over == "active":
            return count.div_(active.sum().clamp(min=1))
        if isinstance(tuples, Triplets):
            num_active = active.new_zeros(num_anchors).index_add(0, tuples.anchor, active).clamp(min=1)
        else:
            num_active = active.sum(dim=1).clamp(min=1)
        return count.div_(per_tuple(num_active, tuples) * max(num_anchors, 1))
