"""Exact ranking of a gallery for each query, in order of (distance, index): one matrix product in chunks of queries.

Fast scores find the candidates. Exact distances decide the order of rows whose scores are too close (see nearness.py).
The result is that of a full float64 sort, for any chunks, any number of threads and any device.

Beyond the product a search costs one pass over the scores, which finds the neighbours through the maxima of groups of
columns. The rank of the nearest relevant row is counted in another pass, only for queries without a relevant row among
their neighbours.

Where very many rows are nearly as near as others, the distances of single pairs would take hours. Such queries are
scored again in float64, which orders nearly all rows.

Memory beyond the embeddings: 4 M (D + 1) bytes for the centred gallery, and about 4 x working_bytes for any N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydml.evaluation.nearness import (
    HIDDEN_SCORE,
    MASKED_SCORE,
    Codes,
    EuclideanNearness,
    Floats,
    HammingNearness,
    Integers,
    Nearness,
    check_num_neighbours,
    check_search,
)
from raydml.ops.clustering import faiss_threads
from raydml.ops.progress import report_progress

Device = str | torch.device

# Bytes of scores at a time.
WORKING_BYTES = 256 * 2**20
# Scores examined at a time: on a CPU they fit its cache. At worst each becomes a pair of 200 bytes.
_SCORES_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
# Queries that are scored again at a time: the gallery is converted for each time.
_FINE_AT_ONCE = 256


class Ranks(NamedTuple):
    """The ranks of the relevant rows for Q queries, by (distance, index).

    first: (Q,) rank of the nearest relevant row, from 1; 0 if no row is relevant.
    hits: (Q, K) whether the nearest, the second nearest ... row is relevant.
    nearest: (Q,) index of the nearest row.
    """

    first: Integers
    hits: NDArray[np.bool_]
    nearest: Integers


class HiddenRows:
    """Gallery rows that a query cannot find: those with its own code, the query itself among them if it is there.

    query_codes: (Q,), gallery_codes: (M,) integers. A hidden row is never relevant, and no other row ranks behind one.
    """

    def __init__(self, query_codes: Integers, gallery_codes: Integers) -> None:
        self._of_query, self._of_row = query_codes, gallery_codes
        self._by_code = np.argsort(gallery_codes, kind="stable")
        counts = np.unique(gallery_codes, return_counts=True)[1]
        self.most = int(counts.max(initial=0))

    def pairs(self, queries: Integers) -> tuple[Integers, Integers]:
        """All hidden rows of some queries (n,): (P,) the place in queries, ascending, and (P,) the row."""
        return _rows_of(self._of_query[queries], self._of_row, self._by_code)

    def contains(self, queries: Integers, rows: Integers) -> NDArray[np.bool_]:
        """Whether rows are hidden from queries; both of one shape, or of shapes that broadcast."""
        return np.asarray(self._of_row[rows] == self._of_query[queries])


def nearest_neighbours(
    queries: Floats,
    gallery: Floats | None = None,
    *,
    k: int,
    device: Device = "cpu",
    working_bytes: int = WORKING_BYTES,
) -> tuple[Integers, Floats]:
    """Find the k nearest gallery rows of each query, exactly, by squared Euclidean distance.

    On unit vectors the order is that of cosine similarity.

    Args:
        queries: (N, D) float32.
        gallery: (M, D) float32, or None for leave-one-out: the queries search one another, and each loses only the row
            with its own index. An exact duplicate of a query stays its neighbour, at distance 0.
        k: neighbours for each query, at most M (N - 1 in leave-one-out).
        device: where the scores are computed; the result is the same on every device.
        working_bytes: bound on the scores at a time. At least one query is scored at a time.

    Returns:
        indices (N, k) int64 into the gallery and distances (N, k) float32 (squared L2), nearest first; equal
        distances in order of index.

    Raises:
        RetrievalError: NaN or infinity, k < 1 or more than there are rows.
    """
    check_search(queries, gallery, k)
    nearness = EuclideanNearness(queries, gallery, torch.device(device))
    indices = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k), dtype=np.float32)
    for chunk in _chunks(nearness, working_bytes, k):
        found = indices[chunk.rows] = chunk.nearest(k)
        numbers = np.repeat(np.arange(chunk.rows.start, chunk.rows.stop), k)
        distances[chunk.rows] = nearness.settle(numbers, found.ravel()).reshape(-1, k)
    return indices, distances


def ranked_relevant(
    queries: Floats,
    gallery: Floats | None = None,
    *,
    query_labels: Integers,
    gallery_labels: Integers | None = None,
    depth: int,
    own: Integers | None = None,
    hidden: HiddenRows | None = None,
    device: Device = "cpu",
    working_bytes: int = WORKING_BYTES,
) -> Iterator[tuple[slice, Ranks]]:
    """Yield the relevance of each query's `depth` nearest rows, and the rank of its nearest relevant row at any depth.

    Each item is a slice of the queries and their ranks: with large classes the hits of all queries fill the memory.

    Args:
        queries, gallery, device, working_bytes: as in `nearest_neighbours`.
        query_labels: (N,). gallery_labels: (M,), None in leave-one-out. Rows with a query's label are relevant.
        depth: K, at most the number of rows that a query can find.
        own: (N,) the gallery row that is the query itself, and that it therefore cannot find; None if there is none.
            In leave-one-out it is the query's own index.
        hidden: further rows that queries cannot find. Behind the rows that a query finds, its hits are false.

    Raises:
        RetrievalError: as `nearest_neighbours`.
    """
    check_search(queries, gallery, depth, own)
    nearness = EuclideanNearness(queries, gallery, torch.device(device), own)
    yield from ranks_by(nearness, query_labels, gallery_labels, depth, working_bytes, hidden)


def ranked_relevant_codes(
    queries: Codes,
    gallery: Codes | None = None,
    *,
    query_labels: Integers,
    gallery_labels: Integers | None = None,
    depth: int,
    own: Integers | None = None,
    hidden: HiddenRows | None = None,
    working_bytes: int = WORKING_BYTES,
) -> Iterator[tuple[slice, Ranks]]:
    """Yield what `ranked_relevant` yields, by Hamming distance, on the CPU with as many threads as torch.

    queries: (N, bytes), gallery: (M, bytes) or None for leave-one-out, of `binary_codes`; the rest as there. Distances
    are small integers, so many neighbours tie. Equal distances are in order of index in the gallery, as everywhere in
    raydml; published numbers of code that orders ties at random may differ.

    Raises RetrievalError: more bits than 32-bit scores hold, and as `ranked_relevant`.
    """
    nearness = HammingNearness(queries, gallery, own)
    check_num_neighbours(depth, nearness.num_rows, is_own=nearness.own is not None)
    with faiss_threads():
        yield from ranks_by(nearness, query_labels, gallery_labels, depth, working_bytes, hidden)


def ranks_by(
    nearness: Nearness,
    query_labels: Integers,
    gallery_labels: Integers | None,
    depth: int,
    working_bytes: int,
    hidden: HiddenRows | None = None,
) -> Iterator[tuple[slice, Ranks]]:
    """Yield what `ranked_relevant` yields, for any nearness."""
    searched = query_labels if gallery_labels is None else gallery_labels
    own = nearness.own
    assert (len(query_labels), len(searched)) == (nearness.num_queries, nearness.num_rows)
    assert own is None or (own.shape == query_labels.shape and own.min() >= 0 and own.max() < nearness.num_rows)
    by_label = np.argsort(searched, kind="stable")
    column_labels = np.pad(searched, (0, nearness.width - nearness.num_rows))
    for chunk in _chunks(nearness, working_bytes, depth, query_labels, column_labels, hidden):
        ranks = Ranks(
            first=np.zeros(len(chunk.numbers), dtype=np.int64),
            hits=np.zeros((len(chunk.numbers), depth), dtype=bool),
            nearest=np.zeros(len(chunk.numbers), dtype=np.int64),
        )
        for owners, finest, places, neighbours in chunk.search(depth):
            ranks.first[owners], ranks.hits[owners] = _relevant(finest, places, neighbours, searched, by_label)
            ranks.nearest[owners] = neighbours[:, 0]
        yield chunk.rows, ranks


def _relevant(
    chunk: _Chunk, places: Integers, neighbours: Integers, searched: Integers, by_label: Integers
) -> tuple[Integers, NDArray[np.bool_]]:
    """Return `Ranks.first` and `Ranks.hits` of some queries of a chunk, whose nearest rows are known."""
    assert chunk.labels is not None
    labels = chunk.labels[places]
    hits = searched[neighbours] == labels[:, None]
    numbers, hidden = chunk.numbers[places], chunk.hidden
    if hidden is not None:
        hits &= ~hidden.contains(numbers[:, None], neighbours)
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)
    further = np.flatnonzero(first == 0)
    owners, rows = _rows_of(labels[further], searched, by_label)
    owners = further[owners]
    if hidden is not None:
        is_found = ~hidden.contains(numbers[owners], rows)
        owners, rows = owners[is_found], rows[is_found]
    elif chunk.nearness.own is not None:
        own = chunk.nearness.own[numbers]
        owners, rows = (array[own[owners] != rows] for array in (owners, rows))
    if len(owners):
        first[np.unique(owners)] = chunk.rank_of_nearest(places[owners], rows)
    return first, hits


def _rows_of(labels: Integers, row_labels: Integers, by_label: Integers) -> tuple[Integers, Integers]:
    """All rows of labels (n,): (P,) the place in labels, ascending, and (P,) the row. by_label sorts the rows."""
    starts = np.searchsorted(row_labels, labels, "left", sorter=by_label)
    counts = np.searchsorted(row_labels, labels, "right", sorter=by_label) - starts
    places = np.repeat(np.arange(len(labels)), counts)
    within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places, by_label[starts[places] + within]


def _chunks(
    nearness: Nearness,
    working_bytes: int,
    depth: int,
    query_labels: Integers | None = None,
    column_labels: Integers | None = None,
    hidden: HiddenRows | None = None,
) -> Iterator[_Chunk]:
    bytes_per_query = nearness.dtype.itemsize * nearness.width + 64 * depth
    num_rows = min(max(1, working_bytes // bytes_per_query), nearness.num_queries)
    buffer = torch.empty((num_rows, nearness.width), device=nearness.device, dtype=nearness.dtype)
    for start in range(0, nearness.num_queries, num_rows):
        numbers = np.arange(start, min(start + num_rows, nearness.num_queries))
        labels = None if query_labels is None else query_labels[numbers]
        yield _Chunk(nearness, numbers, buffer[: len(numbers)], labels, column_labels, hidden)
        report_progress("searching", start + len(numbers), nearness.num_queries, "queries")


class _Chunk:
    """Some queries and their scores against the whole gallery.

    numbers: (n,) of the queries, ascending. scores: (n, width). margin: (n, 1), see `Nearness.score`. labels: (n,) of
    the queries; column_labels: (width,). With labels only the nearest row and the ranks of relevant rows have to be
    exact, without them the order of all rows. An owner is a query's place in the chunk (0..n-1), a column is a gallery
    row.
    """

    def __init__(
        self,
        nearness: Nearness,
        numbers: Integers,
        scores: Tensor,
        labels: Integers | None,
        column_labels: Integers | None,
        hidden: HiddenRows | None = None,
    ) -> None:
        self.nearness, self.numbers, self.scores = nearness, numbers, scores
        self.labels, self.column_labels, self.hidden = labels, column_labels, hidden
        self.most_hidden = 1 if hidden is None else hidden.most
        self.margin = nearness.score(numbers, scores)
        self.margins = self.margin.cpu().numpy()
        if nearness.own is not None:
            scores.scatter_(1, self._on_device(nearness.own[numbers])[:, None], MASKED_SCORE[nearness.dtype])
        if hidden is not None:
            places, rows = hidden.pairs(numbers)
            scores[self._on_device(places), self._on_device(rows)] = HIDDEN_SCORE[nearness.dtype]

    @property
    def rows(self) -> slice:
        """The queries, which follow one another."""
        return slice(int(self.numbers[0]), int(self.numbers[-1]) + 1)

    def _finer(self, owners: Integers) -> Iterator[tuple[slice, _Chunk]]:
        """Score some queries again, by finer scores. Yields which of the owners they are, and their chunk."""
        if not len(owners):
            return
        nearness = self.nearness.finer()
        assert nearness is not None
        # At most as many bytes as the scores of this chunk.
        at_once = max(1, min(len(owners), _FINE_AT_ONCE, len(self.scores) // 2))
        buffer = torch.empty((at_once, nearness.width), device=nearness.device, dtype=nearness.dtype)
        for start in range(0, len(owners), at_once):
            part = slice(start, min(start + at_once, len(owners)))
            chosen = owners[part]
            labels = None if self.labels is None else self.labels[chosen]
            numbers, scores = self.numbers[chosen], buffer[: len(chosen)]
            yield part, _Chunk(nearness, numbers, scores, labels, self.column_labels, self.hidden)

    def nearest(self, k: int) -> Integers:
        """Return the k nearest rows of each query (n, k), in order."""
        indices = np.empty((len(self.numbers), k), dtype=np.int64)
        for owners, _, _, neighbours in self.search(k):
            indices[owners] = neighbours
        return indices

    def search(self, k: int) -> Iterator[tuple[Integers, _Chunk, Integers, Integers]]:
        """Find the k nearest rows of each query.

        Yields some queries at a time: (m,) the owners, ascending; this chunk, or another one with finer scores of them;
        (m,) their places in that chunk; (m, k) the nearest rows, in order.
        """
        indices, crowded = self._nearest(k)
        for part, chunk in self._finer(crowded):
            yield crowded[part], chunk, np.arange(part.stop - part.start), chunk._nearest(k)[0]
        others = np.setdiff1d(np.arange(len(self.numbers)), crowded)
        if len(others):
            yield others, self, others, indices[others]

    def _nearest(self, k: int) -> tuple[Integers, Integers]:
        """The k nearest rows of each query (n, k), in order, and the owners that need finer scores for it."""
        # A few more than k, because the order of rows near the k-th is not certain.
        columns, scores = self._best(k + k // 32 + 4)
        bounds = scores[:, k - 1 : k] - self.margins
        is_near = scores >= bounds
        is_close = (scores[:, :-1] <= scores[:, 1:] + self.margins) & is_near[:, 1:]
        hits = self._hits(np.arange(len(columns))[:, None], columns)
        if hits is not None:
            is_close[:, 1:] &= hits[:, 1:-1] != hits[:, 2:]
        # If the last row of the list is near, rows outside the list may be near too.
        is_open = is_near[:, -1] & (scores.shape[1] < self.scores.shape[1])
        indices = columns[:, :k].copy()
        for part in self._parts(np.flatnonzero(is_close.any(axis=1) & ~is_open)):
            near = is_near[part]
            owners = part[np.nonzero(near)[0]]
            indices[part] = self._first(k, owners, columns[part][near], scores[part][near])
        crowded = []
        for part in self._parts(np.flatnonzero(is_open)):
            whole = self.scores.index_select(0, self._on_device(part))
            # Of identical rows only the first k can be among the k nearest, besides those that the query cannot find.
            could_be = self.nearness.copy_numbers < k + self.most_hidden
            mask = (whole >= self._on_device(bounds[part])) & could_be
            if self._is_too_much(int(mask.sum()), len(part), k):
                crowded.append(part)
                continue
            places, found = (array.cpu().numpy() for array in torch.nonzero(mask, as_tuple=True))
            indices[part] = self._first(k, *self._by_score(part[places], found))
        return indices, np.concatenate([*crowded, np.empty(0, dtype=np.int64)])

    def rank_of_nearest(self, owners: Integers, columns: Integers) -> Integers:
        """Return the rank, from 1, of the nearest of the given rows for each owner (m,). owners: (P,) ascending."""
        queries = np.unique(owners)
        targets = self._first(1, *self._by_score(owners, columns))[:, 0]
        ranks = np.zeros(len(queries), dtype=np.int64)
        for part in self._parts(np.arange(len(queries))):
            ranks[part] = self._ranks(queries[part], targets[part])
        crowded = np.flatnonzero(ranks == 0)
        for place, chunk in self._finer(queries[crowded]):
            chosen = crowded[place]
            for part in chunk._parts(np.arange(len(chosen))):
                ranks[chosen[part]] = chunk._ranks(part, targets[chosen[part]])
        return ranks

    def _is_too_much(self, num_pairs: int, num_queries: int, k: int) -> bool:
        """Return whether finer scores cost less than the exact distances of so many pairs of these queries."""
        is_too_much = num_pairs > num_queries * (8 * k + self.scores.shape[1] // 64)
        return is_too_much and self.nearness.finer() is not None

    def _best(self, num_columns: int) -> tuple[Integers, NDArray[Any]]:
        """The columns with the highest scores (n, K), in order, and these scores; K is at most num_columns."""
        num_queries, width = self.scores.shape
        # The K highest scores are in the K groups of columns with the highest maxima. With this group size the search
        # for the groups and the search inside them cost about the same.
        group = 2 ** min(6, int(math.log2(max(1, width / num_columns)) / 2))
        if group == 1:
            scores, columns = self.scores.topk(min(num_columns, width), dim=1)
            return columns.cpu().numpy(), scores.cpu().numpy()
        groups = self.scores.view(num_queries, -1, group)
        maxima = groups.amax(dim=2)
        places = maxima.topk(min(num_columns, maxima.shape[1]), dim=1).indices
        inside = groups.gather(1, places[:, :, None].expand(-1, -1, group)).view(num_queries, -1)
        scores, offsets = inside.topk(min(num_columns, inside.shape[1]), dim=1)
        columns = places.gather(1, offsets // group) * group + offsets % group
        return columns.cpu().numpy(), scores.cpu().numpy()

    def _by_score(self, owners: Integers, columns: Integers) -> tuple[Integers, Integers, NDArray[Any]]:
        """Pairs (P,) of owners, ascending, and columns, sorted by owner and falling score, and their scores."""
        scores = self.scores[self._on_device(owners), self._on_device(columns)].cpu().numpy()
        order = np.lexsort((-scores, owners))
        return owners, columns[order], scores[order]

    def _first(self, k: int, owners: Integers, columns: Integers, scores: NDArray[Any]) -> Integers:
        """The k nearest of the given rows for each owner (m, k), in order.

        owners, columns, scores: (P,) sorted by owner, with at least k rows each, and falling score. A run is a sequence
        of scores each of which is too close to the next one. Runs are in the right order; exact distances order the
        rows of a run, where their order matters.
        """
        begins_owner = np.diff(owners, prepend=-1) > 0
        begins_run = begins_owner.copy()
        begins_run[1:] |= scores[:-1] > scores[1:] + self.margins[owners[1:], 0]
        runs = np.cumsum(begins_run) - 1
        sizes = np.bincount(runs)
        is_unclear = sizes > 1
        hits = self._hits(owners, columns)
        if hits is not None:
            num_hits = np.bincount(runs, hits)
            is_unclear &= begins_owner[begins_run] | ((num_hits > 0) & (num_hits < sizes))
        pairs = np.flatnonzero(is_unclear[runs])
        distances = self.nearness.settle(self.numbers[owners[pairs]], columns[pairs])
        columns = columns.copy()
        columns[pairs] = columns[pairs][np.lexsort((columns[pairs], distances, runs[pairs]))]
        return columns[np.flatnonzero(begins_owner)[:, None] + np.arange(k)]

    def _ranks(self, queries: Integers, targets: Integers) -> Integers:
        """The rank, from 1, of one row (m,) for each of some queries (m,) of the chunk; 0 where too many are close."""
        rows = self._on_device(queries)
        scores, margin = self.scores.index_select(0, rows), self.margin.index_select(0, rows)
        reached = scores.gather(1, self._on_device(targets)[:, None])
        is_nearer = scores > reached + margin
        ranks = _count(is_nearer) + 1
        is_close = (scores >= reached - margin) ^ is_nearer
        num_close = _count(is_close)
        if num_close.sum() > 8 * len(queries) + self.scores.shape[1]:
            # Of rows that are identical to the target, which are all close, those with a lower index come before it.
            firsts = self.nearness.first_copies
            of_target = firsts[self._on_device(targets)]
            is_close &= firsts != of_target[:, None]
            ranks += self.nearness.copy_numbers[self._on_device(targets)].cpu().numpy()
            if self.hidden is not None:
                owners, hidden = self.hidden.pairs(self.numbers[queries])
                is_copy = (firsts[self._on_device(hidden)] == of_target[self._on_device(owners)]).cpu().numpy()
                is_before = is_copy & (hidden < targets[owners])
                ranks -= np.bincount(owners[is_before], minlength=len(queries))
            elif self.nearness.own is not None:
                own = self.nearness.own[self.numbers[queries]]
                ranks -= (firsts[self._on_device(own)] == of_target).cpu().numpy() & (own < targets)
            num_close = _count(is_close) + 1
        if self._is_too_much(int(num_close.sum()), len(queries), 1):
            return np.zeros(len(queries), dtype=np.int64)
        unclear = np.flatnonzero(num_close > 1)  # the target itself is always close
        if len(unclear):
            close = torch.nonzero(is_close[self._on_device(unclear)], as_tuple=True)
            places, columns = (array.cpu().numpy() for array in close)
            numbers, targets = self.numbers[queries[unclear]], targets[unclear]
            distances = self.nearness.settle(numbers[places], columns)
            to_target = self.nearness.settle(numbers, targets)[places]
            is_before = (distances < to_target) | ((distances == to_target) & (columns < targets[places]))
            ranks[unclear] += np.bincount(places[is_before], minlength=len(unclear))
        return ranks

    def _hits(self, owners: Integers, columns: Integers) -> NDArray[np.bool_] | None:
        """Whether rows are relevant; None without labels."""
        if self.labels is None or self.column_labels is None:
            return None
        return self.column_labels[columns] == self.labels[owners]

    def _parts(self, owners: Integers) -> list[Integers]:
        """Split the owners into parts whose scores are examined at once."""
        at_once = max(1, _SCORES_AT_ONCE.get(self.scores.device.type, 2**20) // self.scores.shape[1])
        return [owners[start : start + at_once] for start in range(0, len(owners), at_once)]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.nearness.device)


def _count(mask: Tensor) -> Integers:
    """Count the true values in each row of (n, M). On a CPU the sum of torch takes 10 times as long."""
    if mask.device.type != "cpu":
        return mask.sum(dim=1).cpu().numpy()
    return np.array([np.count_nonzero(row) for row in mask.numpy()], dtype=np.int64)
