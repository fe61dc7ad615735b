"""What a search begins with, and the shares of its options."""

import re
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from raydml.config.trial import Balance
from raydml.search_space.points import locate, published_defaults, read_point, written_point
from raydml.search_space.published import published_recipe
from raydml.search_space.smoke import write_smoke_space
from raydml.search_space.space import SpaceError, load_space
from raydml.searchers._base import DrawnBefore
from raydml.study.draws import TrialDraws
from raydml.study.shares import Shares, reachable_best
from tests.searchers.spaces import TEXT, space_at

FIRST = "study.search.first=[{loss: {name: triplet, margin: 0.3}, miner: {name: all, tuples: triplets}}, \
{optimizer: {learning_rate: 0.002}}]"


def loss_of(drawn):
    return drawn.trial.loss.name


def test_a_search_begins_with_the_points_that_the_space_names_and_defaults_fill_them_up(tmp_path):
    first, second = (TrialDraws(space_at(tmp_path, FIRST)).draw(index).trial for index in range(2))
    assert first.loss.settings["margin"] == 0.3
    assert first.miner.settings["tuples"] == "triplets"
    # The first item of a choice; the middle of 1e-5 to 1e-2 by its logarithm; the default of the sampler.
    assert first.model.embedding_dim == 16
    assert first.optimizer.learning_rate == pytest.approx(10**-3.5, rel=1e-5)
    assert first.sampler.settings["images_per_class"] == 4
    assert second.loss.name == "margin"
    assert second.loss.settings["beta"] == 1.2, "the default of the margin loss, which the range holds"
    assert second.optimizer.learning_rate == 0.002


def test_trials_after_the_named_points_are_those_that_the_searcher_draws(tmp_path):
    with_first, without = TrialDraws(space_at(tmp_path, FIRST)), TrialDraws(space_at(tmp_path))
    assert with_first.draw(2).trial == without.draw(2).trial


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (
            "{loss: {name: triplet, margin: 0.7}}",
            r"first\.0 .*margin = 0.7 is not in \{'quniform': \[0.1, 0.5, 0.1\]\}",
        ),
        ("{loss: {name: circle}}", r"trial.loss = circle is none of margin, multi_similarity, triplet"),
        ("{optimizer: {learning_rate: 0.5}}", r"trial.optimizer.learning_rate = 0.5 is not in \{'loguniform'"),
        ("{los: {name: triplet}}", r"los is no key of a trial"),
    ],
)
def test_a_point_outside_of_the_space_is_refused_with_its_value(tmp_path, first, words):
    with pytest.raises(SpaceError, match=words):
        TrialDraws(space_at(tmp_path, f"study.search.first=[{first}]"))


def test_the_point_of_a_configuration_gives_the_configuration_again(tmp_path):
    space = space_at(tmp_path)
    for index in range(12):
        drawn = TrialDraws(space).draw(index)
        found = locate(space.trial, drawn.trial.model_dump(mode="json"))
        assert found.outside == ()
        assert found.point == drawn.point
        assert read_point(written_point(drawn.point)) == drawn.point


def test_defaults_are_of_every_domain_also_those_that_the_default_point_does_not_take(tmp_path):
    found = published_defaults(space_at(tmp_path).trial)
    by_name = {str(address[-1]): value for address, value in found.items()}
    assert by_name["epsilon"] == 0.1, "the published default of the multi-similarity miner"
    assert by_name["alpha"] == 2.0, "of the multi-similarity loss"


def balanced(folder, *overrides):
    return TrialDraws(space_at(folder, "study.search.balance={of: loss, least: 4}", *overrides))


def test_each_option_gets_its_least_number_of_trials_first(tmp_path):
    draws = balanced(tmp_path, "study.search.searcher={name: tpe, num_random: 1}")
    before, losses = [], []
    for index in range(12):
        drawn = draws.draw(index, before)
        losses.append(loss_of(drawn))
        # The worst loss for ever: without shares it would hardly be drawn again.
        before.append(DrawnBefore(drawn.point, 0.0 if losses[-1] == "margin" else 0.9, 9, True, {1: 0.0}))
    assert Counter(losses) == {"margin": 4, "triplet": 4, "multi_similarity": 4}
    for turn in range(4):
        assert len(set(losses[3 * turn : 3 * turn + 3])) == 3, "in turn, so that any prefix is fair"


