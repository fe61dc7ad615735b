"""What the losses on pairs of a batch share."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from raydml.ops.distances import full_precision, inner_products


def cosines(embeddings: Tensor, references: Tensor | None) -> Tensor:
    """Similarities (B, M) of embeddings of any length, with the references or with each other; autocast must be off."""
    points = functional.normalize(full_precision(embeddings), dim=1)
    return inner_products(points, None if references is None else functional.normalize(references.to(points.dtype)))


def mean_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, M) weights whose product with a matrix sums to each row's mean over the mask; a row of nothing gives 0."""
    return mask / mask.sum(dim=1, keepdim=True, dtype=dtype).clamp(min=1)


def sum_of_soft_maxima(values: Tensor, mask: Tensor) -> Tensor:
    """The sum over all rows of log(1 + sum of exp over the masked entries of the row), without overflow."""
    # It is the cross-entropy of a first column exp(0) = 1 against the row, which torch has in two fused kernels, and
    # which no empty row makes infinite.
    logits = torch.cat([values.new_zeros(len(values), 1), values.masked_fill(~mask, -math.inf)], dim=1)
    first = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    return functional.cross_entropy(logits, first, reduction="sum")


def refuse_swapped_scales(alpha: float, beta: float) -> None:
    """ValueError where positives would be sharper than negatives."""
    if alpha > beta:
        raise ValueError(
            f"alpha = {alpha}, beta = {beta}: alpha scales positives, beta scales negatives, and alpha must not exceed "
            "beta: a class is spread out, so its positives need the softer scale, while of negatives only the nearest "
            "count. They look swapped (Deep_Metric's code uses the letters the other way round): "
            f"write alpha = {beta}, beta = {alpha}"
        )
