"""More trials for a study: new ones for its search, or those that have failed once more. Later stages run again."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydml.analysis.trials import LIMITS
from raydml.config.refit import has_search
from raydml.config.trial import Machine, parse_trial
from raydml.data.digests import ImageRecord
from raydml.errors import ConfigError
from raydml.search_space.space import SearchSpace, load_space
from raydml.study import events
from raydml.study.driver import only_driver
from raydml.study.events import STAGES, events_path, read_state
from raydml.study.folder import (
    RESULT_FILES,
    PlannedTrials,
    StudyError,
    make_splits,
    planned_trials,
    prepare_images,
    read_json,
    read_study,
    specification_of,
    write_json,
)
from raydml.study.folds import lack_folds
from raydml.training.trial_images import Catalogs

#: What the stages leave in the folder of a study and would be overwritten. The ranking of the search comes last: while
#: it is there, another call finishes a move that a crash has cut off.
_LAST = RESULT_FILES["search"]
_RESULTS = (*(name for name in RESULT_FILES.values() if name != _LAST), _LAST)
_FROM_RESULTS = ("summary.json", "summary.md", "report", "illustrations", "model")
#: Endings that are no result of a trial's configuration.
RETRIED = ("crashed", "stuck", "out_of_memory")


def extend_search(folder: Path, num_trials: int) -> None:
    """Give the search of a study ``num_trials`` trials in all (for a space with grids: of each grid point).

    The new trials are those that the space would have had with this number from the start. The results so far are
    kept in ``earlier/N-trials``. Trials that a time limit ended, or kept from starting, run as well. Where the search
    has all of these trials, nothing changes.

    Raises:
        StudyError: fewer trials than the study has, a space that does not give the study's trials again, a study
            without a search.
        StudyHeld: another process runs the study.
    """
    with only_driver(folder):
        _extend(folder, num_trials)


def retry_failed(folder: Path) -> list[str]:
    """Let the trials of a study that crashed, were stuck or found no memory run again, and return their keys.

    They go on from their checkpoints. The results of their stage and of later ones are kept in ``earlier/retry``, and
    these stages are run again. Trials that diverged or collapsed have their result: they do not run again. Raises
    StudyHeld if another process runs the study.
    """
    with only_driver(folder):
        state = read_state(folder)
        failed = [trial for stage in STAGES for trial in state.of_stage(stage) if trial.ended in RETRIED]
        if not failed:
            return []
        first, keys = failed[0].stage, [trial.trial for trial in failed if trial.stage == failed[0].stage]
        # From the events: a call that was cut off may have moved the result already.
        is_over = first in state.stages and state.stages[first].finished
        if is_over:
            # The test scores of trials that train on are those of other weights then.
            tested = [f"final/{key}{suffix}" for key in keys for suffix in (".json", ".npz")]
            later = [RESULT_FILES[stage] for stage in STAGES[STAGES.index(first) :]]
            _move_results(folder, _new_folder(folder / "earlier" / "retry"), [*tested, *later])
        events.append(
            events_path(folder), {"event": "trials_reopened", "stage": first, "trials": keys, "was_over": is_over}
        )
        return keys


def _new_folder(folder: Path) -> Path:
    numbers = (f"-{number}" if number > 1 else "" for number in itertools.count(1))
    return next(path for number in numbers if not (path := folder.with_name(folder.name + number)).exists())


def _extend(folder: Path, num_trials: int) -> None:
    study, state = read_study(folder), read_state(folder)
    if not has_search(study["trials"]):
        raise StudyError(
            f"--num-trials = {num_trials}: study {folder.name!r} has no search, because its trials have no validation "
            "classes (trial.data.split.val_fraction is 0). Cure: another study with more trials (sweep ... --name)"
        )
    planned = int(study["study"]["search"]["num_trials"])
    missing = len(study["trials"]) > len(state.searched) or any(
        trial.ended in LIMITS for trial in state.of_stage("search")
    )
    if num_trials < planned:
        raise StudyError(
            f"--num-trials = {num_trials}: study {folder.name!r} has {planned} trials already, and trials are not "
            f"taken away. Cure: more than {planned}, or another study (--name)"
        )
    ranked, num_folds = folder / RESULT_FILES["search"], study["study"]["search"].get("folds", 1)
    is_ranked = ranked.exists()
    missing = missing or (is_ranked and num_folds > 1 and lack_folds(read_json(ranked), num_folds))
    if num_trials == planned and not (missing and is_ranked):
        return
    trials, later = study["trials"], {}
    if num_trials > planned:
        found = _trials(folder, study, num_trials)
        trials, later = [trial.model_dump(mode="json") for trial in found.trials], found.later or {}
    num_started = len(state.searched)
    _keep_results(folder, num_started, [one.trial for one in state.of_stage("search") if one.ended in LIMITS])
    events.append(events_path(folder), {"event": "search_extended", "num_trials_before": num_started})
    settings = {**study["study"], "search": {**study["study"]["search"], "num_trials": num_trials}}
    write_json(folder / "study.json", {**study, **later, **specification_of(settings, trials)})


def _trials(folder: Path, study: dict[str, Any], num_trials: int) -> PlannedTrials:
    """Return the trials of the longer search, after the checks that a new study gets."""
    machine = Machine.model_validate(study["machine"])
    try:
        space = dataclasses.replace(_space(folder, study, num_trials), machine=machine)
        catalogs = Catalogs(machine, record=ImageRecord.of_study(folder))
        planned = planned_trials(space, catalogs)
    except ConfigError as error:
        raise StudyError(f"study {folder.name!r} cannot have {num_trials} trials: {error}") from error
    trials = [trial.model_dump(mode="json") for trial in planned.trials]
    # Through the model: an older study lacks keys that have been added since.
    before = [parse_trial(trial).model_dump(mode="json") for trial in study["trials"]]
    if trials[: len(before)] != before:
        raise StudyError(
            f"study {folder.name!r}: with {num_trials} trials its space would give other trials than the "
            f"{len(before)} that have run. Either the study is older than this version and its options are not "
            "recorded, or sampling has changed. Cure: a new study with this number of trials (sweep ... --name)"
        )
    splits = make_splits(space.study, catalogs, planned.trials)
    prepare_images(machine, planned.trials, catalogs)
    write_json(folder / "split.json", splits)
    return planned


def _space(folder: Path, study: dict[str, Any], num_trials: int) -> SearchSpace:
    """Return the study's space with another number of trials."""
    resolved = folder / "resolved_space.json"
    overrides = [f"study.search.num_trials={num_trials}"]
    if not resolved.exists():  # an older study: the options of its command are not recorded
        overrides += [f"study.seed={study['study']['seed']}", f"study.name={study['name']}"]
        if root := study["machine"]["data_root"]:
            overrides.append(f"machine.data_root={root}")
    return load_space(resolved if resolved.exists() else folder / "space.yaml", overrides)


def _keep_results(folder: Path, num_trials: int, continued: Sequence[str]) -> None:
    """Move the results so far to ``earlier/N-trials``. A second call, after a crash, moves what the first has not.

    continued: searched trials that train on, whose test scores are those of other weights then. A later extension of
    as many trials gets a folder of its own, ``N-trials-2``.
    """
    before = [event for event in events.read(events_path(folder)) if event["event"] == "search_extended"]
    number = 1 + sum(event["num_trials_before"] == num_trials for event in before)
    kept = folder / "earlier" / (f"{num_trials}-trials" + (f"-{number}" if number > 1 else ""))
    tested = [f"final/{key}{suffix}" for key in continued for suffix in (".json", ".npz")]
    _move_results(folder, kept, [*tested, *_RESULTS])


def _move_results(folder: Path, kept: Path, names: Sequence[str]) -> None:
    """Move files of a study, and the report and the model that follow from them, to another folder.

    The last of the names is moved last: while it is there, another call finishes a move that a crash has cut off.
    """
    for name in (*names[:-1], *_FROM_RESULTS, *names[-1:]):
        if (folder / name).exists():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            if (kept / name).is_dir():
                shutil.rmtree(kept / name)
            (folder / name).replace(kept / name)
