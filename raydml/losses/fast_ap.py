"""FastAP: Cakir et al., Deep Metric Learning to Rank, CVPR 2019."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from raydml.losses._base import PairLoss, cosines
from raydml.ops.tuples import Pairs

# A bin emptier than this is left out of a quotient.
EMPTY = 1e-12

# The largest number of values in memory at once beside the (B, M) matrices: 64 MiB in float32.
MOST_NUMBERS = 2**24


class FastAp(PairLoss):
    """FastAP: 1 minus the average precision of each anchor's ranking, from histograms of distances.

    The squared distances of unit vectors lie in [0, 4]. Each is shared linearly between the two nearest of num_bins + 1
    equally spaced bin centres. With the histogram h+ of an anchor's positives (N+ in all), its running sums H+, and the
    running sums H- of the negatives' histogram:

        1 - AP = 1 - (1/N+) sum_bins h+ H+ / (H+ + H-) = (1/N+) sum_bins h+ H- / (H+ + H-)

    averaged over the anchors that have a positive. The right-hand side is what is computed: it never falls below 0.

    Every row of the pairs is a query, and what it retrieves are its chosen positives and negatives; so mining is not
    needed; masks and references are supported. Embeddings are normalised here. 10 bins as in the paper.
    """

    def __init__(
        self,
        *,
        num_bins: Annotated[
            int, Field(ge=1, description="bins between squared distances 0 and 4; 10 in the paper")
        ] = 10,
    ) -> None:
        super().__init__()
        self.num_bins = num_bins

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        positive, negative = pairs
        similarity = cosines(points, references)
        # Squared distance 2 - 2s, in widths of a bin.
        place = ((1 - similarity) * (self.num_bins / 2)).clamp(0, self.num_bins)
        running = _RunningHistograms.apply(place, positive, negative, self.num_bins)
        running_positive, running_negative = running.unbind(dim=2)
        histogram = running_positive.diff(dim=1, prepend=torch.zeros_like(running_positive[:, :1]))
        misses = histogram * running_negative / (running_positive + running_negative).clamp(min=EMPTY)
        num_positives = running_positive.detach()[:, -1]
        queries = (num_positives > 0).sum()
        return (misses.sum(dim=1) / num_positives.clamp(min=1)).sum() / queries.clamp(min=1)


class _RunningHistograms(torch.autograd.Function):
    """Running sums of two soft histograms of each row, without the (B, M, bins) that autograd would keep for them."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, positive: Tensor, negative: Tensor, num_bins: int) -> Tensor:
        """(B, num_bins + 1, 2) of place (B, M) in 0..num_bins: how much of each mask lies at or below each centre."""
        ctx.save_for_backward(place, positive, negative)
        masks = torch.stack([positive, negative], dim=2).to(place.dtype)
        centres = torch.arange(num_bins, device=place.device, dtype=place.dtype)[:, None]
        step = max(1, MOST_NUMBERS // max(1, place.numel()))
        # All that a distance shares with centres 0..k is 1 below centre k, 0 beyond the next, and linear between.
        parts = [((centres[k : k + step] + 1) - place[:, None]).clamp_(0, 1) @ masks for k in range(0, num_bins, step)]
        return torch.cat([*parts, masks.sum(dim=1, keepdim=True)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        place, positive, negative = ctx.saved_tensors
        num_bins = gradient.shape[1] - 1
        # Only the running sum at the centre below changes with a distance, with slope -1.
        below = place.long().clamp_(0, num_bins - 1)  # a NaN becomes some integer, and must not be an index
        one, other = gradient.unbind(dim=2)
        return -(one.gather(1, below) * positive + other.gather(1, below) * negative), None, None, None
