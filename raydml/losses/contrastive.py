"""Contrastive loss: Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from raydml.ops.distances import (
    SMALLEST_SQUARE,
    entries_at,
    euclidean,
    full_precision,
    inner_products,
    squares_at,
)
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs, check_kind, counts


class Contrastive(nn.Module):
    """Contrastive loss: draw positives inside one distance, push negatives beyond another.

    With Euclidean distances d and dot products s, a positive and a negative pair cost

        linear      max(0, d - positive_margin)           max(0, negative_margin - d)
        squared     max(0, d - positive_margin)^2 / 2     max(0, negative_margin - d)^2 / 2
        similarity  max(0, 1 - s)                         s where s > negative_margin, else 0

    "linear", the default, is the form of the ICML 2020 benchmark, whose results today's papers compare with, and of
    pytorch-metric-learning, "squared" that of Hadsell et al.
    (eq. 4, where positive_margin is 0), "similarity" that of the Deep_Metric repository, in which the margin chooses
    the negatives without being subtracted.

    average_over: "all" is the mean over the chosen positive pairs plus the mean over the chosen negative pairs, each 0
    where there is none (Hadsell et al. sum); "active" leaves out pairs that cost nothing, as pytorch-metric-learning
    does, so that many easy negatives do not dilute the others; "anchors" sums the costs of all pairs of an anchor and
    averages over the B anchors, as Deep_Metric does; "anchor_means" adds for each anchor the means over its active
    positives and over its active negatives and averages over the B anchors, a switch in Deep_Metric of 2018.

    Embeddings are used as they come. Departures: no 1e-6 is added to the differences; where two embeddings coincide the
    gradient is 0; an item is left out of its own positives by its index, not by "s < 1".
    """

    accepts: ClassVar[tuple[str, ...]] = ("pairs", "triplets", "triplet_ranges")

    def __init__(
        self,
        *,
        form: Annotated[
            Literal["linear", "squared", "similarity"],
            Field(description="the hinges: of the ICML 2020 benchmark, of Hadsell et al., or of Deep_Metric"),
        ] = "linear",
        positive_margin: Annotated[
            float, Field(ge=0, description="distance up to which a positive costs nothing; 0 in Hadsell et al.")
        ] = 0.0,
        negative_margin: Annotated[
            Annotated[float, Field(gt=0)] | None,
            Field(
                description="distance from which on a negative costs nothing, or similarity up to which it does; "
                "null = 1 as in the benchmark, 0.5 as in Deep_Metric for form similarity",
            ),
        ] = None,
        average_over: Annotated[
            Literal["all", "active", "anchors", "anchor_means"] | None,
            Field(
                description="how costs are averaged: over all pairs, over those that cost something, as sums or as "
                "means of each anchor; null = all, for form similarity anchors"
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
                f"positive_margin = {positive_margin}, negative_margin = {self.negative_margin}: positives shall come "
                "nearer than negatives may; write a positive_margin below the negative_margin"
            )
        self.average_over = ("anchors" if similarity else "all") if average_over is None else average_over

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        tuples: Pairs | Triplets | TripletRanges | None = None,
        references: Tensor | None = None,
    ) -> Tensor:
        """Scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64; None = all pairs.

        references: (M, D), the embeddings of the columns of pairs; None = the batch.
        """
        tuples = all_pairs(labels) if tuples is None else tuples
        check_kind(tuples, self.accepts, references)
        with torch.autocast(embeddings.device.type, enabled=False):
            points = full_precision(embeddings)
            others = None if references is None else references.to(points.dtype)
            pulled, pushed = self._costs(points, others, tuples)
            num_positive, num_negative = counts(tuples)
            return self._average(pulled, num_positive, tuples, len(labels)) + self._average(
                pushed, num_negative, tuples, len(labels)
            )

    def _costs(
        self, points: Tensor, others: Tensor | None, tuples: Pairs | Triplets | TripletRanges
    ) -> tuple[Tensor, Tensor]:
        """What each pair costs as a positive and as a negative one, (T,) for listed triplets, else (B, M)."""
        if self.form == "similarity":
            positive = negative = inner_products(points, others)
            if isinstance(tuples, Triplets):
                positive, negative = entries_at(positive, tuples.anchor, torch.stack(tuples[1:3])).unbind()
            return (1 - positive).clamp(min=0), torch.where(negative > self.negative_margin, negative, 0)
        if isinstance(tuples, Triplets):
            squares = squares_at(points, tuples.anchor, torch.stack(tuples[1:3]))
            positive, negative = squares.clamp(min=SMALLEST_SQUARE).sqrt().unbind()
        else:
            positive = negative = euclidean(points, others)
        pulled = (positive - self.positive_margin).clamp(min=0)
        pushed = (self.negative_margin - negative).clamp(min=0)
        return (pulled.square() / 2, pushed.square() / 2) if self.form == "squared" else (pulled, pushed)

    def _average(
        self, cost: Tensor, count: Tensor, tuples: Pairs | Triplets | TripletRanges, num_anchors: int
    ) -> Tensor:
        """The mean of costs that count so and so often: all positives, or all negatives."""
        # As numbers: products with a mask are several times slower on a CPU.
        count = count.to(cost.dtype)
        total = cost * count
        if self.average_over == "all":
            return total.sum() / count.sum().clamp(min=1)
        if self.average_over == "anchors":
            return total.sum() / max(num_anchors, 1)
        active = cost.detach().sign() * count
        if self.average_over == "active":
            return total.sum() / active.sum().clamp(min=1)
        if isinstance(tuples, Triplets):
            total = total.new_zeros(num_anchors).index_add(0, tuples.anchor, total)
            active = total.new_zeros(num_anchors).index_add(0, tuples.anchor, active.to(total.dtype))
        else:
            total, active = total.sum(dim=1), active.sum(dim=1)
        return (total / active.clamp(min=1)).sum() / max(num_anchors, 1)
