"""The simulated studies of benchmarks/search.py, against slow loops and cases by hand."""

import importlib
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from scipy.stats import kendalltau

from raydml.search_space.points import domains_of
from raydml.search_space.space import sample_trials

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RATE = ("optimizer", "learning_rate")


class Modules(NamedTuple):
    """The files of the benchmark."""

    search: ModuleType
    simulated_study: ModuleType
    search_surrogate: ModuleType
    search_table: ModuleType


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield Modules(*map(importlib.import_module, Modules._fields))


@pytest.fixture(scope="module")
def space(modules):
    return modules.search_table.space_of("grocery")


def run(modules, space, curves, scheduler, num_slots, draws=None):
    """Run a study whose trials report these curves, in the order in which they are drawn."""
    remaining = iter(curves)
    return modules.simulated_study.SimulatedStudy(
        draws=draws or modules.simulated_study.draws_of(space, "random", 0, len(curves)),
        curve_of=lambda _point: next(remaining),
        scheduler=scheduler,
        num_trials=len(curves),
        num_slots=num_slots,
    ).run()


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_without_a_scheduler_the_slots_go_through_all_trials(modules, space, num_slots):
    lengths = [3, 1, 4, 1, 5, 2, 2]
    curves = [[index + epoch / 10 for epoch in range(1, length + 1)] for index, length in enumerate(lengths)]
    waiting, slots, expected = list(range(len(lengths))), [None] * num_slots, []
    left = list(lengths)
    for time in itertools.count(1):
        for slot in range(num_slots):
            if slots[slot] is None and waiting:
                slots[slot] = waiting.pop(0)
        for slot, index in enumerate(slots):
            if index is None:
                continue
            left[index] -= 1
            epoch = lengths[index] - left[index]
            expected.append((time, index, epoch, index + epoch / 10))
            if not left[index]:
                slots[slot] = waiting.pop(0) if waiting else None
        if not any(left):
            break
    study = run(modules, space, curves, modules.simulated_study.InOrder(), num_slots)
    assert [report[:4] for report in study.reports] == expected


def halving(modules, name, num_trials):
    """A scheduler with rungs at 1 and 2 epochs, of which every other trial goes on."""
    arguments = {"metric": "val_map_at_r", "max_epochs": 4, "grace_epochs": 1, "reduction_factor": 2, "history": {}}
    if name != "asha":
        arguments["keys"] = [modules.simulated_study.key_of(index) for index in range(num_trials)]
    if name == "sync":
        arguments["ended"] = []
    classes = {"asha": "Asha", "sync": "SyncHalving", "promotion": "Promotion"}
    return getattr(modules.simulated_study, classes[name])(**arguments)


def test_asha_stops_what_is_below_the_median_of_those_before(modules, space):
    study = run(modules, space, [[v] * 4 for v in (0.2, 0.1, 0.3, 0.1)], halving(modules, "asha", 4), 1)
    # 0.2 has nobody before it; 0.1 is below it; 0.3 is above all; 0.1 is below the median, which is 0.2.
    assert [trial.epoch for trial in study.trials] == [4, 1, 4, 1]
    assert [report.num_drawn for report in study.reports] == [1, 1, 1, 1, 2, 3, 3, 3, 3, 4]


def test_synchronous_halving_waits_for_all_trials(modules, space):
    study = run(modules, space, [[v] * 4 for v in (0.2, 0.1, 0.3, 0.4)], halving(modules, "sync", 4), 2)
    assert [trial.epoch for trial in study.trials] == [1, 1, 2, 4]
    reports = [(report.time, report.index, report.epoch) for report in study.reports]
    assert reports == [(1, 0, 1), (1, 1, 1), (2, 2, 1), (2, 3, 1), (3, 3, 2), (3, 2, 2), (4, 3, 3), (5, 3, 4)]


def test_promotion_lets_the_best_go_on_when_a_slot_is_free(modules, space):
    study = run(modules, space, [[v] * 4 for v in (0.2, 0.1, 0.3, 0.4)], halving(modules, "promotion", 4), 1)
    # 0.2 waits until a second trial is there, and waits again after 2 epochs. 0.3 and 0.4 are the best of each rung
    # when they reach it, and go on without a pause.
    order = [(report.index, report.epoch) for report in study.reports]
    assert order[:3] == [(0, 1), (1, 1), (0, 2)]
    assert order[3:] == [(index, epoch) for index in (2, 3) for epoch in (1, 2, 3, 4)]


