"""What a loss is: a function of embeddings, labels and the tuples that a miner chose, with one number as its value.

`accepts` names the kinds of tuples that a loss takes: "pairs", "triplets", "triplet_ranges" (see `raydml.ops.tuples`),
or none where it learns from labels alone. Any miner that yields one of these kinds can be combined with it. A loss that
accepts pairs also takes `references`, the embeddings that the columns of the pairs stand for: a cross-batch memory
passes its embeddings there.

The classes below hold what all losses share. They refuse tuples of other kinds, and they compute in float32 (or wider)
even under autocast: differences of nearby points, and similarities multiplied by 40, need more than the 8 bits of
bfloat16. A subclass defines `cost`; or, where it reads the tuples off a matrix of the batch, it sets `measure`, a
function of `raydml.ops.distances`, and defines `cost_of` that matrix. A miner that reads the same one then shares it.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from raydml.ops.distances import (
    Measure,
    full_precision,
    inner_products,
    logsumexp_and_shares,
    products_with_unit,
    squared_euclidean,
    squares_at,
    without_autocast,
)
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs, check_kind

Tuples = Pairs | Triplets | TripletRanges

# Below it the squared sine is taken for it: its root keeps a finite (zero) gradient at the angles 0 and pi.
SMALLEST_SQUARED_SINE = 1e-12


class ClassLoss(nn.Module):
    """A loss on embeddings and labels alone, usually against learned vectors of the classes; takes no miner.

    These vectors start from torch's global generator, which the caller seeds.
    """

    accepts: ClassVar[tuple[str, ...]] = ()

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: None = None) -> Tensor:
        """Return a scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64 in 0..num_classes-1."""
        if tuples is not None:
            raise ValueError(f"{type(self).__name__} learns from labels alone: set miner to null")
        with without_autocast(embeddings):
            return self.cost(full_precision(embeddings), labels)

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return a scalar in the graph of points (B, D), float32 or wider; 0 for an empty batch."""
        raise NotImplementedError


class PairLoss(nn.Module):
    """A loss on pairs of the batch, or of the batch and references."""

    accepts: ClassVar[tuple[str, ...]] = ("pairs",)
    measure: Measure | None = None

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        tuples: Pairs | None = None,
        references: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> Tensor:
        """Return a scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64; tuples: None = all pairs.

        references: (M, D), the embeddings of the columns of the pairs; None = the batch. matrix: (B, M), the `measure`
        of these embeddings and references with its graph, where it is known already.
        """
        pairs = all_pairs(labels) if tuples is None else tuples
        check_kind(pairs, self.accepts)
        with without_autocast(embeddings):
            points = full_precision(embeddings)
            references = None if references is None else references.to(points.dtype)
            if self.measure is None:
                return self.cost(points, pairs, references)
            return self.cost_of(self.measure(points, references) if matrix is None else matrix, pairs)

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        """Return a scalar in the graph of points (B, D), float32 or wider; 0 where there are no pairs."""
        raise NotImplementedError

    def cost_of(self, matrix: Tensor, pairs: Pairs) -> Tensor:
        """Return a scalar in the graph of the matrix (B, M), float32 or wider; 0 where there are no pairs."""
        raise NotImplementedError


class TripletLoss(nn.Module):
    """A loss on triplets of the batch, and on pairs unless its class says otherwise."""

    accepts: ClassVar[tuple[str, ...]] = ("pairs", "triplets", "triplet_ranges")
    measure: Measure | None = None

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        tuples: Tuples | None = None,
        references: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> Tensor:
        """Return a scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64; tuples: None = all of the batch.

        references: (M, D), the embeddings of the columns of pairs; None = the batch. matrix: (B, M), the `measure` of
        these embeddings and references with its graph, where it is known already.
        """
        if references is not None and "pairs" not in self.accepts:
            raise ValueError(f"references: they are the columns of pairs, and {type(self).__name__} takes no pairs")
        if tuples is None:
            tuples = all_pairs(labels)
        else:
            check_kind(tuples, self.accepts, references)
        with without_autocast(embeddings):
            points = full_precision(embeddings)
            references = None if references is None else references.to(points.dtype)
            if self.measure is None or isinstance(tuples, Triplets):
                return self.cost(points, labels, tuples, references)
            return self.cost_of(self.measure(points, references) if matrix is None else matrix, tuples)

    def cost(self, points: Tensor, labels: Tensor, tuples: Tuples, references: Tensor | None) -> Tensor:
        """Return a scalar in the graph of points (B, D), float32 or wider; 0 where there are no tuples.

        tuples: all pairs of the batch where no miner chose, also for a loss that takes no pairs; with a `measure` only
        listed triplets.
        """
        raise NotImplementedError

    def cost_of(self, matrix: Tensor, tuples: Pairs | TripletRanges) -> Tensor:
        """Return a scalar in the graph of the matrix (B, M), float32 or wider; 0 where there are no tuples."""
        raise NotImplementedError


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


