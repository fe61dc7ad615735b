"""What a miner is: a choice of the tuples of a batch that the loss sees.

`yields` names the kind of the tuples: "pairs", "triplets" or "triplet_ranges" (see `raydml.ops.tuples`). Any loss that
accepts this kind can be combined with the miner. A miner has no state: it draws from the generator that is passed to
it, or from torch's global one. It computes without gradient and in float32 (or wider), also under autocast.

A subclass defines `choose`; or, where it reads a matrix of the batch alone, it sets `measure`, a function of
`raydml.ops.distances`, and defines `choose_from` that matrix. A loss that reads the same matrix then shares it.
"""

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from raydml.ops.distances import Measure, full_precision, without_autocast
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs


class PairMiner(nn.Module):
    """A choice among the pairs of the batch, or among given pairs of the batch with a memory."""

    yields: ClassVar[str] = "pairs"
    measure: Measure | None = None

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        generator: Generator | None = None,
        pairs: Pairs | None = None,
        references: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> Pairs:
        """Return masks (B, M). embeddings: (B, D); labels: (B,) int64; generator: on any device.

        pairs: the candidates; None = all pairs of the batch. references: (M, D), the embeddings of the columns of the
        candidates; None = the batch. matrix: (B, M), the `measure` of these embeddings and references, where it is
        known already.
        """
        pairs = all_pairs(labels) if pairs is None else pairs
        if pairs.positive.numel() == 0:
            return pairs
        with without_autocast(embeddings):
            points = full_precision(embeddings)
            references = None if references is None else references.to(points.dtype)
            if self.measure is None:
                return self.choose(points, labels, pairs, references, generator)
            return self.choose_from(self.measure(points, references) if matrix is None else matrix, pairs, generator)

    def choose(
        self, points: Tensor, labels: Tensor, pairs: Pairs, references: Tensor | None, generator: Generator | None
    ) -> Pairs:
        """Return masks (B, M) within those of the candidates, of which there is at least one row and column."""
        raise NotImplementedError

    def choose_from(self, matrix: Tensor, pairs: Pairs, generator: Generator | None) -> Pairs:
        """Return the same. matrix: (B, M) without a graph."""
        raise NotImplementedError


class TripletMiner(nn.Module):
    """A choice among the triplets of the batch."""

    yields: str = "triplets"
    measure: Measure | None = None

    @torch.no_grad()
    def forward(
        self, embeddings: Tensor, labels: Tensor, generator: Generator | None = None, matrix: Tensor | None = None
    ) -> Triplets | TripletRanges:
        """Return triplets or ranges. embeddings: (B, D); labels: (B,) int64; generator: on any device.

        matrix: (B, B), the `measure` of these embeddings, where it is known already.
        """
        if len(labels) == 0 and self.yields == "triplets":
            return Triplets(labels, labels, labels, labels.bool())
        with without_autocast(embeddings):
            points = full_precision(embeddings)
            if self.measure is None:
                return self.choose(points, labels, generator)
            return self.choose_from(self.measure(points, None) if matrix is None else matrix, labels, generator)

    def choose(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Triplets | TripletRanges:
        """Return triplets of a batch that is not empty, or ranges of any batch."""
        raise NotImplementedError

    def choose_from(self, matrix: Tensor, labels: Tensor, generator: Generator | None) -> Triplets | TripletRanges:
        """Return the same. matrix: (B, B) without a graph."""
        raise NotImplementedError
