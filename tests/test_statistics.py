"""Intervals against numbers worked out by hand from the printed t table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from raydml.statistics import Interval, t_interval


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        # s = 1, t(2) = 4.302653 from the table: 4.302653 / sqrt(3)
        ([1.0, 2.0, 3.0], 2.0, 2.484138),
        # s = sqrt(0.02), t(1) = 12.706205: 12.706205 * 0.1
        ([0.5, 0.7], 0.6, 1.2706205),
        # s = sqrt(2.5), t(4) = 2.776445: 2.776445 * sqrt(0.5)
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0, 1.963243),
        ([0.25, 0.25, 0.25], 0.25, 0.0),
    ],
)
def test_values_from_the_t_table(values, mean, half_width):
    interval = t_interval(values)
    assert interval.mean == pytest.approx(mean)
    assert interval.half_width == pytest.approx(half_width, rel=1e-6)
    assert interval.num_runs == len(values)


def test_scipys_own_interval_agrees():
    values = np.random.default_rng(0).normal(0.6, 0.02, 12).tolist()
    for confidence in (0.5, 0.9, 0.99):
        low, high = stats.t.interval(confidence, 11, loc=np.mean(values), scale=stats.sem(values))
        interval = t_interval(values, confidence=confidence)
        assert interval.mean - interval.half_width == pytest.approx(low)
        assert interval.mean + interval.half_width == pytest.approx(high)


def test_about_95_of_100_intervals_hold_the_true_mean():
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        interval = t_interval(generator.normal(3.0, 2.0, 5).tolist())
        held += abs(interval.mean - 3.0) <= interval.half_width
    assert 925 <= held <= 975


def test_one_run_has_no_interval():
    assert t_interval([0.5]) == Interval(0.5, None, 1)
    assert t_interval([0.5]).text() == "0.500"
    assert Interval(0.61249, 0.0129, 4).text() == "0.612 ± 0.013"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failed_run_is_not_averaged_in(value):
    with pytest.raises(ValueError, match="run 1 of 3"):
        t_interval([0.5, value, 0.6])


def test_no_runs_and_bad_confidence_are_errors():
    with pytest.raises(ValueError, match="at least one run"):
        t_interval([])
    with pytest.raises(ValueError, match="confidence"):
        t_interval([1.0, 2.0], confidence=95)
