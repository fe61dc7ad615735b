"""Second looks at a ranking: k-reciprocal re-ranking of the gallery, and expansion of the queries.

Both use what a plain search does not: the other images. Their numbers are therefore those of another protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.nearness import Floats, Integers, RetrievalError
from raydml.evaluation.pair_distances import Distances, PairDistances, PairMask
from raydml.evaluation.ranking import WORKING_BYTES, Device, Ranks, nearest_neighbours
from raydml.metrics.geometry import unit_rows
from raydml.ops.progress import report_progress

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Re-ranked distances are in [0, 1]. Rounded to so many decimals, those that are equal stay equal in any order of sums.
_DECIMALS = 12


class KReciprocal(NamedTuple):
    """Settings of k-reciprocal re-ranking.

    k1: neighbours among which two images have to find each other. k2: nearest images over which their vectors are
    averaged, the image itself included. original_weight: lambda, the weight of the plain distance.
    """

    k1: int = 20
    k2: int = 6
    original_weight: float = 0.3

    @property
    def name(self) -> str:
        return "k_reciprocal"

    @property
    def sentence(self) -> str:
        return (
            f"re-ranked by k-reciprocal neighbours among all queries and gallery images (k1 = {self.k1}, k2 = "
            f"{self.k2}, lambda = {self.original_weight:g})"
        )

    @property
    def settings(self) -> dict[str, float]:
        """The values by the names that the command line has for them."""
        return {"k1": self.k1, "k2": self.k2, "lambda": self.original_weight}


class QueryExpansion(NamedTuple):
    """Settings of alpha query expansion. n: neighbours that are added to a query. alpha: power of their cosines."""

    n: int = 10
    alpha: float = 3.0

    @property
    def name(self) -> str:
        return "query_expansion"

    @property
    def sentence(self) -> str:
        return f"each query expanded by its {self.n} nearest images (alpha = {self.alpha:g})"

    @property
    def settings(self) -> dict[str, float]:
        """The values by the names that the command line has for them."""
        return {"n": self.n, "alpha": self.alpha}


Rerank = KReciprocal | QueryExpansion


def reranked_relevant(
    queries: Floats,
    gallery: Floats | None = None,
    *,
    query_labels: Integers,
    gallery_labels: Integers | None = None,
    depth: int,
    own: Integers | None = None,
    settings: KReciprocal,
    excluded: PairMask | None = None,
    device: Device = "cpu",
    working_bytes: int = WORKING_BYTES,
) -> Iterator[tuple[slice, Ranks]]:
    """Yield what `ranked_relevant` yields, by k-reciprocal distances, in order of (distance, index).

    The distance of a query and a gallery image is (1 - lambda) Jaccard + lambda d. d is the squared Euclidean distance
    divided by the largest one of the query; Jaccard compares the k-reciprocal neighbours of the two, weighted by
    exp(-d). The neighbours are sought among all images, the queries included, as in the release; an image is its own
    first neighbour. Re-ranked are all gallery images, not only the first ones.

    Args:
        queries, gallery, query_labels, gallery_labels, depth, own: as in `ranked_relevant`.
        excluded: pairs that do not count (of one camera, say): they are ranked last, and never relevant. They are
            neighbours of each other all the same.
        device: where the plain neighbours are found; the rest is computed on the CPU.
        working_bytes: bound on the distances at a time. Beside them the memory is that of the float64 embeddings and of
            the neighbours' weights, some hundred numbers an image; there is no matrix of all pairs.

    Source: Zhong, Zheng, Cao, Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017; with the
    numbers and the order of steps of their release (re_ranking.py). Distances are float64 here, float16 or float32
    there.

    Raises RetrievalError for fewer images than k1 or k2.
    """
    if gallery is None:
        rows, query_nodes, gallery_nodes = queries, np.arange(len(queries)), np.arange(len(queries))
        gallery_labels, own = query_labels, np.arange(len(queries))
    elif own is not None:  # the queries are in the gallery
        rows, query_nodes, gallery_nodes = gallery, own, np.arange(len(gallery))
    else:
        rows = np.concatenate([queries, gallery])
        query_nodes, gallery_nodes = np.arange(len(queries)), np.arange(len(queries), len(rows))
    assert gallery_labels is not None
    finder = _Reciprocal(rows, settings, device)
    # The distances of a query, their ordered copy, the masks, and the product they are made of.
    at_once = max(1, working_bytes // (48 * len(rows)))
    for start in range(0, len(queries), at_once):
        part = slice(start, min(start + at_once, len(queries)))
        distances = finder.distances(query_nodes[part], gallery_nodes)
        relevant = gallery_labels == query_labels[part][:, None]
        numbers = np.arange(part.start, part.stop)
        skipped = np.zeros(relevant.shape, dtype=bool)
        if own is not None:
            skipped[numbers - part.start, own[part]] = True
        if excluded is not None:
            skipped |= excluded(numbers, np.arange(len(gallery_nodes)))
        distances[skipped] = np.inf
        yield part, _ranks_of(distances, relevant & ~skipped, depth)
        report_progress("re-ranking", part.stop, len(queries), "queries")


class _Reciprocal:
    """The k-reciprocal distances of N images; see `reranked_relevant`."""

    def __init__(self, rows: Floats, settings: KReciprocal, device: Device) -> None:
        most = max(settings.k1, settings.k2 - 1)
        if most >= len(rows):
            raise RetrievalError(
                f"k_reciprocal: k1 = {settings.k1} and k2 = {settings.k2} neighbours, but an image has only "
                f"{len(rows) - 1} others. Cure: --rerank k_reciprocal:k1={min(settings.k1, len(rows) - 1)},"
                f"k2={min(settings.k2, len(rows))}, or more images"
            )
        self._original_weight = settings.original_weight
        others, _ = nearest_neighbours(rows, k=most, device=device)
        nearest = np.concatenate([np.arange(len(rows))[:, None], others], axis=1)
        self._pairs = PairDistances(rows)
        self._largest = self._largest_distances(len(rows))
        self._vectors = self._encode(nearest, settings)
        by_column = self._vectors.tocsc()
        self._starts, self._holders, self._weights = by_column.indptr, by_column.indices, by_column.data

    def _largest_distances(self, num_rows: int) -> Distances:
        """The squared distance (N,) of each image to the one that is farthest from it; 1 if all are the same."""
        largest, everyone = np.empty(num_rows), np.arange(num_rows)
        at_once = max(1, WORKING_BYTES // (16 * num_rows))
        for start in range(0, num_rows, at_once):
            part = slice(start, start + at_once)
            largest[part] = self._pairs.block(everyone[part], everyone).max(axis=1)
        return np.where(largest > 0, largest, 1.0)

    def _encode(self, nearest: Integers, settings: KReciprocal) -> csr_array:
        """The weights (N, N) of the k-reciprocal neighbours of each image, sparse; equation 7 and section 3.5."""
        from scipy.sparse import csr_array

        num_rows = len(nearest)
        reciprocal = _mutual(nearest[:, : settings.k1 + 1])
        # Half the neighbours, rounded as in the release; equation 5.
        halves = _mutual(nearest[:, : round(settings.k1 / 2) + 1])
        shared = (reciprocal @ halves.T).multiply(reciprocal).tocoo()
        sizes = halves.sum(axis=1)
        is_joined = 3 * shared.data > 2 * sizes[shared.col]
        places = (shared.row[is_joined], shared.col[is_joined])
        joined = csr_array((np.ones(int(is_joined.sum()), dtype=np.int64), places), shape=(num_rows, num_rows))
        neighbours = (reciprocal + joined @ halves).tocoo()
        owners, columns = (array.astype(np.int64) for array in (neighbours.row, neighbours.col))
        weights = np.exp(-self._pairs.pairs(owners, columns) / self._largest[owners])
        weights /= np.bincount(owners, weights, minlength=num_rows)[owners]
        vectors = csr_array((weights, (owners, columns)), shape=(num_rows, num_rows))
        averaged = _indicator(nearest[:, : settings.k2]) @ vectors
        return csr_array(averaged / settings.k2)

    def distances(self, first: Integers, second: Integers) -> Distances:
        """Return the distances (n, m) of images with these numbers."""
        plain = self._pairs.block(first, second) / self._largest[first][:, None]
        indptr, indices, data = self._vectors.indptr, self._vectors.indices, self._vectors.data
        for place, number in enumerate(first.tolist()):
            held = slice(indptr[number], indptr[number + 1])
            columns = indices[held]
            counts = self._starts[columns + 1] - self._starts[columns]
            of_column = np.repeat(np.arange(len(columns)), counts)
            within = np.arange(len(of_column)) - np.repeat(np.cumsum(counts) - counts, counts)
            entries = self._starts[columns][of_column] + within
            least = np.minimum(data[held][of_column], self._weights[entries])
            shared = np.bincount(self._holders[entries], least, minlength=self._vectors.shape[0])[second]
            jaccard = 1 - shared / (2 - shared)  # each vector has the sum 1
            plain[place] = (1 - self._original_weight) * jaccard + self._original_weight * plain[place]
        return np.round(plain, _DECIMALS, out=plain)


def _indicator(columns: Integers) -> Any:
    """A sparse matrix (N, N) with ones at the columns (N, k) of each row."""
    from scipy.sparse import csr_array

    num_rows, k = columns.shape
    ones, starts = np.ones(columns.size, dtype=np.int64), np.arange(0, columns.size + 1, k)
    return csr_array((ones, np.ravel(columns), starts), shape=(num_rows, num_rows))


def _mutual(neighbours: Integers) -> Any:
    """A sparse matrix (N, N) with ones where two images are among each other's neighbours (N, k)."""
    found = _indicator(neighbours)
    return found.multiply(found.T).tocsr()


