"""Means with confidence intervals over repeated runs (folds and seeds)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Interval(NamedTuple):
    """`mean` ± `half_width` over `num_runs` runs; `half_width` is None where one run allows no interval."""

    mean: float
    half_width: float | None
    num_runs: int

    def text(self, decimals: int = 3) -> str:
        """`0.612 ± 0.013`, or `0.612` where there is no interval."""
        if self.half_width is None:
            return f"{self.mean:.{decimals}f}"
        return f"{self.mean:.{decimals}f} ± {self.half_width:.{decimals}f}"


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean: mean ± t(n-1) * s / sqrt(n), s with n - 1 in the denominator.

    Folds share training classes, so the runs are not independent and the interval is somewhat too narrow; it is the
    convention of Musgrave et al. 2020, section 3.2, and is reported as such.

    Raises:
        ValueError: no value, a value that is NaN or infinite, or a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1, both excluded.")
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
