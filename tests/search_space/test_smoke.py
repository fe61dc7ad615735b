"""Miniatures of search spaces: which trials stay, what becomes small, and splits that work with any settings."""

from pathlib import Path

import pytest

from raydml.errors import ConfigError
from raydml.search_space.smoke import chosen_trials, write_smoke_space
from raydml.search_space.space import load_space, sample_trials
from raydml.study.folder import make_splits
from raydml.training.trial_images import Catalogs

FOLDER = Path(__file__).parents[2] / "search_spaces"
SPACE = """\
study:
  name: mine
  search: {num_trials: 12, max_concurrent: 2, grace_epochs: 30}
  confirm: {top: 2, folds: 3, seeds: 2}
  finalize: {top: 2}
machine: {device: cpu, data_root: /nowhere}
trial:
  epochs: 90
  data:
    name: image_folder
    resize_px: 256
    crop_px: 224
    split: {test_fraction: 0.3, val_fraction: 0.1, num_folds: 5}
    augmentation: {random_crop: true, padding_px: 30}
  model: {backbone: convnet, weights: none, embedding_dim: {choice: [64, 128]}}
  loss, miner, sampler:
    choice:
      - loss: {name: contrastive, negative_margin: {uniform: [0.4, 1.2]}}
        miner: {choice: [null, {name: multi_similarity}]}
        sampler: {name: class_balanced, classes_per_batch: 32, images_per_class: 2}
      - loss: {name: softmax}
        sampler: {name: uniform, batch_size: 128}
  schedule: {name: step, milestones: [30, 60], gamma: 0.1}
  recall_at: [1, 10, 100]
  select_on: val_recall_at_10
"""


def small(tmp_path, overrides=(), text=SPACE):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "space.yaml").write_text(text)
    space = load_space(tmp_path / "space.yaml", overrides)
    return load_space(write_smoke_space(space, tmp_path / "data"))


def test_the_recipes_stay_and_the_sizes_become_small(tmp_path):
    space = small(tmp_path)
    study, trials = space.study, sample_trials(space)
    assert (study.name, study.search.num_trials, study.search.max_concurrent) == ("mine-smoke", 1, None)
    assert (study.confirm.top, study.confirm.folds, study.confirm.seeds, study.finalize.top) == (1, 2, 1, 1)
    # Each loss, with and without the miner, both embeddings; no trial that adds nothing but another margin.
    assert {(trial.loss.name, trial.miner and trial.miner.name) for trial in trials} == {
        *(("contrastive", None), ("contrastive", "multi_similarity"), ("softmax", None))
    }
    assert {trial.model.embedding_dim for trial in trials} == {64, 128}
    assert len(trials) <= 5
    for trial in trials:
        assert (trial.epochs, trial.data.crop_px, trial.data.resize_px) == (2, 32, 36)
        assert (trial.schedule.name, trial.schedule.milestones, trial.data.augmentation.padding_px) == ("step", (1,), 4)
        assert (trial.recall_at, trial.select_on) == ((1, 2), "val_recall_at_1")
        sampler = trial.sampler.settings
        size = sampler.get("batch_size") or sampler["classes_per_batch"] * sampler["images_per_class"]
        assert size == 12
    assert "generated" in (tmp_path / "data" / "mine-smoke.yaml").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trial.data.split={num_folds: 2, val_fraction: 0.75}", "study.confirm.folds=2"],
        ["trial.data.name=cars196", "trial.data.split={num_folds: 10}"],
        ["trial.data.name=image_list", "trial.data.list_file=/elsewhere/mine.csv"],
    ],
)
def test_the_images_suit_the_splits(tmp_path, overrides):
    space = small(tmp_path, overrides)
    trials = sample_trials(space)
    assert len(make_splits(space.study, Catalogs(space.machine), trials)) == 3  # raises for parts that are too small


def test_refits_become_small_and_a_space_without_validation_has_a_miniature(tmp_path):
    refit = small(tmp_path, ["study.refit={top: 2, seeds: 5, epochs: 40}"]).study.refit
    assert (refit.top, refit.seeds, refit.epochs) == (1, 2, 2)
    overrides = ["trial.data.split={val_fraction: 0, test_fraction: %s}", "study.confirm=null", "study.finalize=null"]
    overrides += ["study.refit={seeds: 2}", "study.search.grace_epochs=1"]
    text = SPACE.replace("  select_on: val_recall_at_10\n", "")
    # At least 8 classes to train on: of 12, a share of 0.3 seals 4.
    for fraction, sizes in ((0.3, (8, 0, 4)), (0, (8, 0, 0))):
        space = small(tmp_path / str(fraction), [overrides[0] % fraction, *overrides[1:]], text)
        split = make_splits(space.study, Catalogs(space.machine), sample_trials(space))
        assert {tuple(len(parts[part]) for part in ("train", "val", "test")) for parts in split.values()} == {sizes}


@pytest.mark.parametrize("setting", ["val_fraction=0.0001", "val_fraction=0.9999", "test_fraction=0.99999"])
def test_fractions_that_take_thousands_of_classes_are_refused(tmp_path, setting):
    key, _, value = setting.partition("=")
    with pytest.raises(ConfigError, match=rf"(?s)trial\.data\.split.*{value}.*--set .*{key}"):
        small(tmp_path, [f"trial.data.split.{setting}"])


def test_a_trial_stays_if_it_has_something_new():
    space = load_space(FOLDER / "digits.yaml")
    trials = sample_trials(space)
    chosen = chosen_trials(trials)
    assert chosen[0] == trials[0]
    assert {trial.loss.name for trial in chosen} == {trial.loss.name for trial in trials}
    assert {trial.schedule.name for trial in chosen} == {"constant", "cosine"}
    assert chosen_trials([*chosen, *chosen]) == chosen
