"""Recall@k: Patel et al., Recall@k Surrogate Loss with Large Batches and Similarity Mixup, CVPR 2022."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import Field, Strict
from torch import Tensor

from raydml.losses._base import PairLoss, cosines
from raydml.ops.tuples import Pairs

# The largest number of differences of similarities in memory at once: 64 MiB in float32.
MOST_DIFFERENCES = 2**24


class RecallAtK(PairLoss):
    """Recall@k: 1 minus the recall of each anchor's ranking at several k, with sigmoids for both counts.

    For anchor i with chosen positives P, chosen negatives N and cosines s, the rank of positive j and the recall are

        r(j) = 1 + sum over l in P and N without j of sigmoid((s_l - s_j) / temperature)
        R(k) = min(1, sum over j in P of sigmoid((k - r(j)) / rank_temperature) / min(k, |P|))

    and the loss is 1 - R(k), averaged over the ks and over the anchors that have a positive. The sum may exceed what
    can be found at k, because a sigmoid counts a little of every rank beyond k; the minimum bounds it, as in the
    release, which also divides by min(k, |P|).

    Every row of the pairs is a query, and what it retrieves are its chosen positives and negatives; so mining is not
    needed; masks and references are supported. Embeddings are normalised here. Classes may be of any size. A k beyond
    the batch is allowed: every item is found there. Meant for large batches (4000 images in the paper).

    The ranks of B anchors take B M^2 sigmoids. They are computed a few anchors at a time, once for the value and once
    for the gradient, so that memory stays within a few (B, M) matrices and 64 MiB. torch.compile unrolls that loop.

    Departures: an anchor does not retrieve itself, as in the paper and in evaluation; in the release it stands before
    all its positives. The paper's similarity mixup is not part of the loss: it draws random numbers, and a loss has no
    generator that a restart could put back.
    """

    def __init__(
        self,
        *,
        ks: Annotated[
            tuple[Annotated[int, Field(ge=1)], ...],
            Strict(False),
            Field(min_length=1, description="numbers of retrieved items, in rising order; 1, 2, 4, 8, 16 in the paper"),
        ] = (1, 2, 4, 8, 16),
        rank_temperature: Annotated[
            float, Field(gt=0, description="difference of rank and k above which an item counts as out; 1 in the paper")
        ] = 1.0,
        temperature: Annotated[
            float,
            Field(gt=0, description="difference of two cosines above which they count as ordered; 0.01 in the paper"),
        ] = 0.01,
    ) -> None:
        super().__init__()
        if list(ks) != sorted(set(ks)):
            raise ValueError(f"ks = {list(ks)}: they must rise; write {sorted(set(ks))}")
        self.ks = tuple(ks)
        self.rank_temperature = rank_temperature
        self.temperature = temperature

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        logits = cosines(points, references) / self.temperature
        chosen = (pairs.positive | pairs.negative).to(logits.dtype)
        ranks = _Ranks.apply(logits, chosen)
        num_positives = pairs.positive.sum(dim=1, dtype=logits.dtype)
        recall = torch.zeros_like(num_positives)
        for k in self.ks:
            found = (((k - ranks) / self.rank_temperature).sigmoid() * pairs.positive).sum(dim=1)
            recall = recall + (found / num_positives.clamp(min=1, max=k)).clamp(max=1)
        queries = num_positives.clamp(max=1)  # 1 where there is a positive, else 0
        return (queries * (1 - recall / len(self.ks))).sum() / queries.sum().clamp(min=1)


class _Ranks(torch.autograd.Function):
    """The soft rank of each chosen item of a row, with a gradient that is computed anew: B M^2 numbers are not kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, chosen: Tensor) -> Tensor:
        """(B, M) of logits (B, M); chosen: (B, M), 1 for what is ranked and 0 for what is not."""
        ctx.save_for_backward(logits, chosen)
        ranks = torch.empty_like(logits)
        for rows, columns in _blocks(logits):
            ranks[rows, columns] = (_before(logits, rows, columns) @ chosen[rows, :, None]).squeeze(2)
        # An item is compared with itself too: that is the half that is not added for its own place.
        return ranks.add_(0.5)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, chosen = ctx.saved_tensors
        total = torch.zeros_like(logits)
        for rows, columns in _blocks(logits):
            before = _before(logits, rows, columns)
            slope = before.addcmul_(before, before, value=-1)  # of a sigmoid: g - g^2, in place
            # Each rank grows with the items that it is compared with, and falls with its own.
            total[rows] += (gradient[rows, None, columns] @ slope).squeeze(1) * chosen[rows]
            total[rows, columns] -= (slope @ chosen[rows, :, None]).squeeze(2) * gradient[rows, columns]
        return total, None


def _blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of rows and columns of logits (B, M), each with at most MOST_DIFFERENCES differences."""
    size = logits.shape[1]
    num_rows = max(1, MOST_DIFFERENCES // max(1, size * size))
    num_columns = max(1, MOST_DIFFERENCES // max(1, size))  # fewer than M only where one row alone is too much
    for row in range(0, len(logits), num_rows):
        for column in range(0, size, num_columns):
            yield slice(row, row + num_rows), slice(column, column + num_columns)


def _before(logits: Tensor, rows: slice, columns: slice) -> Tensor:
    """How much each item comes before each of some columns: (R, C, M)."""
    return (logits[rows, None] - logits[rows, columns, None]).sigmoid_()
