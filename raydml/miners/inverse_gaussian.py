"""Inverse-Gaussian sampling: Wang, the Deep_Metric code of 2018 (github.com/bnu-wangxun/Deep_Metric); no paper."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from raydml.miners._base import PairMiner
from raydml.ops.distances import inner_products
from raydml.ops.random_columns import draw_different_columns
from raydml.ops.tuples import Pairs

# The least weight of a negative, next to the greatest, which is 1: nothing that may be drawn weighs 0.
SMALLEST_WEIGHT = 1e-300


class InverseGaussian(PairMiner):
    """Inverse-Gaussian sampling: all positives, and a tenth of the negatives, rare similarities first.

    For anchor i, let mu and sigma be the mean and the (population) standard deviation of the dot products s with its
    negatives. Each negative weighs

        exp((s - mu)^2 / (2 sigma^2))

    the inverse of a Gaussian density, and floor(|N| / one_in) of them are drawn without replacement: none where there
    are fewer than one_in. All positives stay.

    The code calls this "distance weighted"; it is its author's variant, not the sampling of Wu et al., which is the
    distance_weighted miner. The weight loss follows it there, with alpha 2 and beta 50. Embeddings are used as they
    come.
    """

    def __init__(
        self,
        *,
        one_in: Annotated[
            int, Field(ge=1, description="number of negatives for each one that is drawn; 10 in the code")
        ] = 10,
    ) -> None:
        super().__init__()
        self.one_in = one_in
        self.measure = inner_products

    def choose_from(self, matrix: Tensor, pairs: Pairs, generator: Generator | None) -> Pairs:
        """Draw B M numbers."""
        weight = negative_weights(matrix, pairs.negative)
        # The number drawn depends on the row: each row draws the largest number that a row may need, and uses its own.
        most = pairs.negative.shape[1] // self.one_in
        columns = draw_different_columns(weight, generator, most)
        num_drawn = pairs.negative.sum(dim=1, keepdim=True) // self.one_in
        used = torch.arange(most, device=columns.device) < num_drawn
        return Pairs(pairs.positive, torch.zeros_like(pairs.negative).scatter(1, columns, used))


def negative_weights(similarity: Tensor, negative: Tensor) -> Tensor:
    """(B, M) float64 weight of each negative in a draw: 1 for the heaviest of its row, 0 for other items."""
    # In float64, because the weights of 1000 negatives span up to exp(-500).
    similarity = similarity.double()
    count = negative.sum(dim=1, keepdim=True).clamp(min=1)
    mean = similarity.masked_fill(~negative, 0).sum(dim=1, keepdim=True) / count
    square = (similarity - mean).square().masked_fill(~negative, 0)
    # Twice the variance; where all negatives are equally similar, all weigh the same.
    spread = (2 * square.sum(dim=1, keepdim=True) / count).clamp(min=torch.finfo(torch.float64).tiny)
    exponent = square / spread
    weight = (exponent - exponent.amax(dim=1, keepdim=True)).exp() if exponent.shape[1] else exponent
    return weight.clamp(min=SMALLEST_WEIGHT).masked_fill(~negative, 0)
