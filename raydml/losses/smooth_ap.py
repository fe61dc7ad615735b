"""Smooth-AP: Brown et al., Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval, ECCV 2020."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from raydml.losses._base import PairLoss, cosines, mean_weights
from raydml.ops.tuples import Pairs

# The largest number of differences of similarities in memory at once: 64 MiB in float32.
MOST_DIFFERENCES = 2**24


class SmoothAp(PairLoss):
    """Smooth-AP: 1 minus the average precision of each anchor's ranking, ranks counted by sigmoids.

    For anchor i with chosen positives P and negatives N and cosines s, let g(j, k) = sigmoid((s_k - s_j) / temperature)
    be about 1 where k is ranked before j. Then

        1 - AP = mean over j in P of  sum_N g(j, k) / (1 + sum_{P without j} g(j, k) + sum_N g(j, k))

    averaged over the anchors that have a positive.

    Every row of the pairs is a query, and what it retrieves are its chosen positives and negatives; so mining is not
    needed; masks and references are supported. Embeddings are normalised here. Classes may be of any size.

    The ranks of B anchors take B M^2 sigmoids. They are computed a few anchors at a time, together with the gradient,
    so that memory stays within a few (B, M) matrices and 64 MiB. torch.compile unrolls that loop.

    Departure: an anchor does not retrieve itself, as in evaluation. The release, and pytorch-metric-learning, count the
    anchor among its own positives, where it is always first, and demand classes of equal size.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[
            float,
            Field(gt=0, description="difference of two cosines above which they count as ordered; 0.01 in the paper"),
        ] = 0.01,
    ) -> None:
        super().__init__()
        self.temperature = temperature

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        positive, negative = pairs
        logits = cosines(points, references) / self.temperature
        misses = _MissedPrecision.apply(logits, positive, negative, logits.requires_grad)
        return misses.sum() / positive.any(dim=1).sum().clamp(min=1)


class _MissedPrecision(torch.autograd.Function):
    """1 - AP of each row, with its gradient computed in the forward pass: B M^2 numbers are not kept for it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positive: Tensor, negative: Tensor, with_gradient: bool) -> Tensor:
        """(B,) of logits (B, M)."""
        size = logits.shape[1]
        num_rows = max(1, MOST_DIFFERENCES // max(1, size * size))
        num_columns = max(1, MOST_DIFFERENCES // max(1, size))  # fewer than M only where one row alone is too much
        masks = torch.stack([positive, negative], dim=2).to(logits.dtype)
        share = mean_weights(positive, logits.dtype)
        misses, gradient = logits.new_zeros(len(logits)), torch.zeros_like(logits)
        for row in range(0, len(logits), num_rows):
            rows = slice(row, row + num_rows)
            for column in range(0, size, num_columns):
                columns = slice(column, column + num_columns)
                missed, towards, away = _ranks(logits[rows], masks[rows], share[rows], columns, with_gradient)
                misses[rows] += missed
                if with_gradient:
                    gradient[rows] += towards
                    gradient[rows, columns] -= away
        ctx.save_for_backward(gradient)
        return misses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inner,) = ctx.saved_tensors
        return gradient[:, None] * inner, None, None, None


def _ranks(
    logits: Tensor, masks: Tensor, share: Tensor, columns: slice, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the positives among some columns add to 1 - AP of some rows: (R,), and its gradient if with_gradient.

    logits: (R, M); masks: (R, M, 2), positives and negatives; share: (R, M), 1 / number of positives, or 0. The
    gradient comes in two parts: (R, M) with respect to the logits that the columns are compared with, (R, C) to be
    taken from the columns' own.
    """
    before = (logits[:, None] - logits[:, columns, None]).sigmoid_()  # (R, C, M): whether the last comes before
    counts = before @ masks
    # An item is compared with itself too: that is the half that is not added for its own place.
    misses, total = counts[:, :, 1], counts.sum(dim=2) + 0.5
    missed = (share[:, columns] * misses / total).sum(dim=1)
    if not with_gradient:
        return missed, missed, missed
    # The derivatives of misses / total by the count of positives and by that of negatives.
    weight = torch.stack([-misses, total - misses], dim=1) * (share[:, columns] / total.square())[:, None]
    slope = before.addcmul_(before, before, value=-1)  # of a sigmoid: g - g^2, in place
    towards = ((weight @ slope).mT * masks).sum(dim=2)
    away = ((slope @ masks).mT * weight).sum(dim=1)
    return missed, towards, away
