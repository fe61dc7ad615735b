"""Promotion against the algorithm as it is written down (Li et al. 2020, Algorithm 2), in a simulated Tune."""

import math
import pickle
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydml.study.promotion import Pasha, Promotion, distances_of_crossing, is_same_ranking

METRIC = "val_map_at_r"
SETTINGS = {"metric": METRIC, "max_epochs": 9, "grace_epochs": 1, "reduction_factor": 3}


class SlowAsha:
    """`get_job` of the paper, looking at everything each time. top: the highest rung that may be left."""

    def __init__(self, keys, rungs, factor):
        self.keys, self.factor = keys, factor
        self.values = [{} for _ in rungs]
        self.promoted = [set() for _ in rungs]

    def candidates(self, rung):
        order = sorted(self.values[rung], key=lambda key: (-self.values[rung][key], self.keys.index(key)))
        return order[: len(order) // self.factor]

    def promotable(self):
        for rung in reversed(range(len(self.values))):
            for key in self.candidates(rung):
                if key not in self.promoted[rung]:
                    return key, rung
        return None


class SimulatedTune:
    """As many trials run at once as there are slots; each reports its epochs, and waits or ends as the scheduler says.

    value: (key, epoch) -> value. log: (what, key) in order.
    """

    def __init__(self, scheduler, keys, value, *, num_slots, order, max_epochs=9, epochs=None):
        self.scheduler, self.value, self.order, self.max_epochs = scheduler, value, order, max_epochs
        self.log, self.waiting, self.num_slots = [], list(keys), num_slots
        self.epochs = dict(epochs or {})
        self.trials = {}
        self.search_alg = SimpleNamespace(is_finished=lambda: not self.waiting)

    def add(self, key):
        self.trials[key] = SimpleNamespace(
            trial_id=f"id-{key}", config={"run": {"key": key}}, PENDING="PENDING", PAUSED="PAUSED", status="PENDING",
        )  # fmt: skip
        self.scheduler.on_trial_add(self, self.trials[key])

    def stop_trial(self, trial):
        self.log.append(("stopped", trial.config["run"]["key"]))
        trial.status = "TERMINATED"
        self.scheduler.on_trial_remove(self, trial)

    def with_status(self, status):
        return [key for key, trial in self.trials.items() if trial.status == status]

    def run(self, limit=10_000):
        for _ in range(limit):
            if not self.with_status("PENDING") and self.waiting:
                self.add(self.waiting.pop(0))
            while len(self.with_status("RUNNING")) < self.num_slots:
                chosen = self.scheduler.choose_trial_to_run(self)
                if chosen is None:
                    break
                assert chosen.status in ("PENDING", "PAUSED")
                self.log.append(("promoted" if chosen.status == "PAUSED" else "started", chosen.config["run"]["key"]))
                chosen.status = "RUNNING"
                if not self.with_status("PENDING") and self.waiting:
                    self.add(self.waiting.pop(0))
            running = self.with_status("RUNNING")
            if not running:
                if not self.waiting and not self.with_status("PENDING") and not self.with_status("PAUSED"):
                    return self
                continue
            self.report(self.order.choice(running))
        raise AssertionError("it does not end")

    def report(self, key):
        trial = self.trials[key]
        self.epochs[key] = epoch = self.epochs.get(key, 0) + 1
        result = {"epoch": epoch, METRIC: self.value(key, epoch)}
        if epoch == self.max_epochs:
            self.log.append(("finished", key))
            trial.status = "TERMINATED"
            self.scheduler.on_trial_complete(self, trial, result)
            return
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision == "PAUSE":
            trial.status = "PAUSED"
        elif decision == "STOP":
            trial.status = "TERMINATED"
            self.log.append(("diverged", key))
            self.scheduler.on_trial_complete(self, trial, result)


def keys_of(number):
    return [f"t{index:02d}" for index in range(number)]


def run(num_trials, value, *, num_slots=1, seed=0, cls=Promotion, history=None, epochs=None, keys=None):
    scheduler = cls(**SETTINGS, keys=keys_of(num_trials), history=history or ())
    waiting = keys_of(num_trials) if keys is None else keys
    return SimulatedTune(
        scheduler, waiting, value, num_slots=num_slots, order=random.Random(seed), epochs=epochs
    ).run()  # fmt: skip


def test_nine_trials_by_hand_on_one_slot():
    values = dict(zip(keys_of(9), [5, 1, 9, 2, 3, 4, 6, 7, 8], strict=True))
    found = run(9, lambda key, epoch: values[key] + epoch / 100)
    # Epoch 1: t02 is the best of three when it arrives, and goes on. Of six, the best two are t02 and t00: t00, which
    # waits, is promoted. Of seven and of eight, the best two are t02 with t06, then t07: both go on when they arrive.
    # Of nine, t08 is among the best three. Epoch 3: when t06 arrives as the third, t02 is the best, and goes on to the
    # end.
    assert found.epochs == {**dict.fromkeys(keys_of(9), 1), **dict.fromkeys(["t00", "t06", "t07", "t08"], 3), "t02": 9}
    assert [key for what, key in found.log if what == "promoted"] == ["t00", "t02"]
    assert {key for what, key in found.log if what == "stopped"} == set(keys_of(9)) - {"t02"}


def test_the_best_that_waits_is_promoted_before_a_new_trial_starts():
    """Falling values: t00 is the best of the first three, and waits when the third arrives."""
    found = run(9, lambda key, epoch: 9 - int(key[1:]) + epoch / 100)
    begun = [entry for entry in found.log if entry[0] in ("started", "promoted")]
    assert begun[:5] == [
        ("started", "t00"),
        ("started", "t01"),
        ("started", "t02"),
        ("promoted", "t00"),
        ("started", "t03"),
    ]


def test_few_trials_also_train_one_to_its_end():
    found = run(2, lambda key, _: {"t00": 0.2, "t01": 0.7}[key])
    assert found.epochs == {"t00": 1, "t01": 9}


def test_a_diverged_trial_is_stopped_and_does_not_keep_the_others():
    found = run(4, lambda key, _: math.nan if key == "t01" else 0.5)
    assert ("diverged", "t01") in found.log
    assert found.epochs["t00"] == 9, "of equal values the earlier trial goes on"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 10**6))
