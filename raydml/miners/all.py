"""All tuples of the batch: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, arXiv 2017."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from raydml.ops.distances import full_precision, squared_euclidean, without_autocast
from raydml.ops.tuples import Pairs, TripletRanges, all_pairs, all_triplets


class All(nn.Module):
    """Every pair or every triplet of the batch ("batch all").

    The same tuples as without a miner, for a search space in which "no mining" is a choice among miners. Deterministic.

    Pairs: every ordered pair of two different items. Triplets: every positive pair with every negative of its anchor,
    as ranges over the negatives in order of the Euclidean distance of the embeddings as they come.
    """

    def __init__(
        self,
        *,
        tuples: Annotated[
            Literal["pairs", "triplets"], Field(description="the kind of tuples to yield, which the loss must accept")
        ] = "triplets",
    ) -> None:
        super().__init__()
        self.yields = "pairs" if tuples == "pairs" else "triplet_ranges"

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        generator: Generator | None = None,
        pairs: Pairs | None = None,
        references: Tensor | None = None,
    ) -> Pairs | TripletRanges:
        """Return masks (B, M) or ranges (B, B), which are of the batch alone; the arguments are those of PairMiner."""
        pairs = all_pairs(labels) if pairs is None else pairs
        if self.yields == "pairs":
            return pairs
        if references is not None:
            raise ValueError("all: tuples = 'triplets' are of the batch alone; write tuples: pairs for a memory")
        with without_autocast(embeddings):
            # Squares have the order of distances.
            return all_triplets(squared_euclidean(full_precision(embeddings)), pairs)
