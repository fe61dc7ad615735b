"""Verdicts on searches whose truth is known; curves against scipy, itertools and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from raydml.analysis.rank_stability import SETTLED_TAU, expected_best, search_stability, trials_needed

GAPS = {"triplet": 0.60, "contrastive": 0.58, "arcface": 0.56, "proxy": 0.54, "softmax": 0.52}


def simulated(num_each: int, seed: int, peaks: dict[str, float] = GAPS, dimensions: int = 2):
    """A random search, round by round: a smooth peak over each loss's hyperparameters, drawn from a cube around it."""
    generator = np.random.default_rng(seed)
    levels = list(peaks) * num_each
    distance = generator.uniform(-1, 1, (len(levels), dimensions))
    return [peaks[name] - 0.3 * float((own**2).mean()) for name, own in zip(levels, distance, strict=True)], levels


def test_many_trials_settle_the_true_ranking_and_few_do_not():
    for seed in range(5):
        found = search_stability(*simulated(80, seed), noun="losses")
        assert found.settled
        assert found.ranking == list(GAPS)
        assert found.verdict.startswith("the ranking of the 5 losses did not change over the last ")
        assert found.num_missing == 0
        few = search_stability(*simulated(5, seed))
        assert not few.settled
        assert few.num_missing != 0


def test_agreement_grows_with_the_trials():
    curves = [[tau for _, tau in search_stability(*simulated(32, seed)).subsample_tau] for seed in range(10)]
    mean = np.mean(curves, axis=0)
    assert len(mean) == 8
    assert (np.diff(mean) > 0).all()
    assert mean[0] < 0.4
    assert mean[-1] > 0.8


def test_equal_losses_are_not_ranked():
    equal = dict.fromkeys(GAPS, 0.6)
    assert not any(search_stability(*simulated(40, seed, equal)).settled for seed in range(10))


def test_the_number_of_missing_trials_is_about_right():
    """In two dimensions halves agree with 0.9 at about 37 trials of each loss (mean over many simulated searches)."""
    estimates = []
    for seed in range(21):
        found = search_stability(*simulated(24, seed))
        needed = trials_needed(24 * 5, found.subsample_tau)
        estimates.append(math.inf if needed is None else needed)
    assert 0.7 * 37 * 5 < np.median(estimates) < 1.8 * 37 * 5


def test_an_unchanged_ranking_that_depends_on_lucky_trials_is_not_settled():
    # The first trial of each decides, the others are all alike: no change since trial 2, but halves disagree.
    generator = np.random.default_rng(0)
    values = [0.9, 0.8, *generator.uniform(0.1, 0.2, 38)]
    found = search_stability(values, ["A", "B"] * 20)
    assert [tau for _, tau in found.kendall_tau] == [1.0] * 39
    assert not found.settled
    assert "two random halves of the trials rank the levels differently (Kendall's tau" in found.verdict
    assert "still changed" not in found.verdict


def test_a_ranking_that_changed_late_is_not_settled():
    # B overtakes A at trial 82 of 100, with so many high values that all halves have one.
    values = [value for number in range(50) for value in (0.5 + number / 1000, 0.4 if number < 40 else 0.9)]
    found = search_stability(values, ["A", "B"] * 50)
    assert found.subsample_tau[-1] == (50, pytest.approx(1.0, abs=0.01))
    assert not found.settled
    # 82 of 103 trials is below 80 %.
    assert found.verdict == "the ranking of the 2 levels still changed at trial 82 of 100"
    assert (found.num_missing, found.is_lower_bound) == (3, False)
    # With that many more trials and nothing new in them.
    assert search_stability([*values, 0.1, 0.1, 0.1], ["A", "B"] * 50 + ["A", "B", "A"]).settled


def test_three_trials_of_a_level_are_too_few_whatever_they_say():
    values = [0.9, 0.1] * 3
    found = search_stability(values, ["A", "B"] * 3)
    assert found.subsample_tau[-1][1] == 1.0
    assert not found.settled
    assert found.verdict == "some levels had only 3 of the 4 trials needed"
    assert (found.num_missing, found.is_lower_bound) == (2, True)
    assert search_stability([0.9, 0.1] * 4, ["A", "B"] * 4).settled


