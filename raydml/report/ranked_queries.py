"""Every query of a set of images with its nearest neighbours and its own average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.evaluation.protocols import DISTRACTOR, protocols_of, searches
from raydml.evaluation.ranking import nearest_neighbours

# (Query, neighbour) pairs that are looked at together, about 50 bytes each.
_MAX_PAIRS = 2**23


class RankedQueries(NamedTuple):
    """Q queries among N images, and the K nearest images that each of them finds.

    queries: (Q,) row numbers among the N images. neighbours: (Q, K) row numbers among the N images, nearest first, the
    query itself left out. distances: (Q, K) Euclidean. right: (Q, K) whether the neighbour is of the query's class.
    num_relevant: (Q,) R, how many images of its class a query can find. num_right: (Q,) how many of its R nearest are
    right. average_precision: (Q,) AP@R, NaN where R = 0.
    """

    queries: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    distances: NDArray[np.float32]
    right: NDArray[np.bool_]
    num_relevant: NDArray[np.int64]
    num_right: NDArray[np.int64]
    average_precision: NDArray[np.float64]

    @property
    def map_at_r(self) -> float:
        """Mean of the queries that have something to find; NaN where none has."""
        found = self.average_precision[self.num_relevant > 0]
        return float(found.mean()) if len(found) else float("nan")

    @property
    def recall_at_1(self) -> float:
        """Share of the queries whose nearest neighbour is right."""
        return float(self.right[:, 0].mean())


def rank_queries(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None = None,
    *,
    num_neighbours: int = 4,
    device: str = "cpu",
) -> RankedQueries:
    """Search with every query, for its R nearest images and at least num_neighbours, as far as there are.

    Args:
        embeddings: (N, D) float32. labels: (N,), from 0.
        roles: "query" | "gallery" | "distractor" of each image, where the data set has them (protocols.py says what
            they mean); otherwise every image searches all the others.
        num_neighbours: K, of which fewer are kept where there are fewer. device: where distances are computed.

    AP@R is 1/R times the sum, over the right ones among the first R, of the precision there: the mean of it is MAP@R
    (Musgrave, Belongie and Lim, "A Metric Learning Reality Check", 2020, section 3.1). Memory beyond the result is
    bounded, whatever R is.

    Raises ValueError for arrays that do not fit together, ProtocolError for roles that are not whole, RetrievalError
    for embeddings that cannot be searched.
    """
    if len(labels) != len(embeddings) or len(labels) < 2 or (roles is not None and len(roles) != len(labels)):
        told = "" if roles is None else f" and {len(roles)} roles"
        raise ValueError(
            f"{len(embeddings)} embeddings, {len(labels)} labels{told}: the numbers must be equal and at least 2"
        )
    # Distractors are of no class, whatever they are called.
    classes = labels if roles is None else np.where(np.array(roles) == DISTRACTOR, -1, labels)
    search = searches(protocols_of(roles, ())[0], labels, roles)[0]
    gallery = search.queries if search.gallery is None else search.gallery
    is_in_gallery = search.gallery is None or search.own is not None
    num_of_class = np.bincount(classes[gallery][classes[gallery] >= 0], minlength=int(labels.max()) + 1)
    num_relevant = num_of_class[classes[search.queries]] - is_in_gallery
    k = min(max(num_neighbours, int(num_relevant.max())), search.num_found)
    own = np.arange(len(gallery)) if search.gallery is None else search.own
    searched = embeddings if len(search.queries) == len(embeddings) else embeddings[gallery]
    parts = []
    for start in range(0, len(search.queries), step := max(1, _MAX_PAIRS // k)):
        some = slice(start, start + step)
        rows, relevant = search.queries[some], num_relevant[some]
        places, distances = _nearest(embeddings[rows], searched, None if own is None else own[some], k, device)
        neighbours = gallery[places]
        right = classes[neighbours] == classes[rows][:, None]
        within = right & (np.arange(1, k + 1) <= relevant[:, None])
        shown = (neighbours[:, :num_neighbours], distances[:, :num_neighbours], right[:, :num_neighbours])
        parts.append((rows, *shown, relevant, within.sum(axis=1), _average_precision(within, relevant)))
    return RankedQueries(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _nearest(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    own: NDArray[np.int64] | None,
    k: int,
    device: str,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(Q, k) rows of the gallery, nearest first, and Euclidean distances. own: (Q,) the row that is the query itself
    and is left out, or None."""
    rows, squared = nearest_neighbours(queries, gallery, k=k + (own is not None), device=device)
    if own is not None:
        kept = rows != own[:, None]
        kept[kept.all(axis=1), -1] = False  # behind k duplicates of the query
        rows, squared = rows[kept].reshape(-1, k), squared[kept].reshape(-1, k)
    return rows, np.sqrt(squared)


def _average_precision(within: NDArray[np.bool_], num_relevant: NDArray[np.int64]) -> NDArray[np.float64]:
    """within: (Q, K) right ones among the first R."""
    total = (within * (within.cumsum(axis=1) / np.arange(1, within.shape[1] + 1))).sum(axis=1)
    return np.divide(total, num_relevant, out=np.full(len(within), np.nan), where=num_relevant > 0)
