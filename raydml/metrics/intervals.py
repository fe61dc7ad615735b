"""Means with confidence intervals: over repeated runs (folds and seeds), and over the queries of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Elements drawn at a time by the bootstrap: 16 bytes each (an index and its value), so 64 MiB.
_CHUNK_ELEMENTS = 2**22


class Interval(NamedTuple):
    """`mean` ± `half_width` over `num_runs` runs; `half_width` is None for one run, which allows no interval."""

    mean: float
    half_width: float | None
    num_runs: int


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return Student's t interval of the mean: mean ± t(n-1) * s / sqrt(n), s with n - 1 in the denominator.

    Folds share training classes, so the runs are not independent and the interval is somewhat too narrow. It is the
    convention of Musgrave et al. 2020, section 3.2.

    Raises:
        ValueError: no value, a value that is NaN or infinite, or a confidence outside (0, 1).
    """
    from scipy import stats

    _refuse_confidence(confidence)
    if not values:
        raise ValueError("an interval needs at least one run, got none.")
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise ValueError(f"run {index} of {len(values)} has the value {value}; leave failed runs out first.")
    num_runs = len(values)
    mean = math.fsum(values) / num_runs
    if num_runs == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (num_runs - 1)
    quantile = float(stats.t.ppf((1 + confidence) / 2, num_runs - 1))
    return Interval(mean, quantile * math.sqrt(variance / num_runs), num_runs)


def bootstrap_interval(
    per_query: NDArray[np.floating],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    groups: NDArray[np.integer] | None = None,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (low, high) of the mean score over the queries of one run.

    per_query (Q,): the score of each query, any float type; NaN marks a query without a relevant image, which is left
    out as it is left out of the mean. groups (Q,): the class of each query. With groups, whole classes are drawn with
    replacement (cluster bootstrap), since queries of one class succeed and fail together, and the mean is over all
    queries of the drawn classes. Without groups, single queries are drawn; that interval is too narrow if classes
    differ.

    The interval covers the choice of the queries. It covers neither another training run (`t_interval` over seeds and
    folds does) nor another gallery, because each score stays the one found among all images. With few classes (20, say)
    percentile intervals are somewhat too narrow. The bounds are reproducible for a seed.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3; Davison & Hinkley 1997,
    "Bootstrap Methods and their Application", section 3.8, for whole clusters.

    Raises:
        ValueError: shapes that differ, an infinite score, fewer than two queries (or classes) with a score, or a
            confidence or number of resamples out of range.
    """
    _refuse_confidence(confidence)
    if num_resamples < 1:
        raise ValueError(f"num_resamples: {num_resamples} is below 1.")
    scores = np.asarray(per_query, dtype=np.float64)
    if scores.ndim != 1:
        raise ValueError(f"per_query: expected one score a query, shape (Q,), got {scores.shape}.")
    if np.isinf(scores).any():
        raise ValueError(f"per_query: the score of query {int(np.isinf(scores).argmax())} is infinite.")
    is_scored = ~np.isnan(scores)
    sums: NDArray[np.float64] = scores[is_scored]
    counts: NDArray[np.integer] | None = None
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != scores.shape:
            raise ValueError(f"groups: shape {groups.shape}, per_query has {scores.shape}; expected one class a query.")
        found, group = np.unique(groups[is_scored], return_inverse=True)
        sums = np.bincount(group, sums, len(found)).astype(np.float64, copy=False)
        counts = np.bincount(group, minlength=len(found))
    if len(sums) < 2:
        unit = "query" if groups is None else "class"
        raise ValueError(f"a bootstrap needs a score of at least two: got {len(sums)} {unit} with a score.")
    means = _resampled_means(sums, counts, num_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.integer] | None, num_resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Means (num_resamples,) of units drawn with replacement; counts: the queries in each sum, None for one each."""
    num_units = len(sums)
    rows = max(1, _CHUNK_ELEMENTS // num_units)
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        drawn = generator.integers(0, num_units, size=(stop - start, num_units))
        size = num_units if counts is None else counts[drawn].sum(axis=1)
        means[start:stop] = sums[drawn].sum(axis=1) / size
    return means


def _refuse_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1, both excluded.")