def test_curves_by_hand():
    values = [None, 0.3, 0.2, 0.4, 0.5, None, 0.1, 0.6]
    found = search_stability(values, ["A", "B", "A", "C", "A", "B", "C", "B"])
    assert found.best_so_far == [None, 0.3, 0.3, 0.4, 0.5, 0.5, 0.5, 0.6]
    assert found.ranking == ["B", "A", "C"]
    # After 4 trials C 0.4, B 0.3, A 0.2: B A right, the other two pairs wrong; after 5 A 0.5, C 0.4, B 0.3: A C right.
    assert [n for n, _ in found.kendall_tau] == [4, 5, 6, 7, 8]
    assert [tau for _, tau in found.kendall_tau] == pytest.approx([-1 / 3, -1 / 3, -1 / 3, -1 / 3, 1])


def test_tau_is_scipys_also_with_ties():
    generator = np.random.default_rng(1)
    levels = [str(name) for name in generator.integers(0, 6, 60)]
    values = [float(value) for value in generator.integers(0, 9, 60)]  # coarse, so that levels tie
    found = search_stability(values, levels)

    def best(num_trials: int) -> list[float]:
        pairs = list(zip(values, levels, strict=True))[:num_trials]
        return [max((value for value, level in pairs if level == name), default=-math.inf) for name in "012345"]

    first = next(n for n in range(1, 61) if min(best(n)) > -math.inf)
    assert [n for n, _ in found.kendall_tau] == list(range(first, 61))
    for num_trials, tau in found.kendall_tau:
        assert tau == pytest.approx(stats.kendalltau(best(num_trials), best(60)).statistic)
    assert len({tau for _, tau in found.kendall_tau}) > 3


def test_half_samples_against_all_of_them():
    """Three levels of 4, 4 and 3 trials, one failed: every way to draw two disjoint halves of 2, 2 and 1."""
    own = {"A": [0.9, 0.2, 0.3, 0.55], "B": [0.5, 0.6, 0.1, 0.4], "C": [0.7, -math.inf, 0.45]}
    halves = {
        "A": [(set(first), {0, 1, 2, 3} - set(first)) for first in itertools.combinations(range(4), 2)],
        "C": [({first}, {second}) for first, second in itertools.permutations(range(3), 2)],
    }
    halves["B"] = halves["A"]
    taus = []
    for chosen in itertools.product(*(halves[name] for name in "ABC")):
        best = [
            [max(own[name][place] for place in pair[part]) for name, pair in zip("ABC", chosen, strict=True)]
            for part in (0, 1)
        ]
        taus.append(stats.kendalltau(*(stats.rankdata(half) for half in best)).statistic)
    levels = [name for name in "ABC" for _ in own[name]]
    values = [None if math.isinf(value) else value for name in "ABC" for value in own[name]]
    found = [search_stability(values, levels, seed=seed).subsample_tau for seed in range(30)]
    assert {curve[-1][0] for curve in found} == {5}
    assert np.mean([curve[-1][1] for curve in found]) == pytest.approx(np.mean(taus), abs=0.025)  # 4 standard errors


def test_a_saturated_metric_ties_without_warnings():
    found = search_stability([1.0] * 20, ["A", "B"] * 10)
    assert {tau for _, tau in found.kendall_tau} == {1.0}
    assert found.ranking == ["A", "B"]


@pytest.mark.parametrize("num_trials", [1, 2, 3, 5, 6])
def test_expected_best_is_the_mean_over_all_subsets(num_trials):
    values = [0.3, 0.1, 0.7, 0.7, 0.2, 0.5]
    subsets = [max(subset) for subset in itertools.combinations(values, num_trials)]
    assert expected_best(values, num_trials) == pytest.approx(np.mean(subsets))


