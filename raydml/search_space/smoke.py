"""A search space made so small that all its stages run in one to three minutes, on generated images.

What stays: method, loss, miner, regularizers, sampler, optimizer, schedule, backbone, embedding, augmentation and the
layout of the data set, so that everything that a recipe names is built and trained. What becomes small is in
`small_trial` and `small_study`. The numbers of such a run mean nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from raydml.config.recipe import flatten
from raydml.config.refit import trains_on_test_classes, validates
from raydml.config.sections import IMAGES_KEYS, SearcherBlock
from raydml.config.trial import StudySettings, Trial
from raydml.data.benchmarks import BENCHMARK_OF, BENCHMARKS
from raydml.data.catalog import OWN_IMAGES
from raydml.data.containers import CONTAINERS
from raydml.data.miniatures import build
from raydml.errors import ConfigError, Problem
from raydml.models.lookup import facts_of
from raydml.models.random_weights import write_random_weights
from raydml.ops.files import write_whole
from raydml.search_space.space import SearchSpace, sample_trials, shorten

NUM_EPOCHS = 2
MAX_TRIALS = 24  # of the search
SUFFIX = "-smoke"
#: The largest value of a setting of a sampler or a method, where it has this setting.
_LARGEST = {"batch_size": 12, "images_per_class": 4, "classes_per_batch": 6, "batches_per_epoch": 2}
_LARGEST |= {"num_learners": 2, "num_clusters": 4, "images_per_cluster": 4, "recluster_every": 1}
_BATCH, _IMAGES_PER_CLASS, _FEWEST_TRAINING_CLASSES = 12, 4, 6  # 24 training images: two batches in an epoch
_CROP_PX, _MARGIN_PX, _SIZE_PX = 32, 4, 48
_FILE_OF_LIST = "list.csv"


def write_smoke_space(space: SearchSpace, folder: Path, *, max_trials: int = MAX_TRIALS) -> Path:
    """Write a space with the recipes of another one in miniature, its images and its weights; return its file.

    The trials are those of `chosen_trials`, max_trials at most. It writes folder/images, folder/weights and
    folder/<name>-smoke.yaml.
    """
    short = shorten(space, NUM_EPOCHS)
    trials = chosen_trials(sample_trials(short))[:max_trials]
    weights = _weights(trials, folder / "weights")
    classes_per_part = max(_classes_per_part(trial) for trial in trials)
    write_images(trials, folder / "images", classes_per_part)
    content = {
        # What the space does not say stays unsaid: a default that has no use is not refused.
        "study": small_study(short.study).model_dump(mode="json", exclude_unset=True),
        "machine": {**space.machine.model_dump(mode="json"), "data_root": str(folder / "images"), "cache_dir": None},
        # A grid of whole trials: they are run as they are.
        "trial": {"grid": [small_trial(trial, weights) for trial in trials]},
    }
    path = folder / f"{space.study.name}{SUFFIX}.yaml"
    header = f"# Question: do the recipes of {space.path} run? The images are generated: the numbers mean nothing.\n\n"
    write_whole(path, header + yaml.safe_dump(content, sort_keys=False))
    return path


def chosen_trials(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have a key or a value which no trial before them has, but for numbers with a fraction.

    So every block of a choice, every name and every switch that was sampled is run at least once.
    """
    seen: set[str] = set()
    chosen = []
    for trial in trials:
        settings = flatten(trial.model_dump(mode="json", exclude={"seed"}), keep_empty=True)
        new = {key if isinstance(value, float) else f"{key} = {value}" for key, value in settings.items()} - seen
        if new:
            seen |= new
            chosen.append(trial)
    return chosen


def small_study(study: StudySettings) -> StudySettings:
    """Return the same stages: a search on at most two folds, one configuration confirmed on at most two folds with one
    seed, refitted with at most two seeds, and tested."""
    # The trials are a grid: nothing is searched, and no point of the space is left.
    unsearched = {"searcher": SearcherBlock(name="random"), "first": (), "balance": None}
    unsearched |= {"folds": min(study.search.folds, 2)}
    search = study.search.model_copy(update={"num_trials": 1, "max_concurrent": None, "grace_epochs": 1, **unsearched})
    confirm = study.confirm and study.confirm.model_copy(
        update={"top": 1, "seeds": 1, "folds": min(study.confirm.folds, 2)}
    )
    finalize = study.finalize and study.finalize.model_copy(update={"top": 1})
    refit = study.refit and study.refit.model_copy(update={"top": 1, "seeds": min(study.refit.seeds, 2)})
    stages = {"search": search, "confirm": confirm, "refit": refit, "finalize": finalize}
    return study.model_copy(update={"name": f"{study.name}{SUFFIX}", **stages})