def with_slope(variable: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """Return a value in the graph of the variable, given the derivative of the value by each of its entries.

    For a loss whose gradient is known in closed form. Autograd then keeps one tensor for the way back, and not one for
    each operation. value: a scalar; slope: of the shape of variable. Both are computed from ``variable.detach()``. A
    second derivative raises RuntimeError.
    """
    result: Tensor = _WithSlope.apply(variable, value, slope)
    return result


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, variable: Tensor, value: Tensor, slope: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # torch's once_differentiable raises only where the gradient that comes back has a graph; a loss's has none.
        if torch.is_grad_enabled():
            raise RuntimeError("the loss has no second derivative: its slope is a constant; leave create_graph out")
        (slope,) = ctx.saved_tensors
        return slope * gradient, None, None


def sum_of_soft_maxima(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over all rows of log(1 + sum of exp over the masked entries of the row), without overflow."""
    total, slope = soft_maxima(values.detach(), mask)
    return with_slope(values, total, slope)


def soft_maxima(values: Tensor, mask: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the same sum of scale * values, and its derivative by each scaled value. Both (B, M) without a graph."""
    log_sums, shares = logsumexp_and_shares(values, mask, scale=scale)
    # log(1 + e^x), whose derivative is the sigmoid: exactly 0 where a row is empty.
    return torch.logaddexp(log_sums, torch.zeros_like(log_sums)).sum(), shares.mul_(log_sums.sigmoid())


def opposed_soft_maxima(matrix: Tensor, pairs: Pairs, alpha: float, beta: float, base: float) -> Tensor:
    """Return the mean over the anchors of the soft maxima of their positives and negatives, in the graph of the matrix.

    (1/alpha) log(1 + sum_P exp(-alpha (s - base))) + (1/beta) log(1 + sum_N exp(beta (s - base))) with similarities s,
    the matrix (B, M): the loss of Wang et al., CVPR 2019.
    """
    size = max(len(matrix), 1)
    similarity = matrix.detach() - base
    pulled, pull = soft_maxima(similarity, pairs.positive, -alpha)
    pushed, push = soft_maxima(similarity, pairs.negative, beta)
    # In the slope the scales cancel: the derivative of (1/alpha) log(...) by s has a factor alpha.
    return with_slope(matrix, (pulled / alpha + pushed / beta) / size, push.sub_(pull).div_(size))


def refuse_swapped_scales(alpha: float, beta: float) -> None:
    """Raise ValueError where positives would be sharper than negatives."""
    if alpha > beta:
        raise ValueError(
            f"alpha = {alpha}, beta = {beta}: alpha scales positives, beta scales negatives, and alpha must not exceed "
            "beta: a class is spread out, so its positives need the softer scale, while of negatives only the nearest "
            "count. They look swapped (Deep_Metric's code uses the letters the other way round): "
            f"write alpha = {beta}, beta = {alpha}"
        )


def class_vectors(num_classes: int, embedding_dim: int) -> nn.Parameter:
    """Return vectors (C, D), uniform in +-1/sqrt(D) as in torch's linear layer, from torch's global generator.

    All losses on class cosines start from them, so that one learning rate serves all: only the direction of a vector
    counts there, and its length decides how fast the direction turns.
    """
    bound = embedding_dim**-0.5
    return nn.Parameter(torch.empty(num_classes, embedding_dim).uniform_(-bound, bound))


def class_cosines(points: Tensor, vectors: Tensor) -> Tensor:
    """Return the cosines (B, C) of points (B, D) with vectors (C, D), both normalised by max(norm, 1e-12)."""
    return products_with_unit(functional.normalize(points), vectors.to(points.dtype))


def subtract_margin(similarity: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the similarities (B, C) to the classes with a margin taken from those to the own class."""
    own = labels[:, None]
    return similarity.scatter_add(1, own, similarity.new_full(own.shape, -margin))


def add_angular_margin(similarity: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the cosines (B, C) of the angles to the classes, with a margin added to the angle to the own class.

    margin: in radians. Where the angle would exceed pi, the cosine is continued downwards; see ``arcface``.
    """
    own = labels[:, None]
    cosine = similarity.gather(1, own)
    sine = (1 - cosine.square()).clamp(min=SMALLEST_SQUARED_SINE).sqrt()
    shifted = cosine * math.cos(margin) - sine * math.sin(margin)
    beyond = cosine - margin * math.sin(margin)
    return similarity.scatter(1, own, torch.where(cosine >= math.cos(math.pi - margin), shifted, beyond))


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy averaged over the batch; 0 for an empty batch, whose mean would be NaN."""
    return functional.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
