"""Exact nearest neighbours with faiss, in chunks, with ties decided by a rule rather than by luck.

faiss computes float32 distances through a matrix product, whose rounding depends on where a row happens to lie. It
is used here to find candidates; their distances are then computed again as sums of squared differences in float64 and
sorted by (distance, index). Where the last place is closer than the rounding could tell apart (ties), every row within
that margin is fetched before the sort. The result is the one that a full float64 sort gives, and does not depend on the
chunk size or the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Extra candidates, so that ordinary rounding at the last place needs no second look.
_SLACK = 8
# Bytes of working memory beside the embeddings and the result.
_WORKING_BYTES = 256 * 2**20


class RetrievalError(ValueError):
    """Embeddings that cannot be searched: wrong shape, NaN, or fewer rows than neighbours asked for."""


def nearest_neighbours(
    queries: Floats,
    gallery: Floats | None = None,
    *,
    k: int,
    num_threads: int | None = None,
    working_bytes: int = _WORKING_BYTES,
) -> tuple[NDArray[np.int64], Floats]:
    """The k nearest gallery rows of each query, exact, by squared Euclidean distance.

    On unit vectors the order is that of cosine similarity.

    Args:
        queries: (N, D) float32.
        gallery: (M, D) float32, or None for leave-one-out: the queries search themselves and each loses the row with
            its own index, and only that one: an exact duplicate of a query stays its neighbour, at distance 0.
        k: neighbours for each query, at most M (N - 1 in leave-one-out).
        num_threads: threads for faiss; None takes torch's (`torch.get_num_threads()`), which a trial has set to its
            share of the machine. faiss's own setting is put back afterwards.
        working_bytes: bound on temporary memory, apart from one centred copy of the gallery. One query is always
            allowed through, whatever its size.

    Returns:
        indices (N, k) int64 into the gallery and distances (N, k) float32 (squared L2), nearest first; equal
        distances in order of index.

    Raises:
        RetrievalError: arrays that are not 2-D with the same D, NaN or infinity, k < 1 or more than there is.
    """
    leave_one_out = gallery is None
    gallery = queries if gallery is None else gallery
    _check(queries, gallery, k, leave_one_out)
    indices = np.empty((len(queries), k), dtype=np.int64)
    distances = np.empty((len(queries), k), dtype=np.float32)
    num_candidates = min(k + leave_one_out + _SLACK, len(gallery))
    chunk = max(1, working_bytes // (num_candidates * (2 * 8 * queries.shape[1] + 64)))
    with _faiss_threads(torch.get_num_threads() if num_threads is None else num_threads):
        search = _Gallery(gallery)
        for start in range(0, len(queries), chunk):
            rows = slice(start, min(start + chunk, len(queries)))
            own = np.arange(rows.start, rows.stop) if leave_one_out else np.full(rows.stop - rows.start, -1)
            indices[rows], distances[rows] = search.nearest(queries[rows], own, k, num_candidates)
    return indices, distances


def binary_codes(embeddings: Floats) -> Floats:
    """Embeddings (N, D) -> their bits (N, D) as float32: 1 where a coordinate is above 0, else 0 (at 0 itself, too).

    The squared distance of two rows is their Hamming distance, a small integer and so exact: `nearest_neighbours` of
    codes is Hamming search. Codes tie often, and equal distances come in order of index there.

    Source: Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019. Their release leaves
    ties in whatever order faiss returns them, so that its numbers may differ from ours by what ties decide.

    Raises RetrievalError for NaN, which has no sign.
    """
    if np.isnan(embeddings).any():
        raise RetrievalError("embeddings hold NaN, which has no sign: there are no binary codes of them.")
    return (embeddings > 0).astype(np.float32)


class _Gallery:
    """A faiss index over centred rows, beside the rows themselves."""

    def __init__(self, rows: Floats) -> None:
        import faiss  # training alone does without

        self.rows = rows
        # Distances do not change when everything is shifted, rounding does: it grows with the length of the vectors.
        self.centre = rows.mean(axis=0, dtype=np.float64)
        shifted = self._shift(rows)
        self.index = faiss.IndexFlatL2(rows.shape[1])
        self.index.add(shifted)
        self.longest = float(np.einsum("md,md->m", shifted, shifted).max())

    def nearest(
        self, queries: Floats, own: NDArray[np.int64], k: int, num_candidates: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Candidates, exact distances, sort; queries whose last place is not certain are done again with all ties.

        `own` (n,) is the row that each query loses, -1 for none.
        """
        shifted = self._shift(queries)
        rough, candidates = self.index.search(shifted, num_candidates)
        exact = _squared_distances(queries, self.rows[candidates])
        exact[candidates == own[:, None]] = np.inf
        order = np.lexsort((candidates, exact), axis=1)[:, :k]  # lexsort takes its main key last
        indices = np.take_along_axis(candidates, order, axis=1)
        distances = np.take_along_axis(exact, order, axis=1)
        if num_candidates < len(self.rows):
            margin = self._rounding_margin(shifted)
            # A row left outside is at least as far as the last candidate, give or take what float32 can lose.
            for row in np.flatnonzero(distances[:, -1] >= rough[:, -1] - margin):
                radius = np.nextafter(np.float32(distances[row, -1] + 2 * margin[row]), np.float32(np.inf))
                within = self._all_within(shifted[row], float(radius), queries[row], int(own[row]))
                indices[row], distances[row] = within[0][:k], within[1][:k]
        return indices, distances

    def _all_within(
        self, shifted: Floats, radius: float, query: Floats, own: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """All rows within `radius` (squared, as faiss rounds it) of one query, by exact (distance, index)."""
        _, _, members = self.index.range_search(shifted[None], radius)
        members = members[members != own]
        at_once = max(1, _WORKING_BYTES // (2 * 8 * len(query)))
        blocks = [self.rows[members[start : start + at_once]] for start in range(0, len(members), at_once)]
        exact = np.concatenate([_squared_distances(query[None], block[None])[0] for block in blocks])
        order = np.lexsort((members, exact))
        return members[order], exact[order]

    def _shift(self, rows: Floats) -> Floats:
        return (rows - self.centre).astype(np.float32)

    def _rounding_margin(self, shifted: Floats) -> NDArray[np.float64]:
        """(n,) how far faiss's float32 squared distances may be off: grows with the lengths and with sqrt(D)."""
        lengths = np.einsum("nd,nd->n", shifted, shifted).astype(np.float64)
        return 4 * np.finfo(np.float32).eps * np.sqrt(shifted.shape[1]) * (lengths + self.longest)


def _check(queries: Floats, gallery: Floats, k: int, leave_one_out: bool) -> None:
    for name, rows in (("queries", queries), ("gallery", gallery)):
        if rows.ndim != 2 or rows.dtype != np.float32 or 0 in rows.shape:
            raise RetrievalError(f"{name}: expected float32 rows (N, D), got {rows.dtype} of shape {rows.shape}.")
        # Beyond this a squared distance leaves float32; NaN fails every comparison.
        usable = (np.abs(rows) < 1e17).all(axis=1)
        if not usable.all():
            raise RetrievalError(
                f"{name}: {int((~usable).sum())} of {len(rows)} embeddings hold NaN, infinity or numbers beyond 1e17, "
                f"the first is row {int(usable.argmin())}. The training diverged: lower the learning rate or clip "
                "the gradient."
            )
    if queries.shape[1] != gallery.shape[1]:
        raise RetrievalError(f"queries have {queries.shape[1]} dimensions, the gallery has {gallery.shape[1]}.")
    available = len(gallery) - leave_one_out
    if not 1 <= k <= available:
        own = " besides the query itself" if leave_one_out else ""
        raise RetrievalError(
            f"k = {k} neighbours were asked for, but the gallery holds {available} images{own}; "
            f"use k in 1..{available}."
        )


def _squared_distances(queries: Floats, rows: Floats) -> NDArray[np.float64]:
    """(n, c) squared distances of queries (n, D) to rows (n, c, D), summed in float64 row by row."""
    difference = rows.astype(np.float64)
    difference -= queries[:, None, :]
    np.square(difference, out=difference)
    return difference.sum(axis=2)


@contextmanager
def _faiss_threads(num_threads: int) -> Iterator[None]:
    if num_threads < 1:
        raise RetrievalError(f"num_threads: {num_threads} is not at least 1.")
    import faiss  # training alone does without

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
