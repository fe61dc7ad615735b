"""Ranking metrics: from the relevance of ranked neighbours to one number for each query, a fraction in [0, 1].

A ranked list is a row of hits (is the neighbour relevant), nearest first, without the query itself. The mean over
queries (not over classes) is reported; intervals and tables of classes use the same numbers. A query without a relevant
image has no precision (NaN) and is left out of the mean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AnyIntegers = NDArray[np.integer]


def recall(first: AnyIntegers, k: int) -> NDArray[np.bool_]:
    """Return (N,) whether the nearest relevant neighbour, at rank first (N,) from 1, 0 for none, is among the first k.

    The mean over the queries is Recall@k; a query without a relevant image is a miss here, see
    `MetricSpec.lone_misses`. Source: Jegou et al. 2011 (Recall@k of retrieval); Oh Song et al. 2016, section 6, for
    this "any hit" form.
    """
    return (first >= 1) & (first <= k)


def reciprocal_rank(first: AnyIntegers) -> NDArray[np.float64]:
    """Return (N,) 1 / rank of the nearest relevant neighbour, at rank first (N,) from 1; 0.0 if there is none (rank 0).

    The mean is MRR. Source: Voorhees 1999, "The TREC-8 Question Answering Track Report".
    """
    return np.divide(1.0, first, out=np.zeros(len(first)), where=first > 0)


def precision_at_r(hits: NDArray[np.bool_], num_relevant: AnyIntegers) -> NDArray[np.float64]:
    """Return (N,) the R-precision of each query: share of relevant images among its R nearest; NaN if R = 0.

    hits: (N, K) is the i-th neighbour relevant, nearest first, K >= max R. num_relevant: (N,) R, the number of relevant
    images that the query can find, itself not counted; above 0 for some query. Source: Musgrave, Belongie, Lim 2020,
    "A Metric Learning Reality Check", section 3.1.
    """
    within = _within_r(hits, num_relevant)
    return _divided(within.sum(axis=1), num_relevant)


def average_precision(
    hits: NDArray[np.bool_], num_relevant: AnyIntegers, depth: int | None = None
) -> NDArray[np.float64]:
    """Return (N,) the average precision: sum of precision(i) over hits at i <= depth, divided by min(R, depth).

    hits: (N, K) is the i-th neighbour relevant, nearest first, K >= max R or depth. num_relevant: (N,) R, above 0 for
    some query; if it is 0 the result is NaN. depth: the last rank at which hits count; None: R of each query, and the
    mean is MAP@R.

    MAP@R is 1 if every query has its whole class in front. Source: Musgrave, Belongie, Lim 2020, section 3.1. The mAP_c
    of Roth et al. 2020 divides by R + 1 instead and is therefore not comparable.

    With a fixed depth the mean is mAP@depth, another metric: it also counts hits far behind rank R. It divides by
    min(R, depth), as the mAP@100 of Weyand et al. 2020 ("Google Landmarks Dataset v2", section 5.1); Roth et al. 2020
    divide by the size of the class, which includes the query.
    """
    if depth is None:
        counted, divisors = _within_r(hits, num_relevant), num_relevant
    else:
        assert 1 <= depth <= hits.shape[1]
        counted, divisors = hits[:, :depth], np.minimum(num_relevant, depth)
    total = np.zeros(len(hits))
    # Some queries at a time: floats for thousands of neighbours of each query would take gigabytes.
    at_once = max(1, 2**20 // counted.shape[1])
    for start in range(0, len(hits), at_once):
        block = counted[start : start + at_once]
        precision = block.cumsum(axis=1) / np.arange(1, counted.shape[1] + 1)
        total[start : start + at_once] = (precision * block).sum(axis=1)
    return _divided(total, divisors)


def _within_r(hits: NDArray[np.bool_], num_relevant: AnyIntegers) -> NDArray[np.bool_]:
    """(N, max R) hits without those behind rank R of each query."""
    largest = int(num_relevant.max())
    assert 1 <= largest <= hits.shape[1]
    return hits[:, :largest] & (np.arange(largest) < num_relevant[:, None])


def _divided(totals: NDArray[np.number], divisors: AnyIntegers) -> NDArray[np.float64]:
    return np.divide(totals, divisors, out=np.full(len(totals), np.nan), where=divisors > 0)