def small_trial(trial: Trial, weights: dict[str, str]) -> dict[str, Any]:
    """Return a trial as plain values, with the sizes of a miniature. weights: backbone -> file of random weights.

    Small: crops of 32 px or the nearest size that the backbone takes, batches of 12 images, 2 learners, 4 clusters that
    are made anew in each epoch, recall at 1 and 2. `compile`, which takes a minute for each trial, is off. Data sets
    that need no files keep their images, batches and methods.
    """
    plain = trial.model_dump(mode="json")
    for block in ("sampler", "method") if has_files(trial) else ():
        plain[block] |= {
            key: min(value, _LARGEST[key])
            for key, value in plain[block].items()
            if key in _LARGEST and isinstance(value, int) and plain[block].get("num_learners") != 1
        }
    selected = trial.select_on.removeprefix("val_recall_at_")
    k = int(selected) if selected.isdigit() and int(selected) <= _IMAGES_PER_CLASS else 1
    plain |= {"recall_at": sorted({1, 2, k}), "compile": False}
    if selected.isdigit():
        plain["select_on"] = f"val_recall_at_{k}"
    if not validates(trial):
        del plain["select_on"]
    if trial.model.weights != "none":
        plain["model"]["weights"] = weights[trial.model.backbone]
    if not has_files(trial):
        return plain
    groups = plain["sampler"]
    if "classes_per_batch" in groups:
        groups["classes_per_batch"] = min(groups["classes_per_batch"], max(2, _BATCH // groups["images_per_class"]))
    data = plain["data"]
    crop_px = facts_of(trial.model.backbone).nearest_crop_px(min(trial.data.crop_px, _CROP_PX))
    margin_px = min(_MARGIN_PX, trial.data.resize_px - trial.data.crop_px)
    data |= {"content": "", "crop_px": crop_px, "resize_px": crop_px + margin_px}
    data["augmentation"]["padding_px"] = min(trial.data.augmentation.padding_px, _MARGIN_PX)
    for key in IMAGES_KEYS[2:]:  # the images that are made have no groups
        data.pop(key, None)
    if trial.data.name in CONTAINERS:
        data["name"] = "image_folder"
    if trial.data.name == "image_list":
        data["list_file"] = _FILE_OF_LIST
    return plain


def has_files(trial: Trial) -> bool:
    """Return whether the images of a trial are files, which a smoke run generates."""
    return trial.data.name in BENCHMARK_OF or trial.data.name in OWN_IMAGES


def write_images(trials: Sequence[Trial], root: Path, classes_per_part: int) -> None:
    """Write a miniature of each data set of the trials, which their readers find in root."""
    root.mkdir(parents=True, exist_ok=True)
    small = partial(build, classes_per_part=classes_per_part, images_per_class=_IMAGES_PER_CLASS, size_px=_SIZE_PX)
    for name in dict.fromkeys(trial.data.name for trial in trials if has_files(trial)):
        if name in BENCHMARK_OF:
            key = BENCHMARK_OF[name]
            small(key, root / BENCHMARKS[key].folders[0])
        else:
            kind = "image_folder" if name in CONTAINERS else name
            small(kind, root, layout=_FILE_OF_LIST if name == "image_list" else None)


def _classes_per_part(trial: Trial) -> int:
    """Return the fewest classes of a part with which every split trains on enough of them and, unless none validates,
    validates on two.

    Raises ConfigError where the fractions are so extreme that this takes thousands of classes.
    """
    split = trial.data.split

    def fits(num_development: int) -> bool:
        if not validates(trial):
            return num_development >= _FEWEST_TRAINING_CLASSES
        largest_fold = -(-num_development // split.num_folds)
        num_val = math.ceil(num_development * split.val_fraction - 1e-9)
        fewest_val = min(num_val, num_development // split.num_folds)
        return fewest_val >= 2 and num_development - max(num_val, largest_fold) >= _FEWEST_TRAINING_CLASSES

    num_development = next((number for number in range(8, 1_000) if fits(number)), None)
    if num_development is None:
        given = f"val_fraction {split.val_fraction}, num_folds {split.num_folds}"
        raise ConfigError([_too_extreme("", given, "trial.data.split={val_fraction: 0.5, num_folds: 4}")])
    if trial.data.name in BENCHMARK_OF:
        return num_development

    # Folders and lists get twice that number of classes, of which a share is for the test.
    def enough(number: int) -> bool:
        num_test = math.ceil(2 * number * split.test_fraction - 1e-9)
        return (num_test >= 2 or trains_on_test_classes(trial)) and 2 * number - num_test >= num_development

    num_classes = next((number for number in range(num_development // 2, 10_000) if enough(number)), None)
    if num_classes is None:
        cure = "trial.data.split.test_fraction=0.5"
        raise ConfigError([_too_extreme("test_fraction", split.test_fraction, cure)])
    return num_classes


def _too_extreme(key: str, value: object, cure: str) -> Problem:
    message = "would need thousands of generated classes in a smoke run"
    path = "trial.data.split" + (f".{key}" if key else "")
    return Problem(path, value, message, cure=f'for the smoke run, add --set "{cure}"')


def _weights(trials: Sequence[Trial], folder: Path) -> dict[str, str]:
    """Write random weights for each backbone that does not start from random ones anyway: backbone -> file."""
    named = dict.fromkeys(trial.model.backbone for trial in trials if trial.model.weights != "none")
    files = {backbone: folder / f"{backbone}.pth" for backbone in named}
    for backbone, file in files.items():
        write_random_weights(backbone, file)
    return {backbone: str(file) for backbone, file in files.items()}
