"""Triplet loss: Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, CVPR 2015."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydml.losses._base import TripletLoss, Tuples, pair_squares, with_slope
from raydml.ops.distances import SMALLEST_SQUARE, as_numbers, euclidean, squared_euclidean
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
        self.measure = squared_euclidean if squared else euclidean

    def cost(self, points: Tensor, labels: Tensor, tuples: Tuples, references: Tensor | None) -> Tensor:
        assert isinstance(tuples, Triplets)
        squares = pair_squares(points, tuples)
        distance = squares if self.squared else squares.clamp(min=SMALLEST_SQUARE).sqrt()
        cost = (distance[0] - distance[1] + self.margin).clamp(min=0) * tuples.valid
        count = tuples.valid.sum() if self.average_over == "all" else (cost > 0).sum()
        return cost.sum() / count.clamp(min=1)

    def cost_of(self, matrix: Tensor, tuples: Pairs | TripletRanges) -> Tensor:
        # The loss is linear in the distances while no triplet begins or ceases to cost: the weights are its slope.
        distance = matrix.detach().double()
        if isinstance(tuples, Pairs):
            weight, num_active = self._all(distance, tuples)
        else:
            pulled, pushed = pair_counts(self._active(distance, tuples))
            weight, num_active = pulled - pushed, pulled.sum(dtype=distance.dtype)
        count = (num_active if self.average_over == "active" else self._num_triplets(tuples)).clamp(min=1)
        value = ((distance * weight).sum() + self.margin * num_active) / count
        return with_slope(matrix, value.to(matrix.dtype), weight.to(matrix.dtype).div_(count))

    @staticmethod
    def _num_triplets(tuples: Pairs | TripletRanges) -> Tensor:
        """Return the number of all chosen triplets, those that cost nothing included."""
        if isinstance(tuples, Pairs):
            return (tuples.positive.sum(dim=1) * tuples.negative.sum(dim=1)).sum()
        return torch.where(tuples.positive, tuples.stop - tuples.start, 0).clamp(min=0).sum()

    def _all(self, distance: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return how often each distance enters (B, B) int32, and the number of triplets with a cost, of all triplets.

        distance: (B, B) float64 without gradient.
        """
        order = self._order(distance, pairs)
        # 1 for a positive, -1 for a negative, by rank: arithmetic takes a fraction of the time of masks on a CPU.
        side = as_numbers(pairs.positive, torch.int32).sub_(as_numbers(pairs.negative, torch.int32)).gather(1, order)
        positive = side.clamp(min=0)
        negative = positive - side
        num_nearer, num_positives = (here.cumsum(dim=1, dtype=torch.int32) for here in (negative, positive))
        num_farther = num_positives[:, -1:] - num_positives
        pulled = num_nearer.mul_(positive)
        by_rank = pulled - num_farther.mul_(negative)
        return torch.empty_like(by_rank).scatter_(1, order, by_rank), pulled.sum(dtype=distance.dtype)

    def _order(self, distance: Tensor, pairs: Pairs) -> Tensor:
        """Return the columns of each row (B, B), nearest first, with its positives moved away by the margin."""
        positive = as_numbers(pairs.positive, distance.dtype)
        moved = torch.add(distance, positive, alpha=self.margin)
        # By a little less, so that a negative at the margin exactly comes behind: it costs nothing.
        return moved.addcmul_(moved, positive, value=-torch.finfo(moved.dtype).eps).argsort(dim=1)

    def _active(self, distance: Tensor, ranges: TripletRanges) -> TripletRanges:
        """Return the ranges cut to triplets with a cost: negatives nearer than the positive plus the margin.

        distance: (B, B) float64 without gradient.
        """
        # Behind the negatives of a row come its other items, out of order: the running maximum lifts them.
        nearest_first = distance.gather(1, ranges.order).cummax(dim=1).values
        # Only positives are looked up: the others all take one path through the binary search, several times faster.
        num_nearer = torch.searchsorted(nearest_first, torch.where(ranges.positive, distance + self.margin, 0))
        stop = torch.minimum(ranges.stop, num_nearer)
        return TripletRanges(ranges.positive, ranges.order, ranges.start, stop)
