"""The schedulers against their definitions, which look at all trials each time, on random histories."""

import math
import random
from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raydml.study.rungs import milestones
from raydml.study.scheduler import Asha, InOrder, SyncHalving, percentile, trial_key

METRIC = "val_map_at_r"
MAX_EPOCHS = 9
VALUES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6] * 8 + [math.nan, -math.inf]
SETTINGS = settings(max_examples=400, deadline=None, derandomize=True)


class SyncByDefinition(FIFOScheduler):
    """Decides each rung anew whenever it is asked."""

    def __init__(self, *, keys, reduction_factor, grace_epochs, history, ended):
        super().__init__()
        self._keys, self._reduction_factor = list(keys), reduction_factor
        self._milestones = milestones(
            max_epochs=MAX_EPOCHS, grace_epochs=grace_epochs, reduction_factor=reduction_factor
        )
        self._values = {milestone: {} for milestone in self._milestones}
        self._ended = set(ended)
        for key, rows in history.items():
            for epoch, value in rows:
                self._record(key, epoch, value)

    def _record(self, key, epoch, value):
        if epoch in self._values and math.isfinite(value):
            self._values[epoch][key] = value

    def survivors(self, rung):
        entrants = self._keys if rung == 0 else self.survivors(rung - 1)
        if entrants is None:
            return None
        values = self._values[self._milestones[rung]]
        contestants = [key for key in entrants if key in values or key not in self._ended]
        if any(key not in values for key in contestants):
            return None
        num_kept = max(1, len(contestants) // self._reduction_factor)
        ranked = sorted(contestants, key=lambda key: (-values[key], self._keys.index(key)))
        return [key for key in contestants if key in set(ranked[:num_kept])]

    def on_trial_result(self, _controller, trial, result):
        if not math.isfinite(result[METRIC]):
            return TrialScheduler.STOP
        epoch = int(result["epoch"])
        if epoch not in self._values:
            return TrialScheduler.CONTINUE
        self._record(trial_key(trial), epoch, result[METRIC])
        passed = self.survivors(self._milestones.index(epoch))
        return TrialScheduler.CONTINUE if passed and trial_key(trial) in passed else TrialScheduler.PAUSE

    def on_trial_complete(self, _controller, trial, result):
        self._record(trial_key(trial), int(result["epoch"]), result[METRIC])
        self._ended.add(trial_key(trial))

    def on_trial_error(self, _controller, trial):
        self._ended.add(trial_key(trial))

    def on_trial_add(self, _controller, trial):
        self._ended.discard(trial_key(trial))

    def on_trial_remove(self, _controller, trial):
        self._ended.add(trial_key(trial))

    def choose_trial_to_run(self, controller):
        paused = [trial for trial in controller.get_trials() if trial.status == trial.PAUSED]
        for trial in sorted(paused, key=lambda trial: self._keys.index(trial_key(trial))):
            passed = self.survivors(self._milestones.index(int(trial.last_result["epoch"])))
            if passed is None:
                continue
            if trial_key(trial) in passed:
                return trial
            controller.stop_trial(trial)
        return None


class AshaByDefinition(ASHAScheduler):
    """Ray's own rungs, filled with the history."""

    def __init__(self, *, reduction_factor, grace_epochs, history):
        super().__init__("epoch", METRIC, "max", MAX_EPOCHS, grace_epochs, reduction_factor, 1, stop_last_trials=False)
        self._history = history
        for key, rows in history.items():
            for epoch, value in rows:
                if math.isfinite(value):
                    self._brackets[0].on_result(SimpleNamespace(trial_id=key), epoch, value)

    def on_trial_add(self, controller, trial):
        super().on_trial_add(controller, trial)
        for _, recorded in self._brackets[0]._rungs:
            if trial_key(trial) in self._history and trial_key(trial) in recorded:
                recorded[trial.trial_id] = recorded.pop(trial_key(trial))

    def on_trial_result(self, controller, trial, result):
        if not math.isfinite(result[METRIC]):
            return TrialScheduler.STOP
        return super().on_trial_result(controller, trial, result)

    def on_trial_complete(self, controller, trial, result):
        if math.isfinite(result[METRIC]):
            super().on_trial_complete(controller, trial, result)


class Controller:
    """What Tune does with a scheduler, one call at a time; ``log`` has what the scheduler has decided."""

    def __init__(self, scheduler):
        self.scheduler, self.log, self._trials = scheduler, [], []

    def get_trials(self):
        return self._trials

    def add(self, key, epoch):
        trial = SimpleNamespace(
            trial_id=f"id-{key}", config={"run": {"key": key}}, PENDING="PENDING", PAUSED="PAUSED", status="PENDING",
            last_result={"epoch": epoch, METRIC: math.nan}, is_pausing=False,
        )  # fmt: skip
        self._trials.append(trial)
        self.scheduler.on_trial_add(self, trial)

    def stop_trial(self, trial):
        self.log.append(("stopped", trial_key(trial)))
        if trial.status in ("PENDING", "PAUSED"):
            self.scheduler.on_trial_remove(self, trial)
        else:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        trial.status = "TERMINATED"

    def step(self, is_staged):
        trial = self.scheduler.choose_trial_to_run(self)
        self.log.append(("chosen", trial and trial_key(trial)))
        if trial and is_staged:
            trial.status = "PENDING"

    def of(self, number, status, *, is_pausing=False):
        found = [t for t in self._trials if t.status == status and t.is_pausing == is_pausing]
        return sorted(found, key=trial_key)[number % len(found)] if found else None

    def start(self, number):
        if trial := self.of(number, "PENDING"):
            trial.status = "RUNNING"

    def report(self, number, value):
        if not (trial := self.of(number, "RUNNING")):
            return
        # The first epoch after a resume is that of the checkpoint, reported again.
        result = {"epoch": trial.last_result["epoch"] + 1, METRIC: value}
        if result["epoch"] >= MAX_EPOCHS:
            trial.last_result = result
            self.stop_trial(trial)
            return
        decision = self.scheduler.on_trial_result(self, trial, result)
        trial.last_result = result
        self.log.append((decision, trial_key(trial), result["epoch"]))
        if decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        trial.is_pausing = decision == TrialScheduler.PAUSE

    def pause(self, number):
        if trial := self.of(number, "RUNNING", is_pausing=True):
            trial.status, trial.is_pausing = "PAUSED", False

    def fail(self, number, epochs_lost, *, is_pausing, is_last):
        if not (trial := self.of(number, "RUNNING", is_pausing=is_pausing)):
            return
        self.scheduler.on_trial_error(self, trial)
        trial.is_pausing = False
        if is_last:
            trial.status = "ERROR"
            return
        trial.status = "PENDING"
        trial.last_result = {**trial.last_result, "epoch": max(trial.last_result["epoch"] - epochs_lost, 0)}
        self._trials.remove(trial)
        self._trials.append(trial)
        self.scheduler.on_trial_add(self, trial)


def random_calls(seed, num_calls, share_of_faults):
    """Calls of a controller, most of which bring the trials on: few faults let them reach the later rungs."""
    generator = random.Random(seed)
    calls = []
    for _ in range(num_calls):
        number, value = generator.randrange(12), generator.choice(VALUES)
        fault = ("fail", number, generator.randrange(4), generator.random() < 0.5, generator.random() < 0.3)
        usual = [
            ("step", generator.random() < 0.7),
            ("start", number),
            ("pause", number),
            *[("report", number, value)] * 3,
        ]
        calls.append(fault if generator.random() < share_of_faults else generator.choice(usual))
    return calls


CALLS = st.builds(
    random_calls, st.integers(0, 10**6), st.sampled_from([10, 50, 200, 400]), st.sampled_from([0, 0.02, 0.2])
)
HISTORIES = st.lists(st.tuples(st.lists(st.sampled_from(VALUES), max_size=6), st.booleans()), max_size=8)


def apply(controller, call):
    name, *arguments = call
    if name == "fail":
        number, epochs_lost, is_pausing, is_last = arguments
        controller.fail(number, epochs_lost, is_pausing=is_pausing, is_last=is_last)
    else:
        getattr(controller, name)(*arguments)


def compare(by_definition, scheduler, keys, begun, calls):
    """Let both decide about the same trials, those that go on from an earlier run first, in one history."""
    controllers = [Controller(by_definition), Controller(scheduler)]
    for call in [*(("add", key, begun.get(key, 0)) for key in keys), *calls, ("step", True)]:
        for controller in controllers:
            apply(controller, call)
        expected, found = (controller.log for controller in controllers)
        assert found == expected, call
    return controllers


def resumed(earlier):
    """The history and the ended trials of an earlier run, and the epochs from which the others go on."""
    histories = {f"t{number:02d}": list(enumerate(values, 1)) for number, (values, _) in enumerate(earlier)}
    ended = [f"t{number:02d}" for number, (_, is_ended) in enumerate(earlier) if is_ended]
    return histories, ended, {key: len(rows) for key, rows in histories.items() if key not in ended}


@SETTINGS
@given(HISTORIES, st.integers(1, 10), st.sampled_from([2, 3]), st.sampled_from([1, 2]), CALLS)
def test_synchronous_halving_decides_as_its_definition(earlier, num_new, reduction_factor, grace_epochs, calls):
    history, ended, begun = resumed(earlier)
    keys = [*history, *(f"t{len(history) + number:02d}" for number in range(num_new))]
    arguments = {
        "keys": keys, "history": history, "ended": ended, "grace_epochs": grace_epochs,
        "reduction_factor": reduction_factor,
    }  # fmt: skip
    by_definition = SyncByDefinition(**arguments)
    scheduler = SyncHalving(metric=METRIC, max_epochs=MAX_EPOCHS, **arguments)
    to_add = [key for key in keys if key not in ended]
    compare(by_definition, scheduler, to_add, begun, calls)
    rungs = range(len(by_definition._milestones))
    assert [scheduler.survivors(rung) for rung in rungs] == [by_definition.survivors(rung) for rung in rungs]


@SETTINGS
@given(HISTORIES, st.integers(1, 10), st.sampled_from([2, 3]), st.sampled_from([1, 2]), CALLS)
def test_asynchronous_halving_decides_as_ray_does(earlier, num_new, reduction_factor, grace_epochs, calls):
    history, ended, begun = resumed(earlier)
    keys = [*history, *(f"t{len(history) + number:02d}" for number in range(num_new))]
    arguments = {"history": history, "grace_epochs": grace_epochs, "reduction_factor": reduction_factor}
    by_definition = AshaByDefinition(**arguments)
    scheduler = Asha(metric=METRIC, max_epochs=MAX_EPOCHS, **arguments)
    to_add = [key for key in keys if key not in ended]
    compare(by_definition, scheduler, to_add, begun, calls)
    assert scheduler._brackets[0]._rungs == by_definition._brackets[0]._rungs


@SETTINGS
@given(st.integers(1, 10), CALLS)
def test_trials_without_a_scheduler_start_in_the_order_of_ray(num_trials, calls):
    keys = [f"t{number:02d}" for number in range(num_trials)]
    compare(FIFOScheduler(), InOrder(), keys, {}, calls)


@SETTINGS
@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(2, 7))
def test_a_percentile_of_ordered_values_is_that_of_numpy(values, reduction_factor):
    share = 1 - 1 / reduction_factor
    assert percentile(sorted(values), share) == np.nanpercentile(values, share * 100)