def shares(folder, *, eliminate=True, rungs=(1, 3)):
    space = space_at(folder)
    return Shares(space.trial, Balance(of="loss", least=4, eliminate=eliminate), 0, rungs, 9)


def with_values(address, values_at):
    """One trial for each value at epoch 1, or values at epochs 1, 3 and 9: by the position of its option."""
    return [
        DrawnBefore({address: position}, max(pair), 9, True, dict(zip((1, 3, 9), pair, strict=False)))
        for position, values in values_at.items()
        for pair in (value if isinstance(value, tuple) else (value,) for value in values)
    ]


#: Values at epoch 1 of a weak option, two good ones, and one trial that has gained 0.05 until epoch 3.
WEAK = {0: [0.10, 0.11, 0.12, 0.13], 1: [0.5, 0.6, 0.7, (0.8, 0.85)], 2: [0.3, 0.5, 0.7, 0.6]}


def test_an_option_is_eliminated_where_the_best_of_its_further_trials_stays_below(tmp_path):
    found = shares(tmp_path)
    before = with_values(found.address, WEAK)
    # mean 0.115, s 0.01291, n = 4; the best of 10: t of 3 degrees of freedom at 0.95^(1/10); the gain of 0.05.
    reachable = 0.115 + stats.t(3).ppf(0.95**0.1) * 0.0129099 * (1 + 1 / 4) ** 0.5 + 0.05
    eliminated = found.eliminated(before, num_left=10)
    assert list(eliminated) == [0]
    assert eliminated[0].option == "margin + distance_weighted"
    assert eliminated[0].reachable == pytest.approx(reachable, rel=1e-4)
    assert eliminated[0].best == 0.85
    assert found.eliminated(before, num_left=10**9) == {}, "some of very many trials could be the best"
    assert shares(tmp_path, eliminate=False).eliminated(before, 10) == {}


def test_what_trials_gain_after_a_rung_counts(tmp_path):
    """An option behind at the first rung may win, as long as no trial has shown how little is gained after it."""
    found = shares(tmp_path)
    unknown = {**WEAK, 1: [0.5, 0.6, 0.7, 0.8]}
    assert found.eliminated(with_values(found.address, unknown), 10) == {}
    large = {**WEAK, 2: [(0.1, 0.85), 0.5, 0.7, 0.6]}
    assert 0 not in found.eliminated(with_values(found.address, large), 10), "one trial has gained 0.75"


def test_every_rung_with_enough_trials_has_to_agree(tmp_path):
    """At the second rung the option may win, because its values there are spread."""
    found = shares(tmp_path)
    others = {1: [(0.5, 0.5, 0.5), (0.6, 0.6, 0.6), (0.7, 0.7, 0.7), (0.8, 0.8, 0.8)]}
    near, spread = (
        [(0.1 + n / 100, value) for n, value in enumerate(at_3)] for at_3 in ([0.1] * 4, [0.1, 0.4, 0.7, 0.1])
    )
    assert 0 in found.eliminated(with_values(found.address, {0: near, **others}), 10)
    assert 0 not in found.eliminated(with_values(found.address, {0: spread, **others}), 10)


def test_the_bound_holds_in_19_of_20_searches():
    generator = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        values = generator.normal(0.4, 0.1, 5 + 20)
        held.append(values[5:].max() < reachable_best(list(values[:5]), 20))
    assert np.mean(held) > 0.95 - 3 * (0.95 * 0.05 / 2000) ** 0.5


def test_an_eliminated_option_is_not_drawn_any_more(tmp_path):
    draws = balanced(tmp_path, "study.search.num_trials=24")
    before = []
    for index in range(24):
        drawn = draws.draw(index, before)
        value = {"margin": 0.1, "triplet": 0.8, "multi_similarity": 0.79}[loss_of(drawn)] + index / 1000
        before.append(DrawnBefore(drawn.point, value, 9, True, {1: value, 3: value, 9: value}))
    losses = [draws.draw(index, before[:index]).trial.loss.name for index in range(24)]
    assert "margin" not in losses[12:]
    assert {"triplet", "multi_similarity"} == set(losses[12:])


