"""Distances and similarities between the rows of a batch, as matrices whose gradients are finite everywhere.

All functions take points in float32 or wider; losses convert their embeddings with `full_precision` first.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# A smaller squared distance counts as zero: its root keeps a finite (zero) gradient.
SMALLEST_SQUARE = 1e-12

# Beyond all similarities and distances of embeddings, and finite, so that its product with 0 is 0.
BEYOND_ALL = 1e30

# A finite stand-in for the logarithm of 0: its exponential is 0, and its products stay finite.
LOG_OF_ZERO = -BEYOND_ALL


# A function of this file that maps points (B, D), and others (M, D) or None, to a matrix (B, M).
Measure = Callable[[Tensor, Tensor | None], Tensor]


def shared_measure(loss: nn.Module, miner: nn.Module | None) -> Measure | None:
    """Return the measure that the loss and the miner both read, or None where they read none or different ones.

    The matrix is then computed once for both. A loss reads no matrix where the miner lists triplets: it takes
    differences, which are exact.
    """
    measure: Measure | None = getattr(loss, "measure", None)
    same = measure is getattr(miner, "measure", None) and getattr(miner, "yields", None) != "triplets"
    return measure if same else None


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off on the device of the tensor."""
    device = tensor.device.type
    # To enter and leave torch.autocast takes 10 to 20 us, also where it is off: of 800 us for a loss with its miner.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def full_precision(embeddings: Tensor) -> Tensor:
    """Convert embeddings to float32, unless they are wider.

    Differences of nearby points, and similarities that a loss multiplies by 40, need more than the 8 bits of bfloat16.
    Autocast must be off, or the next product rounds again.
    """
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def squared_euclidean(points: Tensor, others: Tensor | None = None) -> Tensor:
    """Return squared distances (B, M) of points (B, D) from others (M, D), or from each other; at least 0.

    They are computed as |x|^2 + |y|^2 - 2xy, by a matrix product, many times faster than differences. The vectors are
    measured from the mean of the points, so the error is about 1e-7 (float32) of the squared radius of the points, for
    any position of their mean. The distance of a point from itself is 0.
    """
    if others is None:
        squares: Tensor = _SquaresAmong.apply(points)
        return squares
    centre = _mean(points.detach())
    rows, columns = points - centre, others - centre
    norms = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return torch.addmm(norms, rows, columns.T, alpha=-2).clamp(min=0)


def euclidean(points: Tensor, others: Tensor | None = None) -> Tensor:
    """Return distances (B, M) of points (B, D) from others (M, D), or from each other.

    A distance is at least 1e-6, with gradient 0 there: the distance of two equal points has no gradient. In float32 its
    error is about 3e-4 of the radius of the points if two points nearly coincide, and smaller otherwise.
    """
    if others is None:
        distances: Tensor = _DistancesAmong.apply(points)
        return distances
    return squared_euclidean(points, others).clamp(min=SMALLEST_SQUARE).sqrt()


def inner_products(points: Tensor, others: Tensor | None = None) -> Tensor:
    """Return dot products (B, M) of points (B, D) with others (M, D), or with each other: cosines of unit vectors."""
    if others is None:
        products: Tensor = _ProductsAmong.apply(points)
        return products
    return points @ others.T


def products_with_unit(points: Tensor, vectors: Tensor) -> Tensor:
    """Return dot products (B, C) of points (B, D) with vectors (C, D), divided by max(vector norm, 1e-12).

    The products are divided, not the vectors: a loss often has many more vectors (one or more a class) than points, and
    a normalised copy of them, with its gradient, costs more than the products.
    """
    return points @ vectors.T / torch.linalg.vector_norm(vectors, dim=1).clamp(min=1e-12)


# Among the points of one batch the gradient of a matrix reaches a point through its row and through its column.
# Autograd needs a product for each and a node for every step between. These functions need one product of the sum,
# except for large batches of short embeddings.


class _ProductsAmong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        ctx.save_for_backward(points)
        return points @ points.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (points,) = ctx.saved_tensors
        if _is_large(points):
            return torch.addmm(gradient @ points, gradient.T, points)
        return _with_transpose(gradient) @ points


class _SquaresAmong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        squares, centred = _squares_among(points, 0.0)
        ctx.save_for_backward(centred)
        return squares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (centred,) = ctx.saved_tensors
        return _pull(centred, gradient, 2)


