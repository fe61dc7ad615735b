"""What a miner hands to a loss: which pairs or triplets of the batch count.

All types have shapes fixed by the batch, never by its content, so that making and using them needs no answer from the
GPU. What must not count is masked, not removed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs as two masks; the row is the anchor, the column an item of the batch, or of a memory (M columns).

    positive: (B, M) bool, pairs to draw together. negative: (B, M) bool, pairs to push apart.
    """

    positive: Tensor
    negative: Tensor


class Triplets(NamedTuple):
    """Triplets of a batch as index lists.

    anchor, positive, negative: (T,) int64 rows of the batch, always within it. valid: (T,) bool; a loss ignores the
    other rows, whatever they hold.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    valid: Tensor


class TripletRanges(NamedTuple):
    """Very many triplets without a list: for each pair (a, p), a range of a's negatives in order of their distance.

    The triplets are (a, p, order[a, r]) for all a and p with positive[a, p] and all start[a, p] <= r < stop[a, p].
    B^3 triplets take B^2 numbers.

    positive: (B, B) bool. order: (B, B) int64, the columns of each row, negatives first, nearest first (by Euclidean
    distance of the embeddings as they are), the others behind. start, stop: (B, B) int64, 0 <= start, stop <= number of
    negatives of the row; stop <= start is an empty range.
    """

    positive: Tensor
    order: Tensor
    start: Tensor
    stop: Tensor


def all_pairs(labels: Tensor) -> Pairs:
    """Every ordered pair of a batch. labels: (B,) int64.

    An item is kept from being its own positive by its index, not by its similarity: exact copies of an image
    are positives of each other.
    """
    same = labels[:, None] == labels[None, :]
    return Pairs(negative=~same, positive=same.fill_diagonal_(False))


def all_triplets(distance: Tensor, pairs: Pairs) -> TripletRanges:
    """Every triplet of a positive and a negative pair with the same anchor. distance: (B, B), without gradient."""
    order = distance.masked_fill(~pairs.negative, torch.inf).argsort(dim=1)
    num_negatives = pairs.negative.sum(dim=1, keepdim=True)
    return TripletRanges(
        positive=pairs.positive,
        order=order,
        start=torch.zeros_like(order),
        stop=num_negatives.expand_as(order),
    )


def pair_counts(ranges: TripletRanges) -> tuple[Tensor, Tensor]:
    """In how many of the triplets each pair takes part: (B, B) int64 of positive and (B, B) of negative pairs."""
    positive, order, start, stop = ranges
    length = torch.where(positive, stop - start, 0).clamp(min=0)
    # A range adds 1 to all ranks from its start on and takes it away again from its stop on.
    one = (length > 0).long()
    steps = order.new_zeros(len(order), order.shape[1] + 1)
    steps = steps.scatter_add(1, start, one).scatter_add(1, stop, -one)
    by_rank = steps.cumsum(dim=1)[:, :-1]
    return length, torch.zeros_like(order).scatter(1, order, by_rank)


def chosen_pairs(tuples: object, labels: Tensor) -> Pairs:
    """The pairs a loss on pairs works on: those given, or all of the batch. ValueError on anything else."""
    pairs = all_pairs(labels) if tuples is None else tuples
    check_kind(pairs, ("pairs",))
    assert isinstance(pairs, Pairs)
    return pairs


def counts(tuples: Pairs | Triplets | TripletRanges) -> tuple[Tensor, Tensor]:
    """How often each positive and each negative pair counts, bool or int64.

    (B, M) for pairs; (B, B) for ranges of triplets, whose pairs count in every triplet they take part in; (T,) for
    listed triplets.
    """
    if isinstance(tuples, Triplets):
        return tuples.valid, tuples.valid
    return pair_counts(tuples) if isinstance(tuples, TripletRanges) else (tuples.positive, tuples.negative)


def spread(values: Tensor, tuples: Pairs | Triplets | TripletRanges) -> Tensor:
    """What belongs to an anchor, for each of its tuples: (B,) to (T,) for listed triplets, else to (B, 1)."""
    return values.index_select(0, tuples.anchor) if isinstance(tuples, Triplets) else values[:, None]


def check_kind(tuples: object, accepts: tuple[str, ...], references: Tensor | None = None) -> None:
    """Refuse tuples that a loss cannot work with, and references that belong to none. accepts: as the loss says."""
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
