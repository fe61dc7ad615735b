"""Exact ranking by Euclidean distance: one matrix product in chunks, and a second look where float32 cannot tell.

Everything that is asked of a ranking here follows from one matrix of scores, ``q.g - |g|^2 / 2``, larger for nearer
rows, made a few queries at a time. Its float32 rounding depends on where a row happens to lie, so it only finds
candidates: scores closer than the rounding could tell apart (``_rounding``, a worst-case bound) are replaced by
distances summed in float64, and equal distances come in order of index. The answer is that of a full float64 sort and
depends neither on chunks nor on threads, nor on the device.

What a full search costs beyond the product: the neighbours are found through the maxima of groups of columns, one pass
over the scores, and the rank of the nearest relevant row is counted rather than searched for, in one more pass over
those queries only that have none among their neighbours.

Memory beyond the embeddings: 4 M (D + 1) bytes (the gallery, centred) + about 3 x working_bytes, whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydml.ops.progress import report_progress

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Device = str | torch.device

# Bytes of scores at a time.
_WORKING_BYTES = 256 * 2**20
# Of a neighbour: places, scores and columns, on the device and on the host.
_BYTES_A_NEIGHBOUR = 64
# Pairs (query, row) that are looked at one by one at a time, about 200 bytes each.
_MAX_PAIRS = 2**20
# Rows looked at beyond k, so that which one is the k-th needs no second look where they are of one kind, and of more
# the denser they lie: one for so many.
_SLACK = 4
_ROWS_FOR_ONE_MORE = 32
# Columns to a group at most, a power of two; galleries are padded to a multiple of it.
_LARGEST_GROUP = 64
# Bytes of scores that are counted at a time on a CPU, and of pairs that are summed, so that they stay in its cache.
_CACHE_BYTES = 2**21
# Groups for each neighbour asked for: with fewer, many of the nearest rows would share a group.
_GROUPS_PER_NEIGHBOUR = 4
# float32 holds every integer up to here.
_LARGEST_EXACT = 2**24


class RetrievalError(ValueError):
    """Embeddings that cannot be searched: wrong shape, NaN, or fewer rows than neighbours asked for."""


class Ranks(NamedTuple):
    """Where the relevant rows of Q queries stand, by (distance, index).

    first: (Q,) rank of the nearest relevant row, from 1; 0 where no row is relevant.
    hits: (Q, K) whether the nearest, the second nearest ... row is relevant.
    nearest: (Q,) index of the nearest row.
    """

    first: Integers
    hits: NDArray[np.bool_]
    nearest: Integers


def nearest_neighbours(
    queries: Floats,
    gallery: Floats | None = None,
    *,
    k: int,
    device: Device = "cpu",
    working_bytes: int = _WORKING_BYTES,
) -> tuple[Integers, Floats]:
    """The k nearest gallery rows of each query, exact, by squared Euclidean distance.

    On unit vectors the order is that of cosine similarity.

    Args:
        queries: (N, D) float32.
        gallery: (M, D) float32, or None for leave-one-out: the queries search themselves and each loses the row with
            its own index, and only that one: an exact duplicate of a query stays its neighbour, at distance 0.
        k: neighbours for each query, at most M (N - 1 in leave-one-out).
        device: where the scores are computed; the result is the same everywhere.
        working_bytes: bound on the scores at a time. One query is always allowed through, whatever its size.

    Returns:
        indices (N, k) int64 into the gallery and distances (N, k) float32 (squared L2), nearest first; equal
        distances in order of index.

    Raises:
        RetrievalError: arrays that are not 2-D with the same D, NaN or infinity, k < 1 or more than there is.
    """
    _check(queries, gallery, k)
    space = _Points(queries, gallery, torch.device(device))
    indices = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k), dtype=np.float32)
    for chunk in _chunks(space, working_bytes, k):
        indices[chunk.rows], distances[chunk.rows] = chunk.nearest(k, with_distances=True)
    return indices, distances


def ranked_relevant(
    queries: Floats,
    gallery: Floats | None = None,
    *,
    query_labels: Integers,
    gallery_labels: Integers | None = None,
    depth: int,
    own: Integers | None = None,
    device: Device = "cpu",
    working_bytes: int = _WORKING_BYTES,
) -> Iterator[tuple[slice, Ranks]]:
    """The relevance of each query's `depth` nearest rows, and the rank of its nearest relevant one, however far.

    Some queries at a time, with which they are: where classes are large, the hits of all would fill the memory.

    Args:
        queries, gallery, device, working_bytes: as in `nearest_neighbours`.
        query_labels: (N,) and gallery_labels (M,), None in leave-one-out: rows of a query's label are relevant.
        depth: K, at most the rows that a query can find.
        own: (N,) the row of the gallery that each query is itself, and therefore cannot find; None: none (in
            leave-one-out each its own).

    Raises:
        RetrievalError: as `nearest_neighbours`; labels that are not one for each row.
    """
    _check(queries, gallery, depth, own)
    space = _Points(queries, gallery, torch.device(device), own)
    yield from rank_in(space, query_labels, gallery_labels, depth, working_bytes)


class Space(Protocol):
    """Queries and a gallery, and how near they are: what a ranking is made from.

    num_queries; width: columns of the scores, a multiple of 64, the gallery's rows first; num_rows: the gallery's;
    own: (N,) the row that each query is itself, or None; device and dtype of the scores; is_exact: whether scores are
    exact, and then equal scores are ties.
    """

    num_queries: int
    num_rows: int
    width: int
    own: Integers | None
    device: torch.device
    dtype: torch.dtype
    is_exact: bool

    def score(self, rows: slice, out: Tensor) -> NDArray[np.float64]:
        """Fill out (n, width) for these queries, larger for nearer rows and `nothing` for what is none; (n,) how far
        each query's scores may be off."""
        ...

    def settle(self, queries: Integers, columns: Integers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(P,) exact scores and (P,) squared distances of pairs; equal distances have equal scores."""
        ...


def rank_in(
    space: Space, query_labels: Integers, gallery_labels: Integers | None, depth: int, working_bytes: int
) -> Iterator[tuple[slice, Ranks]]:
    """`ranked_relevant` in any space."""
    searched = query_labels if gallery_labels is None else gallery_labels
    if len(query_labels) != space.num_queries or len(searched) != space.num_rows:
        raise RetrievalError(
            f"{len(query_labels)} labels for {space.num_queries} queries and {len(searched)} for {space.num_rows} rows "
            "to search; there must be one for each."
        )
    own = space.own
    if own is not None and (own.shape != (space.num_queries,) or own.min() < 0 or own.max() >= space.num_rows):
        raise RetrievalError(
            f"own: a place among the {space.num_rows} rows to search for each of {space.num_queries} queries is "
            f"wanted, got {own.dtype} of shape {own.shape}."
        )
    members = _Members(searched)
    label_of = np.pad(searched, (0, space.width - space.num_rows))
    for chunk in _chunks(space, working_bytes, depth):
        labels = query_labels[chunk.rows]
        neighbours, _ = chunk.nearest(depth, relevance=_Relevance(labels, label_of))
        hits = searched[neighbours] == labels[:, None]
        first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
        num_own = 0 if space.own is None else searched[space.own[chunk.rows]] == labels
        further = np.flatnonzero((first == 0) & (members.count(labels) > num_own))
        if len(further):
            first[further] = chunk.rank_nearest_of(members.of(labels[further]), further)
        yield chunk.rows, Ranks(first, hits, neighbours[:, 0])


class _Members:
    """The rows of each label, by label."""

    def __init__(self, labels: Integers) -> None:
        self.labels, self.starts, self.counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
        self.order = np.argsort(labels, kind="stable")

    def count(self, labels: Integers) -> Integers:
        """(n,) how many rows have these labels."""
        place = np.minimum(np.searchsorted(self.labels, labels), len(self.labels) - 1)
        return np.where(self.labels[place] == labels, self.counts[place], 0)

    def of(self, labels: Integers) -> tuple[Integers, Integers]:
        """All rows of labels (n,) that have some: (P,) which of the n, ascending, and (P,) the row."""
        place = np.searchsorted(self.labels, labels)
        counts = self.counts[place]
        owner = np.repeat(np.arange(len(labels)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return owner, self.order[np.repeat(self.starts[place], counts) + within]


class _Relevance(NamedTuple):
    """The labels of a chunk's queries and of the columns."""

    labels: Integers
    label_of: Integers

    def __call__(self, queries: Integers, columns: Integers) -> NDArray[np.bool_]:
        return self.label_of[columns] == self.labels[queries]


class _Points:
    """Euclidean space: the gallery on the device in the form that one matrix product scores."""

    dtype = torch.float32

    def __init__(
        self, queries: Floats, gallery: Floats | None, device: torch.device, own: Integers | None = None
    ) -> None:
        self.own = np.arange(len(queries)) if gallery is None else own
        self.queries, self.gallery = queries, queries if gallery is None else gallery
        self.device, self.num_queries = device, len(queries)
        self.num_rows, self.dim = self.gallery.shape
        self.width = padded_width(self.num_rows)
        # Small integers have exact scores, and ties: nothing to look at twice.
        self.is_exact = (
            torch.get_float32_matmul_precision() == "highest"
            and _scores_exactly(self.gallery)
            and (gallery is None or _scores_exactly(queries))
        )
        # Distances do not change when everything is shifted, rounding does: it grows with the length of the vectors.
        centre = np.zeros(self.dim) if self.is_exact else self.gallery.mean(axis=0, dtype=np.float64)
        self.centre = centre.astype(np.float32)
        columns = np.zeros((self.width, self.dim + 1), dtype=np.float32)
        np.subtract(self.gallery, self.centre, out=columns[: self.num_rows, : self.dim])
        squares = np.einsum("md,md->m", columns, columns, dtype=np.float64)
        columns[:, self.dim] = -squares / 2
        columns[self.num_rows :, self.dim] = nothing(self.dtype)
        self.longest = float(np.sqrt(squares.max()))
        self.columns = torch.from_numpy(columns).to(device)

    def score(self, rows: slice, out: Tensor) -> NDArray[np.float64]:
        points = np.ones((rows.stop - rows.start, self.dim + 1), dtype=np.float32)
        np.subtract(self.queries[rows], self.centre, out=points[:, :-1])
        torch.mm(torch.from_numpy(points).to(self.device), self.columns.T, out=out)
        points[:, -1] = 0
        return self._rounding(np.sqrt(np.einsum("nd,nd->n", points, points, dtype=np.float64)))

    def _rounding(self, lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) how far the float32 scores of queries of these lengths may be off.

        A sum of n products in float32 is off by at most 8 sqrt(n) u times the lengths, in whatever order, but for one
        case in 10^13 (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019, theorem 3.1
        with lambda = 8); 16 u more for the shift and the halved squares. What lies below the smallest normal number
        may be lost altogether.
        """
        if self.is_exact:
            return np.zeros(len(lengths))
        unit = np.finfo(np.float32).eps / 2
        inputs = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
        relative = (8 * np.sqrt(self.dim + 1) + 16) * unit + inputs
        lost = (self.dim + 1) * float(np.finfo(np.float32).smallest_normal)
        return relative * self.longest * (lengths + self.longest) + lost

    def settle(self, queries: Integers, columns: Integers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        distances, lengths = np.empty(len(queries)), np.empty(len(queries))
        at_once = max(1, _CACHE_BYTES // (8 * self.dim))
        for start in range(0, len(queries), at_once):
            part = slice(start, start + at_once)
            points = self.queries[queries[part]].astype(np.float64)
            distances[part] = np.square(self.gallery[columns[part]] - points).sum(axis=1)
            lengths[part] = np.square(points - self.centre).sum(axis=1)
        return (lengths - distances) / 2, distances


def padded_width(num_rows: int) -> int:
    """The columns of the scores of so many rows."""
    return num_rows + -num_rows % _LARGEST_GROUP


def nothing(dtype: torch.dtype) -> float:
    """The score of what is no candidate, padding and a query's own row: below any real one, and itself finite."""
    # 2.6e38 that bfloat16 holds too, so that no product rounds it.
    return -1.5 * 2.0**127 if dtype == torch.float32 else torch.iinfo(dtype).min


def _chunks(space: Space, working_bytes: int, depth: int) -> Iterator[_Chunk]:
    bytes_a_query = space.dtype.itemsize * space.width + _BYTES_A_NEIGHBOUR * depth
    num_rows = min(max(1, working_bytes // bytes_a_query), space.num_queries)
    buffer = torch.empty((num_rows, space.width), device=space.device, dtype=space.dtype)
    for start in range(0, space.num_queries, num_rows):
        rows = slice(start, min(start + num_rows, space.num_queries))
        yield _Chunk(space, rows, buffer[: rows.stop - rows.start])
        report_progress("searching", rows.stop, space.num_queries, "queries")


class _Chunk:
    """Some queries and their scores against the whole gallery. rows: which of all queries they are."""

    def __init__(self, space: Space, rows: slice, scores: Tensor) -> None:
        self.space, self.rows, self.scores = space, rows, scores
        self.rounding = space.score(rows, scores)
        if space.own is not None:
            scores.scatter_(1, self._on_device(space.own[rows])[:, None], nothing(space.dtype))

    def nearest(
        self, k: int, *, with_distances: bool = False, relevance: _Relevance | None = None
    ) -> tuple[Integers, NDArray[np.float64]]:
        """The k nearest rows of each query (n, k), in order, and their squared distances (n, k) if asked for.

        relevance: only the nearest row and which of the k places are relevant ones must be right, not which row of a
        kind comes before which: of a thousand neighbours many are nearly as far as the next one.
        """
        group = _group(self.scores.shape[1], k)
        best = self.scores.view(len(self.scores), -1, group).amax(dim=2)
        indices, is_certain = self._first_look(k, best, relevance)
        distances = np.empty((len(indices), k if with_distances else 0))
        if with_distances:
            certain = np.flatnonzero(is_certain)
            pairs = np.repeat(certain, k) + self.rows.start, indices[certain].ravel()
            distances[certain] = self.space.settle(*pairs)[1].reshape(-1, k)
        for owners, columns, scores in self._candidates(k, best, np.flatnonzero(~is_certain)):
            keys, settled = self._keys(owners, columns, scores, relevance, all_exact=with_distances)
            order = np.lexsort((columns, -keys, owners))
            queries, firsts = np.unique(owners[order], return_index=True)
            chosen = order[firsts[:, None] + np.arange(k)]
            indices[queries] = columns[chosen]
            if with_distances:
                distances[queries] = settled[chosen]
        return indices, distances

    def _first_look(self, k: int, best: Tensor, relevance: _Relevance | None) -> tuple[Integers, NDArray[np.bool_]]:
        """The k best columns by score (n, k), in order, and (n,) for which queries rounding and ties cannot matter.

        best: (n, groups) the best score of each group of columns. relevance: as in `nearest`.
        """
        num_queries, num_groups = best.shape
        group = self.scores.shape[1] // num_groups
        num_rows = k + 1 if relevance is None else k + _SLACK + k // _ROWS_FOR_ONE_MORE
        # So many rows cannot lie in more groups.
        places = best.topk(min(num_rows, num_groups), dim=1).indices
        starts = torch.arange(num_queries, device=best.device)[:, None] * num_groups
        inside = self.scores.view(-1, group).index_select(0, (starts + places).flatten()).view(num_queries, -1)
        scores, offsets = inside.topk(min(num_rows, inside.shape[1]), dim=1)
        columns = (places.gather(1, offsets // group) * group + offsets % group).cpu().numpy()
        margin = self._margin(slice(None))
        is_clear = (scores[:, :-1] - scores[:, 1:] > margin).cpu().numpy()
        if relevance is not None:
            hits = relevance(np.arange(num_queries)[:, None], columns)
            is_clear[:, 1:] |= hits[:, 1:-1] == hits[:, 2:]
        # What is not looked at is not above the last one.
        if scores.shape[1] > k:
            is_clear = is_clear & (scores[:, k - 1 : k] - scores[:, -1:] > margin).cpu().numpy()
        return columns[:, :k], np.logical_and.reduce(is_clear, axis=1)

    def _candidates(self, k: int, best: Tensor, queries: Integers) -> Iterator[tuple[Integers, Integers, NDArray[Any]]]:
        """(query of the chunk, column, score) of every row that may be among the k nearest of these, by blocks."""
        if not len(queries):
            return
        group = self.scores.shape[1] // best.shape[1]
        rows = self._on_device(queries)
        best = best[rows]
        # k groups hold a score this high, so k rows do; rounding may hide a nearer one a little below.
        bound = best.topk(k, dim=1).values[:, -1:] - self._margin(queries)
        wanted = best >= bound
        for block in _blocks(_count(wanted).cpu().numpy() * group):
            owner, place = torch.nonzero(wanted[block], as_tuple=True)
            wanted_groups = rows[block].index_select(0, owner) * best.shape[1] + place
            scores = self.scores.view(-1, group).index_select(0, wanted_groups)
            # In galleries of a few groups the k-th best group may hold no row at all.
            is_row = scores > nothing(self.space.dtype)
            inside, offset = torch.nonzero(is_row & (scores >= bound[block].index_select(0, owner)), as_tuple=True)
            owners = queries[(owner[inside] + block.start).cpu().numpy()]
            columns = place[inside] * group + offset
            yield owners, columns.cpu().numpy(), scores[inside, offset].cpu().numpy()

    def _keys(
        self,
        owners: Integers,
        columns: Integers,
        scores: NDArray[Any],
        relevance: _Relevance | None = None,
        *,
        all_exact: bool = False,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scores that sort as the true ones do, and the squared distances of those looked at twice (elsewhere NaN).

        owners, columns, scores: (P,) pairs. Only those that lie too close to another of the same query are looked at
        twice, or all. relevance: as in `nearest`.
        """
        keys = scores.astype(np.float64)
        distances = np.full(len(keys), np.nan)
        again = np.full(len(keys), all_exact)
        if not (all_exact or self.space.is_exact):
            order = np.lexsort((scores, owners))
            hits = None if relevance is None else relevance(owners[order], columns[order])
            again[order] = _too_close(owners[order], keys[order], 2 * self.rounding[owners[order]], hits)
        if again.any():
            keys[again], distances[again] = self.space.settle(owners[again] + self.rows.start, columns[again])
        return keys, distances

    def rank_nearest_of(self, relevant: tuple[Integers, Integers], queries: Integers) -> Integers:
        """The rank, from 1, of the nearest relevant row of some queries (m,) of the chunk.

        relevant: (P,) place in queries, ascending, and (P,) the row; at least one other than a query's own for each.
        """
        targets = self._nearest_of(*relevant, queries)
        at_once = len(queries)
        if self.scores.device.type == "cpu":
            at_once = max(1, _CACHE_BYTES // (self.scores.element_size() * self.scores.shape[1]))
        starts = range(0, len(queries), at_once)
        parts = [slice(start, start + at_once) for start in starts]
        return np.concatenate([self._ranks_of(targets[part], queries[part]) for part in parts])

    def _ranks_of(self, targets: Integers, queries: Integers) -> Integers:
        """The rank, from 1, of one row (m,) for each of the queries (m,)."""
        scores = self.scores.index_select(0, self._on_device(queries))
        reached = scores.gather(1, self._on_device(targets)[:, None])
        margin = self._margin(queries)
        is_nearer = scores > reached + margin
        nearer = _count(is_nearer).cpu().numpy()
        # The target itself is always close; where others are too, they are looked at twice.
        is_close = (scores >= reached - margin) ^ is_nearer
        close = _count(is_close).cpu().numpy()
        unclear = np.flatnonzero(close > 1)
        if len(unclear):
            unclear_close = is_close.index_select(0, self._on_device(unclear))
            nearer[unclear] += self._num_nearer(unclear_close, queries[unclear], targets[unclear], close[unclear])
        return nearer + 1

    def _nearest_of(self, owners: Integers, columns: Integers, queries: Integers) -> Integers:
        """The nearest of the given rows for each of the queries."""
        chunk_rows = queries[owners]
        scores = self.scores[self._on_device(chunk_rows), self._on_device(columns)].cpu().numpy()
        best = np.maximum.reduceat(scores, np.searchsorted(owners, np.arange(len(queries))))
        near = scores >= best[owners] - 2 * self.rounding[chunk_rows]
        owners, columns = owners[near], columns[near]
        keys, _ = self._keys(chunk_rows[near], columns, scores[near])
        order = np.lexsort((columns, -keys, owners))
        return columns[order[np.searchsorted(owners, np.arange(len(queries)))]]

    def _num_nearer(self, around: Tensor, queries: Integers, targets: Integers, close: Integers) -> Integers:
        """(m,) how many of the rows marked in around (m, width) come before the target, by (distance, index)."""
        before = np.zeros(len(queries), dtype=np.int64)
        reached, _ = self.space.settle(queries + self.rows.start, targets)
        for block in _blocks(close):
            places, columns = (found.cpu().numpy() for found in torch.nonzero(around[block], as_tuple=True))
            places = places + block.start
            keys, _ = self.space.settle(queries[places] + self.rows.start, columns)
            is_before = (keys > reached[places]) | ((keys == reached[places]) & (columns < targets[places]))
            before += np.bincount(places[is_before], minlength=len(queries))
        return before

    def _margin(self, queries: slice | Integers) -> Tensor | int:
        """(m, 1) how much two scores of these queries may be off together, upwards to float32: it must not shrink."""
        if self.space.is_exact:
            return 0
        margin = np.nextafter((2 * self.rounding[queries]).astype(np.float32), np.float32(np.inf))
        return self._on_device(margin)[:, None]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.space.device)


def _too_close(
    owners: Integers, scores: NDArray[np.float64], margins: NDArray[np.float64], hits: NDArray[np.bool_] | None
) -> NDArray[np.bool_]:
    """(P,) which scores lie within their margins of another one of the same owner, where the order of the two matters.

    Sorted by owner and then upwards by score. hits: the order matters between hits and others, and for the best one;
    None: between all.
    """

    def are_close(upper: Integers, lower: Integers) -> NDArray[np.bool_]:
        return (owners[upper] == owners[lower]) & (scores[upper] - scores[lower] <= margins[upper])

    places = np.arange(len(owners))
    again = np.zeros(len(owners), dtype=np.bool_)
    if hits is None:
        again[1:] = are_close(places[1:], places[:-1])
        again[:-1] |= again[1:]
        return again
    for kind in (hits, ~hits):
        # Each one of the other kind, against the next of this kind below and above it.
        below = np.maximum.accumulate(np.where(kind, places, -1))
        above = np.minimum.accumulate(np.where(kind, places, len(places))[::-1])[::-1]
        others = np.flatnonzero(~kind & (below >= 0))
        again[others] |= are_close(others, below[others])
        others = np.flatnonzero(~kind & (above < len(places)))
        again[others] |= are_close(above[others], others)
    bests = np.flatnonzero(np.append(owners[1:] != owners[:-1], True))
    rivals = are_close(bests[np.searchsorted(bests, places)], places)
    rivals[bests] = False
    again |= rivals
    again[1:] |= rivals[:-1] & (owners[1:] == owners[:-1]) & np.isin(places[1:], bests)
    return again


def _group(width: int, k: int) -> int:
    """Columns to a group, such that looking for groups and looking into k of them cost about the same."""
    group = _LARGEST_GROUP
    while group > 1 and (group * group * k > width or width // group < _GROUPS_PER_NEIGHBOUR * k):
        group //= 2
    return group


def _blocks(costs: Integers) -> Iterator[slice]:
    """Consecutive places whose costs add up to at most _MAX_PAIRS, or single ones."""
    start, total = 0, 0
    for place, cost in enumerate(costs.tolist()):
        if place > start and total + cost > _MAX_PAIRS:
            yield slice(start, place)
            start, total = place, 0
        total += cost
    if len(costs):
        yield slice(start, len(costs))


def _count(mask: Tensor) -> Tensor:
    """(n, M) truth values -> (n,) how many are true. On a CPU eight bytes are added at a time, 10 times as fast."""
    if mask.device.type != "cpu" or mask.shape[1] % 8 or not mask.is_contiguous():
        return mask.count_nonzero(dim=1)
    words = mask.view(torch.int64)
    num_words = next(number for number in range(255, 0, -1) if words.shape[1] % number == 0)
    lanes = words.view(len(words), -1, num_words).sum(dim=2)  # each byte at most 255: no carry
    return lanes.view(torch.uint8).sum(dim=1)


def _scores_exactly(rows: Floats) -> bool:
    """Whether the scores of these rows are integers, or halves, that float32 holds."""
    largest = float(np.abs(rows).max())
    if largest > 2**12 or 4 * rows.shape[1] * largest**2 > _LARGEST_EXACT:
        return False
    return all(bool((block == np.rint(block)).all()) for block in np.array_split(rows, max(1, len(rows) // 4096)))


def _check(queries: Floats, gallery: Floats | None, k: int, own: Integers | None = None) -> None:
    is_own = gallery is None or own is not None
    gallery = queries if gallery is None else gallery
    for name, rows in (("queries", queries), ("gallery", gallery)):
        if rows.ndim != 2 or rows.dtype != np.float32 or 0 in rows.shape:
            raise RetrievalError(f"{name}: expected float32 rows (N, D), got {rows.dtype} of shape {rows.shape}.")
        # Beyond this a squared distance leaves float32; NaN fails every comparison.
        usable = (rows.max(axis=1) < 1e17) & (rows.min(axis=1) > -1e17)
        if not usable.all():
            raise RetrievalError(
                f"{name}: {int((~usable).sum())} of {len(rows)} embeddings hold NaN, infinity or numbers beyond 1e17, "
                f"the first is row {int(usable.argmin())}. The training diverged: lower the learning rate or clip "
                "the gradient."
            )
    if queries.shape[1] != gallery.shape[1]:
        raise RetrievalError(f"queries have {queries.shape[1]} dimensions, the gallery has {gallery.shape[1]}.")
    available = len(gallery) - is_own
    if not 1 <= k <= available:
        besides = " besides the query itself" if is_own else ""
        raise RetrievalError(
            f"k = {k} neighbours were asked for, but the gallery holds {available} images{besides}; "
            f"use k in 1..{available}."
        )
