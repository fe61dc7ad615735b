"""Which configuration is better: paired tests over their common runs, and the resulting ranking in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

SIGNIFICANCE = 0.05  # a difference whose Holm-adjusted p is below it is called significant
_CONFIDENCE = 0.95

# configuration -> {(fold, seed): value}; the larger value is the better one
Runs = Mapping[str, Mapping[Any, float]]


class Comparison(NamedTuple):
    """The comparison of two configurations over the runs (fold and seed) that both have."""

    better: str  # the one with the larger mean over the common runs; the first given where the means are equal
    worse: str
    difference: float  # mean of the paired differences, >= 0
    half_width: float | None  # of the 95 % t interval of the difference; None where the differences have no spread
    p: float | None  # two-sided; None with one common run
    p_holm: float | None  # adjusted for all comparisons made together
    is_real: bool  # p_holm < 0.05
    num_pairs: int


def compare_all(values: Runs, *, test_train_ratio: float = 0.0) -> list[Comparison]:
    """Compare each pair of configurations by a paired t-test over their common runs, adjusted by Holm's method.

    values: configuration -> {(fold, seed): value}, larger is better; two runs are a pair when their keys are equal.
    Pairs of configurations come in the order of their means, best first.

    Folds share training classes and seeds share a fold, so the differences are not independent and the plain test is
    too optimistic: where a configuration's advantage varies from fold to fold as much as from seed to seed, 4 folds of
    3 seeds call 18 of 100 differences real that are not (of 10 seeds: 43), not 5. `test_train_ratio` = r is the
    correction of Nadeau & Bengio 2003, "Inference for the generalization error", Machine Learning 52: the squared
    standard error becomes (1/n + r) s^2 with r = test over training classes of a run, 1/(k - 1) for k folds (Bouckaert
    & Frank 2004 for repeated cross-validation). It is not the default because it has no value for a single fold, where
    only seeds vary, and because published tables (Musgrave et al. 2020) carry the plain interval; with 2 folds of 3
    seeds it makes each interval sqrt(7) times as wide, and hardly anything is real.

    Differences without spread (equal up to rounding) have no t statistic and no half_width. They come from coarse
    values rather than from certainty, so p is that of the exact sign-flip test, 2^(1 - n) for n pairs, instead of the
    limit 0; it is 1 where all differences are 0. A pair with one common run has no p, is never real, and is not counted
    among the comparisons that Holm's method adjusts for.

    Raises:
        ValueError: a value that is NaN or infinite, two configurations without a common run, or a negative ratio.
    """
    if not (math.isfinite(test_train_ratio) and test_train_ratio >= 0):
        raise ValueError(f"test_train_ratio: {test_train_ratio} is no ratio of test to training classes, such as 1/3")
    _refuse_values(values)
    found = [_compare(values, first, second, test_train_ratio) for first, second in combinations(_by_mean(values), 2)]
    adjusted = iter(holm([row.p for row in found if row.p is not None]))
    rows = [row if row.p is None else row._replace(p_holm=next(adjusted)) for row in found]
    return [row._replace(is_real=row.p_holm is not None and row.p_holm < SIGNIFICANCE) for row in rows]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's method, in the given order: the i-th smallest of m times (m - i + 1), made monotone.

    Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def ranking_in_words(values: Runs, comparisons: Sequence[Comparison]) -> list[str]:
    """Return the ranking in sentences without a full stop, best configurations first.

    Each pair is in exactly one kind of sentence: "A is significantly better than B, C and D", or "There is no
    significant difference between B, C and D". The second kind holds for every pair that it names, and a configuration
    may be in several of them: A may not differ from B, nor B from C, where A is better than C.

    Raises:
        ValueError: two configurations of ``values`` without a comparison.
    """
    names = _by_mean(values)
    if len(names) == 1:
        return [f"{names[0]} is the only configuration"]
    rows = {frozenset((row.better, row.worse)): row for row in comparisons}
    for first, second in combinations(names, 2):
        if frozenset((first, second)) not in rows:
            raise ValueError(f"{first!r} and {second!r} are not compared. Cure: pass what compare_all returns for them")
    beaten = {name: tuple(row.worse for row in comparisons if row.is_real and row.better == name) for name in names}
    sentences = []
    for losers in dict.fromkeys(beaten[name] for name in names if beaten[name]):
        winners = [name for name in names if beaten[name] == losers]
        verb = "is" if len(winners) == 1 else "are each"
        found = f"{_listed(winners)} {verb} significantly better than {_listed(losers)}"
        sentences.append(f"{found} (Holm-adjusted p < {SIGNIFICANCE})")
    for group in _undecided_groups(names, rows):
        untested = any(rows[frozenset(pair)].p is None for pair in combinations(group, 2))
        reason = " (two configurations that share a single run cannot be tested)" if untested else ""
        sentences.append(f"There is no significant difference between {_listed(group)}{reason}")
    return sentences


def _compare(values: Runs, first: str, second: str, test_train_ratio: float) -> Comparison:
    """Return the comparison of one pair before Holm's adjustment."""
    from scipy import stats

    common = [key for key in values[first] if key in values[second]]
    num_pairs = len(common)
    if not common:
        raise ValueError(
            f"{first!r} and {second!r} have no run in common (fold and seed), so they cannot be compared. "
            "Cure: confirm both on the same folds and seeds"
        )
    differences = [values[first][key] - values[second][key] for key in common]
    mean = math.fsum(differences) / num_pairs
    # The rounding error of equal differences: 0.7 - 0.6 and 0.8 - 0.7 differ in the last places.
    rounding = 8 * 2.0**-52 * max(abs(values[name][key]) for name in (first, second) for key in common)
    if max(map(abs, differences)) <= rounding:
        mean = 0.0
    better, worse = (first, second) if mean >= 0 else (second, first)
    row = Comparison(better, worse, abs(mean), None, None, None, False, num_pairs)
    if num_pairs == 1:
        return row
    if max(differences) - min(differences) <= rounding:
        return row._replace(p=2.0 ** (1 - num_pairs) if mean else 1.0)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (num_pairs - 1)
    error = math.sqrt(variance * (1 / num_pairs + test_train_ratio))
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, num_pairs - 1))
    return row._replace(half_width=quantile * error, p=2 * float(stats.t.sf(abs(mean) / error, num_pairs - 1)))


def _undecided_groups(names: Sequence[str], rows: Mapping[frozenset[str], Comparison]) -> list[list[str]]:
    """Return groups of names without a real difference inside, which together hold every such pair."""
    covered: set[frozenset[str]] = set()
    groups = []
    for pair in combinations(names, 2):
        if rows[frozenset(pair)].is_real or frozenset(pair) in covered:
            continue
        group = list(pair)
        for name in names:
            if name not in group and not any(rows[frozenset((name, member))].is_real for member in group):
                group.append(name)
        group.sort(key=names.index)
        covered |= {frozenset(two) for two in combinations(group, 2)}
        groups.append(group)
    return groups


def _by_mean(values: Runs) -> list[str]:
    """Sort names by the mean over all their runs, best first; equal means keep the given order."""
    return sorted(values, key=lambda name: -math.fsum(values[name].values()) / len(values[name]))


def _refuse_values(values: Runs) -> None:
    for name, runs in values.items():
        if not runs:
            raise ValueError(f"{name!r} has no run. Cure: leave it out")
        for key, value in runs.items():
            if not math.isfinite(value):
                raise ValueError(f"{name!r}, run {key}: the value is {value}. Cure: leave failed runs out")


def _listed(names: Iterable[str]) -> str:
    """`A`, `A and B`, `A, B and C`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