def test_a_searcher_sees_what_has_been_reported_until_then(modules, space):
    seen = []

    class Listening:
        def __init__(self):
            self.draws = modules.simulated_study.draws_of(space, "random", 0, 3)

        def draw(self, index, before, taken):
            seen.append([(one.value, one.num_epochs, one.has_result, dict(one.curve)) for one in before])
            assert len(taken) == len({one.point[RATE] for one in before}) == index
            return self.draws.draw(index, before, taken)

    curves = [[0.3, 0.1, 0.2], [0.5], [0.7, 0.6]]
    run(modules, space, curves, modules.simulated_study.InOrder(), 2, Listening())
    assert seen == [[], [(None, 0, False, {})], [(0.3, 1, False, {1: 0.3}), (0.5, 1, True, {1: 0.5})]]


def test_random_search_draws_the_trials_of_a_study(modules, space):
    study = run(modules, space, [[0.1]] * 3, modules.simulated_study.InOrder(), 1)
    search = space.study.search.model_copy(update={"num_trials": 3})
    settings = space.study.model_copy(update={"seed": 0, "search": search})
    assert [trial.drawn.trial for trial in study.trials] == sample_trials(replace(space, study=settings))


def test_the_choice_follows_what_was_reported_and_has_the_value_without_noise(modules):
    report = modules.simulated_study.Report
    reports = [report(1, 0, 1, 0.3, 2), report(1, 1, 1, 0.2, 2), report(2, 0, 2, 0.1, 2), report(2, 1, 2, 0.6, 2)]
    reports += [report(3, 2, 1, 0.7, 3)]
    points = [{modules.search.LOSS: loss} for loss in (0, 1, 0)]
    found = modules.search.outcome(reports, points, truths=[0.25, 0.5, 0.4], best=[0.9, 0.8])
    assert found.chosen.tolist() == [0.25, 0.25, 0.25, 0.5, 0.4]
    assert found.top.tolist() == [0.25, 0.5, 0.5, 0.5, 0.5]
    # Loss 0 leads after the first epoch, and again for good when the third trial is there.
    assert found.ranked_after == 3


def test_tau_is_that_of_scipy(modules):
    generator = np.random.default_rng(0)
    for _ in range(20):
        first, second = generator.permutation(7), generator.permutation(7)
        assert modules.search.tau(first, second) == pytest.approx(kendalltau(first, second)[0])
    assert modules.search.tau([1.0, -np.inf, -np.inf], [3.0, 2.0, 1.0]) == pytest.approx(2 / 3)


def test_epochs_to_a_value(modules):
    assert modules.search.epochs_to(0.5, [0.1, 0.6, 0.4, 0.5, 0.7]) == 2
    assert modules.search.epochs_to(0.8, [0.1, 0.6]) is None


def test_quartiles_keep_the_last_value_of_a_study_that_is_over(modules):
    curves = [np.array(values) for values in ([1.0], [2.0, 4.0], [3.0, 5.0, 9.0])]
    low, median, high = modules.search.quartiles(curves)
    assert median == [2.0, 4.0, 4.0]
    assert (low[2], high[2]) == (2.5, 6.5)


def test_coordinates_of_a_point(modules, space):
    coordinates = modules.search_surrogate.Coordinates(space)
    domains = dict(domains_of(space.trial))
    rate = domains[RATE]
    point = {RATE: (rate.low * rate.high) ** 0.5, ("loss, miner",): 4}
    row = coordinates(point)
    sizes = [len(domain.items) if hasattr(domain, "items") else 1 for domain in domains.values()]
    begins = dict(zip(domains, np.cumsum([0, *sizes]), strict=False))
    assert len(row) == sum(sizes)
    assert row[begins[RATE]] == pytest.approx(0.5)
    losses = row[begins["loss, miner",] :][: len(domains["loss, miner",].items)]
    assert losses.tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert row[begins["loss, miner", 4, "loss", "temperature"]] == -1
