"""What the losses on pairs and triplets share."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from raydml.losses._base import Tuples
from raydml.ops.distances import inner_products, squared_euclidean, squares_at
from raydml.ops.tuples import Triplets


def cosines(points: Tensor, references: Tensor | None) -> Tensor:
    """Return the cosines (B, M) of points (B, D) of any length with the references, or with each other."""
    references = None if references is None else functional.normalize(references)
    return inner_products(functional.normalize(points), references)


def pair_squares(points: Tensor, tuples: Tuples, references: Tensor | None = None) -> Tensor:
    """Return squared distances: (2, T) for listed triplets, anchor to positive and to negative; else (B, M)."""
    if isinstance(tuples, Triplets):
        return squares_at(points, tuples.anchor, torch.stack([tuples.positive, tuples.negative]))
    return squared_euclidean(points, references)


def both_sides(values: Tensor, tuples: Tuples) -> tuple[Tensor, Tensor]:
    """Return the values of the positive and of the negative pairs: the two rows for listed triplets, else all twice."""
    if isinstance(tuples, Triplets):
        return values[0], values[1]
    return values, values


def mean_cost(cost: Tensor, count: Tensor, active_only: bool = False) -> Tensor:
    """Return the mean of costs that are at least 0, weighted by how often each pair counts; 0 where none does.

    active_only: average over the pairs with a positive cost.
    """
    # As numbers: products with a mask are several times slower on a CPU.
    count = count.to(cost.dtype)
    divisor = cost.detach().sign() * count if active_only else count
    return (cost * count).sum() / divisor.sum().clamp(min=1)


def mean_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights (B, M) whose product with a matrix sums to the mean of each row over the mask; 0 in empty rows."""
    return mask / mask.sum(dim=1, keepdim=True, dtype=dtype).clamp(min=1)


def sum_of_soft_maxima(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over all rows of log(1 + sum of exp over the masked entries of the row), without overflow."""
    # It is the cross-entropy of a first column exp(0) = 1 against the row. Torch has that in two fused kernels, and no
    # empty row makes it infinite.
    logits = torch.cat([values.new_zeros(len(values), 1), values.masked_fill(~mask, -math.inf)], dim=1)
    first = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    return functional.cross_entropy(logits, first, reduction="sum")


def refuse_swapped_scales(alpha: float, beta: float) -> None:
    """Raise ValueError where positives would be sharper than negatives."""
    if alpha > beta:
        raise ValueError(
            f"alpha = {alpha}, beta = {beta}: alpha scales positives, beta scales negatives, and alpha must not exceed "
            "beta: a class is spread out, so its positives need the softer scale, while of negatives only the nearest "
            "count. They look swapped (Deep_Metric's code uses the letters the other way round): "
            f"write alpha = {beta}, beta = {alpha}"
        )
