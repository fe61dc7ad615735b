"""Upper limits of a trial, cut to what its images allow: a space for 43 classes also runs on 6.

Upper limits are the classes and images in a batch (`Sampler.cut_to`), the groups of a method (`Method.cut_to`), the
default k of Recall@k, and the number of folds. Each is cut to the smallest of the splits that the search and the
confirmation use, so that all runs of a configuration have equal settings. What fits is not changed. It happens before
fingerprints are final: what runs is what is fingerprinted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from raydml import registry
from raydml.config.recipe import flatten, value_text
from raydml.config.sections import SplitSettings
from raydml.config.trial import ConfirmStage, SearchStage, StudySettings, Trial, parse_trial
from raydml.data.catalog import Catalog
from raydml.data.splits import used_splits
from raydml.evaluation.protocols import ProtocolError, protocols_of, retrieval_tasks
from raydml.ops.wording import counted
from raydml.training.trial_images import Catalogs

_logger = logging.getLogger("raydml")


def trials_within_limits(
    trials: Sequence[Trial], catalogs: Catalogs, num_folds: int, search_folds: int = 1
) -> list[Trial]:
    """Return the trials with their upper limits cut; trials that become equal are one.

    The divisions of the classes are logged first, such as "26 classes in class folders, 930 images: 9 train / 4
    validate / 13 test, sealed", then a note that names what was cut.

    num_folds, search_folds: how many folds the confirmation and the search use. Raises DataError where no split is
    possible, ConfigError where the settings that were cut do not fit together.
    """
    limits, cut = Limits(catalogs, num_folds, search_folds), dict[str, Trial]()
    for trial in trials:
        result = limits.cut(trial)
        cut.setdefault(result.model_dump_json(), result)
    limits.say_what_was_cut()
    if len(cut) < len(trials):
        _logger.info("note: %d trials are left of %d, the others became equal to one of these", len(cut), len(trials))
    return list(cut.values())


class Limits:
    """Cuts the upper limits of trials. What it takes to know the limits of a data set is done once.

    num_folds, search_folds: how many folds the confirmation and the search use.
    """

    def __init__(self, catalogs: Catalogs, num_folds: int, search_folds: int = 1) -> None:
        self._catalogs, self._num_folds, self._search_folds = catalogs, num_folds, search_folds
        self._done: dict[str, Trial] = {}
        self._parts: dict[str, _Parts] = {}  # with a large data set, each takes a while
        self._changes: dict[tuple[str, str], set[str]] = {}  # (key, new value) -> old values

    def cut(self, trial: Trial) -> Trial:
        """Return a trial with its upper limits cut; see `trials_within_limits` for what it raises."""
        kept = trial.model_dump_json(include={"data", "sampler", "method", "recall_at"})
        data = trial.data.images_key() + trial.data.split.model_dump_json()
        if data not in self._parts:
            self._parts[data] = _parts_of(
                trial.data.split, self._catalogs.of(trial), self._num_folds, self._search_folds
            )
        if kept not in self._done:
            self._done[kept] = _within_limits(trial, self._parts[data])
            for key, old, new in _differences(trial, self._done[kept]):
                self._changes.setdefault((key, new), set()).add(old)
        changed = self._done[kept].model_dump(mode="json", include={"data", "sampler", "method", "recall_at"})
        whole = trial.model_dump(mode="json")
        return trial if all(whole[key] == changed[key] for key in changed) else parse_trial({**whole, **changed})

    def say_what_was_cut(self) -> None:
        """Log how the classes are divided, and a note on what was cut so far."""
        for line in dict.fromkeys(one.line for one in self._parts.values()):
            _logger.info("%s", line)
        if self._changes:
            cuts = [
                f"{key} {' and '.join(sorted(old, key=_size))} -> {new}" for (key, new), old in self._changes.items()
            ]
            _logger.info("note: cut to what the images allow: %s", ", ".join(cuts))


def study_within_limits(study: StudySettings, trials: Iterable[Trial]) -> StudySettings:
    """Return the settings of a study that searches and confirms on no more folds than its trials have."""
    stages: dict[str, ConfirmStage | SearchStage | None] = {"search": study.search, "confirm": study.confirm}
    most = min(trial.data.split.num_folds for trial in trials)
    cut = {name: stage for name, stage in stages.items() if stage is not None and stage.folds > most}
    for name, stage in cut.items():
        _logger.info("note: cut to what the images allow: study.%s.folds %d -> %d", name, stage.folds, most)
    return study.model_copy(update={name: stage.model_copy(update={"folds": most}) for name, stage in cut.items()})


class _Parts(NamedTuple):
    """How the classes of a data set are divided for some trials.

    split: with as many folds as there can be. train_labels: of the search and of each used fold. num_found: images that
    every query finds in each part that is scored; all images where none is. line: the division of the search, in words.
    """

    split: SplitSettings
    train_labels: list[np.ndarray]
    num_found: int
    line: str


def _parts_of(split: SplitSettings, catalog: Catalog, num_folds: int, search_folds: int) -> _Parts:
    search, most, splits = used_splits(catalog, num_folds, search_folds, **split.model_dump())
    what = catalog.description or counted(len(catalog.class_names), "class", "classes")
    validate = f"{len(search.val):,} validate" if search.val else "none validates"
    test = f"{len(search.test):,} test, sealed" if search.test else "none is sealed"
    return _Parts(
        split=split.model_copy(update={"num_folds": most}),
        train_labels=[catalog.labels[np.isin(catalog.labels, one.train)] for one in splits],
        num_found=min(
            (
                _num_found(catalog, part, declared)
                for one in splits
                for part, declared in ((one.val, ()), (one.test, catalog.protocols))
                if part
            ),
            default=len(catalog.labels),  # no part is scored, so none limits recall_at
        ),
        line=f"{what}: {len(search.train):,} train / {validate} / {test}",
    )


def _num_found(catalog: Catalog, classes: Sequence[int], declared: Sequence[str]) -> int:
    """Return how many images every query of some classes finds under each of their protocols."""
    rows = np.flatnonzero(np.isin(catalog.labels, classes))
    roles = None if catalog.roles is None else [catalog.roles[row] for row in rows]
    groups = None if catalog.groups is None else catalog.groups.select(rows)
    try:
        return min(
            task.num_found
            for protocol in protocols_of(roles, declared, groups)
            for task in retrieval_tasks(protocol, catalog.labels[rows], roles, groups)
        )
    except ProtocolError:
        return len(rows)  # `check_split` refuses these images, with the cure


def _within_limits(trial: Trial, parts: _Parts) -> Trial:
    sampler = dict(trial.sampler.settings)
    class_of = registry.load("samplers", trial.sampler.name)
    for labels in parts.train_labels:
        sampler = class_of.cut_to(labels, **sampler)  # type: ignore[attr-defined]
    recall_at = trial.recall_at
    if recall_at == Trial.model_fields["recall_at"].default:  # a list of the user is refused where it does not fit
        recall_at = tuple(k for k in recall_at if k <= parts.num_found)
    settings: dict[str, Any] = {**trial.model_dump(mode="json"), "recall_at": list(recall_at)}
    settings["data"]["split"] = parts.split.model_dump(mode="json")
    settings["sampler"] = {"name": trial.sampler.name, **sampler}
    if trial.method.name != "plain":  # most need no torch
        built = (registry.build("samplers", trial.sampler.name, labels=each, **sampler) for each in parts.train_labels)
        batch_size = min(one.batch_size for one in built)
        method = registry.load("methods", trial.method.name).cut_to(batch_size, **trial.method.settings)  # type: ignore[attr-defined]
        settings["method"] = {"name": trial.method.name, **method}
    return parse_trial(settings)


def _differences(before: Trial, after: Trial) -> list[tuple[str, str, str]]:
    """Return (key, old value, new value) of each key that differs, in words."""
    old, new = (flatten(trial.model_dump(mode="json")) for trial in (before, after))
    return [(key, value_text(old[key]), value_text(new[key])) for key in old if key in new and old[key] != new[key]]


def _size(text: str) -> tuple[int, str]:
    return len(text), text