class _DistancesAmong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        squares, centred = _squares_among(points, SMALLEST_SQUARE)
        distances = squares.sqrt_()
        ctx.save_for_backward(centred, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        centred, distances = ctx.saved_tensors
        # -1 / distance, and 0 at the smallest. A threshold takes a quarter of the time of a mask on a CPU.
        inverse = functional.threshold(distances.reciprocal().neg_(), -0.999 * SMALLEST_SQUARE**-0.5, 0, inplace=True)
        return _pull(centred, inverse.mul_(gradient), -1)


def _mean(points: Tensor) -> Tensor:
    return points.mean(dim=0) if len(points) else points.sum(dim=0)  # the mean of no points is NaN


def _squares_among(points: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Return the squares, at least smallest, and the points measured from their mean."""
    centred = points - _mean(points)
    products = centred @ centred.T
    norms = products.diagonal()  # so that the distance of a point from itself is exactly 0
    return torch.add(norms[:, None] + norms, products, alpha=-2).clamp_(min=smallest), centred


def _pull(centred: Tensor, weight: Tensor, factor: int) -> Tensor:
    """Return (B, D): factor times the sum over j of (weight_ij + weight_ji) (x_i - x_j).

    centred: the points measured from their mean. A shift changes no difference, and far from the origin the terms would
    cancel to noise.
    """
    large = _is_large(centred)
    if large:
        total = weight.sum(dim=1) + weight.sum(dim=0)
    else:
        weight = _with_transpose(weight)
        total = weight.sum(dim=1)
    pull = (total[:, None] * centred).addmm_(weight, centred, beta=factor, alpha=-factor)
    return pull.addmm_(weight.T, centred, alpha=-factor) if large else pull


def _with_transpose(matrix: Tensor) -> Tensor:
    """Return the sum of a matrix (B, B) and its transpose."""
    # The copy goes block by block. A sum with the transpose jumps from row to row: twice the time at B = 512.
    return matrix.T.clone(memory_format=torch.contiguous_format).add_(matrix)


def _is_large(points: Tensor) -> bool:
    """Whether a second product is faster than adding the transpose of a (B, B) matrix."""
    return len(points) > 4 * points.shape[1]


def entries_at(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return entries (K, T) of a matrix (B, M) at rows (T,) and columns (K, T), both int64."""
    return matrix.flatten().index_select(0, (rows * matrix.shape[1] + columns).flatten()).view_as(columns)


def squares_at(points: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return squared distances (K, T) of points (B, D) at rows (T,) from points at columns (K, T), both int64.

    A short list takes K T D differences, which are exact; a long list is read from the matrix of all pairs.
    """
    if len(rows) > 2 * len(points):
        return entries_at(squared_euclidean(points), rows, columns)
    ends = points.index_select(0, columns.flatten()).view(*columns.shape, points.shape[1])
    return (points.index_select(0, rows) - ends).square().sum(dim=2)


def hidden(values: Tensor, mask: Tensor, stand_in: float, scale: float = 1.0) -> Tensor:
    """Return scale * values (B, M), and about stand_in where the mask (B, M) is false. It is far beyond all values.

    It adds numbers: masked_fill jumps entry by entry, which takes up to ten times as long on a CPU. An infinite value
    stays where it is hidden.
    """
    return as_numbers(~mask, values.dtype).mul_(stand_in).add_(values, alpha=scale)


def as_numbers(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask, as 0 and 1, or whole numbers in another dtype."""
    # Torch converts bytes five times faster than booleans on a CPU.
    return (counts.view(torch.uint8) if counts.dtype == torch.bool else counts).to(dtype)


def masked_logsumexp(values: Tensor, mask: Tensor, dim: int = 1) -> Tensor:
    """Return the log of the sum of exponentials over the masked entries of each row (dim 1) or column (dim 0).

    For an empty mask it is about LOG_OF_ZERO, with gradient 0; minus infinity would make gradients NaN.
    """
    result: Tensor = _MaskedLogSumExp.apply(values, mask, dim)
    return result


def logsumexp_and_shares(values: Tensor, mask: Tensor, dim: int = 1, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return masked_logsumexp of scale * values with the dimension kept, and the share of each entry in its sum.

    values, mask, shares: (B, M), without a graph. A share is 0 outside the mask. In rows (columns) with an empty mask
    the shares are undefined.
    """
    # Through softmax: exponentials that underflow, as those of most hidden entries do, slow torch.logsumexp and
    # torch.exp down 4 to 20 times on a CPU, but not the fused kernel of softmax.
    logits = hidden(values, mask, LOG_OF_ZERO, scale)
    shares = logits.softmax(dim=dim)
    if logits.shape[dim] == 0:
        return shares.sum(dim=dim, keepdim=True) + LOG_OF_ZERO, shares
    # The largest share is exp(maximum - result), at least one divided by the number of entries.
    return logits.amax(dim=dim, keepdim=True) - shares.amax(dim=dim, keepdim=True).log(), shares


class _MaskedLogSumExp(torch.autograd.Function):
    """Log-sum-exp, whose gradient is the shares."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, dim: int) -> Tensor:
        result, shares = logsumexp_and_shares(values, mask, dim)
        ctx.dim = dim
        ctx.save_for_backward(shares.mul_(result > LOG_OF_ZERO / 2))
        return result.squeeze(dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return share * gradient.unsqueeze(ctx.dim), None, None
