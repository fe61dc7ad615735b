"""Distance-weighted sampling: Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional

from raydml.miners._base import TripletMiner
from raydml.ops.distances import squared_euclidean
from raydml.ops.random_columns import draw_columns, draw_different_columns
from raydml.ops.tuples import Pairs, Triplets, all_pairs

# Beyond it a negative costs nothing in the margin loss of Wu et al.: beta + margin.
ZERO_LOSS_DISTANCE = 1.4

# Weights that the Divide and Conquer authors give to negatives in range and beyond the upper cutoff, so that
# an anchor always has something to draw.
FLOOR_WEIGHT = 1e-9
FAR_WEIGHT = 1e-6

# Lower bound of 1 - d^2/4: at d = 2 the density is 0 and its inverse infinite.
ANTIPODE_EPSILON = 1e-6


class DistanceWeighted(TripletMiner):
    """Distance-weighted mining: negatives spread evenly over distance.

    On the unit sphere in D dimensions the distance d of two random points has a density in proportion to

        q(d) = d^(D-2) (1 - d^2/4)^((D-3)/2)

    A negative is drawn with the weight w = 1/q(max(d, cutoff)), a positive evenly from the anchor's class. The lower
    cutoff bounds the weights of very close (often mislabelled) negatives; an upper cutoff leaves out those that cost
    nothing in the margin loss.

    variant = "wu": one triplet an anchor (T = B), as in the Multi-Similarity and MIC releases. They have no upper
    cutoff; with one, an anchor without a negative before it draws from all of its negatives evenly.

    variant = "divide_conquer": the follow-up code of the authors of Divide and Conquer (Sanakoyeu et al., CVPR 2019).
    Every anchor draws k different negatives; k is the mean number of positives rounded to the nearest, at least 1, at
    most the batch size less the largest class (T = B max(1, B//2), k valid for each anchor). Its positives go with them
    one to one where there are k, else k are drawn with replacement. A negative weighs w / max(1, the row's largest w)
    + 1e-9 before the upper cutoff, and 1e-6 beyond it.

    variant = "mdr": the release of Multi-level Distance Regularization (Kim and Park, AAAI 2021). One negative for
    every ordered positive pair, in row-major order (T = B*B). Weights are float32 and relative to the largest w over
    all items: the anchor itself (at distance 1), its positives and what is beyond the upper cutoff count too. Where one
    of them is much nearer than every negative, all weights are 0, and the anchor draws from its negatives evenly. In
    512 dimensions this is the rule rather than the exception, and part of the published results.

    Departures: embeddings are normalised first, as the density is that of a sphere; 1 - d^2/4 is at least 1e-6, where
    the releases give NaN for exactly opposite points; "wu" draws one triplet an anchor (Wu et al. draw one negative for
    every positive pair). A triplet is invalid where its anchor has no positive or no negative in the batch.
    """

    def __init__(
        self,
        *,
        variant: Annotated[
            Literal["wu", "divide_conquer", "mdr"],
            Field(
                description="which release to follow: one negative an anchor (wu), as many as positives "
                "(divide_conquer), or one for every positive pair (mdr)"
            ),
        ] = "wu",
        cutoff: Annotated[
            float, Field(gt=0, le=1, description="distances below it get its weight; 0.5 in Wu et al.")
        ] = 0.5,
        upper_cutoff: Annotated[
            float | None,
            Field(
                gt=1,
                le=2,
                description="negatives beyond it are left out; null = none for variant wu, 1.4 for the others",
            ),
        ] = None,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.cutoff = cutoff
        self.upper_cutoff = ZERO_LOSS_DISTANCE if upper_cutoff is None and variant != "wu" else upper_cutoff

    def choose(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Triplets:
        """Return T triplets; draw 2 B to 2 B^2 numbers, depending on the variant."""
        item = torch.arange(len(labels), device=labels.device)
        pairs = all_pairs(labels)
        weight = self.weights(points, pairs.negative)
        if self.variant == "divide_conquer":
            return _as_many_as_positives(weight, pairs, generator)
        if self.variant == "mdr":
            return _one_for_every_positive(weight, pairs, generator)
        return Triplets(
            anchor=item,
            positive=draw_columns(pairs.positive, generator)[:, 0],
            negative=draw_columns(weight, generator)[:, 0],
            valid=pairs.positive.any(dim=1) & pairs.negative.any(dim=1),
        )

    def weights(self, points: Tensor, negative: Tensor) -> Tensor:
        """Return the weight (B, B) of each item as a negative of each anchor (row); 0 where it is no negative.

        points: (B, D) of any length, float32 or wider; negative: (B, B) bool.
        """
        # Float32 decides which rows of "mdr" underflow.
        points = points.float() if self.variant == "mdr" else points
        square = squared_euclidean(functional.normalize(points, dim=1))
        if self.variant == "mdr":
            square.fill_diagonal_(1)
        log_weight = _log_inverse_density(square, self.cutoff, points.shape[1])
        before = negative if self.upper_cutoff is None else negative & (square < self.upper_cutoff**2)
        if self.variant == "divide_conquer":
            log_weight = log_weight.masked_fill(~before, 0)
            weight = (log_weight - log_weight.amax(dim=1, keepdim=True)).exp() + FLOOR_WEIGHT
            return weight.masked_fill(negative & ~before, FAR_WEIGHT).masked_fill(~negative, 0)
        if self.variant == "wu":
            # Weights but for a factor. Finite where masked, so that a row without candidates has no inf - inf.
            weight = log_weight.masked_fill(~before, torch.finfo(square.dtype).min).softmax(dim=1)
        else:
            weight = (log_weight - log_weight.amax(dim=1, keepdim=True)).exp()
        weight = weight.masked_fill(~before, 0)
        return torch.where(weight.any(dim=1, keepdim=True), weight, negative)


def _log_inverse_density(square: Tensor, cutoff: float, dim: int) -> Tensor:
    """log 1/q of squared distances on the unit sphere in dim dimensions, but for a constant."""
    square = square.clamp(min=cutoff**2)
    antipode = (1 - square / 4).clamp(min=ANTIPODE_EPSILON)
    return (2 - dim) / 2 * square.log() - (dim - 3) / 2 * antipode.log()


def _as_many_as_positives(weight: Tensor, pairs: Pairs, generator: Generator | None) -> Triplets:
    """As many different negatives an anchor as an item has positives on average. weight: (B, B)."""
    size = len(weight)
    num_positives = pairs.positive.sum(dim=1, keepdim=True)
    largest_class = num_positives.max() + 1
    mean = (2 * num_positives.sum() + size) // (2 * size)  # floor(mean + 0.5), in whole numbers
    num_drawn = torch.minimum(mean.clamp(min=1), size - largest_class)
    # At most the largest class less 1, and at most the rest: never more than half of the batch.
    slots = torch.arange(max(size // 2, 1), device=weight.device)
    negative = draw_different_columns(weight, generator, len(slots))
    own = pairs.positive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : len(slots)]
    drawn = draw_columns(pairs.positive, generator, len(slots))
    valid = (slots < num_drawn) & (num_positives > 0)
    return Triplets(
        anchor=torch.arange(size, device=weight.device)[:, None].expand_as(negative).flatten(),
        positive=torch.where(num_positives == num_drawn, own, drawn).flatten(),
        negative=negative.flatten(),
        valid=valid.flatten(),
    )


def _one_for_every_positive(weight: Tensor, pairs: Pairs, generator: Generator | None) -> Triplets:
    """One negative for each ordered positive pair, in row-major order. weight: (B, B)."""
    item = torch.arange(len(weight), device=weight.device).expand_as(weight)
    return Triplets(
        anchor=item.T.flatten(),
        positive=item.flatten(),
        negative=draw_columns(weight, generator, len(weight)).flatten(),
        valid=(pairs.positive & pairs.negative.any(dim=1, keepdim=True)).flatten(),
    )
