"""A shorter study: everything that is counted in epochs is cut with them, and nothing else changes."""

import logging

import pytest

from raydml.search_space.domains import to_plain
from raydml.search_space.space import load_space, sample_trials, shorten

SPACE = """\
study: {search: {num_trials: 2, grace_epochs: 20}}
trial:
  epochs: 100
  data: {name: digits, resize_px: 8, crop_px: 8}
  model: {backbone: convnet, weights: none, embedding_dim: {choice: [8, 16]}}
  loss: {name: margin}
  sampler: {name: class_balanced, classes_per_batch: 2}
  %s
"""
STEP = (
    "schedule: {name: step, milestones: [40, 60, 80], gamma: 0.2, new_layer_warmup_epochs: 10, new_layer_factor: 2.0}"
)
# A choice of blocks, one of which supplies the schedule together with the optimizer.
SHARED = """optimizer, schedule:
    choice:
      - optimizer: {name: sgd}
        schedule: {choice: [{name: step, milestones: [3, 50]}, {name: cosine, warmup_epochs: {randint: [1, 40]}}]}
      - optimizer: {name: adamw}"""


def write(folder, schedule):
    path = folder / "space.yaml"
    path.write_text(SPACE % schedule)
    return path


@pytest.mark.parametrize(
    ("epochs", "milestones", "warmup", "grace"), [(70, [40, 60, 69], 10, 20), (12, [11], 10, 12), (2, [1], 1, 2)]
)
def test_milestones_warm_ups_and_grace_end_with_the_epochs(tmp_path, caplog, epochs, milestones, warmup, grace):
    space = load_space(write(tmp_path, STEP))
    with caplog.at_level(logging.INFO, "raydml"):
        short = shorten(space, epochs)
    assert short.study.search.grace_epochs == grace
    for trial in sample_trials(short):
        assert (trial.epochs, list(trial.schedule.milestones)) == (epochs, milestones)
        assert (trial.schedule.new_layer_warmup_epochs, trial.schedule.gamma) == (warmup, 0.2)
    assert f"cut to fit {epochs} epochs" in caplog.text
    assert "milestones [40, 60, 80] -> " in caplog.text
    assert load_space(write(tmp_path, STEP), max_epochs=epochs) == short  # the option of the command line


def test_a_single_epoch_keeps_the_name_of_the_schedule_only(tmp_path):
    (trial, _) = sample_trials(load_space(write(tmp_path, STEP), max_epochs=1))
    assert trial.schedule.model_dump() == {
        "name": "constant",
        "warmup_epochs": 0,
        "new_layer_warmup_epochs": 0,
        "new_layer_factor": 1.0,
    }
    cosine = "schedule: {name: {choice: [constant, cosine]}, warmup_epochs: 3}"
    trials = sample_trials(load_space(write(tmp_path, cosine), max_epochs=1))
    assert {trial.schedule.name for trial in trials} == {"constant", "cosine"}


def test_schedules_in_shared_choices_and_ranges_of_epochs_are_cut(tmp_path):
    blocks = to_plain(load_space(write(tmp_path, SHARED), max_epochs=5).trial)["optimizer, schedule"]["choice"]
    assert blocks[0]["schedule"]["choice"] == [
        {"name": "step", "milestones": [3, 4]},
        {"name": "cosine", "warmup_epochs": {"randint": [1, 5]}},
    ]
    assert blocks[1] == {"optimizer": {"name": "adamw"}}


def test_the_epochs_of_refits_end_with_those_of_the_trials(tmp_path, caplog):
    path = write(tmp_path, STEP)
    with caplog.at_level(logging.INFO, "raydml"):
        short = load_space(path, ["study.refit={epochs: 30}"], max_epochs=20)
    assert short.study.refit.epochs == 20
    assert "study.refit.epochs 30 -> 20" in caplog.text
    for epochs in ("confirmed", 10):
        assert load_space(path, [f"study.refit={{epochs: {epochs}}}"], max_epochs=20).study.refit.epochs == epochs


def test_more_epochs_than_the_file_cut_nothing(tmp_path, caplog):
    space = load_space(write(tmp_path, STEP))
    with caplog.at_level(logging.INFO, "raydml"):
        longer = shorten(space, 200)
    assert caplog.text == ""
    assert longer.study == space.study
    assert to_plain(longer.trial) == {**to_plain(space.trial), "epochs": 200}
