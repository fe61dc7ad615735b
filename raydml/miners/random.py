"""Random triplets: Roth et al., MIC: Mining Interclass Characteristics for Improved Metric Learning, ICCV 2019."""

import torch
from torch import Generator, Tensor

from raydml.miners._base import TripletMiner
from raydml.ops.random_columns import draw_different_numbers
from raydml.ops.tuples import Triplets


class Random(TripletMiner):
    """As many triplets as the batch has items, each as likely as any other.

    T = B different triplets out of all (a, p, n) with a and p of one class and n of another: "random" sampling in the
    authors' release. An anchor may have several or none. Embeddings play no part.

    A batch with fewer than B triplets yields each of them at most once, and the other rows are invalid. Departure: in a
    small batch with hardly more than B triplets a row can be invalid too (see draw_different_numbers).
    """

    def choose(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Triplets:
        """Return T = B triplets; draw 4 B numbers."""
        # Sorted by class, the positives of an item are the rest of its block, its negatives what lies around the block.
        blocks, item = labels.sort(stable=True)
        start = torch.searchsorted(blocks, blocks)
        stop = torch.searchsorted(blocks, blocks, right=True)
        num_positives, num_negatives = stop - start - 1, len(labels) - (stop - start)
        # All triplets, numbered anchor by anchor: (P, N) of them for each.
        bounds = (num_positives * num_negatives).cumsum(dim=0)
        number, valid = draw_different_numbers(bounds[-1], generator, len(labels))
        anchor = torch.searchsorted(bounds, number, right=True).clamp(max=len(labels) - 1)
        first, last, width = start[anchor], stop[anchor], num_negatives[anchor].clamp(min=1)
        within = number - bounds[anchor] + num_positives[anchor] * num_negatives[anchor]
        positive = first + within // width
        positive = positive + (positive >= anchor)  # over the anchor itself
        negative = within % width
        negative = negative + (last - first) * (negative >= first)  # over the block
        # Without a triplet in the batch the places are arbitrary: 0 is a valid index.
        anchor, positive, negative = (item[torch.where(valid, place, 0)] for place in (anchor, positive, negative))
        return Triplets(anchor, positive, negative, valid)
