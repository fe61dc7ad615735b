"""What a miner is: a choice of the tuples of a batch that the loss sees.

`yields` names the kind of the tuples: "pairs", "triplets" or "triplet_ranges" (see `raydml.ops.tuples`). Any loss that
accepts this kind can be combined with the miner. A miner has no state: it draws from the generator that is passed to
it, or from torch's global one. It computes without gradient and in float32 (or wider), also under autocast.
"""

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from raydml.ops.distances import full_precision
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs


class PairMiner(nn.Module):
    """A choice among the pairs of the batch, or among given pairs of the batch with a memory."""

    yields: ClassVar[str] = "pairs"

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        generator: Generator | None = None,
        pairs: Pairs | None = None,
        references: Tensor | None = None,
    ) -> Pairs:
        """Return masks (B, M). embeddings: (B, D); labels: (B,) int64; generator: on any device.

        pairs: the candidates; None = all pairs of the batch. references: (M, D), the embeddings of the columns of the
        candidates; None = the batch.
        """
        pairs = all_pairs(labels) if pairs is None else pairs
        if pairs.positive.numel() == 0:
            return pairs
        with torch.autocast(embeddings.device.type, enabled=False):
            points = full_precision(embeddings)
            references = None if references is None else references.to(points.dtype)
            return self.choose(points, labels, pairs, references, generator)

    def choose(
        self, points: Tensor, labels: Tensor, pairs: Pairs, references: Tensor | None, generator: Generator | None
    ) -> Pairs:
        """Return masks (B, M) within those of the candidates, of which there is at least one row and column."""
        raise NotImplementedError


class TripletMiner(nn.Module):
    """A choice among the triplets of the batch."""

    yields: str = "triplets"

    @torch.no_grad()
    def forward(
        self, embeddings: Tensor, labels: Tensor, generator: Generator | None = None
    ) -> Triplets | TripletRanges:
        """Return triplets or ranges. embeddings: (B, D); labels: (B,) int64; generator: on any device."""
        if len(labels) == 0 and self.yields == "triplets":
            return Triplets(labels, labels, labels, labels.bool())
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.choose(full_precision(embeddings), labels, generator)

    def choose(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Triplets | TripletRanges:
        """Return triplets of a batch that is not empty, or ranges of any batch."""
        raise NotImplementedError
