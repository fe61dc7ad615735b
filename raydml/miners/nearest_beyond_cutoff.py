"""Nearest negatives beyond a cutoff: Sanakoyeu et al., Divide and Conquer the Embedding Space, CVPR 2019."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from raydml.miners._base import TripletMiner
from raydml.ops.distances import euclidean
from raydml.ops.tuples import Triplets, all_pairs


class NearestBeyondCutoff(TripletMiner):
    """The nearest negatives that are not suspiciously near, one for each positive.

    With k the mean number of positives of an item of the batch, rounded down, every anchor gets its k nearest negatives
    at Euclidean distance >= cutoff (those nearer are often mislabelled). Its positives and its chosen negatives are
    paired in the order of their place in the batch, and what has no partner is left out. Embeddings are used as they
    come. Deterministic.

    T = B*B: the row of the positive pair (a, p), in row-major order, is valid where p has a partner. This is what the
    authors' release of Divide and Conquer does instead of distance-weighted sampling.

    Departures: an anchor with fewer than k negatives beyond the cutoff takes the nearest of the others, where the
    release takes the anchor itself and perhaps its positives for negatives; and k is at least 1, so that a batch with
    few positives is not lost.
    """

    def __init__(
        self,
        *,
        cutoff: Annotated[
            float, Field(ge=0, description="negatives nearer than this come last; 0.5 in the authors' release")
        ] = 0.5,
    ) -> None:
        super().__init__()
        self.cutoff = cutoff

    def choose(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Triplets:
        """Return T = B*B triplets."""
        size = len(labels)
        item = torch.arange(size, device=labels.device)
        pairs = all_pairs(labels)
        distance = euclidean(points)
        # Those before the cutoff behind all others, among themselves still in order of distance.
        behind = 2 * distance.amax() * (distance < self.cutoff)
        order = (distance + behind).masked_fill(~pairs.negative, torch.inf).argsort(dim=1)
        num_chosen = (pairs.positive.sum() // size).clamp(min=1)
        first = (item < num_chosen).expand(size, size)
        chosen = pairs.negative & torch.zeros_like(pairs.negative).scatter(1, order, first)
        # The r-th chosen negative of each row, in the order of the batch; what is not chosen goes to a spare column.
        rank = torch.where(chosen, chosen.cumsum(dim=1) - 1, size)
        negatives = item.new_zeros(size, size + 1).scatter(1, rank, item.expand(size, size))
        partner = (pairs.positive.cumsum(dim=1) - 1).clamp(min=0)
        return Triplets(
            anchor=item[:, None].expand(size, size).flatten(),
            positive=item.expand(size, size).flatten(),
            negative=negatives.gather(1, partner).flatten(),
            valid=(pairs.positive & (partner < chosen.sum(dim=1, keepdim=True))).flatten(),
        )
