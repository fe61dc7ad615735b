"""A study on disk: its folder, its specification and its checkpoints.

<storage>/<name>/study.json      the specification: settings, machine, every trial of the search stage; and how the
                                 images of a benchmark differ from the published ones, empty if they do not. Where the
                                 searcher needs results, `points` are those of the trials, and the trials that need
                                 results stand for those that events.jsonl has
                 space.yaml      the user's file; resolved_space.json: the same after --set and the other options
                 split.json      which classes train, validate and are sealed, for the search, each fold and the refits
                 events.jsonl    everything that happened, one line each (raydml.study.events)
                 search/ confirm/ refit/  run-000/<trial>/checkpoint_*, one run folder for each (re)start
                 ranking.json confirmed.json refit.json final.json summary.json   what each stage ended with
                 final/          the test numbers and embeddings of each finalized run and refit
                 image_digests/  the bytes of its images as they were when each was first opened (data/digests.py)
                 test_reads.jsonl  every opening of the test classes
                 illustrations/ report/ model/
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from raydml.analysis.trials import parameters_of, varying
from raydml.config.refit import has_search, refit_split, trains_on_test_classes
from raydml.config.sections import ExtraTest, SplitSettings
from raydml.config.trial import Machine, StudySettings, Trial, fingerprint
from raydml.data.benchmarks import BENCHMARK_OF
from raydml.data.catalog import Catalog, DataError, log_notes
from raydml.data.digests import ImageRecord
from raydml.data.splits import Split, further_folds, make_split
from raydml.errors import did_you_mean
from raydml.evaluation.protocols import protocols_of, reason_unscorable
from raydml.ops.addresses import is_address, redacted, without_secrets
from raydml.ops.files import write_whole
from raydml.ops.object_store import check_uri
from raydml.ops.wording import counted
from raydml.search_space.points import written_point
from raydml.search_space.space import SearchSpace, each_alternative
from raydml.study.draws import TrialDraws
from raydml.study.driver import only_driver
from raydml.study.events import events_path, read_state
from raydml.study.limits import Limits, study_within_limits, trials_within_limits
from raydml.study.mirror import fetch_study
from raydml.study.remote import StudyPlace, files_of_study
from raydml.training import checkpoint
from raydml.training.trial_images import Catalogs, open_development, with_content

_logger = logging.getLogger("raydml")

#: What each stage ends with.
RESULT_FILES = {"search": "ranking.json", "confirm": "confirmed.json", "refit": "refit.json", "finalize": "final.json"}


class StudyError(ValueError):
    """A study cannot be created, found or continued; the message says the cure."""


def write_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON with sorted keys; a reader sees the old file or the new one."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


#: What a study.json has once it has the hash of its settings, with the types.
_STUDY = {
    "name": str,
    "study_id": str,
    "storage": str,
    "select_on": str,
    "machine": dict,
    "study": dict,
    "trials": list,
}


class _Object(dict[str, Any]):
    """An object of a JSON file of a study; a key that is missing there is an error that names the file."""

    def __init__(self, entries: dict[str, Any], path: Path) -> None:
        super().__init__(entries)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise _damaged(self._path, f"it has no {key}")

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a study.

    Raises StudyError for one that is damaged or holds something else, with the cure; its objects raise it for a key
    that they do not have.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda entries: _Object(entries, path))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise _damaged(path, f"it is not JSON ({error})") from error
    if fault := _fault_in(path.name, value):
        raise _damaged(path, fault)
    return value


def is_whole(path: Path) -> bool:
    """Return whether a JSON file of a study is there and can be read."""
    with suppress(StudyError):
        return path.exists() and read_json(path) is not None
    return False


def _damaged(path: Path, fault: str) -> StudyError:
    return StudyError(f"{path} is damaged: {fault}. Cure: {_cure_of(path)}")


def _fault_in(name: str, value: Any) -> str:
    """Return what the content of a file of this name lacks; empty where nothing is missing."""
    is_list = name in (*RESULT_FILES.values(), "illustrations.json")
    if is_list and not isinstance(value, list):
        return "it holds no list"
    for row in value if is_list else [value]:
        if not isinstance(row, dict):
            return f"it holds {type(row).__name__} instead of an object"
    if name == "study.json":
        required = _STUDY if "specification" in value else {}
        wrong = [
            key for key, kind in _STUDY.items() if key in {**required, **value} and not isinstance(value.get(key), kind)
        ]
        if wrong:
            return f"it has no usable {', '.join(wrong)}"
    return ""


def _cure_of(path: Path) -> str:
    """Return what mends a damaged file of a study. Results are made again from the events."""
    folder = path.parent.parent if path.parent.name in ("final", "illustrations") else path.parent
    resume = f"launch.py resume {shlex.quote(str(folder))}"
    if path.name == "study.json":
        resolved = folder / "resolved_space.json"
        again = f"launch.py sweep {shlex.quote(str(resolved))} --storage {shlex.quote(str(folder.parent))}"
        delete = "delete it and " if path.exists() else ""
        again = f", or {delete}make it again: {again}" if resolved.exists() else ""
        return f"put it back from a backup{again}"
    if path.name == "split.json":
        return "put it back from a backup, or delete it: the study works without it"
    if path.name == "summary.json":
        return f"delete it and let the report make it again: launch.py report {shlex.quote(str(folder))}"
    return f"delete it and let the study make it again: {resume}"


class StudyPlan(NamedTuple):
    """What a study is before it has a folder. space: with the settings of the study that its images allow. splits: each
    split by name, as in split.json. catalogs: of its data sets, as listed. later: of `PlannedTrials`."""

    space: SearchSpace
    trials: list[Trial]
    splits: dict[str, Any]
    catalogs: Catalogs
    later: dict[str, Any] | None = None


def plan_study(space: SearchSpace, catalogs: Catalogs | None = None) -> StudyPlan:
    """List the images, divide the classes and sample the trials. Raises DataError, ConfigError, StudyError."""
    catalogs = catalogs or Catalogs(space.machine)
    trials, later = planned_trials(space, catalogs)
    space = replace(space, study=study_within_limits(space.study, trials))
    if space.study.refit is not None and space.study.refit.classes == "all":
        _logger.info(
            "note: study.refit.classes is all: refits train on the sealed classes as well, and are never scored"
        )
    return StudyPlan(space, trials, make_splits(space.study, catalogs, trials), catalogs, later)


def create_study(
    space: SearchSpace,
    *,
    storage: Path,
    tracking_uri: str | None,
    space_text: str,
    plan: StudyPlan | None = None,
    command: str = "",
    user: str = "",
    stored_at: str | None = None,
) -> Path:
    """Create the folder of a study and return it; a study that exists with the same settings is left as it is.

    stored_at: the address of the study, if its files go to an object store. The folder is then the driver's alone.

    tracking_uri: of the MLflow store; None is the embedded one, which is in the storage folder wherever that is.
    What can be wrong is found here, before an actor starts: unreadable images, splits without classes, weights that
    cannot be fetched. plan: what `plan_study` returned for this space, if it was called before. command: the one that
    creates the study. user: the one whose login it has at an MLflow server. Raises StudyError if a study of this name
    has other settings, and StudyHeld while another process makes or runs one of this name.
    """
    folder = storage.resolve() / space.study.name
    plan = plan or plan_study(space)
    with only_driver(folder):
        return _create(folder, plan, storage, tracking_uri, space_text, command, user, stored_at)


def _create(
    folder: Path,
    plan: StudyPlan,
    storage: Path,
    tracking_uri: str | None,
    space_text: str,
    command: str,
    user: str,
    stored_at: str | None,
) -> Path:
    space, trials, splits, catalogs, later = plan
    recorded = StudyPlace.of(folder).uri
    if (folder / "study.json").exists() and recorded != stored_at:
        there = f"in {recorded}" if recorded else f"on this disk, in {folder}"
        raise StudyError(
            f"study {space.study.name!r} exists, with its files {there}. Cure: give this one a name of its own "
            f"(--name {_free_name(folder)}), or the same --storage"
        )
    specification = specification_of(
        space.study.model_dump(mode="json"), [trial.model_dump(mode="json") for trial in trials]
    )
    if (folder / "study.json").exists():
        made = read_study(folder)
        if made["specification"] != specification["specification"]:
            raise StudyError(
                f"study {space.study.name!r} exists in {folder} with other settings. Cure: give this one a name of its "
                f"own (--name {_free_name(folder)}), or go on with the old one "
                f"(launch.py resume {shlex.quote(str(folder))})"
            )
        # Where the study runs and reports may change from one command to the next; its specification may not.
        here = {"machine": with_absolute_paths(space.machine, storage).model_dump(mode="json")}
        write_json(
            folder / "study.json", {**made, **here, "tracking_uri": _recorded_store(tracking_uri, folder.parent)}
        )
        return folder
    study_id = _study_id_before(folder, trials, later)
    StudyPlace(str(folder), stored_at).record()
    machine = with_absolute_paths(space.machine, storage)
    record = ImageRecord.of_study(folder)
    if not study_id:
        shutil.rmtree(record.folder, ignore_errors=True)  # of a creation that was cut off
    left_out = prepare_images(machine, trials, catalogs.recorded(record, on_changed="accept"))
    write_json(folder / "split.json", splits)
    write_whole(folder / "space.yaml", space_text)
    write_whole(folder / "resolved_space.json", json.dumps(space.to_dict(), indent=1) + "\n")  # keys in their order
    study = {
        "name": space.study.name,
        "study_id": study_id or uuid.uuid4().hex,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "storage": str(storage.resolve()),
        "tracking_uri": _recorded_store(tracking_uri, folder.parent),
        "command": redacted(command),
        "user": user,
        "commit": checkpoint.git_commit(),
        "select_on": trials[0].select_on,
        "machine": machine.model_dump(mode="json"),
        "unlike_published": unlike_published(trials, catalogs, left_out),
        **(later or {}),
        **specification,
    }
    write_json(folder / "study.json", study)  # last: a folder without it is not a study
    return folder


def _study_id_before(folder: Path, trials: Sequence[Trial], later: Mapping[str, Any] | None) -> str:
    """Return the id of the study whose study.json was deleted; empty where the folder has no events.

    Raises StudyError where the events are those of other trials.
    """
    state = read_state(folder)
    known = trials if later is None else trials[: later["num_known"]]
    prints = {search_key(index): fingerprint(trial) for index, trial in enumerate(known)}
    if any(prints.get(trial.trial, trial.fingerprint) != trial.fingerprint for trial in state.of_stage("search")):
        raise StudyError(
            f"{events_path(folder)} is of other trials than those of {folder.name!r}. Cure: a name of its own "
            f"(--name {_free_name(folder)}), or the settings of the study that the folder had"
        )
    return state.study_id


def search_key(index: int) -> str:
    """Return the key of a trial of the search."""
    return f"search-{index:03d}"


def all_search_keys(study_json: Mapping[str, Any]) -> list[str]:
    """Return the keys of all trials of a search in their order, also of those that are drawn while it runs."""
    return [search_key(index) for index in range(len(study_json["trials"]))]


def planned_search(study_json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configurations by key that a search has before it starts: of trials that need no results."""
    known = study_json["trials"][: study_json.get("num_known")]
    return {search_key(index): trial for index, trial in enumerate(known)}