def _ranks_of(distances: Distances, relevant: NDArray[np.bool_], depth: int) -> Ranks:
    """The ranks of the relevant rows (n, M) by distances (n, M), which are infinite for rows that do not count."""
    first, nearest = (np.zeros(len(distances), dtype=np.int64) for _ in range(2))
    hits = np.zeros((len(distances), depth), dtype=bool)
    for place, (row, right) in enumerate(zip(distances, relevant, strict=True)):
        found = np.arange(len(row))
        if depth < len(row):
            found = np.flatnonzero(row <= np.partition(row, depth - 1)[depth - 1])
        found = found[np.argsort(row[found], kind="stable")][:depth]
        hits[place], nearest[place] = right[found], found[0]
        if hits[place].any():
            first[place] = hits[place].argmax() + 1
        elif right.any():
            wanted = np.flatnonzero(right)
            target = wanted[row[wanted].argmin()]
            first[place] = (row < row[target]).sum() + (row[:target] == row[target]).sum() + 1
    return Ranks(first, hits, nearest)


def expanded_queries(
    queries: Floats, gallery: Floats, *, own: Integers | None = None, settings: QueryExpansion, device: Device = "cpu"
) -> Floats:
    """Return each query plus its nearest gallery images, weighted by cosine^alpha, scaled to length 1: (Q, D) float32.

    queries: (Q, D), gallery: (M, D), both of `unit_rows`. own: (Q,) the gallery row that is the query itself, which is
    not added; None if there is none. The query itself has the weight 1. A negative cosine weighs nothing.

    Source: Radenovic, Tolias, Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation", PAMI 2018, section 3.4
    (alpha = 3 there); alpha = 0 is the average query expansion of Chum et al. 2007.

    Raises RetrievalError for fewer gallery images than n.
    """
    available = len(gallery) - (own is not None)
    if settings.n > available:
        raise RetrievalError(
            f"query_expansion: n = {settings.n} neighbours, but a query searches only {available} images. Cure: "
            f"--rerank query_expansion:n={available}, or more images"
        )
    found, _ = nearest_neighbours(queries, gallery, k=settings.n + (own is not None), device=device)
    if own is not None:
        # Each query loses itself or, where identical images come before it, the last neighbour.
        is_own = found == own[:, None]
        is_own[~is_own.any(axis=1), -1] = True
        found = found[~is_own].reshape(len(queries), settings.n)
    expanded = queries.astype(np.float64)
    at_once = max(1, WORKING_BYTES // (16 * settings.n * queries.shape[1]))
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        near = gallery[found[part]].astype(np.float64)
        cosines = np.einsum("nkd,nd->nk", near, queries[part].astype(np.float64))
        weights = np.where(cosines > 0, np.maximum(cosines, 0) ** settings.alpha, 0.0)
        expanded[part] += np.einsum("nk,nkd->nd", weights, near)
    return unit_rows(expanded).astype(np.float32)
