"""Semi-hard mining: Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, CVPR 2015."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from raydml.miners._base import TripletMiner
from raydml.ops.distances import BEYOND_ALL, euclidean, hidden, squared_euclidean
from raydml.ops.random_columns import draw_columns
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs

MARGIN = 0.2


class SemiHard(TripletMiner):
    """Negatives farther than the positive, but within the margin of it.

    A triplet (a, p, n) is semi-hard when

        d(a, p) < d(a, n) < d(a, p) + margin

    with Euclidean distances d of the embeddings as they come (FaceNet's are of unit length), or squared ones. Both
    bounds are strict: the lower one is so in the paper, and at the upper one the triplet loss of that margin is 0.

    negatives = "all": every semi-hard triplet; a positive pair without a semi-hard negative has none. This is
    pytorch_metric_learning's TripletMarginMiner(type_of_triplets="semihard"), but for d(a, n) = d(a, p) + margin,
    which that one keeps.
    negatives = "nearest": one for every positive pair: the nearest that is farther than the positive, within the margin
    or not, else the farthest of all, so that no positive pair is lost. The form of widely used TensorFlow code; the
    margin plays no part.
    negatives = "random": one triplet an anchor (T = B): a positive at random, then one of its semi-hard negatives at
    random, or any negative where it has none. The form of the MIC authors and of their 2020 benchmark.
    """

    def __init__(
        self,
        *,
        margin: Annotated[
            float, Field(gt=0, description="width of the band beyond the positive; 0.2 in FaceNet, where it is squared")
        ] = MARGIN,
        negatives: Annotated[
            Literal["all", "nearest", "random"],
            Field(
                description="all in the band, the nearest beyond each positive, or a random one in the band an anchor"
            ),
        ] = "all",
        squared: Annotated[
            bool, Field(description="measure the band in squared distances, as FaceNet does; the code of MIC does not")
        ] = True,
    ) -> None:
        super().__init__()
        if negatives == "nearest" and margin != MARGIN:
            raise ValueError(
                f"negatives = 'nearest', margin = {margin}: the nearest is taken within the margin or not, so it would "
                "have no effect; leave margin out, or write negatives: all"
            )
        self.margin = margin
        self.negatives = negatives
        self.measure = squared_euclidean if squared else euclidean
        self.yields = "triplets" if negatives == "random" else "triplet_ranges"

    def choose_from(self, matrix: Tensor, labels: Tensor, generator: Generator | None) -> TripletRanges | Triplets:
        """Return ranges (B, B), or T = B triplets, for which it draws 2 B numbers."""
        pairs = all_pairs(labels)
        if self.negatives == "random":
            return self._random(matrix, pairs, generator)
        ascending, order = hidden(matrix, pairs.negative, BEYOND_ALL).sort(dim=1)
        # Only positives are looked up: the others all take one path through the binary search, several times faster.
        bound = torch.where(pairs.positive, matrix, 0)
        start = torch.searchsorted(ascending, bound, right=True)  # the first with d(a, n) > d(a, p)
        if self.negatives == "all":
            stop = torch.searchsorted(ascending, bound + self.margin)  # the first with d(a, n) >= d(a, p) + margin
            return TripletRanges(pairs.positive, order, start, stop)
        stop = torch.minimum(start + 1, pairs.negative.sum(dim=1, keepdim=True))
        return TripletRanges(pairs.positive, order, (stop - 1).clamp(min=0), stop)

    def _random(self, distance: Tensor, pairs: Pairs, generator: Generator | None) -> Triplets:
        positive = draw_columns(pairs.positive, generator)
        if len(distance) == 0:
            return Triplets(positive[:, 0], positive[:, 0], positive[:, 0], positive[:, 0].bool())
        bound = distance.gather(1, positive)
        band = pairs.negative & (distance > bound) & (distance < bound + self.margin)
        band = torch.where(band.any(dim=1, keepdim=True), band, pairs.negative)
        return Triplets(
            anchor=torch.arange(len(distance), device=distance.device),
            positive=positive[:, 0],
            negative=draw_columns(band, generator)[:, 0],
            valid=pairs.positive.any(dim=1) & pairs.negative.any(dim=1),
        )
