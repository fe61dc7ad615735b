"""Metrics on plain arrays: ranked neighbours in, one number a query out; images and their clusters in, one number out.

Nothing here knows distances, embeddings or faiss. A ranked list is a row of hits (is the neighbour relevant), nearest
first, from which the query itself has already been removed by index. All results but AMI are fractions in [0, 1].

The plain mean over queries (not over classes) is what is reported; intervals over queries and tables of classes are
made of the same numbers. A query without a relevant image has no precision (NaN) and is left out of that mean.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer]


class MetricError(ValueError):
    """The arrays given to a metric do not fit together, or hold no query the metric is defined for."""


def recall(first: Integers, k: int) -> NDArray[np.bool_]:
    """(N,) whether the nearest relevant neighbour, at rank first (N,) from 1, 0 for none, is among the first k.

    Its mean is Recall@k, over all queries: the only image of its class is a miss. Source: Jegou et al. 2011 (Recall@k
    of retrieval); Oh Song et al. 2016, section 6, for this "any hit" form.
    """
    return (first >= 1) & (first <= k)


def reciprocal_rank(first: Integers) -> NDArray[np.float64]:
    """(N,) 1 / rank of the nearest relevant neighbour, at rank first (N,) from 1; 0.0 where none is relevant (rank 0).

    Its mean is MRR. Source: Voorhees 1999, "The TREC-8 Question Answering Track Report".
    """
    return np.divide(1.0, first, out=np.zeros(len(first)), where=first > 0)


def precision_at_r(hits: NDArray[np.bool_], num_relevant: Integers) -> NDArray[np.float64]:
    """(N,) R-precision of each query: share of relevant images among its R nearest; NaN where R = 0.

    hits: (N, K) is the i-th neighbour relevant, nearest first, K >= max R. num_relevant: (N,) R, how many relevant
    images the query could find, itself not counted. Source: Musgrave, Belongie, Lim 2020, "A Metric Learning Reality
    Check", section 3.1.

    Raises MetricError: K below max R; no query with R > 0.
    """
    within = _within_r(hits, num_relevant)
    return _divided(within.sum(axis=1), num_relevant)


def average_precision(hits: NDArray[np.bool_], num_relevant: Integers, depth: int | None = None) -> NDArray[np.float64]:
    """(N,) average precision of each query: sum of precision(i) over hits at i <= depth, divided by min(R, depth).

    hits: (N, K) is the i-th neighbour relevant, nearest first. num_relevant: (N,) R; where it is 0 the result is NaN.
    depth: how far down the list hits count; None: R of each query, and the mean of the result is MAP@R.

    MAP@R is 1 where every query has its whole class in front. Source: Musgrave, Belongie, Lim 2020, section 3.1. The
    mAP_c of Roth et al. 2020 divides by R + 1 instead and is therefore not comparable.

    With a fixed depth the mean is mAP@depth, which is another metric: mAP@1000 counts hits far behind rank R and does
    not reach 1 sooner than MAP@R, but is never near 0 where Recall@1000 is high. It divides by min(R, depth), as the
    mAP@100 of Weyand et al. 2020 ("Google Landmarks Dataset v2", section 5.1); Roth et al. 2020 divide by the size of
    the class, which includes the query.

    Raises MetricError: K below max R or depth; no query with R > 0.
    """
    if depth is None:
        counted, divisors = _within_r(hits, num_relevant), num_relevant
    else:
        _check_relevant(hits, num_relevant)
        if not 1 <= depth <= hits.shape[1]:
            raise MetricError(f"depth = {depth} is outside 1..{hits.shape[1]}, the neighbours given for each query.")
        counted, divisors = hits[:, :depth], np.minimum(num_relevant, depth)
    total = np.zeros(len(hits))
    # Some queries at a time: thousands of neighbours of each would take gigabytes as floats.
    at_once = max(1, 2**20 // counted.shape[1])
    for start in range(0, len(hits), at_once):
        block = counted[start : start + at_once]
        precision = block.cumsum(axis=1) / np.arange(1, counted.shape[1] + 1)
        total[start : start + at_once] = (precision * block).sum(axis=1)
    return _divided(total, divisors)


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


def ami(labels: Integers, clusters: Integers) -> float:
    """Adjusted mutual information of two partitions: NMI (arithmetic mean) corrected for chance. Can be below 0.

    Args:
        labels: (N,) class of each image, any integers.
        clusters: (N,) cluster of each image, any integers (-1 is a cluster like any other).

    1.0 where the partitions agree up to names, 0.0 on average where they know nothing of each other, whatever the
    number of clusters. The expectation needs the sizes of classes and clusters only, so that equal sizes are counted
    together: scikit-learn, which goes through all pairs of a class and a cluster, takes 98 s where this takes 2 s
    (60,502 images, 11,316 classes). Source: Vinh, Epps, Bailey 2010, JMLR 11, equation 24a and table 2 (AMI_sum).

    Raises:
        MetricError: arrays that are not integers of one shape (N,), N >= 1.
    """
    _check_partitions(labels, clusters)
    from sklearn.metrics import mutual_info_score  # training alone does without

    sizes = [np.unique(ids, return_counts=True)[1] for ids in (labels, clusters)]
    if len(sizes[0]) == len(sizes[1]) == 1:
        return 1.0
    expected = _expected_mutual_information(sizes[0], sizes[1])
    shares = [counts / len(labels) for counts in sizes]
    entropies = [float(-(share * np.log(share)).sum()) for share in shares]
    smallest = np.finfo(np.float64).eps
    beyond_chance = sum(entropies) / 2 - expected
    # Where every image is its own class and cluster chance explains everything: 0 / 0, and they agree.
    beyond_chance = min(beyond_chance, -smallest) if beyond_chance < 0 else max(beyond_chance, smallest)
    if len(sizes[0]) == len(sizes[1]) == len(labels):
        return 1.0
    return float((mutual_info_score(labels, clusters) - expected) / beyond_chance)


def _expected_mutual_information(class_sizes: Integers, cluster_sizes: Integers) -> float:
    """In nats, of two random partitions with these sizes."""
    from scipy.stats import hypergeom  # training alone does without

    num_images = int(class_sizes.sum())
    total = 0.0
    for a, times_a in zip(*np.unique(class_sizes, return_counts=True), strict=True):
        for b, times_b in zip(*np.unique(cluster_sizes, return_counts=True), strict=True):
            shared = np.arange(max(1, a + b - num_images), min(a, b) + 1)
            terms = shared / num_images * np.log(num_images * shared / (float(a) * float(b)))
            total += times_a * times_b * float((terms * hypergeom.pmf(shared, num_images, a, b)).sum())
    return total


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


def _within_r(hits: NDArray[np.bool_], num_relevant: Integers) -> NDArray[np.bool_]:
    """(N, max R) hits with everything behind rank R of each query struck out."""
    _check_relevant(hits, num_relevant)
    largest = int(num_relevant.max())
    if largest > hits.shape[1]:
        raise MetricError(f"{hits.shape[1]} neighbours for each query are too few: the largest class needs {largest}.")
    return hits[:, :largest] & (np.arange(largest) < num_relevant[:, None])


def _check_relevant(hits: NDArray[np.bool_], num_relevant: Integers) -> None:
    if num_relevant.shape != hits.shape[:1] or not np.issubdtype(num_relevant.dtype, np.integer):
        raise MetricError(
            f"num_relevant: expected integers of shape {hits.shape[:1]}, got {num_relevant.dtype} {num_relevant.shape}."
        )
    if num_relevant.min() < 0:
        raise MetricError(f"num_relevant: {num_relevant.min()} is negative.")
    if not num_relevant.any():
        raise MetricError(
            "no query has another image of its class (num_relevant is 0 everywhere), so R-precision and MAP@R "
            "are undefined; evaluate on classes with at least two images."
        )


def _divided(totals: NDArray[np.number], divisors: Integers) -> NDArray[np.float64]:
    return np.divide(totals, divisors, out=np.full(len(totals), np.nan), where=divisors > 0)