def specification_of(study: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what defines a study, as keys of its study.json: its settings, its trials, and the hash of both."""
    # A stage that a study does not have is left out: the studies that were made before it existed keep their hash.
    hashed = {name: value for name, value in study.items() if name != "refit" or value is not None}
    return {"study": study, "trials": trials, "specification": _digest({"study": hashed, "trials": trials})}


def settings_of(folder: Path, study_json: Mapping[str, Any]) -> tuple[StudySettings, Machine]:
    """Return the settings of a study that is to run, and where it runs.

    Raises StudyError if study.json has other settings or trials than it was written with.
    """
    found = specification_of(study_json["study"], study_json["trials"])["specification"]
    if found != study_json["specification"]:
        raise _damaged(folder / "study.json", "its settings or trials are not those that it was written with")
    try:
        return StudySettings.model_validate(study_json["study"]), Machine.model_validate(study_json["machine"])
    except ValidationError as error:
        raise _damaged(folder / "study.json", str(error.errors()[0]["loc"])) from error


def fingerprinted_trials(space: SearchSpace, catalogs: Catalogs) -> list[Trial]:
    """Return the trials of `planned_trials`."""
    return planned_trials(space, catalogs).trials


class PlannedTrials(NamedTuple):
    """The trials of a search, as far as they can be known before it.

    later: None where no trial needs results. Else ``num_known``, the number of the trials that need none, ``points``,
    those of all trials in the space, and ``varying``, the names of the parameters that may differ between trials.
    """

    trials: list[Trial]
    later: dict[str, Any] | None = None


def planned_trials(space: SearchSpace, catalogs: Catalogs) -> PlannedTrials:
    """Return the trials of a space, each with the hash of its images: their fingerprints are final.

    Upper limits that the images do not allow are cut before (see `limits`), with a note. Where the searcher needs
    results, the trials from the first such one on are random: they stand for those that are drawn during the search.
    """
    num_folds = 0 if space.study.confirm is None else space.study.confirm.folds
    draws = TrialDraws(space)
    later = None
    if draws.can_adapt:
        limits = Limits(catalogs, num_folds, space.study.search.folds)
        found = draws.known(lambda trial: with_content(limits.cut(trial), catalogs.of(trial)))
        limits.say_what_was_cut()
        trials = [drawn.trial for drawn in found]
        later = {
            "num_known": draws.num_known,
            "points": [written_point(drawn.point) for drawn in found],
            "varying": varying([parameters_of(trial.model_dump(mode="json")) for trial in each_alternative(space)]),
        }
    else:
        known = [one.trial for one in draws.known()]
        drawn = trials_within_limits(known, catalogs, num_folds, space.study.search.folds)
        trials = [with_content(trial, catalogs.of(trial)) for trial in drawn]
    if len(metrics := sorted({trial.select_on for trial in trials})) > 1:
        raise StudyError(
            f"trial.select_on = {', '.join(metrics)}: trials that are ranked by different metrics cannot be compared. "
            "Cure: one value instead of a domain"
        )
    possible = each_alternative(space) if draws.can_adapt else trials  # what is drawn later is not known
    parts = {trial.data.images_key() + trial.data.split.model_dump_json() for trial in possible}
    if space.study.search.folds > 1 and len(parts) > 1:
        raise StudyError(
            f"study.search.folds = {space.study.search.folds}: the trials have {len(parts)} different splits or sets "
            "of images, and are compared class by class. Cure: one value instead of each domain below "
            "trial.data.split and of those that decide on the images, or study.search.folds: 1"
        )
    return PlannedTrials(trials, later)


def with_absolute_paths(machine: Machine, storage: Path) -> Machine:
    """Return the settings with absolute paths, valid in every process, and a cache folder (in `storage` by default)."""
    return machine.model_copy(
        update={
            "data_root": machine.data_root.resolve() if machine.data_root else None,
            "cache_dir": machine.cache_dir.resolve() if machine.cache_dir else storage.resolve() / "cache",
        }
    )


def make_splits(study: StudySettings, catalogs: Catalogs, trials: Iterable[Trial]) -> dict[str, Any]:
    """Return every split of the search, the folds and the refits, by name. Raises where a trial cannot work with it."""
    from raydml.inference.evaluate import check_extra_test

    splits: dict[str, Any] = {}
    made: dict[str, Split] = {}
    checked: set[tuple[str, str, tuple[int, ...]]] = set()  # what a check depends on, of either kind
    checked_extras: set[tuple[str, ExtraTest]] = set()
    for trial in trials:  # many share a split and a sampler, and with a large data set each check takes a while
        data = trial.data
        catalog = catalogs.of(trial)
        if data.extra_tests and study.finalize is None:
            log_notes(["data.extra_tests are not scored, because study.finalize is null"])
        for place, settings in splits_of_stages(study, data.split).items():
            name = f"{place} {_digest(settings.model_dump(mode='json'))[:8]}"
            key = f"{data.images_key()} {name}"
            if key not in made:
                made[key] = make_split(catalog, **settings.model_dump())
                parts = made[key].to_dict().items()
                splits[name] = {part: [catalog.class_names[c] for c in classes] for part, classes in parts}
            what = (key, trial.sampler.model_dump_json(), trial.recall_at)
            if what not in checked:
                check_split(trial, catalog, made[key], place)
                checked.add(what)
            tested = (data.images_key(), "", (*trial.recall_at, *made[key].test))
            if study.finalize is not None and tested not in checked:
                check_test(trial, catalog, made[key])
                checked.add(tested)
            if study.finalize is not None and settings.test_fraction:
                for extra in data.extra_tests:
                    if (key, extra) not in checked_extras:
                        check_extra_test(extra, catalogs.extra(extra), catalog, made[key])
                        checked_extras.add((key, extra))
    return splits


def unlike_published(trials: Iterable[Trial], catalogs: Catalogs, left_out: Mapping[str, set[str]]) -> list[str]:
    """Return in words how the images of the benchmarks that trials use differ from the published ones.

    left_out: what `prepare_images` returned.
    """
    used = {trial.data.name: catalogs.of(trial) for trial in trials if trial.data.name in BENCHMARK_OF}
    return [
        f"{name}: {words}" if len(used) > 1 else words
        for name, catalog in used.items()
        for words in (*catalog.differences, *without_some("development", len(left_out.get(name, ()))))
    ]


def without_some(part: str, num_left_out: int) -> list[str]:
    """Return a sentence on unreadable images of a part; none where every image was read."""
    if not num_left_out:
        return []
    verb = "is" if num_left_out == 1 else "are"
    return [f"{counted(num_left_out, f'{part} image')} that cannot be read {verb} left out"]


def prepare_images(machine: Machine, trials: Sequence[Trial], catalogs: Catalogs) -> dict[str, set[str]]:
    """Fetch the pretrained weights, then decode the development images: once for all trials and before any starts.

    Returns what `decode_images` returns.
    """
    from raydml.models.network import build_network

    for model in {
        trial.model.model_dump_json(include={"backbone", "weights"}): trial.model for trial in trials
    }.values():
        if model.weights != "none":
            build_network(**model.model_dump(), seed=0)
    return decode_images(machine, trials, catalogs)


def prepared_by(trial: Trial) -> str:
    """Return what `prepare_images` depends on: trials of which it is equal share their weights and decoded images."""
    data = trial.data.model_dump_json(include={"name", *_DECODED_BY})
    return data + trial.model.model_dump_json(include={"backbone", "weights"})


#: The settings of the data that decoded images depend on.
_DECODED_BY = {"content", "resize_px", "resize", "interpolation", "split"}


def decode_images(machine: Machine, trials: Sequence[Trial], catalogs: Catalogs) -> dict[str, set[str]]:
    """Decode the development images unless they are in the cache, and compare their bytes with the study's record.

    Images of trials that train on every class are left to those trials, which record that they open them. Returns data
    set -> paths of the unreadable images that are left out. Raises DataError for missing, changed and unreadable ones.
    """
    left_out: dict[str, set[str]] = {}
    sealed = [trial for trial in trials if not trains_on_test_classes(trial)]
    for trial in {trial.data.model_dump_json(include=_DECODED_BY): trial for trial in sealed}.values():
        opened = open_development(trial, machine, augmented=False, catalogs=catalogs)
        skipped = (*opened.train.skipped, *opened.val.skipped)
        left_out.setdefault(trial.data.name, set()).update(path for path, _reason in skipped)
    return left_out


def splits_of_stages(study: StudySettings, split: SplitSettings) -> dict[str, SplitSettings]:
    """Return the splits that the runs of a searched trial have: ``search``, ``fold 0`` ... and ``refit``.

    split: of the trial. A fold that the search itself validates on is not repeated.
    """
    places = {"search": split}
    confirmed = range(study.confirm.folds) if study.confirm else ()
    for fold in sorted({*further_folds(split.fold, split.num_folds, study.search.folds), *confirmed}):
        if fold != split.fold:
            places[f"fold {fold}"] = split.model_copy(update={"fold": fold})
    if study.refit is not None:
        places["refit"] = refit_split(split, study.refit.classes)
    return places


def check_split(trial: Trial, catalog: Catalog, split: Split, place: str = "search") -> None:
    """Raise where the training classes cannot fill a batch, or the validation classes cannot be scored.

    place: of the split among those of `splits_of_stages`.
    """
    from raydml.training.parts import make_sampler

    labels = catalog.labels[np.isin(catalog.labels, split.train)]
    try:
        make_sampler(trial, np.unique(labels, return_inverse=True)[1])
    except DataError as error:
        if place == "search":
            raise
        where = "a refit" if place == "refit" else f"a run on {place}"
        raise StudyError(f"{where} trains on {len(split.train):,} classes, and its sampler cannot: {error}") from error
    if split.val:
        _refuse_unscorable(trial, catalog, split.val, "val")


def check_test(trial: Trial, catalog: Catalog, split: Split) -> None:
    """Raise StudyError where the sealed classes, or one of their lists, cannot be scored at the end.

    What the labels, roles and groups say is enough for it; no image is opened.
    """
    if split.test:
        _refuse_unscorable(trial, catalog, split.test, "test")


def _refuse_unscorable(trial: Trial, catalog: Catalog, classes: Sequence[int], part: Literal["val", "test"]) -> None:
    """Raise StudyError where the classes of a part, or one of their lists, cannot be scored. classes: their ids."""
    rows, words = np.isin(catalog.labels, classes), "validation" if part == "val" else "test"
    declared = catalog.protocols if part == "test" else ()  # declared protocols and lists are for the test classes
    sets = {f"the {words} classes": rows}
    for name, names in catalog.lists.items() if part == "test" else ():
        numbers = np.flatnonzero(np.isin(np.array(catalog.class_names), list(names)))
        sets[f"the {words} classes of the list {name}"] = rows & np.isin(catalog.labels, numbers)
    for what, some in sets.items():
        if reason := _reason(catalog, some, (1,), declared):
            key = "trial.data.exclude_same = 'group': " if _excludes(catalog) else ""
            cure = _cure_of_unscorable(catalog, f"the {words} part")
            raise StudyError(f"{key}{what} cannot be scored: {reason}. Cure: {cure}")
        if reason := _reason(catalog, some, trial.recall_at, declared):
            raise StudyError(
                f"trial.recall_at = {list(trial.recall_at)}: {what} have {int(some.sum()):,} images: {reason}. Cure: "
                f"leave the larger k out, or raise trial.data.split.{part}_fraction"
            )


def _reason(catalog: Catalog, is_scored: np.ndarray, recall_at: Sequence[int], declared: Sequence[str]) -> str:
    """Return why some images of a catalog cannot be scored under one of their protocols, or "". is_scored: (N,)."""
    rows = np.flatnonzero(is_scored)
    roles = None if catalog.roles is None else [catalog.roles[row] for row in rows]
    groups = None if catalog.groups is None else catalog.groups.select(rows)
    labels = catalog.labels[rows]
    reasons = (
        reason_unscorable(protocol, labels, roles, recall_at, groups)
        for protocol in protocols_of(roles, declared, groups)
    )
    return next(filter(None, reasons), "")


def _excludes(catalog: Catalog) -> bool:
    return catalog.groups is not None and catalog.groups.are_excluded


def _cure_of_unscorable(catalog: Catalog, part: str) -> str:
    if _excludes(catalog):
        return f"exclude_same: nothing, or a class in {part} with images in two groups"
    return f"a class in {part} with two images, one of them in the gallery"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _free_name(folder: Path) -> str:
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return f"{folder.name}-{number}"


def lost_specification(folder: Path) -> str:
    """Return what to do about a folder with a study's events and no study.json; empty for any other folder."""
    if not events_path(folder).exists() or (folder / "study.json").exists():
        return ""
    return f"{folder / 'study.json'} is missing, beside the events of a study. Cure: {_cure_of(folder / 'study.json')}"


def find_study(target: str, storage: Path) -> Path:
    """Return the folder of a study given by name, path or address. Raises StudyError that lists the studies there are.

    A study at an address is brought into the storage folder, or up to date there; see `fetch_study` for what it raises.
    """
    if is_address(target):
        return fetch_study(check_uri(target), storage)
    folders = [Path(target).resolve(), (storage / target).resolve()]
    for folder in folders:
        if (folder / "study.json").exists():
            return folder
    if lost := next(filter(None, map(lost_specification, folders)), ""):
        raise StudyError(lost)
    known = sorted(path.parent.name for path in storage.glob("*/study.json"))
    hint, listed = did_you_mean(target, known) or ".", ", ".join(known)
    cure = f"Studies there: {listed}. Cure: name one of these, its folder, or the right --storage"
    if not known:
        cure = "There are none yet. Cure: start one with `sweep`, or name the right --storage"
    raise StudyError(f"no study {target!r} in {storage.resolve()}{hint} {cure}")


def stages_of(study: StudySettings | Mapping[str, Any], trials: Sequence[Any]) -> list[str]:
    """Return the stages of a study in order: the search, and the others where they have settings.

    study, trials: the settings and the trials of the search, or their plain values, of which older studies lack some.
    Without validation classes there is nothing to search by.
    """
    settings = dict(study)
    search = ["search"] if has_search(trials) else []
    return [*search, *(stage for stage in ("confirm", "refit", "finalize") if settings.get(stage) is not None)]


def planned_stages(study: StudySettings, trials: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the stages of a study in order, each with ``num_trials`` and ``max_epochs``. trials: as plain values."""
    epochs = max(int(trial["epochs"]) for trial in trials)
    refit_epochs = epochs if study.refit is None or study.refit.epochs == "confirmed" else study.refit.epochs
    sizes = {
        "search": lambda: (len(trials), epochs),
        "confirm": lambda: (num_confirmed(study, len(trials)), epochs),
        "refit": lambda: (num_refits(study, trials), refit_epochs),
        "finalize": lambda: (num_tested(study, trials), 0),
    }
    rows = ((stage, *sizes[stage]()) for stage in stages_of(study, trials))
    return [{"stage": stage, "num_trials": number, "max_epochs": most} for stage, number, most in rows]


def num_confirmed(study: StudySettings, num_trials: int) -> int:
    """Return how many runs the confirmation has."""
    assert study.confirm is not None
    return min(study.confirm.top, num_trials) * study.confirm.folds * study.confirm.seeds


def num_refits(study: StudySettings, trials: Sequence[Any]) -> int:
    """Return how many models the stage refit trains; 0 without the stage."""
    if study.refit is None:
        return 0
    num_configurations = min(study.refit.top, len(trials)) if has_search(trials) else len(trials)
    return num_configurations * study.refit.seeds


def num_tested(study: StudySettings, trials: Sequence[Any]) -> int:
    """Return how many networks finalize tests: the runs of the best configurations, and their refits."""
    assert study.finalize is not None
    refits = num_refits(study, trials) if study.refit is not None and study.refit.classes == "development" else 0
    if not has_search(trials):
        return refits
    if study.confirm is None:
        return min(study.finalize.top, len(trials)) + refits
    num_configurations = min(study.finalize.top, study.confirm.top, len(trials))
    return num_configurations * study.confirm.folds * study.confirm.seeds + refits


def read_study(folder: Path) -> dict[str, Any]:
    """Return study.json with the paths of where the storage folder is now: it may have been copied, moved or renamed.

    tracking_uri: None for the embedded store, which moves along. Older studies recorded its absolute path.
    """
    study: dict[str, Any] = read_json(folder / "study.json")
    recorded, here = Path(study.get("storage") or ""), folder.resolve().parent
    study["tracking_uri"] = _unless_embedded(study.get("tracking_uri"), recorded)
    if recorded.is_absolute() and recorded != here:
        machine = study.get("machine") or {}
        for name in ("data_root", "cache_dir"):
            path = Path(machine.get(name) or "")
            if path.is_relative_to(recorded):
                machine[name] = str(here / path.relative_to(recorded))
    return _Object({**study, "storage": str(here)}, folder / "study.json")


def _unless_embedded(tracking_uri: str | None, storage: Path) -> str | None:
    """Return the address of a store; None if it is the embedded store of a storage folder."""
    return None if tracking_uri == f"sqlite:///{storage / 'mlflow.db'}" else tracking_uri


def _recorded_store(tracking_uri: str | None, storage: Path) -> str | None:
    """Return the address of a store as study.json has it: without its password, and None for the embedded store."""
    found = _unless_embedded(tracking_uri, storage)
    return None if found is None else without_secrets(found)


def report_to(folder: Path, tracking_uri: str) -> None:
    """Change the MLflow store that a study reports to."""
    study = read_study(folder)
    write_json(folder / "study.json", {**study, "tracking_uri": _recorded_store(tracking_uri, folder.resolve().parent)})


def move_data_root(folder: Path, data_root: Path) -> None:
    """Change where a study finds its images. Whether they are the same is checked when they are opened."""
    study = read_study(folder)
    study["machine"]["data_root"] = str(data_root.resolve())
    write_json(folder / "study.json", study)


def newest_checkpoint(
    folder: Path, stage: str, key: str, damaged: list[str] | None = None, *, whole: bool = True
) -> Path | None:
    """Return the newest intact checkpoint of a trial over all starts of its stage; one in a store is fetched.

    What is wrong with each newer one is added to ``damaged``. whole: fetch more than its card and its history.
    """
    return files_of_study(folder).newest_checkpoint(stage, key, damaged, whole=whole)
