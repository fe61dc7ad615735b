"""Whether a search had enough trials: would another one rank the compared choices (losses, methods) alike?

A level is one value of the compared choice, ranked by the best of its trials. Three questions are answered.

1. Does the ranking still change? Kendall's tau-b (Kendall 1945) between the ranking by the first n trials and the one
   by all of them. It ends at 1 by construction, so only the share of trials since the last change counts.
2. Would another search agree? Every level's trials are split at random into two halves, and tau is taken between the
   rankings by each half; a mean over many splits (split-half reliability, Spearman 1910, Brown 1910). The same with
   smaller parts shows how agreement grows with trials. No trial is in both parts, so this is not circular.
3. What is a further trial worth? The best value minus the expected best of half as many trials (Dodge et al. 2019,
   "Show Your Work", in the unbiased form without replacement of Tang et al. 2020, "Showing Your Work Doesn't Always
   Work").

The number of missing trials is extrapolated from the curve of question 2. Tau is converted to a correlation, rho =
sin(pi/2 tau) (Greiner). Its odds rho / (1 - rho), the ratio of the levels' true variance to that of the error, grow as
a power of the number of trials. Power 1 is the Spearman-Brown formula; the best of n random draws near a smooth peak in
d searched dimensions has power 4/d; so the power is fitted to the curve, between 1 and 4. In simulated searches (5
losses; 1, 2, 3, 4 and 6 dimensions) with half of the trials that they needed, the median estimate was 1.9, 1.5, 1.2,
1.2 and 1.2 times the truth, and half of the estimates were between 0.7 and 4 times (7 in one dimension).

How reliable "settled" is: five equally good losses were called settled in none of 240 simulated searches, two equally
good ones in 19, because one of two is easily ahead in both halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SETTLED_TAU = 0.9  # of 5 levels, the order of one of the ten pairs may be random
SETTLED_SHARE = 0.2  # the last trials, as a share of all, in which the ranking may not change
MIN_TRIALS = 4  # of every level: two in each half
MAX_FACTOR = 10  # the largest factor of missing trials that is reported; a larger one is a guess

_NUM_SPLITS = 200
_LEAST_TAU = 0.05  # nothing is extrapolated from less agreement
_NUM_SIZES = 8  # parts of 1/16, 2/16, ... 8/16 of the trials

_Scores = NDArray[np.float64]  # (N,) values in trial order, -inf for a trial without one


class SearchStability(NamedTuple):
    """The verdict on a search, and the curves behind it.

    num_missing: how many more trials it needs; 0 for a settled search, None where nothing can be said. is_lower_bound:
    whether it needs at least that many. verdict: the reasons, in one sentence without its full stop. remark: what more
    trials would bring, as a sentence, or "".
    """

    best_so_far: list[float | None]  # after each trial; None before the first value
    kendall_tau: list[tuple[int, float]]  # first n trials against all, from where every ranked level has a value
    subsample_tau: list[tuple[int, float]]  # two disjoint random parts of n trials each; the last are halves
    ranking: list[str]  # levels with a value, best first; equal ones in order of appearance
    settled: bool
    verdict: str
    num_missing: int | None = 0
    is_lower_bound: bool = False
    remark: str = ""


def search_stability(
    values: Sequence[float | None], levels: Sequence[str], *, seed: int = 0, noun: str = "levels"
) -> SearchStability:
    """Judge a search by its trials in order. The larger value is the better one.

    values: the selection metric of each trial; None counts as a trial that found nothing.
    levels: the level of each trial. noun: the plural of what the levels are, for the verdict ("losses").

    A level none of whose trials has a value is not ranked; the verdict names it. A search is settled if at least two
    levels are ranked, each by at least `MIN_TRIALS` trials, if halves agree with at least `SETTLED_TAU`, and if the
    ranking did not change in the last `SETTLED_SHARE` of the trials.

    Raises ValueError for lengths that differ, or a value that is NaN or infinite.
    """
    if len(values) != len(levels):
        raise ValueError(f"{len(values)} values but {len(levels)} levels; each trial needs one of both.")
    for index, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"trial {index} has the value {value}; pass None for a trial without one.")
    scores = np.array([-np.inf if value is None else value for value in values])
    so_far = [None if np.isinf(best) else float(best) for best in np.maximum.accumulate(scores)]
    valued = {level for value, level in zip(values, levels, strict=True) if value is not None}
    names = [name for name in dict.fromkeys(levels) if name in valued]
    level_of = np.array([names.index(name) if name in names else -1 for name in levels], dtype=np.int64)
    best = _best_of_levels(scores, level_of, len(names))
    ranking = [names[index] for index in np.argsort(-best, kind="stable")]
    remark = _remark(values, [name for name in dict.fromkeys(levels) if name not in valued])
    if len(names) < 2:
        reason = f"only one of the {noun} has a value ({names[0]})" if names else "no trial has a value"
        if names and len(set(levels)) == 1:
            reason = f"the trials do not differ in their {noun}"
        return SearchStability(so_far, [], [], ranking, False, reason, None, False, remark)
    prefix, unchanged_from = _prefix_tau(scores, level_of, len(names))
    parts = _subsample_tau(scores, level_of, len(names), np.random.default_rng(seed))
    fewest = int(np.bincount(level_of[level_of >= 0]).min())
    verdict, num_missing = _verdict(len(values), unchanged_from, fewest, parts, f"{len(names)} {noun}")
    is_lower_bound = fewest < MIN_TRIALS
    return SearchStability(
        so_far, prefix, parts, ranking, num_missing == 0, verdict, num_missing, is_lower_bound, remark
    )


def expected_best(values: Sequence[float], num_trials: int) -> float:
    """Return the expected best of ``num_trials`` of the values, drawn at random without replacement.

    The mean over all subsets of that size (Tang et al. 2020): the i-th smallest of N values is the largest
    of a subset of n with probability C(i - 1, n - 1) / C(N, n). Raises ValueError unless 1 <= num_trials <= N.
    """
    if not 1 <= num_trials <= len(values):
        raise ValueError(f"num_trials: {num_trials} is not between 1 and the number of values, {len(values)}.")
    weight, expected = num_trials / len(values), 0.0
    for place, value in zip(range(len(values), 0, -1), sorted(values, reverse=True), strict=True):
        expected += weight * value
        weight *= (place - num_trials) / (place - 1) if place > 1 else 0.0
    return expected


def trials_needed(num_trials: int, curve: Sequence[tuple[int, float]]) -> int | None:
    """Estimate the total number of trials with which halves agree with `SETTLED_TAU`.

    curve: ``SearchStability.subsample_tau``, halves last. None where halves do not agree at all, or where more than
    `MAX_FACTOR` times as many trials would be needed.
    """
    size, tau = curve[-1]
    if tau < _LEAST_TAU:
        return None
    # Smaller parts show how fast agreement grows; much smaller ones follow another law, and without agreement there
    # are no odds.
    used = [(n, own) for n, own in curve if own >= _LEAST_TAU and 4 * n >= size]
    log_size, log_odds = [math.log(n) for n, _ in used], [math.log(_odds(own)) for _, own in used]
    power = float(np.polyfit(log_size, log_odds, 1)[0]) if len(used) >= 3 else 1.0
    factor = (_odds(SETTLED_TAU) / _odds(tau)) ** (1 / min(max(power, 1.0), 4.0))
    return None if factor > MAX_FACTOR else max(num_trials, math.ceil(factor * num_trials))


def _odds(tau: float) -> float:
    """Return rho / (1 - rho) of the correlation rho of two rankings that agree with tau."""
    rho = math.sin(math.pi / 2 * min(tau, 0.995))  # finite odds where halves agree entirely
    return rho / (1 - rho)


def _verdict(
    num_trials: int, unchanged_from: int, fewest: int, parts: list[tuple[int, float]], what: str
) -> tuple[str, int | None]:
    """Return the reasons of the verdict in words, and how many trials are missing: 0 where the search is settled."""
    half_tau = parts[-1][1] if parts else None
    problems: list[str] = []
    needed: list[int | None] = [num_trials]
    noun = what.partition(" ")[2]
    if fewest < MIN_TRIALS:
        problems.append(f"some {noun} had only {fewest} of the {MIN_TRIALS} trials needed")
        needed.append(math.ceil(num_trials * MIN_TRIALS / fewest))
    if half_tau is not None and half_tau < SETTLED_TAU:
        problems.append(f"two random halves of the trials rank the {noun} differently (Kendall's tau {half_tau:.2f})")
        needed.append(trials_needed(num_trials, parts))
    if num_trials - unchanged_from < SETTLED_SHARE * num_trials:
        problems.append(f"the ranking of the {what} still changed at trial {unchanged_from} of {num_trials}")
        needed.append(math.ceil(unchanged_from / (1 - SETTLED_SHARE)))
    if problems:
        *others, last = problems
        return (f"{', '.join(others)}, and {last}" if others else last), _missing(num_trials, needed)
    share = 100 * (num_trials - unchanged_from) // num_trials
    return (
        f"the ranking of the {what} did not change over the last {share} % of the trials, and two random halves of "
        f"the trials agree on it (Kendall's tau {half_tau:.2f})"
    ), 0


def _missing(num_trials: int, needed: Sequence[int | None]) -> int | None:
    """Return how many more trials are needed, rounded up to the two digits that the extrapolation is good for."""
    known = [number for number in needed if number is not None]
    if len(known) < len(needed):
        return None
    missing = max(1, max(known) - num_trials)
    unit = 10 ** max(0, len(str(missing)) - 2)
    return math.ceil(missing / unit) * unit


def _remark(values: Sequence[float | None], without_value: Sequence[str]) -> str:
    found = [value for value in values if value is not None]
    remarks = []
    if len(found) > 1:
        gain = max(found) - expected_best(found, len(found) // 2)
        remarks.append(f"With half of the trials, the best value would on average be {gain:.4f} lower.")
    if without_value and found:
        remarks.append(f"No trial of {', '.join(without_value)} has a value.")
    return " ".join(remarks)


def _prefix_tau(scores: _Scores, level_of: NDArray[np.int64], num_levels: int) -> tuple[list[tuple[int, float]], int]:
    """Return Kendall's tau of the first n trials against all, and the n from which on the ranking is the final one."""
    final = _order(_best_of_levels(scores, level_of, num_levels))
    best = np.full(num_levels, -np.inf)
    taus: list[tuple[int, float]] = []
    unchanged_from = 1
    for num_trials, (score, level) in enumerate(zip(scores, level_of, strict=True), start=1):
        if level >= 0:
            best[level] = max(best[level], score)
        order, complete = _order(best), not np.isinf(best).any()
        if complete:
            taus.append((num_trials, float(_tau(order, final))))
        if not complete or not np.array_equal(order, final):
            unchanged_from = num_trials + 1
    return taus, unchanged_from