def test_it_promotes_what_the_algorithm_promotes(num_trials, num_slots, seed):
    """After each report, what is above is promoted; at the end nothing promotable is left."""
    order = random.Random(seed)
    values = {key: [order.choice([0.1, 0.2, 0.3, 0.4, 0.5]) for _ in range(9)] for key in keys_of(num_trials)}
    scheduler = Promotion(**SETTINGS, keys=keys_of(num_trials), history=())
    slow = SlowAsha(keys_of(num_trials), [1, 3], 3)
    tune = SimulatedTune(
        scheduler, keys_of(num_trials), lambda key, epoch: values[key][epoch - 1], num_slots=num_slots, order=order
    )
    report = tune.report

    def report_and_compare(key):
        report(key)
        epoch = tune.epochs[key]
        if epoch in (1, 3):
            rung = [1, 3].index(epoch)
            slow.values[rung][key] = values[key][epoch - 1]
            goes_on = tune.trials[key].status == "RUNNING"
            assert goes_on == (key in slow.candidates(rung)), "only what is among the best third goes straight on"
            if goes_on:
                slow.promoted[rung].add(key)

    choose = scheduler.choose_trial_to_run

    def choose_and_compare(controller):
        num_ended = len(tune.with_status("TERMINATED"))
        chosen = choose(controller)
        expected = slow.promotable()
        if expected is not None:
            assert chosen is not None
            assert chosen.config["run"]["key"] == expected[0]
        if chosen is not None and chosen.status == "PAUSED":
            key = chosen.config["run"]["key"]
            rung = [1, 3].index(tune.epochs[key])
            if expected is None:  # the last one
                assert not tune.waiting
                assert not tune.with_status("RUNNING")
                assert not slow.promoted[rung]
            slow.promoted[rung].add(key)
        if len(tune.with_status("TERMINATED")) > num_ended and tune.with_status("RUNNING"):
            # Stopped before the end: even if all that are to come were worse, it could not be promoted.
            for what, key in tune.log[-1:]:
                assert what == "stopped"
                at_first = slow.values[0]
                better = [k for k in at_first if (-at_first[k], k) < (-at_first[key], key)]
                assert tune.epochs[key] == 1
                assert len(better) >= max(1, num_trials // 3)
        return chosen

    tune.report, scheduler.choose_trial_to_run = report_and_compare, choose_and_compare
    tune.run()
    assert slow.promotable() is None
    assert any(epoch == 9 for epoch in tune.epochs.values()), "one is trained to its end"


def test_after_a_restart_waiting_trials_meet_full_rungs():
    """Nine trials have reached epoch 1 when the driver is killed; all report their checkpoints again, t00 first."""
    values = {key: int(key[1:]) / 10 for key in keys_of(9)}
    history = [(key, 1, values[key]) for key in keys_of(9)]
    found = run(
        9, lambda key, epoch: values[key] + epoch / 1000 - 0.001, history=history, epochs=dict.fromkeys(keys_of(9), 0)
    )
    promoted = {key for key, epoch in found.epochs.items() if epoch >= 3}
    assert promoted == {"t06", "t07", "t08"}, "against empty rungs, t02 and t05 would have gone on"


def test_what_was_promoted_before_a_restart_is_not_promoted_a_second_time():
    history = [("t00", 1, 0.9), ("t01", 1, 0.1), ("t02", 1, 0.2), ("t00", 2, 0.9)]
    scheduler = Promotion(**SETTINGS, keys=keys_of(6), history=history)
    assert scheduler._rungs[0].promoted == {"t00"}
    tune = SimulatedTune(scheduler, [], None, num_slots=1, order=random.Random(0))
    for key, value in (("t03", 0.95), ("t04", 0.96), ("t05", 0.97)):
        tune.add(key)
        scheduler.on_trial_result(tune, tune.trials[key], {"epoch": 1, METRIC: value})
    tune.add("t00")  # from its checkpoint of the first epoch: it is no longer among the best, and goes on all the same
    assert scheduler.on_trial_result(tune, tune.trials["t00"], {"epoch": 1, METRIC: 0.9}) == "CONTINUE"
    tune.add("t02")
    assert scheduler.on_trial_result(tune, tune.trials["t02"], {"epoch": 1, METRIC: 0.2}) == "PAUSE"


def test_a_decision_at_1000_waiting_trials_looks_at_no_trial_twice():
    """Not a time: the number of comparisons. A search over all would look at 1,000 trials at each of 1,000 steps."""
    scheduler = Promotion(**SETTINGS, keys=[f"t{index:04d}" for index in range(1000)], history=())
    looked = 0
    rank = scheduler._rungs[0].rank

    def counted(*arguments):
        nonlocal looked
        looked += 1
        return rank(*arguments)

    scheduler._rungs[0].rank = counted
    tune = SimulatedTune(scheduler, [], None, num_slots=1, order=random.Random(0))
    tune.waiting = ["more"]
    for index in range(1000):
        key = f"t{index:04d}"
        trial = SimpleNamespace(
            trial_id=key, config={"run": {"key": key}}, PENDING="PENDING", PAUSED="PAUSED", status="RUNNING"
        )
        scheduler.on_trial_add(tune, trial)
        if scheduler.on_trial_result(tune, trial, {"epoch": 1, METRIC: 1 - index / 1000}) == "PAUSE":
            trial.status = "PAUSED"
    scheduler._rungs[0].has_changed = False
    looked = 0
    for _ in range(1000):
        chosen = scheduler.choose_trial_to_run(tune)
        if chosen is not None:
            chosen.status = "RUNNING"
    assert looked <= 2000


@pytest.mark.parametrize("cls", [Promotion, Pasha])
def test_it_is_plain_data_for_tune_to_pickle(cls):
    scheduler = cls(**SETTINGS, keys=keys_of(2), history=())
    assert pickle.loads(pickle.dumps(scheduler))._highest == scheduler._highest


def test_pasha_stays_at_two_rungs_while_the_ranking_is_the_same():
    found = run(9, lambda key, epoch: int(key[1:]) + epoch / 100, cls=Pasha)
    assert max(found.epochs.values()) == 3
    found = run(9, lambda key, epoch: int(key[1:]) + epoch / 100)
    assert max(found.epochs.values()) == 9


def test_pasha_adds_a_rung_where_the_ranking_has_turned():
    def value(key, epoch):
        quality = int(key[1:])
        return quality if epoch < 3 else -quality

    assert max(run(9, value, cls=Pasha).epochs.values()) == 9


def test_a_rung_that_pasha_has_added_is_there_after_a_restart():
    """Two trials change places at the second rung, and later ones make the rankings equal again."""
    reports = [("t00", 1, 0.5), ("t01", 1, 0.6), ("t00", 3, 0.8), ("t01", 3, 0.7)]
    scheduler = Pasha(**SETTINGS, keys=keys_of(2), history=reports)
    assert scheduler._highest == 2
    assert Pasha(**SETTINGS, keys=keys_of(2), history=reports[:3])._highest == 1
    # In the order of the reports: sorted by trial, the second rung would never have been compared.
    live = Pasha(**SETTINGS, keys=keys_of(2), history=())
    for key, epoch, value in reports:
        live._know(key, epoch, value)
    assert live._highest == 2


def test_a_trial_that_is_trained_again_with_another_result_counts_once():
    scheduler = Promotion(**SETTINGS, keys=keys_of(6), history=[("t00", 1, 0.9), ("t00", 1, 0.1), ("t01", 1, 0.5)])
    rung = scheduler._rungs[0]
    assert (rung.rank("t00", 0), rung.rank("t01", 1), len(rung._order)) == (1, 0, 2)


def test_a_handed_out_trial_is_given_again_while_tune_has_no_place_for_it_and_an_error_ends_its_wait():
    scheduler = Promotion(**SETTINGS, keys=keys_of(9), history=())
    tune = SimulatedTune(scheduler, ["more"], None, num_slots=1, order=random.Random(0))
    for key, value in (("t00", 0.9), ("t01", 0.1), ("t02", 0.2)):
        tune.add(key)
        assert scheduler.on_trial_result(tune, tune.trials[key], {"epoch": 1, METRIC: value}) == "PAUSE"
        tune.trials[key].status = "PAUSED"
    chosen = scheduler.choose_trial_to_run(tune)
    assert chosen is tune.trials["t00"]
    assert scheduler.choose_trial_to_run(tune) is chosen, "it is still paused"
    chosen.status = "RUNNING"
    assert scheduler.choose_trial_to_run(tune) is None
    scheduler.on_trial_error(tune, tune.trials["t01"])
    assert "t01" not in scheduler._rungs[0].waiting
    assert len(scheduler._active) == 2


def test_nothing_ends_while_trials_may_still_come():
    scheduler = Promotion(**SETTINGS, keys=keys_of(4), history=())
    tune = SimulatedTune(scheduler, ["more"], None, num_slots=1, order=random.Random(0))
    tune.add("t00")
    scheduler.on_trial_result(tune, tune.trials["t00"], {"epoch": 1, METRIC: 0.5})
    tune.trials["t00"].status = "PAUSED"
    assert (scheduler.choose_trial_to_run(tune), tune.log) == (None, [])
    tune.waiting.clear()
    assert scheduler.choose_trial_to_run(tune) is tune.trials["t00"], "the last one goes on"


def test_trials_within_the_noise_may_change_places():
    before, after = {"a": 0.50, "b": 0.49, "c": 0.2}, {"a": 0.60, "b": 0.61, "c": 0.3}
    assert not is_same_ranking(before, after, list(before), 0.0)
    assert is_same_ranking(before, after, list(before), 0.02)
    far = {"a": 0.3, "b": 0.61, "c": 0.6}
    assert not is_same_ranking(before, far, list(before), 0.02)


def test_the_noise_is_seen_where_curves_cross_twice():
    straight, crossing = {1: 0.1, 2: 0.2, 3: 0.3}, {1: 0.2, 2: 0.1, 3: 0.35}
    assert distances_of_crossing(straight, crossing) == [pytest.approx(0.05)]
    assert distances_of_crossing(straight, {1: 0.0, 2: 0.3, 3: 0.4}) == [], "one crossing is a change of the ranking"
