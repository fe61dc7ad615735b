"""Distance-weighted sampling: Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017."""

import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional

from raydml.tuples import Triplets, all_pairs

# Weights that the Divide and Conquer authors give to negatives in range and beyond the upper cutoff, so that
# an anchor always has something to draw.
FLOOR_WEIGHT = 1e-9
FAR_WEIGHT = 1e-6

# Smallest 1 - d^2/4 that is told from zero: at d = 2 the density is 0 and its inverse infinite.
ANTIPODE_EPSILON = 1e-6


class DistanceWeighted(nn.Module):
    """Distance-weighted mining: one triplet an anchor, negatives spread evenly over distance.

    On the unit sphere in D dimensions the distance of two random points has the density

        q(d) ~ d^(D-2) (1 - d^2/4)^((D-3)/2)

    A negative is drawn with probability proportional to 1/q(max(d, cutoff)), a positive evenly from the
    anchor's class. T = B: triplet i has anchor i, and is invalid where i has no positive or no negative in
    the batch.

    cutoff: distances below it weigh as it does, 0.5 in the paper, which bounds the weights of very close
    (often mislabelled) negatives. upper_cutoff: None leaves it at that, as in the Multi-Similarity and MIC
    releases; a number (1.4 = beta + margin in Wu et al.) makes negatives beyond it, which cost nothing in the
    margin loss, next to impossible: the weighting of the Divide and Conquer authors.

    Departures: one triplet an anchor (as Multi-Similarity; Wu et al. draw one negative for every positive
    pair); embeddings are normalised first, as the density is that of a sphere; 1 - d^2/4 is at least 1e-6,
    where the releases give NaN for exactly opposite points.
    """

    yields: ClassVar[str] = "triplets"

    def __init__(
        self,
        *,
        cutoff: Annotated[float, Interval(gt=0, le=1)] = 0.5,
        upper_cutoff: Annotated[float, Interval(gt=1, le=2)] | None = None,
    ) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.upper_cutoff = upper_cutoff

    @torch.no_grad()
    def forward(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Triplets:
        """T = B triplets. embeddings: (B, D); labels: (B,) int64; generator: on any device, draws 2 B^2 numbers."""
        anchor = torch.arange(len(labels), device=labels.device)
        pairs = all_pairs(labels)
        if len(labels) == 0:
            return Triplets(anchor, anchor, anchor, anchor.bool())
        probabilities = negative_probabilities(
            embeddings, pairs.negative, cutoff=self.cutoff, upper_cutoff=self.upper_cutoff
        )
        return Triplets(
            anchor=anchor,
            positive=_draw(pairs.positive.to(probabilities.dtype), generator),
            negative=_draw(probabilities, generator),
            valid=pairs.positive.any(dim=1) & pairs.negative.any(dim=1),
        )


def negative_probabilities(
    embeddings: Tensor, negative: Tensor, *, cutoff: float, upper_cutoff: float | None = None
) -> Tensor:
    """(B, B) probability of each item as the negative of each anchor (row); a row without negatives is 0.

    embeddings: (B, D), any length; negative: (B, B) bool, the candidates; cutoffs: distances, see
    DistanceWeighted.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        points = functional.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        dim = points.shape[1]
        clamped = distance.clamp(min=cutoff)
        antipode = (1 - clamped.square() / 4).clamp(min=ANTIPODE_EPSILON)
        log_density = (dim - 2) * clamped.log() + (dim - 3) / 2 * antipode.log()
        if upper_cutoff is None:
            # Rows without a candidate are softened before and zeroed after: softmax of nothing is NaN.
            log_weight = (-log_density).masked_fill(~negative, -math.inf)
            lonely = ~negative.any(dim=1, keepdim=True)
            return log_weight.masked_fill(lonely, 0).softmax(dim=1).masked_fill(lonely, 0)
        in_range = negative & (distance < upper_cutoff)
        log_weight = (-log_density).masked_fill(~in_range, 0)
        weight = (log_weight - log_weight.amax(dim=1, keepdim=True)).exp() + FLOOR_WEIGHT
        weight = weight.masked_fill(distance > upper_cutoff, FAR_WEIGHT).masked_fill(~negative, 0)
        return weight / weight.sum(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)


def _draw(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, B) weights to (B,) columns, one drawn from each row in proportion; any column where a row is all zero.

    The race of exponential clocks that torch.multinomial runs, without its checks, which wait for the GPU.
    """
    device = weight.device if generator is None else generator.device
    to_accelerator = device.type == "cpu"  # in the other direction the CPU could read before the copy has landed
    clock = torch.empty(weight.shape, dtype=weight.dtype, device=device).exponential_(generator=generator)
    clock = clock.to(weight.device, non_blocking=to_accelerator).clamp(min=torch.finfo(weight.dtype).tiny)
    return (weight / clock).argmax(dim=1)
