"""What every searcher must do: valid configurations, none twice, and the same ones for the same seed and results."""

import math

import pytest

from raydml import registry
from raydml.config.trial import fingerprint
from raydml.searchers._base import DrawnBefore
from raydml.study.draws import TrialDraws
from tests.searchers.spaces import space_at, with_searcher

SEARCHERS = registry.names("searchers")
#: How many draws of each are checked, where a draw takes long.
NUM_DRAWS = {"gp": 12, "tpe": 40}


def result_of(index, drawn):
    """A made-up result: the learning rate counts, and every seventh trial has diverged."""
    if index % 7 == 6:
        return DrawnBefore(drawn.point, None, 1, True)
    value = 0.5 - 0.1 * abs(math.log10(drawn.trial.optimizer.learning_rate) + 3.5)
    return DrawnBefore(drawn.point, value, 9, True, {1: value / 2, 3: value * 0.8, 9: value})


def drawn_by(draws, num_draws, before=(), *, running=0):
    """The trials of a search; as many of the newest as `running` have no result when the next one is drawn."""
    found, results, taken = [], list(before), set()
    for index in range(len(results), num_draws):
        known = [DrawnBefore(one.point) if place >= index - running else one for place, one in enumerate(results)]
        drawn = draws.draw(index, known, taken)
        assert drawn is not None
        taken.add(fingerprint(drawn.trial))
        found.append(drawn)
        results.append(result_of(index, drawn))
    return found, results


@pytest.mark.parametrize("name", SEARCHERS)
def test_its_draws_are_valid_and_none_is_drawn_twice(tmp_path, name):
    num_draws = NUM_DRAWS.get(name, 300)
    draws = TrialDraws(with_searcher(tmp_path, name, f"study.search.num_trials={num_draws}"))
    found, _ = drawn_by(draws, num_draws, running=2)  # each trial was validated when it was made
    assert len({fingerprint(drawn.trial) for drawn in found}) == num_draws
    assert {drawn.trial.loss.name for drawn in found} == {"margin", "triplet", "multi_similarity"}
    for drawn in found:
        assert 4 <= drawn.trial.sampler.settings["images_per_class"] < 9
        if drawn.trial.loss.name == "triplet":
            assert drawn.trial.loss.settings["margin"] in (0.1, 0.2, 0.3, 0.4, 0.5)
        rate = drawn.trial.optimizer.learning_rate
        assert rate == float(f"{rate:.6g}")


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_searcher_that_begins_anew_goes_on_as_the_first_one_would_have(tmp_path, name):
    space = with_searcher(tmp_path, name, "study.search.num_trials=16")
    found, results = drawn_by(TrialDraws(space), 16)
    for num_known in (3, 12):
        again, _ = drawn_by(TrialDraws(space), 16, results[:num_known])
        assert [fingerprint(one.trial) for one in again] == [fingerprint(one.trial) for one in found[num_known:]]


@pytest.mark.parametrize("name", SEARCHERS)
def test_another_seed_gives_other_trials(tmp_path, name):
    first, other = (drawn_by(TrialDraws(with_searcher(tmp_path, name, f"study.seed={seed}")), 12)[0] for seed in (0, 1))
    assert {fingerprint(one.trial) for one in first} != {fingerprint(one.trial) for one in other}


@pytest.mark.parametrize("name", SEARCHERS)
def test_what_it_says_needs_no_result_needs_none(tmp_path, name):
    """Results that are the opposite change no trial before the first that may depend on them, and change later ones."""
    draws = TrialDraws(with_searcher(tmp_path, name, "study.search.num_trials=14"))
    found, results = drawn_by(draws, 14)

    def opposite(one):
        return one if one.value is None else one._replace(value=1 - one.value)

    same = []
    for index in range(14):
        again = draws.draw(index, [opposite(one) for one in results[:index]])
        same.append(fingerprint(again.trial) == fingerprint(found[index].trial))
    assert all(same[: draws.num_known])
    assert draws.can_adapt == (not all(same))


def test_random_draws_are_those_of_a_search_without_a_searcher(tmp_path):
    """Studies from before there were searchers go on with the trials that they have."""
    from raydml.search_space.space import sample_trials

    space = space_at(tmp_path, "study.search.num_trials=20")
    assert "searcher" not in space.study.model_dump(mode="json")["search"]
    assert [drawn.trial for drawn in TrialDraws(space).known()] == sample_trials(space)


@pytest.mark.parametrize("name", ["tpe", "priors"])
def test_a_diverged_trial_counts_as_a_bad_one(tmp_path, name):
    """Where all trials with a high learning rate have diverged, few further ones have it."""
    draws = TrialDraws(with_searcher(tmp_path, name, "study.search.num_trials=60", "study.seed=2"))
    before = []
    for index in range(30):
        drawn = draws.draw(index, before)
        rate = drawn.trial.optimizer.learning_rate
        value = None if rate > 3e-4 else 0.5 + 0.01 * math.log10(rate)
        before.append(DrawnBefore(drawn.point, value, 1, True))
    later = [draws.draw(index, before).trial.optimizer.learning_rate for index in range(30, 50)]
    high = sum(rate > 3e-4 for rate in later)
    # Of random draws, half. As good ones, tpe would draw 20 of them.
    assert high <= (8 if name == "tpe" else 12)
