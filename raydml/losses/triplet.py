"""Triplet loss: Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, CVPR 2015."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydml.losses._base import TripletLoss, Tuples, pair_squares
from raydml.ops.distances import SMALLEST_SQUARE, euclidean, squared_euclidean
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, pair_counts


class Triplet(TripletLoss):
    """Triplet loss: a positive nearer than a negative, by a margin.

    For an anchor a, a positive p and a negative n, with squared distances d:

        max(0, d(a, p) - d(a, n) + margin)

    averaged over all chosen triplets, those that cost nothing included, as in the code of MIC (ICCV 2019) and of the
    ICML 2020 benchmark; `average_over: active` leaves them out, as pytorch-metric-learning does, which keeps the few
    that cost something from being diluted. `squared: false` takes d as the distance itself, as the code of MDR
    (AAAI 2021) does. Defaults are FaceNet's; published results come from a miner: without one every triplet of the
    batch counts.

    All triplets at once cost no more than all pairs: the loss is piecewise linear in the (B, B) distances, so a
    distance enters as often as it is an active triplet's positive, less as often as it is its negative. These counts
    are whole numbers and the sum is taken in float64, so nothing is lost where two large sums nearly cancel.

    Embeddings are used as they come. Departure: no 1e-6 is added to the differences of coordinates, as MDR's code does
    through torch; where two embeddings coincide the gradient is 0.
    """

    accepts: ClassVar[tuple[str, ...]] = ("triplets", "triplet_ranges")

    def __init__(
        self,
        *,
        margin: Annotated[
            float, Field(gt=0, description="how much nearer a positive must be than a negative; 0.2 in Schroff et al.")
        ] = 0.2,
        squared: Annotated[
            bool, Field(description="compare squared distances, as Schroff et al. do, or distances themselves")
        ] = True,
        average_over: Annotated[
            Literal["all", "active"],
            Field(description="the triplets to average over: all chosen ones, or only those with a cost"),
        ] = "all",
    ) -> None:
        super().__init__()
        self.margin = margin
        self.squared = squared
        self.average_over = average_over

    def cost(self, points: Tensor, labels: Tensor, tuples: Tuples, references: Tensor | None) -> Tensor:
        if isinstance(tuples, Triplets):
            total, num_all, num_active = self._listed(points, tuples)
        else:
            distance = (squared_euclidean(points) if self.squared else euclidean(points)).double()
            sums = self._all(distance, tuples) if isinstance(tuples, Pairs) else self._ranges(distance, tuples)
            total, num_all, num_active = sums
        count = num_all if self.average_over == "all" else num_active
        return (total / count.clamp(min=1)).to(points.dtype)

    def _listed(self, points: Tensor, triplets: Triplets) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the costs, the number of triplets, and the number of those with a cost."""
        squares = pair_squares(points, triplets)
        distance = squares if self.squared else squares.clamp(min=SMALLEST_SQUARE).sqrt()
        cost = (distance[0] - distance[1] + self.margin).clamp(min=0) * triplets.valid
        return cost.sum(), triplets.valid.sum(), (cost > 0).sum()

    def _ranges(self, distance: Tensor, ranges: TripletRanges) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same for ranges of triplets. distance: (B, B)."""
        pulled, pushed = pair_counts(self._active(distance.detach(), ranges))
        num_all = torch.where(ranges.positive, ranges.stop - ranges.start, 0).clamp(min=0).sum()
        num_active = pulled.sum()
        total = ((pulled - pushed) * distance).sum() + self.margin * num_active.double()
        return total, num_all, num_active

    def _all(self, distance: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same for all triplets, by sorting each row with its positives moved by the margin."""
        # By a little less, so that a negative at the margin exactly comes behind: it costs nothing.
        moved = torch.nextafter(distance.detach() + self.margin, torch.zeros_like(distance))
        order = torch.where(pairs.positive, moved, distance.detach()).argsort(dim=1)
        negative, positive = pairs.negative.gather(1, order), pairs.positive.gather(1, order)
        num_nearer, num_positives = negative.cumsum(dim=1), positive.cumsum(dim=1)
        num_farther = num_positives[:, -1:] - num_positives
        by_rank = torch.where(positive, num_nearer, torch.where(negative, -num_farther, 0))
        weight = torch.zeros_like(order).scatter(1, order, by_rank)
        num_active = weight.clamp(min=0).sum()
        num_all = (pairs.positive.sum(dim=1) * pairs.negative.sum(dim=1)).sum()
        return (weight * distance).sum() + self.margin * num_active.double(), num_all, num_active

    def _active(self, distance: Tensor, ranges: TripletRanges) -> TripletRanges:
        """Return the ranges cut to triplets with a cost: negatives nearer than the positive plus the margin.

        distance: (B, B) without gradient.
        """
        # Behind the negatives of a row come its other items, out of order: the running maximum lifts them.
        nearest_first = distance.gather(1, ranges.order).cummax(dim=1).values
        # Only positives are looked up: the others all take one path through the binary search, several times faster.
        num_nearer = torch.searchsorted(nearest_first, torch.where(ranges.positive, distance + self.margin, 0))
        stop = torch.minimum(ranges.stop, num_nearer)
        return TripletRanges(ranges.positive, ranges.order, ranges.start, stop)
