"""Paired tests against published data, scipy and closed testing; the words against the comparisons they express."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from scipy import stats

from raydml.analysis.comparisons import Comparison, compare_all, holm, ranking_in_words


def runs(*values: float) -> dict[tuple[int, int], float]:
    return {(index // 3, index % 3): value for index, value in enumerate(values)}


def test_students_sleep_data():
    """Hours of extra sleep of ten patients under two drugs (Student 1908): t = 4.0621, p = 0.002833, interval
    0.7001 to 2.4599, as R's t.test(paired = TRUE) prints them."""
    first = runs(0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
    second = runs(1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)
    (row,) = compare_all({"first": first, "second": second})
    assert (row.better, row.worse, row.num_pairs) == ("second", "first", 10)
    assert row.difference == pytest.approx(1.58)
    assert row.p == pytest.approx(0.002833, abs=5e-7)
    assert row.p_holm == row.p
    assert row.is_real
    assert row.difference - row.half_width == pytest.approx(0.7001, abs=5e-5)
    assert row.difference + row.half_width == pytest.approx(2.4599, abs=5e-5)


def test_scipys_paired_test_on_the_common_runs_alone():
    generator = np.random.default_rng(0)
    values = {name: {} for name in "ABCD"}
    for key in itertools.product(range(4), range(3)):
        level = generator.normal(0.6, 0.05)  # what all configurations of a fold and seed have in common
        for place, name in enumerate("ABCD"):
            if generator.random() < 0.8:
                values[name][key] = level - 0.008 * place + generator.normal(0, 0.01)
    rows = compare_all(values)
    assert len(rows) == 6
    for row in rows:
        common = sorted(values[row.better].keys() & values[row.worse].keys())
        theirs = stats.ttest_rel(
            [values[row.better][key] for key in common], [values[row.worse][key] for key in common]
        )
        interval = theirs.confidence_interval(0.95)
        assert row.num_pairs == len(common) < 12
        assert row.p == pytest.approx(theirs.pvalue)
        assert row.difference == pytest.approx((interval.low + interval.high) / 2)
        assert row.difference >= 0
        assert row.half_width == pytest.approx((interval.high - interval.low) / 2)
    assert [row.p_holm for row in rows] == holm([row.p for row in rows])
    assert {row.is_real for row in rows} == {True, False}
    assert all(row.is_real == (row.p_holm < 0.05) for row in rows)


def test_the_correction_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, error sqrt(1/3 + 1/2) = 0.912871; with 2 degrees p = 1 - t / sqrt(t^2 + 2).
    values = {"A": runs(2.0, 4.0, 6.0), "B": runs(1.0, 2.0, 3.0)}
    (row,) = compare_all(values, test_train_ratio=0.5)
    assert row.half_width == pytest.approx(4.302653 * 0.912871, rel=1e-6)
    assert row.p == pytest.approx(1 - 2.190890 / 6.8**0.5, rel=1e-5)
    with pytest.raises(ValueError, match="test_train_ratio"):
        compare_all(values, test_train_ratio=-1)


def test_the_plain_test_is_as_optimistic_as_its_docstring_says():
    generator = np.random.default_rng(1)
    real = {0.0: 0, 1 / 3: 0}
    for _ in range(1000):
        by_fold, by_run = generator.normal(size=(4, 1)), generator.normal(size=(4, 3))
        advantage = (by_fold + by_run).ravel()  # its mean is 0: no difference is real
        values = {"A": dict(enumerate(advantage)), "B": dict.fromkeys(range(12), 0.0)}
        for ratio in real:
            real[ratio] += compare_all(values, test_train_ratio=ratio)[0].is_real
    assert 0.14 < real[0.0] / 1000 < 0.22
    assert real[1 / 3] / 1000 < 0.05


def test_holm_by_hand():
    # The textbook example: 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04 lifted to the one before. Two are rejected.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_the_closure_of_bonferroni():
    """A hypothesis is rejected when Bonferroni rejects every set with it (Marcus, Peritz & Gabriel 1976)."""
    generator = np.random.default_rng(2)
    for _ in range(20):
        p_values = (generator.random(6) ** 3).tolist()
        p_values[3] = p_values[0]
        sets = [group for size in range(1, 7) for group in itertools.combinations(range(6), size)]
        expected = [
            max(min(1.0, len(group) * min(p_values[j] for j in group)) for group in sets if i in group)
            for i in range(6)
        ]
        assert holm(p_values) == pytest.approx(expected)


def test_of_five_equal_configurations_seldom_any_is_called_better():
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(300):
        values = {name: dict(enumerate(generator.normal(0.5, 0.1, 8))) for name in "ABCDE"}
        wrong += any(row.is_real for row in compare_all(values))
    assert wrong / 300 < 0.08  # plain p-values: about 0.25


def test_equal_differences_get_the_sign_flip_p():
    # All 0.1 up to rounding. Of 2^6 flips of signs, two are as extreme.
    higher, lower = runs(0.7, 0.8, 0.4, 0.9, 0.2, 0.3), runs(0.6, 0.7, 0.3, 0.8, 0.1, 0.2)
    (row,) = compare_all({"lower": lower, "higher": higher})
    assert row == Comparison("higher", "lower", pytest.approx(0.1), None, 2 / 64, 2 / 64, True, 6)
    (row,) = compare_all({"lower": {0: 0.6, 1: 0.7}, "higher": {0: 0.7, 1: 0.8}})
    assert (row.p, row.is_real) == (0.5, False)


def test_equal_configurations_are_not_different():
    (row,) = compare_all({"A": runs(0.5, 0.7), "B": runs(0.5, 0.7)})
    assert row == Comparison("A", "B", 0.0, None, 1.0, 1.0, False, 2)
    (row,) = compare_all({"A": {0: 0.1 + 0.2}, "B": {0: 0.3}})
    assert row == Comparison("A", "B", 0.0, None, None, None, False, 1)


def test_one_common_run_allows_no_test_and_does_not_count_for_holm():
    values = {"A": runs(0.9, 0.8, 0.85, 0.8), "B": runs(0.7, 0.65, 0.6, 0.61), "C": {(0, 0): 0.1, (7, 7): 0.2}}
    rows = {(row.better, row.worse): row for row in compare_all(values)}
    assert rows["A", "C"] == Comparison("A", "C", pytest.approx(0.8), None, None, None, False, 1)
    assert rows["A", "B"].p_holm == rows["A", "B"].p < 0.05
    assert rows["A", "B"].is_real


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="no run in common"):
        compare_all({"A": {0: 0.5}, "B": {1: 0.5}})
    with pytest.raises(ValueError, match="'B', run 1: the value is nan"):
        compare_all({"A": {0: 0.5}, "B": {0: 0.5, 1: float("nan")}})
    with pytest.raises(ValueError, match="'B' has no run"):
        compare_all({"A": {0: 0.5}, "B": {}})
    assert compare_all({}) == compare_all({"A": {0: 0.5}}) == []


