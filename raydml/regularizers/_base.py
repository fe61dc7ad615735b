"""What a regulariser is: a term that is added to any loss, or a change to the tuples that any miner yields."""

from typing import ClassVar, TypeVar

from torch import Generator, Tensor, nn

from raydml.ops.distances import full_precision, without_autocast
from raydml.ops.tuples import Pairs, TripletRanges, Triplets

Tuples = TypeVar("Tuples", bound=Pairs | Triplets | TripletRanges)


class Regularizer(nn.Module):
    """A module that can be combined with every loss.

    ``needs_pairs``: it calls the loss on pairs of its own, so the loss must accept pairs. ``rewrites``: the kinds of
    tuples it can change; where it is not empty, the trial's miner must yield one of them.
    """

    needs_pairs: ClassVar[bool] = False
    rewrites: ClassVar[tuple[str, ...]] = ()

    def forward(self, embeddings: Tensor, labels: Tensor, generator: Generator | None = None) -> Tensor:
        """Return the weighted term, a scalar in the graph, float32 or wider, also under autocast.

        embeddings: (B, D), as the loss gets them; labels: (B,) int64. Called exactly once in a training step, so it may
        keep statistics.
        """
        with without_autocast(embeddings):
            return self.term(full_precision(embeddings), labels, generator)

    def term(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
        """Return the weighted term of points (B, D), float32 or wider; 0 unless a subclass adds one."""
        return points[:0].sum()

    def rewrite(self, tuples: Tuples, labels: Tensor, generator: Generator | None = None) -> Tuples:
        """Return the tuples that the loss gets in place of the mined ones; same shapes."""
        return tuples
