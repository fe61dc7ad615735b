"""Importance on results whose cause is known, because the test made them."""

from __future__ import annotations

import numpy as np
import pytest

from raydml.analysis.importance import importance_of


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


def test_a_parameter_of_one_loss_does_not_stand_in_for_the_loss():
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
def test_too_little_to_learn_from_is_said(values, reason):
    found = importance_of(drawn(10), values, NAMES)
    assert (found.shares, found.reason) == ({}, reason)


def test_a_search_over_nothing_has_no_importance():
    found = importance_of([{"rate": 0.1}] * 10, list(range(10)), ["rate"])
    assert found.reason == "no parameter differs between the trials"
