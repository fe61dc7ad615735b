"""Published recipes: what they consist of, and on which classes those of the five systems train."""

import shutil
from pathlib import Path

import pytest
from scipy.io import loadmat

from raydml.config.trial import fingerprint
from raydml.search_space import smoke
from raydml.search_space.published import published_recipe
from raydml.search_space.space import SpaceError, load_space, sample_trials
from raydml.training.trainer import Trainer
from tests.study.test_smoke import smoke_overrides

FOLDER = Path(__file__).parents[2] / "search_spaces"
SYSTEMS = ("divide_conquer", "classification", "deep_metric", "multi_similarity", "mdr", "mic")
SPACES = sorted(path.stem for system in SYSTEMS for path in FOLDER.glob(f"{system}_*.yaml"))
SPACE = """\
study:
  name: mine
  seed: 7
  search: {num_trials: 12, max_concurrent: 2, grace_epochs: 30}
  confirm: {top: 2, folds: 2, seeds: 2}
  finalize: {top: 2}
trial:
  epochs: 90
  data: {name: digits, resize_px: 8, crop_px: 8, split: {order: sorted, val_fraction: 0.4, num_folds: 2, fold: 1}}
  model: {backbone: convnet, weights: none, embedding_dim: {choice: [64, 128], first: 128}}
  loss, miner:
    choice:
      - loss: {name: contrastive, negative_margin: {uniform: [0.4, 1.2], first: 0.7}}
        miner: {choice: [null, {name: multi_similarity}]}
      - loss: {name: softmax}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 2}
  schedule: {name: step, milestones: [30, 60], gamma: 0.1}
  select_on: val_recall_at_1
"""


def space_at(folder, text=SPACE, overrides=()):
    (folder / "space.yaml").write_text(text)
    return load_space(folder / "space.yaml", overrides)


def test_the_recipe_is_trial_0_without_validation_and_nothing_is_searched(tmp_path):
    space = space_at(tmp_path, overrides=["study.search.folds=2"])
    recipe = published_recipe(space, seeds=5)
    assert recipe.study.search.folds == 1, "nothing validates"
    study = recipe.study
    assert (study.name, study.seed, study.search.num_trials, study.search.scheduler) == ("mine-published", 7, 1, "none")
    assert (study.confirm, study.refit.model_dump(), study.finalize.model_dump()) == (
        None,
        {"top": 1, "seeds": 5, "epochs": "confirmed", "classes": "development"},
        {"top": 1},
    )
    (trial,) = sample_trials(recipe)
    assert (trial.model.embedding_dim, trial.loss.negative_margin, trial.miner) == (128, 0.7, None)
    assert (trial.epochs, trial.schedule.milestones, trial.seed) == (90, (30, 60), 7)
    split = trial.data.split
    assert (split.val_fraction, split.fold, split.order, split.test_fraction) == (0.0, None, "sorted", 0.5)
    first = sample_trials(space)[0]
    data = first.data.model_copy(update={"split": split})
    assert fingerprint(trial) == fingerprint(first.model_copy(update={"data": data}))
    assert published_recipe(space, seeds=1, name="other").study.name == "other"


def test_a_space_without_a_published_point_and_a_name_that_becomes_too_long_are_refused(tmp_path):
    plain = space_at(tmp_path, SPACE.replace(", first: 128", "").replace(", first: 0.7", ""))
    with pytest.raises(
        SpaceError, match=r"(?s)space\.yaml: trial: names no published point.*`first`.*cure: .*--recipe"
    ):
        published_recipe(plain, seeds=3)
    with pytest.raises(ValueError, match=r"(?s)name = .*at most 200.*--name"):
        published_recipe(space_at(tmp_path, overrides=[f"study.name={'x' * 195}"]), seeds=3)


@pytest.mark.parametrize("name", SPACES)
def test_the_headers_name_the_command(name):
    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\nstudy:")[0]
    assert "\n#   As published, on all published training classes: add --recipe published" in header


def published_training_images(dataset, root):
    """{image: class} of the published training classes of a miniature, read from its own list files."""

    def rows(path, num_skipped=0):
        return [line.split() for line in (root / path).read_text().splitlines()[num_skipped:]]

    if dataset == "cub200":
        images, classes = dict(rows("images.txt")), dict(rows("image_class_labels.txt"))
        return {f"images/{images[number]}": label for number, label in classes.items() if int(label) <= 100}
    if dataset == "cars196":
        annotations = loadmat(root / "cars_annos.mat")["annotations"][0]
        pairs = [(row["relative_im_path"].item(), row["class"].item()) for row in annotations]
        return {path: label for path, label in pairs if label <= 98}
    if dataset == "sop":
        return {path: label for _, label, _, path in rows("Ebay_train.txt", 1)}
    if dataset == "inshop":
        listed = rows("list_eval_partition.txt", 2)
        return {path: label for path, label, status in listed if status == "train"}
    return {f"image/{image}.jpg": label for image, label in rows("train_test_split/train_list.txt")}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_each_system_trains_on_exactly_the_published_training_classes(name, tmp_path):
    # In tests/study/test_smoke.py one space of each system has its own backbone.
    space = load_space(FOLDER / f"{name}.yaml", smoke_overrides(name, has_own_backbone=False))
    recipe = published_recipe(space, seeds=3)
    first, (published,) = sample_trials(space)[0], sample_trials(recipe)
    assert (published.epochs, published.schedule, published.method) == (first.epochs, first.schedule, first.method)

    small = load_space(smoke.write_smoke_space(recipe, tmp_path / "data"))
    (trial,) = sample_trials(small)
    trainer = Trainer(trial, small.machine, device="cpu")
    result = next(trainer.epochs())
    assert result["ended"] == ""  # neither collapsed nor diverged
    assert not any(name.startswith(("val_", "best_")) for name in result)
    (root,) = (tmp_path / "data" / "images").iterdir()
    dataset = name.rpartition("_")[2]
    expected = published_training_images(dataset, root)
    images = trainer.train_images
    assert set(images.paths) == set(expected)
    pairs = set(zip(images.labels.tolist(), map(expected.get, images.paths), strict=True))
    assert len(pairs) == len(set(expected.values())) >= 6  # each class is one label
    shutil.rmtree(tmp_path / "data")