@pytest.mark.parametrize(
    ("of", "words"),
    [
        ("losss", r"balance.of = 'losss': is no choice .*did you mean: loss"),
        ("optimizer.learning_rate", r"choices: model.embedding_dim, loss, miner"),
    ],
)
def test_a_balance_of_something_else_is_refused(tmp_path, of, words):
    with pytest.raises(SpaceError) as error:
        TrialDraws(space_at(tmp_path, f"study.search.balance={of}"))
    assert re.search(words, str(error.value), re.DOTALL)


UNSEARCHED = (
    "study.search.searcher={name: tpe}", "study.search.balance=loss",
    "study.search.first=[{optimizer: {learning_rate: 0.002}}]",
)  # fmt: skip


def test_a_miniature_and_a_published_recipe_search_nothing(tmp_path):
    """Their trials are fixed: points, shares and a searcher of the space would have nothing to choose from."""
    space = space_at(tmp_path, *UNSEARCHED, "study.search.num_trials=6")
    small = load_space(write_smoke_space(space, tmp_path / "smoke"))
    assert len(TrialDraws(small).known()) > 1
    firsts = TEXT
    for ends, value in {"[0.6, 1.4]": 1.2, "[4, 9]": 5, "[1.0e-5, 1.0e-2]": 1.0e-3}.items():
        firsts = firsts.replace(f"{ends}}}", f"{ends}, first: {value}}}")
    recipe = published_recipe(space_at(tmp_path, *UNSEARCHED, text=firsts), seeds=1)
    (only,) = TrialDraws(recipe).known()
    assert only.trial.optimizer.learning_rate == 0.001


@pytest.mark.parametrize(("key", "value"), [("searcher", "{name: tpe}"), ("balance", "loss")])
def test_without_validation_classes_nothing_can_be_proposed_from_results(tmp_path, key, value):
    fixed = ("trial.data.split.val_fraction=0", "study.refit={seeds: 1}", "study.search.scheduler=none")
    with pytest.raises(SpaceError, match=rf"study.search.{key} = .*proposes trials from their validation metrics"):
        space_at(tmp_path, *fixed, f"study.search.{key}={value}")
    assert space_at(tmp_path, *fixed, "study.search.searcher={name: grid}")


def test_an_option_without_a_further_configuration_leaves_its_share_to_the_others(tmp_path):
    text = TEXT.replace(
        "model: {backbone: convnet, weights: none, embedding_dim: {choice: [16, 32, 64]}}",
        "model: {backbone: convnet, weights: none, embedding_dim: 16}",
    )
    for domain, value in (
        ("{randint: [4, 9]}", "4"),
        ("{loguniform: [1.0e-5, 1.0e-2]}", "1.0e-3"),
        ("{quniform: [0.1, 0.5, 0.1]}", "0.2"),
    ):
        text = text.replace(domain, value)
    draws = TrialDraws(
        space_at(tmp_path, "study.search.balance={of: loss, least: 4}", "study.search.num_trials=20", text=text)
    )
    found = draws.known()
    assert len(found) == 20
    assert Counter(map(loss_of, found))["triplet"] == 1, "it has one configuration"


def test_shares_that_cannot_be_met_and_too_few_configurations_are_refused(tmp_path):
    with pytest.raises(SpaceError, match=r"balance.least = 8: times 3 options is more than .*: 6\n.*at most 2"):
        TrialDraws(space_at(tmp_path, "study.search.balance={of: loss, least: 8}", "study.search.num_trials=6"))
    same = """
study: {name: same, search: {num_trials: 2}}
trial:
  data: {name: digits, resize_px: 16, crop_px: 16}
  model: {backbone: convnet, weights: none}
  loss: {choice: [{name: contrastive}, {name: contrastive, positive_margin: 0.0}]}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 4}
"""
    with pytest.raises(SpaceError, match="2 trials are needed, and the space has only 1 distinct"):
        TrialDraws(space_at(tmp_path, text=same)).known()


def test_an_excluded_option_is_replaced_by_each_of_the_others(tmp_path):
    draws = balanced(tmp_path, "study.search.num_trials=60")
    before = [DrawnBefore({draws.shares.address: position}) for position in (0, 1, 2) for _ in range(4)]
    losses = Counter(loss_of(draws.draw(index, before, eliminated={0})) for index in range(12, 48))
    assert losses["margin"] == 0
    assert min(losses["triplet"], losses["multi_similarity"]) > 8
