"""Metrics on plain arrays: ranked neighbours in, one number a query out; images and their clusters in, one number out.

Nothing here knows distances, embeddings or faiss. A ranked list is a row of hits (is the neighbour relevant), nearest
first, from which the query itself has already been removed by index. All results but AMI are fractions in [0, 1].

The plain mean over queries (not over classes) is what is reported; intervals over queries and tables of classes are
made of the same numbers. A query without a relevant image has no precision (NaN) and is left out of that mean.
"""

from __future__ import annotations

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
