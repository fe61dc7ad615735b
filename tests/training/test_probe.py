"""A probe against the trainer itself."""

from raydml.config.trial import Machine, parse_trial
from raydml.training import probe
from raydml.training.probe import probe_trial
from tests.training.test_trainer import trial_of


def test_steps_are_timed_one_by_one_after_warming_up(monkeypatch):
    timed = []
    median = probe.median
    monkeypatch.setattr(probe, "median", lambda seconds: timed.append(list(seconds)) or median(seconds))
    cost = probe_trial(trial_of(epochs=8), Machine(device="cpu"), "cpu")
    ((seconds),) = timed
    assert len(seconds) == 10
    assert min(seconds) <= cost.seconds_per_step <= max(seconds)
    assert cost.clustering_s == 0
    assert cost.validation_s > 0
    assert cost.peak_memory_bytes > 1e8


def test_the_backbone_trains_although_a_trial_warms_its_head_up_first(monkeypatch):
    """Its first epoch would take less time and memory than the others."""
    made = []

    class Seen(probe.Trainer):
        def __init__(self, *arguments, **others):
            super().__init__(*arguments, **others)
            made.append(self)

    monkeypatch.setattr(probe, "Trainer", Seen)
    probe_trial(
        trial_of(epochs=8, schedule={"name": "constant", "new_layer_warmup_epochs": 3}), Machine(device="cpu"), "cpu"
    )
    (trainer,) = made
    assert all(parameter.grad is not None for parameter in trainer.method.network.trunk.parameters())


def test_epochs_of_a_single_step_are_timed_too():
    trial = trial_of(epochs=3)
    sampler = type(trial.sampler).model_validate({"name": "uniform", "batch_size": 512})
    cost = probe_trial(trial.model_copy(update={"sampler": sampler}), Machine(device="cpu"), "cpu")
    assert cost.seconds_per_step > 0


def test_a_trial_without_validation_takes_no_time_for_it():
    plain = trial_of(epochs=8).model_dump(mode="json")
    plain["data"]["split"] |= {"val_fraction": 0}
    cost = probe_trial(parse_trial(plain), Machine(device="cpu"), "cpu")
    assert cost.seconds_per_step > 0
    assert cost.validation_s == 0
