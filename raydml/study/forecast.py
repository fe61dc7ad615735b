"""What a study would do, before anything starts: images, steps, epochs, disk, weights and the sampled values.

`forecast` returns plain values:

{
    "study": name,
    "data": [{"name", "num_images", "num_classes", "as_published", "splits": [{"split" ("search", "fold 0",
              "refit"), and for each of "train", "val", "test": {"num_images", "num_classes"}}]}], one for each data
              set and split,
    "steps": {"per_epoch", "batch", "images_per_epoch", "epochs", "per_trial", "images_per_trial": each [least, most]
              over the trials, and "are_expected": whether a method decides on the number while it trains},
    "stages": [{"stage", "num_trials", "epochs" (expected, of all trials, with those on further folds at most),
                "most_epochs" (of all trials), "in_words"}],
    "slots": {"num_slots" (trials at a time on this machine; 0 where it lacks what a trial needs), "in_words"},
    "cache": {"folder", "free_bytes", "development_bytes", "test_bytes"} | None where no image file is decoded,
    "weights": [{"backbone", "found" (True, False, or None for random weights), "in_words"}],
    "num_trials", "published_point" (whether trial 0 is one), "num_first" (points of study.search.first), "searcher",
    "num_later" (trials that are random here, and drawn from results when the search runs),
    "keys": [{"key", "domain" (in words), "values": [of each trial that has the key]}],
    "probe": [{"num_trials", "shape" (the settings in which the shapes differ), "epoch_s", and the fields of
               `training.probe.StepCost`}] | None, "hours" | None, "device" (only with a probe),
}
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydml import registry
from raydml.config.recipe import flatten
from raydml.config.refit import has_search, validates
from raydml.config.sections import IMAGES_KEYS
from raydml.config.trial import Machine, StudySettings, Trial
from raydml.data.catalog import WITHOUT_FILES, Catalog
from raydml.data.splits import Split, make_split
from raydml.images.cache import estimate_packs
from raydml.models.backbones import TIMM
from raydml.models.lookup import facts_of
from raydml.models.pretrained import DOWNLOAD_URL, path_of_published
from raydml.ops.wording import counted
from raydml.search_space.domains import has_first
from raydml.search_space.space import SearchSpace
from raydml.search_space.varying import varying_keys
from raydml.study.folder import (
    StudyPlan,
    num_confirmed,
    num_refits,
    num_tested,
    splits_of_stages,
    stages_of,
    with_absolute_paths,
)
from raydml.study.rungs import expected_epochs, expected_spans
from raydml.training.parts import make_sampler
from raydml.training.trial_images import Catalogs, split_for, storage_for


def forecast(plan: StudyPlan, storage: Path, *, as_published: bool = False) -> dict[str, Any]:
    """Return what a study would do, as the module describes it.

    plan: of `plan_study`, which refuses what a run would refuse. as_published: whether its catalogs have the published
    counts of benchmarks.
    """
    space, trials, _, catalogs, later = plan
    machine = with_absolute_paths(space.machine, storage)
    return {
        "study": space.study.name,
        "data": _data(space.study, catalogs, trials, as_published),
        "steps": _steps(catalogs, trials),
        "stages": stages_with_epochs(space.study, trials),
        "slots": _slots(machine, space.study),
        "cache": _cache(catalogs, trials, machine),
        "weights": _weights(trials),
        "num_trials": len(trials),
        "published_point": has_first(space.trial),
        "num_first": len(space.study.search.first),
        "num_later": len(trials) - later["num_known"] if later else 0,
        "searcher": space.study.search.searcher.name,
        "keys": _keys(space, trials),
        "probe": None,
        "hours": None,
    }


_IMAGES = tuple(f"data.{key}" for key in IMAGES_KEYS)


def _different(trials: Iterable[Trial], *sections: str) -> list[Trial]:
    """Return the first trial of each value of some sections, such as ``data.split``."""
    found: dict[str, Trial] = {}
    for trial in trials:
        plain = flatten(trial.model_dump(mode="json"))
        key = {name: value for name, value in plain.items() if name.startswith(sections)}
        found.setdefault(repr(sorted(key.items())), trial)
    return list(found.values())


def _data(
    study: StudySettings, catalogs: Catalogs, trials: Sequence[Trial], as_published: bool
) -> list[dict[str, Any]]:
    found = []
    for trial in _different(trials, *_IMAGES, "data.split"):
        catalog, splits = catalogs.of(trial), splits_of_stages(study, trial.data.split)
        found.append(
            {
                "name": catalog.name,
                "num_images": len(catalog.labels),
                "num_classes": len(catalog.class_names),
                "as_published": as_published and trial.data.name not in WITHOUT_FILES,
                "splits": [
                    {"split": name, **_counts(catalog, make_split(catalog, **split.model_dump()))}
                    for name, split in splits.items()
                    if name != "search" or validates(trial)
                ],
            }
        )
    return found


def _counts(catalog: Catalog, split: Split) -> dict[str, dict[str, int]]:
    return {
        part: {"num_images": int(np.isin(catalog.labels, classes).sum()), "num_classes": len(classes)}
        for part, classes in split.to_dict().items()
    }


def _steps(catalogs: Catalogs, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the least and the largest numbers of steps and images over the trials, on the search split."""
    found: dict[str, list[int]] = {}
    for trial in _different(trials, "data.", "sampler", "method", "epochs"):
        steps, batch = steps_per_epoch(trial, catalogs.of(trial))
        row = {"per_epoch": steps, "batch": batch, "images_per_epoch": steps * batch, "epochs": trial.epochs}
        row |= {"per_trial": steps * trial.epochs, "images_per_trial": steps * batch * trial.epochs}
        for name, number in row.items():
            found.setdefault(name, []).append(number)
    ranges = {name: [min(numbers), max(numbers)] for name, numbers in found.items()}
    return {**ranges, "are_expected": any(trial.method.name != "plain" for trial in trials)}


