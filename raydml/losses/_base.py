"""What a loss is: a function of embeddings, labels and the tuples that a miner chose, with one number as its value.

`accepts` names the kinds of tuples that a loss takes: "pairs", "triplets", "triplet_ranges" (see `raydml.ops.tuples`),
or none where it learns from labels alone. Any miner that yields one of these kinds can be combined with it. A loss that
accepts pairs also takes `references`, the embeddings that the columns of the pairs stand for: a cross-batch memory
passes its embeddings there.

The classes below hold what all losses share. They refuse tuples of other kinds, and they compute in float32 (or wider)
even under autocast: differences of nearby points, and similarities multiplied by 40, need more than the 8 bits of
bfloat16. A subclass defines `cost`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from raydml.ops.distances import full_precision
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs, check_kind

Tuples = Pairs | Triplets | TripletRanges


class ClassLoss(nn.Module):
    """A loss on embeddings and labels alone, usually against learned vectors of the classes; takes no miner.

    These vectors start from torch's global generator, which the caller seeds.
    """

    accepts: ClassVar[tuple[str, ...]] = ()

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: None = None) -> Tensor:
        """Return a scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64 in 0..num_classes-1."""
        if tuples is not None:
            raise ValueError(f"{type(self).__name__} learns from labels alone: set miner to null")
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.cost(full_precision(embeddings), labels)

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return a scalar in the graph of points (B, D), float32 or wider; 0 for an empty batch."""
        raise NotImplementedError


class PairLoss(nn.Module):
    """A loss on pairs of the batch, or of the batch and references."""

    accepts: ClassVar[tuple[str, ...]] = ("pairs",)

    def forward(
        self, embeddings: Tensor, labels: Tensor, tuples: Pairs | None = None, references: Tensor | None = None
    ) -> Tensor:
        """Return a scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64; tuples: None = all pairs.

        references: (M, D), the embeddings of the columns of the pairs; None = the batch.
        """
        pairs = all_pairs(labels) if tuples is None else tuples
        check_kind(pairs, self.accepts)
        with torch.autocast(embeddings.device.type, enabled=False):
            points = full_precision(embeddings)
            return self.cost(points, pairs, None if references is None else references.to(points.dtype))

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        """Return a scalar in the graph of points (B, D), float32 or wider; 0 where there are no pairs."""
        raise NotImplementedError


class TripletLoss(nn.Module):
    """A loss on triplets of the batch, and on pairs unless its class says otherwise."""

    accepts: ClassVar[tuple[str, ...]] = ("pairs", "triplets", "triplet_ranges")

    def forward(
        self, embeddings: Tensor, labels: Tensor, tuples: Tuples | None = None, references: Tensor | None = None
    ) -> Tensor:
        """Return a scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64; tuples: None = all of the batch.

        references: (M, D), the embeddings of the columns of pairs; None = the batch.
        """
        if references is not None and "pairs" not in self.accepts:
            raise ValueError(f"references: they are the columns of pairs, and {type(self).__name__} takes no pairs")
        if tuples is None:
            tuples = all_pairs(labels)
        else:
            check_kind(tuples, self.accepts, references)
        with torch.autocast(embeddings.device.type, enabled=False):
            points = full_precision(embeddings)
            return self.cost(points, labels, tuples, None if references is None else references.to(points.dtype))

    def cost(self, points: Tensor, labels: Tensor, tuples: Tuples, references: Tensor | None) -> Tensor:
        """Return a scalar in the graph of points (B, D), float32 or wider; 0 where there are no tuples.

        tuples: all pairs of the batch where no miner chose, also for a loss that takes no pairs.
        """
        raise NotImplementedError
