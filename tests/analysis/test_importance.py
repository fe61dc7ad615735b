"""Importance on results whose cause the test made, and the table of two choices by hand."""

from __future__ import annotations

import numpy as np
import pytest

from raydml.analysis.importance import CrossingCell, crossing_of, importance_of
from raydml.analysis.trials import EpochReport, TrialState, parameters_of, varying
from raydml.config.recipe import flatten


def drawn(count, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {
            "rate": float(10 ** generator.uniform(-5, -2)),
            "loss": str(generator.choice(["a", "b", "c"])),
            "flip": bool(generator.integers(2)),
            "noise": float(generator.uniform()),
        }
        for _ in range(count)
    ]


NAMES = ["rate", "loss", "flip", "noise"]
OF_LOSS = {"a": 0.1, "b": 0.5, "c": 0.2}


def test_the_parameter_that_makes_the_result_has_nearly_all_the_weight():
    configs = drawn(60)
    found = importance_of(configs, [OF_LOSS[config["loss"]] for config in configs], NAMES)
    assert next(iter(found.shares)) == "loss"
    assert found.shares["loss"] > 0.95
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.r2 > 0.8
    assert found.num_trials == 60
    assert found.reason is None


def test_two_causes_share_the_weight_by_what_they_do():
    configs = drawn(200)
    values = [OF_LOSS[config["loss"]] + 0.05 * np.log10(config["rate"]) for config in configs]
    found = importance_of(configs, values, NAMES)
    # Variance of the loss term 0.029, of the rate's 0.05^2 * 0.75 = 0.0019 (uniform of width 3).
    assert list(found.shares)[:2] == ["loss", "rate"]
    assert found.shares["loss"] > 3 * found.shares["rate"] > 3 * 3 * found.shares["noise"]


def test_the_same_seed_gives_the_same_shares():
    configs = drawn(20)
    values = [OF_LOSS[config["loss"]] for config in configs]
    assert importance_of(configs, values, NAMES, seed=1) == importance_of(configs, values, NAMES, seed=1)


def test_results_that_no_parameter_explains_are_not_explained():
    configs = drawn(40)
    values = np.random.default_rng(5).uniform(size=40).tolist()
    found = importance_of(configs, values, NAMES)
    assert found.shares == {}
    assert found.r2 <= 0
    assert "no better than their mean" in found.reason


def test_a_parameter_of_one_loss_does_not_get_the_weight_of_the_loss():
    configs = drawn(60)
    for config in configs:
        if config["loss"] == "b":
            config["margin of b"] = config["noise"]
    found = importance_of(configs, [OF_LOSS[config["loss"]] for config in configs], [*NAMES, "margin of b"])
    assert found.shares["margin of b"] < 0.15
    assert found.shares["loss"] > 0.8


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.5] * 7 + [None] * 3, "7 trials with a value: at least 8 are needed"),
        ([0.5] * 7 + [float("nan")] * 3, "7 trials with a value: at least 8 are needed"),
        ([0.5] + [None] * 9, "1 trial with a value: at least 8 are needed"),
        ([0.5] * 10, "all trials have the same value"),
    ],
)
def test_too_few_values_are_a_reason(values, reason):
    found = importance_of(drawn(10), values, NAMES)
    assert (found.shares, found.reason) == ({}, reason)


def test_a_search_over_nothing_has_no_importance():
    found = importance_of([{"rate": 0.1}] * 10, list(range(10)), ["rate"])
    assert found.reason == "no parameter differs between the trials"


def trial(value, loss, method="plain", miner=None, regularizers=()):
    config = {
        "seed": 3,
        "loss": {"name": loss, "beta": 1.0},
        "method": {"name": method},
        "miner": {"name": miner} if miner else None,
        "regularizers": {name: {"weight": 0.1} for name in regularizers},
    }
    reports = {} if value is None else {1: EpochReport({"val_map_at_r": value})}
    return TrialState("search-000", "search", config=config, reports=reports, num_epochs=1, state="finished")


def test_the_two_most_varied_choices_are_crossed():
    trials = [trial(0.5, "margin"), trial(0.7, "margin"), trial(0.6, "margin"), trial(0.4, "triplet")]
    trials += [trial(0.8, "triplet", "mic"), trial(0.3, "weight", "mic"), trial(None, "arcface", "divide_conquer")]
    crossing = crossing_of(trials)
    assert (crossing.rows_of, crossing.columns_of) == ("loss", "method")
    assert crossing.rows == ["triplet", "margin", "weight"]
    assert crossing.columns == ["mic", "plain"]
    assert crossing.cells == {
        ("triplet", "mic"): CrossingCell(0.8, 0.8, 1),
        ("margin", "plain"): CrossingCell(0.7, 0.6, 3),
        ("triplet", "plain"): CrossingCell(0.4, 0.4, 1),
        ("weight", "mic"): CrossingCell(0.3, 0.3, 1),
    }


def test_a_choice_that_varies_more_comes_first_and_one_alone_is_a_column():
    trials = [trial(0.1, "margin", miner=miner) for miner in (None, "random", "all")]
    crossing = crossing_of([*trials, trial(0.2, "margin", regularizers=["rho", "mdr"])])
    assert (crossing.rows_of, crossing.columns_of) == ("miner", "regularizers")
    assert crossing.rows == ["none", "random", "all"]
    assert crossing.columns == ["mdr + rho", "none"]
    alone = crossing_of(trials)
    assert (alone.rows_of, alone.columns_of, alone.columns) == ("miner", None, [""])
    assert crossing_of([trial(0.1, "margin"), trial(0.2, "margin")]) is None
    assert crossing_of([trial(None, "margin"), trial(None, "triplet")]) is None


def test_a_setting_carries_the_name_of_its_choice():
    parameters = parameters_of(trial(0.1, "margin", miner="random", regularizers=["mdr"]).config)
    assert parameters == {
        "loss": "margin",
        "method": "plain",
        "miner": "random",
        "sampler": "none",
        "regularizers": "mdr",
        "loss.margin.beta": 1.0,
        "regularizers.mdr.weight": 0.1,
    }
    assert flatten({"a": {"b": {"c": [1]}, "d": None}, "e": {}}) == {"a.b.c": [1], "a.d": None}


def test_only_what_differs_among_those_that_have_it_varies():
    one = {"loss": "margin", "loss.margin.beta": 1.0, "epochs": 3}
    other = {"loss": "triplet", "loss.triplet.margin": 0.2, "epochs": 3}
    third = {"loss": "triplet", "loss.triplet.margin": 0.3, "epochs": 3}
    assert varying([one, other]) == ["loss"]
    assert varying([one, other, third]) == ["loss", "loss.triplet.margin"]
    assert varying([{"flag": 1}, {"flag": True}]) == ["flag"]
