"""Rungs by hand, and the expected epochs of a search against Ray's own scheduler and by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from raydml.study.rungs import expected_epochs, expected_epochs_left, expected_spans, milestones
from raydml.study.scheduler import Asha


def test_milestones_stop_short_of_the_last_epoch():
    assert milestones(max_epochs=9, grace_epochs=1, reduction_factor=3) == [1, 3]
    assert milestones(max_epochs=10, grace_epochs=1, reduction_factor=3) == [1, 3, 9]
    assert milestones(max_epochs=2, grace_epochs=2, reduction_factor=3) == []


def simulated_asha(num_trials, *, max_epochs, grace_epochs, reduction_factor, repeats=400):
    """Epochs of each trial (repeats x trials) under the scheduler itself: random values, trials one after the other."""
    generator = np.random.default_rng(1)
    rungs, rows = [], []
    while (rung := grace_epochs * reduction_factor ** len(rungs)) < max_epochs:
        rungs.append(rung)
    for _ in range(repeats):
        settings = {"grace_epochs": grace_epochs, "reduction_factor": reduction_factor, "history": {}}
        scheduler = Asha(metric="score", max_epochs=max_epochs, **settings)
        rows.append([])
        for number in range(num_trials):
            trial = SimpleNamespace(trial_id=str(number), config={"run": {"key": str(number)}})
            scheduler.on_trial_add(None, trial)
            value = generator.random()
            epochs = max_epochs
            for rung in rungs:
                if scheduler.on_trial_result(None, trial, {"epoch": rung, "score": value}) == scheduler.STOP:
                    epochs = rung
                    break
            rows[-1].append(epochs)
    return np.array(rows)


@pytest.mark.parametrize(("num_trials", "reduction_factor"), [(1, 3), (16, 3), (20, 2)])
def test_asha_is_expected_to_take_what_rays_scheduler_takes_in_random_order(num_trials, reduction_factor):
    sizes = {"max_epochs": 20, "grace_epochs": 4, "reduction_factor": reduction_factor}
    epochs = simulated_asha(num_trials, **sizes)
    expected = epochs.sum(axis=1).mean()
    assert expected_epochs(num_trials, "asha", **sizes) == pytest.approx(expected, rel=0.03)
    spans = expected_spans(num_trials, "asha", **sizes)
    for num_done in (0, 4, 7, 19):
        left = (epochs - num_done)[epochs > num_done].mean()
        assert expected_epochs_left(spans, num_planned=20, num_done=num_done) == pytest.approx(left, rel=0.05)


def test_synchronous_halving_and_none_by_hand():
    sizes = {"max_epochs": 9, "grace_epochs": 1, "reduction_factor": 3}
    # 16 trials train epoch 1, 5 of them epochs 2 and 3, 1 the other six.
    assert expected_epochs(16, "sync", **sizes) == 16 + 5 * 2 + 1 * 6
    assert expected_epochs(2, "sync", **sizes) == 2 + 1 * 2 + 1 * 6
    assert expected_epochs(16, "none", **sizes) == 16 * 9