def test_what_the_second_half_is_worth():
    # Best of two of 0.1, 0.2, 0.3, 0.4: 0.2, 0.3 twice, 0.4 three times: 2/6; 0.4 - 0.3333.
    found = search_stability([0.2, 0.4, 0.1, 0.3], ["A", "B", "A", "B"])
    assert found.remark == "With half of the trials, the best value would on average be 0.0667 lower."


def test_trials_needed_is_the_spearman_brown_formula_without_a_curve():
    for tau in (0.7, 0.8, 0.89):
        factor = trials_needed(1000, [(500, tau)]) / 1000
        rho = math.sin(math.pi / 2 * tau)
        raised = factor * rho / (1 + (factor - 1) * rho)
        assert 2 / math.pi * math.asin(raised) == pytest.approx(SETTLED_TAU, abs=1e-4)
    assert trials_needed(1000, [(500, 0.95)]) == 1000


def test_trials_needed_follows_a_steeper_curve():
    # Odds that grow with the square of the trials; by hand: from odds 20 at half of 100 to 80.24 takes 2.003 times as
    # many. rho = sin(0.45 pi) = 0.98769, so its odds are 80.22.
    curve = [(n, 2 / math.pi * math.asin(1 / (1 + 1 / (20 * (n / 50) ** 2)))) for n in (15, 25, 40, 50)]
    assert trials_needed(100, curve) == 201


@pytest.mark.parametrize("tau", [-0.4, 0.0, 0.04, 0.5])
def test_nothing_is_extrapolated_from_too_little_agreement(tau):
    assert trials_needed(100, [(50, tau)]) is None


@pytest.mark.parametrize(
    ("values", "levels", "ranking", "words", "remark"),
    [
        ([], [], [], "no trial has a value", ""),
        ([None, None], ["A", "B"], [], "no trial has a value", ""),
        ([0.5], ["A"], ["A"], "the trials do not differ in their levels", ""),
        (
            [0.5, None, 0.7],
            ["A", "B", "A"],
            ["A"],
            "only one of the levels has a value (A)",
            "With half of the trials, the best value would on average be 0.1000 lower. No trial of B has a value.",
        ),
    ],
)
def test_where_there_is_nothing_to_rank(values, levels, ranking, words, remark):
    found = search_stability(values, levels)
    assert (found.ranking, found.settled, found.verdict, found.remark) == (ranking, False, words, remark)
    assert found.num_missing is None
    assert found.kendall_tau == found.subsample_tau == []
    assert len(found.best_so_far) == len(values)


def test_one_trial_of_each_has_no_halves():
    found = search_stability([0.5, 0.6, 0.4], ["A", "B", "C"], noun="methods")
    assert found.ranking == ["B", "A", "C"]
    assert found.kendall_tau == [(3, 1.0)]
    assert found.subsample_tau == []
    assert found.verdict == (
        "some methods had only 1 of the 4 trials needed, and the ranking of the 3 methods still changed at trial 3 of 3"
    )
    assert (found.num_missing, found.is_lower_bound) == (9, True)


def test_a_level_that_never_has_a_value_is_named_and_not_ranked():
    values, levels = simulated(80, 0)
    values, levels = [*values, None, None], [*levels, "broken", "broken"]
    found = search_stability(values, levels)
    assert found.settled
    assert found.ranking == list(GAPS)
    assert found.remark.endswith(" No trial of broken has a value.")


def test_the_seed_alone_decides():
    search = simulated(10, 3)
    assert search_stability(*search, seed=1) == search_stability(*search, seed=1)
    assert search_stability(*search, seed=1).subsample_tau != search_stability(*search, seed=2).subsample_tau


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="2 values but 1 levels"):
        search_stability([0.1, 0.2], ["A"])
    with pytest.raises(ValueError, match="trial 1 has the value nan"):
        search_stability([0.1, math.nan], ["A", "B"])
    with pytest.raises(ValueError, match="num_trials: 3"):
        expected_best([0.1, 0.2], 3)