def test_pairs_come_best_first():
    values = {"low": runs(0.1, 0.2), "high": runs(0.9, 0.7), "middle": runs(0.5, 0.4)}
    pairs = [(row.better, row.worse) for row in compare_all(values)]
    assert pairs == [("high", "middle"), ("high", "low"), ("middle", "low")]


REAL = " (Holm-adjusted p < 0.05)"


def relation(names: str, real: str) -> tuple[dict[str, dict[int, float]], list[Comparison]]:
    """Values that rank the names in their order, and comparisons of which those in ``real`` ("AB AC") are real."""
    wins = [tuple(pair) for pair in real.split()]
    values = {name: {0: 1.0 - place / 100, 1: 1.0 - place / 100} for place, name in enumerate(names)}
    rows = []
    for pair in itertools.combinations(names, 2):
        better, worse = pair[::-1] if pair[::-1] in wins else pair
        rows.append(Comparison(better, worse, 0.01, 0.01, 0.2, 0.2, (better, worse) in wins, 2))
    return values, rows


@pytest.mark.parametrize(
    ("names", "real", "expected"),
    [
        ("A", "", ["A is the only configuration"]),
        ("AB", "AB", [f"A is significantly better than B{REAL}"]),
        ("AB", "", ["There is no significant difference between A and B"]),
        (
            "ABCD",
            "AB AC AD",
            [
                f"A is significantly better than B, C and D{REAL}",
                "There is no significant difference between B, C and D",
            ],
        ),
        (  # not transitive: neither neighbour differs, the ends do
            "ABC",
            "AC",
            [
                f"A is significantly better than C{REAL}",
                "There is no significant difference between A and B",
                "There is no significant difference between B and C",
            ],
        ),
        (  # two that beat the same
            "ABCD",
            "AC AD BC BD",
            [
                f"A and B are each significantly better than C and D{REAL}",
                "There is no significant difference between A and B",
                "There is no significant difference between C and D",
            ],
        ),
        (  # a circle, possible where each two have other common runs
            "ABC",
            "AB BC CA",
            [
                f"A is significantly better than B{REAL}",
                f"B is significantly better than C{REAL}",
                f"C is significantly better than A{REAL}",
            ],
        ),
    ],
)
def test_sentences_by_hand(names, real, expected):
    assert ranking_in_words(*relation(names, real)) == expected


def test_a_single_run_says_why_nothing_can_be_decided():
    values = {"A": {0: 0.5}, "B": {0: 0.4}}
    (sentence,) = ranking_in_words(values, compare_all(values))
    assert sentence == (
        "There is no significant difference between A and B "
        "(two configurations that share a single run cannot be tested)"
    )


def names_of(text: str) -> list[str]:
    return re.findall(r"\b[A-J]\b", text)


def test_the_sentences_say_what_the_comparisons_say_and_nothing_else():
    generator = np.random.default_rng(4)
    names = "ABCDEFGHIJ"
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        real = [pair for pair in map("".join, itertools.combinations(names, 2)) if generator.random() < share]
        real = [pair[::-1] if generator.random() < 0.1 else pair for pair in real]
        values, rows = relation(names, " ".join(real))
        better, undecided = [], set()
        for sentence in ranking_in_words(values, rows):
            if sentence.startswith("There is no significant difference between"):
                group = names_of(sentence)
                undecided |= set(map(frozenset, itertools.combinations(group, 2)))
            else:
                winners, losers = re.split(r" better than ", sentence)
                better += map("".join, itertools.product(names_of(winners), names_of(losers)))
        assert sorted(better) == sorted(real)  # as lists: nothing is said twice
        assert undecided == set(map(frozenset, itertools.combinations(names, 2))) - set(map(frozenset, real))


def test_ten_configurations_stay_readable():
    generator = np.random.default_rng(5)
    for spread in (0.0, 0.005, 0.02, 0.1):
        values = {
            name: dict(enumerate(0.6 + spread * place + generator.normal(0, 0.01, 12)))
            for place, name in enumerate("ABCDEFGHIJ")
        }
        assert len(ranking_in_words(values, compare_all(values))) <= 15


def test_a_missing_comparison_is_an_error():
    values, rows = relation("ABC", "AB")
    with pytest.raises(ValueError, match="'B' and 'C' are not compared"):
        ranking_in_words(values, rows[:-1])
