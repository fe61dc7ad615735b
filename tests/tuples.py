"""Pairs and triplets of a batch, made and listed by loops."""

import torch
from torch import Tensor

from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs


def every_triplet(labels: Tensor) -> list[tuple[int, int, int]]:
    """All (anchor, positive, negative) of a batch."""
    y, rows = labels.tolist(), range(len(labels))
    return [(a, p, n) for a in rows for p in rows for n in rows if a != p and y[a] == y[p] != y[n]]


def as_triplets(rows: list[tuple[int, int, int]]) -> Triplets:
    anchor, positive, negative = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).T
    return Triplets(anchor, positive, negative, torch.ones_like(anchor, dtype=torch.bool))


def some_pairs(labels: Tensor, share: float) -> Pairs:
    """About this share of all pairs, at random."""
    generator = torch.Generator().manual_seed(0)
    return Pairs(*(mask & (torch.rand(mask.shape, generator=generator) < share) for mask in all_pairs(labels)))


def random_ranges(points: Tensor, labels: Tensor, seed: int = 0) -> TripletRanges:
    """Some positives, each with a range of its anchor's negatives at random, empty and backward ones among them."""
    generator = torch.Generator().manual_seed(seed)
    size = len(labels)
    positive, order = torch.zeros(size, size, dtype=torch.bool), torch.zeros(size, size, dtype=torch.int64)
    start, stop = torch.zeros_like(order), torch.zeros_like(order)
    for a in range(size):
        negatives = [n for n in range(size) if labels[n] != labels[a]]
        negatives.sort(key=lambda n, a=a: (points[a] - points[n]).norm().item())
        # Behind the negatives comes what is nearest of all, the anchor itself included.
        order[a] = torch.tensor([*negatives, *(i for i in range(size) if labels[i] == labels[a])])
        for p in range(size):
            positive[a, p] = p != a and labels[p] == labels[a] and torch.rand(1, generator=generator).item() < 0.8
            start[a, p], stop[a, p] = torch.randint(len(negatives) + 1, (2,), generator=generator)
    return TripletRanges(positive, order, start, stop)


def listed(tuples: Triplets | TripletRanges) -> list[tuple[int, int, int]]:
    """The valid triplets, or those of the ranges, one by one."""
    if isinstance(tuples, Triplets):
        return [(a, p, n) for a, p, n, valid in zip(*(c.tolist() for c in tuples), strict=True) if valid]
    positive, order, start, stop = (column.tolist() for column in tuples)
    size = range(len(positive))
    return [(a, p, order[a][r]) for a in size for p in size if positive[a][p] for r in range(start[a][p], stop[a][p])]


def where(mask: Tensor) -> set[tuple[int, int]]:
    """The (row, column) of each true entry."""
    return {(i, j) for i, j in mask.nonzero().tolist()}


def empty_kinds(size: int) -> dict[str, Pairs | Triplets | TripletRanges]:
    """Tuples of each kind, of which none counts; the positives of the ranges have empty ranges."""
    none, rows, order = (torch.zeros(size, size).bool(), torch.zeros(size).long(), torch.arange(size).repeat(size, 1))
    return {
        "pairs": Pairs(none, none),
        "triplets": Triplets(rows, rows, rows, rows.bool()),
        "triplet_ranges": TripletRanges(~none, order, order * 0, order * 0),
    }
