"""Intervals against numbers worked out by hand from the printed t table; the bootstrap against all its resamples."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from raydml.metrics.intervals import Interval, bootstrap_interval, t_interval
from raydml.metrics.names import interval_text


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
    assert interval_text(0.5, t_interval([0.5]).half_width, 3) == "0.500"
    assert interval_text(0.61249, 0.01294) == "0.6125 ± 0.0129"
    assert interval_text(None, None) == "-"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failed_run_is_not_averaged_in(value):
    with pytest.raises(ValueError, match="run 1 of 3"):
        t_interval([0.5, value, 0.6])


def test_no_runs_and_bad_confidence_are_errors():
    with pytest.raises(ValueError, match="at least one run"):
        t_interval([])
    with pytest.raises(ValueError, match="confidence"):
        t_interval([1.0, 2.0], confidence=95)


def test_resamples_are_those_of_a_plain_loop():
    scores = np.random.default_rng(3).random(50_000)
    generator = np.random.default_rng(7)
    means = sorted(scores[generator.integers(0, 50_000, 50_000)].mean() for _ in range(201))
    # 201 means in order: quantiles 0.025 and 0.975 are at places 5 and 195 exactly.
    assert bootstrap_interval(scores, num_resamples=201, seed=7) == pytest.approx((means[5], means[195]), rel=1e-12)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_all_resamples_of_four_scores(confidence):
    scores = [0.0, 0.1, 0.35, 1.0]
    means = np.array([sum(drawn) / 4 for drawn in itertools.product(scores, repeat=4)])
    expected = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    found = bootstrap_interval(np.array(scores), num_resamples=40_000, confidence=confidence)
    assert found == pytest.approx(expected, abs=0.026)  # the step between neighbouring means


def test_scipys_percentile_bootstrap_agrees():
    scores = np.random.default_rng(4).beta(0.5, 0.5, 300)
    theirs = stats.bootstrap(
        (scores,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert bootstrap_interval(scores, num_resamples=9999) == pytest.approx(tuple(theirs), abs=0.002)


def test_classes_are_drawn_whole_and_weigh_by_their_queries():
    # Class 5 has one query of score 1, class 9 three of score 0. Drawn: 5 5 -> 1, 9 9 -> 0, else 1 of 4 right.
    scores, groups = np.array([0.0, 1.0, 0.0, 0.0]), np.array([9, 5, 9, 9])
    assert bootstrap_interval(scores, groups=groups, confidence=0.4) == (0.25, 0.25)
    assert bootstrap_interval(scores, groups=groups, confidence=0.95) == (0.0, 1.0)


def test_queries_without_a_relevant_image_are_left_out():
    generator = np.random.default_rng(5)
    scores, groups = generator.random(40), generator.integers(0, 6, 40)
    # The added class 99 has no score at all and must not be drawn as a class of 0 queries.
    with_nan = np.concatenate([[np.nan], scores[:20], [np.nan, np.nan], scores[20:]])
    with_groups = np.concatenate([[99], groups[:20], [99, 2], groups[20:]])
    assert bootstrap_interval(with_nan) == bootstrap_interval(scores)
    assert bootstrap_interval(with_nan, groups=with_groups) == bootstrap_interval(scores, groups=groups)


def test_how_often_the_bootstrap_holds_the_true_mean():
    generator = np.random.default_rng(6)
    held = {"queries": 0, "classes": 0, "queries of classes": 0}
    groups = np.repeat(np.arange(60), 10)
    for _ in range(300):
        low, high = bootstrap_interval((generator.random(200) < 0.7).astype(np.float32), num_resamples=300)
        held["queries"] += low <= 0.7 <= high
        # Each class has a difficulty of its own, uniform around 0.5.
        scores = (generator.random(600) < generator.random(60)[groups]).astype(float)
        for name, by in (("classes", groups), ("queries of classes", None)):
            low, high = bootstrap_interval(scores, num_resamples=300, groups=by)
            held[name] += low <= 0.5 <= high
    assert 0.90 <= held["queries"] / 300 <= 0.99
    assert 0.90 <= held["classes"] / 300 <= 0.99
    assert held["queries of classes"] / 300 < 0.8  # too narrow, as the docstring says


def test_the_bootstrap_fits_into_memory():
    scores = np.random.default_rng(8).random(60_000)
    tracemalloc.start()
    bootstrap_interval(scores, num_resamples=200)  # 12 million draws: 192 MB at once
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6


def test_the_seed_alone_decides():
    scores = np.random.default_rng(9).random(30)
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state must not change
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(scores, seed=2)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_query": np.array([0.5])}, "got 1 query"),
        ({"per_query": np.array([0.5, np.nan])}, "got 1 query"),
        ({"per_query": np.array([])}, "got 0 query"),
        ({"per_query": np.array([0.5, 0.6]), "groups": np.array([3, 3])}, "got 1 class"),
        ({"per_query": np.array([0.5, 0.6]), "groups": np.array([3])}, "groups: shape"),
        ({"per_query": np.zeros((2, 2))}, "shape"),
        ({"per_query": np.array([0.5, np.inf])}, "query 1 is infinite"),
        ({"per_query": np.array([0.5, 0.6]), "confidence": 95}, "confidence"),
        ({"per_query": np.array([0.5, 0.6]), "num_resamples": 0}, "num_resamples"),
    ],
)
def test_invalid_arguments_of_the_bootstrap_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**arguments)