def _subsample_tau(
    scores: _Scores, level_of: NDArray[np.int64], num_levels: int, generator: np.random.Generator
) -> list[tuple[int, float]]:
    """Return (size, mean tau) of two disjoint random parts, each with the same share of every level's trials.

    Empty where a level has a single trial, which cannot be in both parts.
    """
    places = [np.flatnonzero(level_of == level) for level in range(num_levels)]
    # Part k of the sizes, for every level; equal totals (few trials) once.
    sizes = [[max(1, len(own) * part // (2 * _NUM_SIZES)) for own in places] for part in range(1, _NUM_SIZES + 1)]
    by_total = {
        sum(size): size for size in sizes if all(2 * n <= len(own) for n, own in zip(size, places, strict=True))
    }
    shuffled = [generator.permuted(np.tile(own, (_NUM_SPLITS, 1)), axis=1) for own in places]
    taus = []
    for total, size in sorted(by_total.items()):
        parts = [(own[:, :n], own[:, n : 2 * n]) for own, n in zip(shuffled, size, strict=True)]
        first, second = (np.stack([scores[part[half]].max(axis=1) for part in parts], axis=1) for half in (0, 1))
        taus.append((total, float(_tau(_order(first), _order(second)).mean())))
    return taus


def _best_of_levels(scores: _Scores, level_of: NDArray[np.int64], num_levels: int) -> _Scores:
    """Return the best score (L,) of each level; -inf for a level without one."""
    best = np.full(num_levels, -np.inf)
    ranked = level_of >= 0
    np.maximum.at(best, level_of[ranked], scores[ranked])
    return best


def _order(best: _Scores) -> NDArray[np.int64]:
    """Compare all pairs of levels (..., L) as (..., L, L): 1 the row's is better, -1 the column's, 0 equal."""
    # Not by subtraction: two levels without a score are equal, but -inf - -inf is NaN.
    row, column = best[..., :, None], best[..., None, :]
    return (row > column).astype(np.int64) - (row < column)


def _tau(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return Kendall's tau-b (...) of orders (..., L, L); 1 if both have only equal levels, 0 if one has."""
    num_first, num_second = (np.abs(order).sum(axis=(-2, -1)) for order in (first, second))
    agreement, scale = (first * second).sum(axis=(-2, -1)), np.sqrt(num_first * num_second)
    return np.where(scale > 0, agreement / np.maximum(scale, 1), num_first == num_second)