def steps_per_epoch(trial: Trial, catalog: Catalog) -> tuple[int, int]:
    """Return the expected number of steps in an epoch, and the images of a batch."""
    labels = catalog.labels[np.isin(catalog.labels, split_for(trial, catalog).train)]
    sampler = make_sampler(trial, np.unique(labels, return_inverse=True)[1])
    method = registry.load("methods", trial.method.name)
    expected = method.expected_steps(sampler.batches_per_epoch, **trial.method.settings)  # type: ignore[attr-defined]
    return round(expected), sampler.batch_size


def stages_with_epochs(study: StudySettings, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the rows of the key ``stages``, with the expected epochs of each."""
    search, each_epochs = study.search, sorted(trial.epochs for trial in trials)
    shortest, longest, most = each_epochs[0], each_epochs[-1], sum(each_epochs)
    planned = _epochs_in_words(each_epochs)
    rungs = {"grace_epochs": search.grace_epochs, "reduction_factor": search.reduction_factor}
    epochs = float(most)
    if search.scheduler != "none":  # the rungs are those of the longest trial, and the shorter ones end by themselves
        epochs = min(expected_epochs(len(trials), search.scheduler, max_epochs=longest, **rungs), epochs)
    words = f"{counted(len(trials), 'trial')} of {planned}"
    if search.scheduler != "none" and search.grace_epochs < longest:
        first = min(search.grace_epochs, shortest)
        words = f"{counted(len(trials), 'trial')} of {first} to {longest} epochs, about {epochs:,.0f} of "
        words += f"{most:,} epochs with {search.scheduler}"
    if search.folds > 1:
        num_ended = num_run_to_end(study, trials)
        further = min(num_ended * longest, most) * (search.folds - 1)
        words += f"; then at most {counted(num_ended * (search.folds - 1), 'run')} on "
        words += f"{counted(search.folds - 1, 'further fold')}, {further:,} epochs: of each trial that runs to its end"
        epochs, most = epochs + further, most * search.folds
    stages = [{"stage": "search", "num_trials": len(trials), "epochs": epochs, "most_epochs": most, "in_words": words}]
    stages = stages if "search" in stages_of(study, trials) else []
    if study.confirm is not None:
        confirm, top = study.confirm, min(study.confirm.top, len(trials))
        runs = num_confirmed(study, len(trials))
        words = f"{counted(top, 'configuration')} x {counted(confirm.folds, 'fold')} x {counted(confirm.seeds, 'seed')}"
        words += f" = {counted(runs, 'run')} of {planned}"
        most = runs // top * sum(each_epochs[-top:])
        stages.append({"stage": "confirm", "num_trials": runs, "epochs": most, "most_epochs": most, "in_words": words})
    if study.refit is not None:
        stages.append(_refit_stage(study, trials))
    if study.finalize is not None:
        runs, noun = num_tested(study, trials), "run" if study.confirm or study.refit else "best trial"
        words = f"{counted(runs, noun)} scored on the test classes"
        stages.append({"stage": "finalize", "num_trials": runs, "epochs": 0, "most_epochs": 0, "in_words": words})
    return stages


def num_run_to_end(study: StudySettings, trials: Sequence[Trial]) -> int:
    """Return how many trials of a search are expected to run to their end, at most, where none fails."""
    search, lengths = study.search, {trial.epochs for trial in trials}
    if len(lengths) > 1:  # the shorter ones end by themselves
        return len(trials)
    rungs = {"grace_epochs": search.grace_epochs, "reduction_factor": search.reduction_factor}
    return math.ceil(expected_spans(len(trials), search.scheduler, max_epochs=max(lengths), **rungs)[-1][1])


def _epochs_in_words(each_epochs: Sequence[int]) -> str:
    """Return ``8 epochs``, or ``4 to 8 epochs`` of trials that differ. each_epochs: ascending."""
    shortest, longest = each_epochs[0], each_epochs[-1]
    return counted(longest, "epoch") if shortest == longest else f"{shortest} to {longest} epochs"


def _refit_stage(study: StudySettings, trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the refits: of unknown length where the confirmation finds the number of epochs, at most the longest."""
    assert study.refit is not None
    refit, runs, each_epochs = study.refit, num_refits(study, trials), sorted(trial.epochs for trial in trials)
    num_configurations = runs // refit.seeds
    if not has_search(trials):
        most, of = refit.seeds * sum(each_epochs), _epochs_in_words(each_epochs)
    elif refit.epochs == "confirmed":
        most = refit.seeds * sum(each_epochs[-num_configurations:])
        of = f"as many epochs as are best, at most {each_epochs[-1]}"
    else:
        most, of = runs * refit.epochs, counted(refit.epochs, "epoch")
    classes = "all classes, those of the test included" if refit.classes == "all" else "all development classes"
    words = f"{counted(num_configurations, 'configuration')} x {counted(refit.seeds, 'seed')} on {classes}"
    words += f" = {counted(runs, 'run')} of {of}"
    return {"stage": "refit", "num_trials": runs, "epochs": most, "most_epochs": most, "in_words": words}


def _slots(machine: Machine, study: StudySettings) -> dict[str, Any]:
    """Return how many trials run at a time on this machine, as an embedded Ray shares it out."""
    num_cpus, num_gpus = os.cpu_count() or 1, torch.cuda.device_count() if machine.device != "cpu" else 0
    gpus = machine.num_gpus(are_there=num_gpus > 0)
    limits = [num_cpus // machine.cpus_per_trial]
    words = f"this machine has {counted(num_cpus, 'CPU')} and {counted(num_gpus, 'GPU')}; a trial takes "
    words += f"{counted(machine.cpus_per_trial, 'CPU')}" + (f" and {gpus:g} GPU" if gpus else "")
    if gpus:
        limits.append(int(num_gpus / gpus))
    if study.search.max_concurrent is not None:
        limits.append(study.search.max_concurrent)
        words += f"; study.search.max_concurrent is {study.search.max_concurrent}"
    return {"num_slots": min(limits), "in_words": words}


def _cache(catalogs: Catalogs, trials: Sequence[Trial], machine: Machine) -> dict[str, Any] | None:
    development = test = 0
    for trial in _different(trials, *_IMAGES, "data.split", "data.resize", "data.interpolation"):
        if trial.data.name not in WITHOUT_FILES:
            catalog = catalogs.of(trial)
            split = split_for(trial, catalog)
            sizes = estimate_packs(catalog, split, storage_for(trial.data, machine))
            development, test = development + sizes[0], test + sizes[1]
    if not development:
        return None
    folder = machine.cache_dir
    assert folder is not None
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return {"folder": str(folder), "free_bytes": free, "development_bytes": development, "test_bytes": test}


def _weights(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    rows = []
    for trial in _different(trials, "model.backbone", "model.weights"):
        found, words = find_weights(trial)
        rows.append({"backbone": trial.model.backbone, "found": found, "in_words": words})
    return rows


def find_weights(trial: Trial) -> tuple[bool | None, str]:
    """Return whether the weights of a trial are on this machine (None: it starts from random ones), and a sentence."""
    weights, facts = trial.model.weights, facts_of(trial.model.backbone)
    if weights == "none":
        return None, "random weights"
    path = Path(weights).expanduser()
    if weights == "default" and facts.is_timm:
        from raydml.models.timm_source import source_of

        source = source_of(trial.model.backbone.removeprefix(TIMM))
        if (local := source.local_weights()) is not None:
            return True, f"found: {local}"
        return False, f"missing: {source.place}; a run fetches it from {facts.weights_file} where there is a network"
    if weights == "default" and facts.weights_file is not None:
        path = path_of_published(facts.weights_file)
    if path.is_file():
        return True, f"found: {path}"
    if weights == "default":
        address = f"{DOWNLOAD_URL}{facts.weights_file}"
        return False, f"missing: {path}; a run fetches it from {address} where there is a network"
    file = facts.weights_by_path if path.name in facts.weights_by_path else "the file"
    return False, f"missing: {path.resolve()}; put {file} there, or --set trial.model.weights=none"


def _keys(space: SearchSpace, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    rows = [flatten(trial.model_dump(mode="json")) for trial in trials]
    found = []
    for key, domain in varying_keys(space.trial).items():
        block, _, name = key.rpartition(".")
        values = [row.get(key) for row in rows if key in row or (name == "name" and block in row)]
        # What --set has replaced in every block is written there still.
        if values and (domain != "set by block" or len({repr(value) for value in values}) > 1):
            found.append({"key": key, "domain": domain, "values": values})
    return found
