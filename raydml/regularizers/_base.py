"""What a regulariser is: a term added to any loss, or a change to the tuples any miner yields."""

from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from raydml.ops.tuples import Pairs, TripletRanges, Triplets

Tuples = TypeVar("Tuples", bound=Pairs | Triplets | TripletRanges)


class Regularizer(nn.Module):
    """Something that may stand beside every loss.

    ``needs_pairs``: it calls the loss on pairs of its own, so the loss must accept pairs. ``rewrites``: the kinds of
    tuples it can change; where it is not empty, the trial's miner must yield one of them.
    """

    needs_pairs: ClassVar[bool] = False
    rewrites: ClassVar[tuple[str, ...]] = ()

    def forward(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The term, weighted, as a scalar in the graph, float32 or wider.

        embeddings: (B, D), as the loss gets them; labels: (B,) int64. Called once a training step and not otherwise,
        so it may keep statistics.
        """
        raise NotImplementedError

    def rewrite(
        self,
        tuples: Tuples,
        labels: Tensor,  # noqa: ARG002 - most change nothing
        generator: torch.Generator | None = None,  # noqa: ARG002
    ) -> Tuples:
        """The tuples that the loss gets in place of the mined ones; same shapes."""
        return tuples
