"""Metrics on integer arrays: labels of ranked neighbours, or of images and their clusters, in, one number out.

Nothing here knows distances, embeddings or faiss. A ranked list is a row of class labels, nearest first, from
which the query itself has already been removed (`retrieval.nearest_neighbours` removes it by index). All results
are fractions in [0, 1], and every mean over queries is the plain one (not over classes).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer]


class MetricError(ValueError):
    """The arrays given to a metric do not fit together, or hold no query the metric is defined for."""


def recall_at_k(neighbour_labels: Integers, query_labels: Integers, ks: Sequence[int]) -> dict[int, float]:
    """Share of queries with at least one neighbour of their own class among the first k, for each k.

    Args:
        neighbour_labels: (N, K) labels of the neighbours, nearest first, without the query itself.
        query_labels: (N,) labels of the queries.
        ks: ranks to report, each in 1..K.

    The mean is over all N queries: the only image of its class can never be a hit and counts as a miss.

    Source: Jegou et al. 2011 (Recall@k of retrieval); Oh Song et al. 2016, section 6, for this "any hit" form.

    Raises:
        MetricError: wrong shapes or dtypes, no query, or a k outside 1..K.
    """
    hits = _hits(neighbour_labels, query_labels)
    for k in ks:
        if not 1 <= k <= hits.shape[1]:
            raise MetricError(
                f"recall_at: k = {k} is outside 1..{hits.shape[1]}, the number of neighbours given for each query."
            )
    # A query whose class never shows up gets rank K, which no k reaches.
    first_hit = np.where(hits.any(axis=1), hits.argmax(axis=1), hits.shape[1])
    return {int(k): float(np.mean(first_hit < k)) for k in ks}


def r_precision(neighbour_labels: Integers, query_labels: Integers, num_relevant: Integers) -> float:
    """Mean share of own-class images among a query's R nearest, R being the number of relevant images.

    Args:
        neighbour_labels: (N, K) labels of the neighbours, nearest first, without the query itself; K >= max R.
        query_labels: (N,) labels of the queries.
        num_relevant: (N,) R of each query: how many images of its class it could find (itself not counted).

    Queries with R = 0 have no R-precision and are left out of the mean.

    Source: Musgrave, Belongie, Lim 2020, "A Metric Learning Reality Check", section 3.1.

    Raises:
        MetricError: wrong shapes or dtypes, K < max R, or no query with R > 0.
    """
    hits, relevant = _hits_within_r(neighbour_labels, query_labels, num_relevant)
    return float(np.mean(hits.sum(axis=1) / relevant))


def map_at_r(neighbour_labels: Integers, query_labels: Integers, num_relevant: Integers) -> float:
    """Mean average precision at R: (1/R) * sum over i <= R of precision(i) where the i-th neighbour is right.

    Args:
        neighbour_labels: (N, K) labels of the neighbours, nearest first, without the query itself; K >= max R.
        query_labels: (N,) labels of the queries.
        num_relevant: (N,) R of each query: how many images of its class it could find (itself not counted).

    Queries with R = 0 are left out of the mean. 1.0 means that every query has its whole class in front.

    Source: Musgrave, Belongie, Lim 2020, "A Metric Learning Reality Check", section 3.1. The mAP_c of Roth et al.
    2020 divides by R + 1 instead and is therefore not comparable.

    Raises:
        MetricError: wrong shapes or dtypes, K < max R, or no query with R > 0.
    """
    hits, relevant = _hits_within_r(neighbour_labels, query_labels, num_relevant)
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    return float(np.mean((precision * hits).sum(axis=1) / relevant))


def nmi(labels: Integers, clusters: Integers, *, mean: Literal["geometric", "arithmetic"]) -> float:
    """Normalised mutual information of two partitions of the same images: I(labels, clusters) / mean(H, H).

    Args:
        labels: (N,) class of each image, any integers.
        clusters: (N,) cluster of each image, any integers (-1 is a cluster like any other).
        mean: of the two entropies. Papers before 2019 report the geometric one, as scikit-learn did up to 0.21; since
            then its default is the arithmetic one. The latter is never larger.

    1.0 where the partitions agree up to names, also where both are one single set; 0.0 where only one of them is.
    It grows with the number of clusters (no correction for chance).

    Raises:
        MetricError: arrays that are not integers of one shape (N,), N >= 1, or another mean.
    """
    if mean not in ("geometric", "arithmetic"):
        raise MetricError(f"nmi: mean: {mean!r} is not one of geometric, arithmetic.")
    _check_partitions(labels, clusters)
    from sklearn.metrics import normalized_mutual_info_score  # training alone does without

    return float(normalized_mutual_info_score(labels, clusters, average_method=mean))


def pair_f1(labels: Integers, clusters: Integers) -> float:
    """F1 over pairs of images: is a pair of one cluster a pair of one class, and the reverse.

    2 TP / (pairs of one class + pairs of one cluster), with TP the pairs that are both; 0.0 where there is no such
    pair, also where no class and no cluster has two images.

    Args:
        labels: (N,) class of each image, any integers.
        clusters: (N,) cluster of each image, any integers (-1 is a cluster like any other).

    Source: Manning, Raghavan, Schuetze 2008, "Introduction to Information Retrieval", section 16.3; Oh Song et al.
    2016, section 6.

    Raises:
        MetricError: arrays that are not integers of one shape (N,), N >= 1.
    """
    _check_partitions(labels, clusters)
    _, label_ids = np.unique(labels, return_inverse=True)
    cluster_values, cluster_ids = np.unique(clusters, return_inverse=True)
    both = _num_pairs(label_ids * np.int64(len(cluster_values)) + cluster_ids)
    return 2 * both / (_num_pairs(label_ids) + _num_pairs(cluster_ids)) if both else 0.0


def _num_pairs(ids: Integers) -> int:
    """How many pairs of places hold the same number."""
    counts = np.unique(ids, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def _check_partitions(labels: Integers, clusters: Integers) -> None:
    for name, array in (("labels", labels), ("clusters", clusters)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise MetricError(f"{name}: expected an integer array with 1 dimension, got {array.dtype} {array.shape}.")
    if labels.shape != clusters.shape:
        raise MetricError(f"{len(labels)} labels for {len(clusters)} clusters; they must be equal.")
    if labels.size == 0:
        raise MetricError("labels and clusters are empty: there is nothing to compare.")


def _hits(neighbour_labels: Integers, query_labels: Integers) -> NDArray[np.bool_]:
    """(N, K) truth table: is the neighbour of the query's class."""
    for name, array, num_dims in (("neighbour_labels", neighbour_labels, 2), ("query_labels", query_labels, 1)):
        if array.ndim != num_dims or not np.issubdtype(array.dtype, np.integer):
            raise MetricError(
                f"{name}: expected an integer array with {num_dims} dimension(s), got {array.dtype} {array.shape}."
            )
    if len(neighbour_labels) != len(query_labels):
        raise MetricError(
            f"neighbour_labels has {len(neighbour_labels)} rows for {len(query_labels)} query_labels; "
            "they must be equal."
        )
    if neighbour_labels.size == 0:
        raise MetricError(f"neighbour_labels is empty, shape {neighbour_labels.shape}: there is nothing to rank.")
    return neighbour_labels == query_labels[:, None]


def _hits_within_r(
    neighbour_labels: Integers, query_labels: Integers, num_relevant: Integers
) -> tuple[NDArray[np.bool_], Integers]:
    """(M, max R) hits with everything behind rank R struck out, and (M,) R, for the M queries with R > 0."""
    hits = _hits(neighbour_labels, query_labels)
    if num_relevant.shape != query_labels.shape or not np.issubdtype(num_relevant.dtype, np.integer):
        raise MetricError(
            f"num_relevant: expected integers of shape {query_labels.shape}, "
            f"got {num_relevant.dtype} {num_relevant.shape}."
        )
    if num_relevant.min() < 0:
        raise MetricError(f"num_relevant: {num_relevant.min()} is negative.")
    defined = num_relevant > 0
    if not defined.any():
        raise MetricError(
            "no query has another image of its class (num_relevant is 0 everywhere), so R-precision and MAP@R "
            "are undefined; evaluate on classes with at least two images."
        )
    relevant = num_relevant[defined]
    largest = int(relevant.max())
    if largest > hits.shape[1]:
        raise MetricError(f"{hits.shape[1]} neighbours for each query are too few: the largest class needs {largest}.")
    within = np.arange(largest) < relevant[:, None]
    return hits[defined, :largest] & within, relevant
