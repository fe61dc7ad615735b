"""Pairs and triplets of a batch, as miners give them to losses.

All shapes depend on the size of the batch, never on its content, so no operation waits for the GPU. Tuples that do not
count are masked, not removed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs as two masks; the row is the anchor, the column an item of the batch, or of a memory (M columns).

    positive: (B, M) bool, pairs to pull together. negative: (B, M) bool, pairs to push apart.
    """

    positive: Tensor
    negative: Tensor


class Triplets(NamedTuple):
    """Triplets of a batch as index lists.

    anchor, positive, negative: (T,) int64 rows of the batch, always in range. valid: (T,) bool; losses ignore the other
    triplets.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    valid: Tensor


class TripletRanges(NamedTuple):
    """Triplets as ranges: for each pair (a, p), a range of the negatives of a, in order of their distance.

    The triplets are (a, p, order[a, r]) for all a and p with positive[a, p] and all start[a, p] <= r < stop[a, p].
    So B^3 triplets take B^2 numbers.

    positive: (B, B) bool. order: (B, B) int64, the columns of each row, negatives first, nearest first (by Euclidean
    distance of the embeddings), then the others. start, stop: (B, B) int64, 0 <= start, stop <= number of
    negatives of the row; stop <= start is an empty range.
    """

    positive: Tensor
    order: Tensor
    start: Tensor
    stop: Tensor


def all_pairs(labels: Tensor) -> Pairs:
    """Return every ordered pair of a batch. labels: (B,) int64.

    Only an item with the same index is not its own positive: exact copies of an image are positives of each other.
    """
    same = labels[:, None] == labels[None, :]
    return Pairs(negative=~same, positive=same.fill_diagonal_(False))


def all_triplets(distance: Tensor, pairs: Pairs) -> TripletRanges:
    """Return every triplet of a positive and a negative pair with one anchor. distance: (B, B), without gradient."""
    order = distance.masked_fill(~pairs.negative, torch.inf).argsort(dim=1)
    num_negatives = pairs.negative.sum(dim=1, keepdim=True)
    return TripletRanges(
        positive=pairs.positive, order=order, start=torch.zeros_like(order), stop=num_negatives.expand_as(order)
    )


def pair_counts(ranges: TripletRanges) -> tuple[Tensor, Tensor]:
    """Return the number of triplets of each positive pair (B, B) and of each negative pair (B, B), int32."""
    positive, order, start, stop = ranges
    length = (stop - start).int().mul_(positive.view(torch.uint8)).clamp_(min=0)
    # A range adds 1 to all ranks from its start and subtracts it from its stop.
    one = length.sign()
    steps = length.new_zeros(len(order), order.shape[1] + 1)
    steps = steps.scatter_add_(1, start, one).scatter_add_(1, stop, one.neg_())
    by_rank = steps.cumsum(dim=1, dtype=length.dtype)[:, :-1]
    return length, torch.empty_like(length).scatter_(1, order, by_rank)


def counts(tuples: Pairs | Triplets | TripletRanges) -> tuple[Tensor, Tensor]:
    """Return how often each positive and each negative pair counts, bool or int32.

    (B, M) for pairs; (B, B) for ranges of triplets, whose pairs count once for every triplet; (T,) for listed triplets.
    """
    if isinstance(tuples, Triplets):
        return tuples.valid, tuples.valid
    return pair_counts(tuples) if isinstance(tuples, TripletRanges) else (tuples.positive, tuples.negative)


def per_tuple(values: Tensor, tuples: Pairs | Triplets | TripletRanges) -> Tensor:
    """Repeat a value of each anchor (B,) for its tuples: (T,) for listed triplets, else (B, 1)."""
    return values.index_select(0, tuples.anchor) if isinstance(tuples, Triplets) else values[:, None]


def check_kind(tuples: object, accepts: tuple[str, ...], references: Tensor | None = None) -> None:
    """Raise ValueError for tuples that a loss does not accept, and for references without pairs.

    accepts: of "pairs", "triplets", "triplet_ranges".
    """
    kinds = {"pairs": Pairs, "triplets": Triplets, "triplet_ranges": TripletRanges}
    if not isinstance(tuples, tuple(kinds[name] for name in accepts)):
        listed = " or ".join(accepts)
        raise ValueError(
            f"tuples: the loss works on {listed}, not on {type(tuples).__name__}; "
            f"choose a miner that yields {listed}, or none"
        )
    if references is not None and not isinstance(tuples, Pairs):
        raise ValueError(
            f"references: they are the columns of pairs and have no place in {type(tuples).__name__}; "
            "choose a miner that yields pairs"
        )
