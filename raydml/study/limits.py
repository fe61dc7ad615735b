"""Upper limits of a trial, cut to what its images allow: a space for 43 classes also runs on 6.

Upper limits are the classes and images in a batch (`Sampler.cut_to`), the groups of a method (`Method.cut_to`), the k
of Recall@k, and the number of folds. Each is cut to the smallest of the splits that the search and the confirmation
use, so that all runs of a configuration have equal settings. What fits is not changed. It happens before fingerprints
are final: what runs is what is fingerprinted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from raydml import registry
from raydml.config.recipe import flatten, value_text
from raydml.config.trial import StudySettings, Trial, parse_trial
from raydml.data.catalog import Catalog, counted
from raydml.data.splits import Split, largest_num_folds, make_split
from raydml.training.trial_images import Catalogs

_logger = logging.getLogger("raydml")


def trials_within_limits(trials: Sequence[Trial], catalogs: Catalogs, num_folds: int) -> list[Trial]:
    """Return the trials with their upper limits cut; trials that become equal are one.

    The divisions of the classes are logged first, such as "26 classes in class folders, 930 images: 9 train / 4
    validate / 13 test, sealed", then a note that names what was cut.

    num_folds: how many folds the confirmation uses. Raises DataError where no split is possible, ConfigError where the
    settings that were cut do not fit together.
    """
    cut: dict[str, Trial] = {}
    done: dict[str, Trial] = {}
    changes: dict[tuple[str, str], set[str]] = {}  # (key, new value) -> old values
    for trial in trials:
        kept = trial.model_dump_json(include={"data", "sampler", "method", "recall_at"})
        if kept not in done:
            done[kept] = _within_limits(trial, catalogs.of(trial), num_folds)
            for key, old, new in _differences(trial, done[kept]):
                changes.setdefault((key, new), set()).add(old)
        changed = done[kept].model_dump(mode="json", include={"data", "sampler", "method", "recall_at"})
        whole = trial.model_dump(mode="json")
        result = trial if all(whole[key] == changed[key] for key in changed) else parse_trial({**whole, **changed})
        cut.setdefault(result.model_dump_json(), result)
    for line in dict.fromkeys(_divided(trial, catalogs.of(trial)) for trial in cut.values()):
        _logger.info("%s", line)
    if changes:
        cuts = [f"{key} {' and '.join(sorted(olds, key=_size))} -> {new}" for (key, new), olds in changes.items()]
        _logger.info("note: cut to what the images allow: %s", ", ".join(cuts))
    if len(cut) < len(trials):
        _logger.info("note: %d trials are left of %d, the others became equal to one of these", len(cut), len(trials))
    return list(cut.values())


def study_within_limits(study: StudySettings, trials: Iterable[Trial]) -> StudySettings:
    """Return the settings of a study that confirms on no more folds than its trials have."""
    if study.confirm is None:
        return study
    most = min(trial.data.split.num_folds for trial in trials)
    if study.confirm.folds <= most:
        return study
    _logger.info("note: cut to what the images allow: study.confirm.folds %d -> %d", study.confirm.folds, most)
    return study.model_copy(update={"confirm": study.confirm.model_copy(update={"folds": most})})


def used_splits(trial: Trial, catalog: Catalog, num_folds: int) -> list[Split]:
    """Return the splits of the search and of the first folds."""
    folds = dict.fromkeys((trial.data.split.fold, *range(num_folds)))
    settings = [trial.data.split.model_copy(update={"fold": fold}) for fold in folds]
    return [make_split(catalog, **one.model_dump()) for one in settings]


def _divided(trial: Trial, catalog: Catalog) -> str:
    split = make_split(catalog, **trial.data.split.model_dump())
    what = catalog.description or counted(len(catalog.class_names), "class", "classes")
    return f"{what}: {len(split.train):,} train / {len(split.val):,} validate / {len(split.test):,} test, sealed"


def _within_limits(trial: Trial, catalog: Catalog, num_folds: int) -> Trial:
    split = trial.data.split
    used = max(num_folds, 0 if split.fold is None else split.fold + 1)
    if used:
        whole = make_split(catalog, **split.model_copy(update={"fold": None}).model_dump())
        most = largest_num_folds(len(whole.train) + len(whole.val), split.num_folds, used)
        split = split.model_copy(update={"num_folds": most})
        trial = trial.model_copy(update={"data": trial.data.model_copy(update={"split": split})})
    sampler, counts = dict(trial.sampler.settings), []
    class_of = registry.load("samplers", trial.sampler.name)
    for used_split in used_splits(trial, catalog, min(num_folds, split.num_folds)):
        sampler = class_of.cut_to(catalog.labels[np.isin(catalog.labels, used_split.train)], **sampler)  # type: ignore[attr-defined]
        counts += [int(np.isin(catalog.labels, part).sum()) for part in (used_split.val, used_split.test)]
    # The smallest of the parts that are scored; a query does not find itself.
    recall_at = tuple(k for k in trial.recall_at if k < min(counts)) or trial.recall_at
    settings: dict[str, Any] = {**trial.model_dump(mode="json"), "recall_at": list(recall_at)}
    settings["sampler"] = {"name": trial.sampler.name, **sampler}
    batch_size = sampler.get("batch_size") or sampler["classes_per_batch"] * sampler["images_per_class"]
    if trial.method.name != "plain":  # most need no torch
        method = registry.load("methods", trial.method.name).cut_to(batch_size, **trial.method.settings)  # type: ignore[attr-defined]
        settings["method"] = {"name": trial.method.name, **method}
    return parse_trial(settings)


def _differences(before: Trial, after: Trial) -> list[tuple[str, str, str]]:
    """Return (key, old value, new value) of each key that differs, in words."""
    old, new = (flatten(trial.model_dump(mode="json")) for trial in (before, after))
    return [(key, value_text(old[key]), value_text(new[key])) for key in old if key in new and old[key] != new[key]]


def _size(text: str) -> tuple[int, str]:
    return len(text), text
