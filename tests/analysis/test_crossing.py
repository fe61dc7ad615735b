"""Which two choices are crossed and what the cells hold, by hand; and the parameters of trials."""

from __future__ import annotations

from raydml.analysis.crossing import Cell, crossing_of
from raydml.analysis.trial_history import TrialHistory, flattened, parameters_of, varying


def trial(value, loss, method="plain", miner=None, regularizers=()):
    config = {
        "seed": 3,
        "loss": {"name": loss, "beta": 1.0},
        "method": {"name": method},
        "miner": {"name": miner} if miner else None,
        "regularizers": {name: {"weight": 0.1} for name in regularizers},
    }
    return TrialHistory("search-000", "search", "", config, {}, value, None, "finished")


def test_the_two_most_varied_choices_are_crossed():
    trials = [trial(0.5, "margin"), trial(0.7, "margin"), trial(0.6, "margin"), trial(0.4, "triplet")]
    trials += [trial(0.8, "triplet", "mic"), trial(0.3, "weight", "mic"), trial(None, "arcface", "divide_conquer")]
    crossing = crossing_of(trials)
    assert (crossing.rows_of, crossing.columns_of) == ("loss", "method")
    assert crossing.rows == ["triplet", "margin", "weight"]
    assert crossing.columns == ["mic", "plain"]
    assert crossing.cells == {
        ("triplet", "mic"): Cell(0.8, 0.8, 1),
        ("margin", "plain"): Cell(0.7, 0.6, 3),
        ("triplet", "plain"): Cell(0.4, 0.4, 1),
        ("weight", "mic"): Cell(0.3, 0.3, 1),
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
    assert flattened({"a": {"b": {"c": [1]}, "d": None}, "e": {}}) == {"a.b.c": [1], "a.d": None}


def test_only_what_differs_among_those_that_have_it_varies():
    one = {"loss": "margin", "loss.margin.beta": 1.0, "epochs": 3}
    other = {"loss": "triplet", "loss.triplet.margin": 0.2, "epochs": 3}
    third = {"loss": "triplet", "loss.triplet.margin": 0.3, "epochs": 3}
    assert varying([one, other]) == ["loss"]
    assert varying([one, other, third]) == ["loss", "loss.triplet.margin"]
    assert varying([{"flag": 1}, {"flag": True}]) == ["flag"]
