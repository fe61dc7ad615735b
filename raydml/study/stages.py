"""A study on Ray: search, confirm, finalize. Each stage can be interrupted, and run again from where it was."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from raydml.config.trial import Machine, Study, Trial, fingerprint, parse_trial
from raydml.metrics.intervals import t_interval
from raydml.study.cluster import Interrupted, catch_signals, connected, trial_resources
from raydml.study.events import TrialState, events_path, rank, read_state
from raydml.study.finalize import finalize, illustrate
from raydml.study.folder import RESULT_FILES, StudyError, read_json, read_study, stages_of, write_json
from raydml.study.results import write_results
from raydml.study.runner import StudySession, drop_checkpoints, run_trials
from raydml.training.trial_images import Catalogs


class Outcome(NamedTuple):
    """How a run of a study ended: ``finished``, or ``interrupted`` by a signal."""

    status: str
    signal: int | None = None


def run_study(folder: Path, *, address: str | None = None) -> Outcome:
    """Run the stages of a study that are not finished, and return when they are.

    address: of a running Ray cluster; None starts an embedded one that ends with this call. Raises DataError before
    anything starts if the images are missing or not those of the study.
    """
    study_json = read_study(folder)
    study = Study.model_validate(study_json["study"])
    machine = Machine.model_validate(study_json["machine"])
    stages = stages_of(study)
    if is_finished(folder, stages):
        return Outcome("finished")
    _refuse_other_images(study_json, machine)
    session = StudySession(folder, study, machine, study_json["select_on"], {})
    session.record(
        "study_started",
        study=study.name,
        study_id=study_json["study_id"],
        config={**study_json["study"], "select_on": session.metric},
        storage=study_json["storage"],
        commit=study_json["commit"],
    )
    with catch_signals() as received:
        try:
            with connected(address):
                resources = trial_resources(machine, session.note, joined=address is not None)
                session = session._replace(resources=resources)
                for stage in stages:
                    _run_stage(session, stage, received)
                illustrate(session)
        except (Interrupted, KeyboardInterrupt):
            number = received[0] if received else signal.SIGINT
            session.record("interrupted", signal=number)
            return Outcome("interrupted", number)
        write_results(folder, session.record)
        session.record("study_finished")
    return Outcome("finished")


def is_finished(folder: Path, stages: list[str]) -> bool:
    """Return whether every stage has its result and the study was recorded as finished: nothing is left to do."""
    return all((folder / RESULT_FILES[stage]).exists() for stage in stages) and read_state(folder).state == "finished"


def _refuse_other_images(study_json: Mapping[str, Any], machine: Machine) -> None:
    """Raise DataError where the images are not those of the study: each trial would crash on them, and count as run."""
    catalogs = Catalogs(machine)
    for trial in study_json["trials"]:
        catalogs.of(parse_trial(trial))


def _run_stage(session: StudySession, stage: str, received: list[int]) -> None:
    """Run a stage that has no result yet. received: the signals that have arrived so far."""
    result = session.folder / RESULT_FILES[stage]
    if result.exists():
        return
    if not received:
        _STAGES[stage](session)
    if received:
        raise Interrupted(received[0])
    if not result.exists():
        raise StudyError(f"stage {stage} stopped before all its trials have ended; see {events_path(session.folder)}")


def search_trials(study_json: Mapping[str, Any]) -> dict[str, Trial]:
    """Return the trials of the search by key."""
    return {f"search-{index:03d}": parse_trial(trial) for index, trial in enumerate(study_json["trials"])}


def _search(session: StudySession) -> None:
    trials = search_trials(read_study(session.folder))
    configurations = {key: fingerprint(trial) for key, trial in trials.items()}
    states = run_trials(session, "search", trials, configurations, session.study.search.scheduler)
    failed = [key for key, state in states.items() if state.ended and state.best is None]
    if len(failed) == len(trials):
        raise StudyError(
            f"no trial of the search has a value of {session.metric}: {_endings(states)}. Nothing can be ranked. "
            "Cure: gentler settings (smaller learning rates, say) under another --name"
        )
    _finish(session, "search", trials, states, lambda: rank(states.values()))


def confirm_trials(ranking: list[dict[str, Any]], trials: Mapping[str, Trial], study: Study) -> list[dict[str, Any]]:
    """Return the best configurations x folds x seeds: rows of ``from_trial``, ``configuration`` and ``trial``."""
    assert study.confirm is not None
    rows = []
    for row in [row for row in ranking if row["value"] is not None][: study.confirm.top]:
        searched = trials[row["trial"]]
        for fold in range(study.confirm.folds):
            split = searched.data.split.model_copy(update={"fold": fold})
            data = searched.data.model_copy(update={"split": split})
            for seed in range(study.confirm.seeds):
                trial = searched.model_copy(update={"data": data, "seed": study.seed + seed})
                rows.append({"from_trial": row["trial"], "configuration": row["fingerprint"], "trial": trial})
    return rows


def _confirm(session: StudySession) -> None:
    searched = search_trials(read_study(session.folder))
    rows = confirm_trials(read_json(session.folder / RESULT_FILES["search"]), searched, session.study)
    by_key = {f"confirm-{index:03d}": row for index, row in enumerate(rows)}
    trials = {key: row["trial"] for key, row in by_key.items()}
    configurations = {key: row["configuration"] for key, row in by_key.items()}
    states = run_trials(session, "confirm", trials, configurations, "none")
    _finish(session, "confirm", trials, states, lambda: _confirmed(by_key, states))
    result = session.folder / RESULT_FILES["confirm"]
    if not result.exists():
        return
    # Checkpoints of the configurations that will not be tested are no longer needed.
    top = session.study.finalize.top if session.study.finalize else 1
    kept = {row["configuration"] for row in read_json(result)[:top]}
    for key, configuration in configurations.items():
        if configuration not in kept:
            drop_checkpoints(session.folder, "confirm", key)


def _confirmed(rows: Mapping[str, Mapping[str, Any]], states: Mapping[str, TrialState]) -> list[dict[str, Any]]:
    """Return each configuration with its runs, their mean and its 95 % interval, best first."""
    groups: dict[str, dict[str, Any]] = {}
    for key, row in rows.items():
        named = {"configuration": row["configuration"], "from_trial": row["from_trial"], "runs": []}
        groups.setdefault(row["configuration"], named)["runs"].append(
            {
                "trial": key,
                "fold": row["trial"].data.split.fold,
                "seed": row["trial"].seed,
                "value": states[key].best,
                "ended": states[key].ended,
            }
        )
    # A configuration with a failed run is not confirmed: its mean would be over fewer, perhaps easier, folds.
    complete = [group for group in groups.values() if all(run["value"] is not None for run in group["runs"])]
    if not complete:
        raise StudyError(f"no configuration got through all its folds and seeds: {_endings(states)}")
    for group in complete:
        interval = t_interval([run["value"] for run in group["runs"]])
        group |= {"mean": interval.mean, "half_width": interval.half_width, "num_runs": len(group["runs"])}
    return sorted(complete, key=lambda group: -group["mean"])


def _endings(states: Mapping[str, TrialState]) -> str:
    """Return ``search-000 crashed (ValueError: ...), search-001 non_finite_loss``."""
    return ", ".join(
        f"{key} {state.ended}" + (f" ({state.error})" if state.error else "") for key, state in states.items()
    )


def _finish(
    session: StudySession,
    stage: str,
    trials: Mapping[str, Trial],
    states: Mapping[str, TrialState],
    ranking: Callable[[], list[dict[str, Any]]],
) -> None:
    """Write the stage's result, unless the run was cut short: an unfinished stage has no result."""
    if any(key not in states or not states[key].ended for key in trials):
        return
    rows = ranking()
    write_json(session.folder / RESULT_FILES[stage], rows)
    session.record("stage_finished", stage=stage, ranking=rows)


_STAGES = {"search": _search, "confirm": _confirm, "finalize": finalize}
