"""A study on Ray: search, confirm, refit, finalize. Each stage can be interrupted, and run again from where it was.

Finalize opens the test classes once, for the winners of the stages before. Every read of them is recorded, as an event
and in ``test_reads.jsonl``, before it happens.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray

from raydml.config.refit import has_search, trains_on_test_classes
from raydml.config.trial import Machine, StudySettings, Trial, fingerprint, parse_trial
from raydml.data.digests import ImageRecord
from raydml.evaluation.saved_embeddings import SavedEmbeddingsError, load_embeddings
from raydml.metrics.intervals import t_interval
from raydml.study.actor import evaluate_ensemble_remotely, evaluate_remotely, illustrate_remotely
from raydml.study.budget import UNLIMITED, Budget
from raydml.study.cluster import EarlyRay, Interrupted, address_of_job, catch_signals, connected, trial_resources
from raydml.study.description import description_of
from raydml.study.drawing import DrawnSearch, is_drawn_later, trials_of_search
from raydml.study.driver import only_driver
from raydml.study.events import TrialState, events_path, rank, read_state, read_trials
from raydml.study.extension import RETRIED
from raydml.study.faults import fault_in, fault_of
from raydml.study.first_steps import forecast_in_words, forecast_of, is_wanted, measure_shapes, shares, shares_in_words
from raydml.study.folder import (
    RESULT_FILES,
    StudyError,
    decode_images,
    newest_checkpoint,
    num_tested,
    planned_stages,
    read_json,
    read_study,
    settings_of,
    stages_of,
    write_json,
)
from raydml.study.folds import further_trials, note_on_pruned, p_values_of, rank_over_folds, runs_of_use
from raydml.study.node import look_at_nodes, needs_of, packs_in
from raydml.study.process import MachineFault, RayEnded
from raydml.study.refit import configurations_to_refit, lost_refits, notes_on_refits, refit_trials, refitted
from raydml.study.remote import StudyPlace, files_of_study, merge_reads
from raydml.study.results import (
    find_winner,
    illustrated_runs,
    is_finished,
    refuse_lost_events,
    tested_run,
    top_trials,
    trials_of,
    write_results,
)
from raydml.study.retention import drop_checkpoints
from raydml.study.runner import StudySession, num_slots, run_trials
from raydml.study.search_limit import SearchLimit
from raydml.training import checkpoint
from raydml.training.trial_images import Catalogs


class Outcome(NamedTuple):
    """How a run of a study ended: ``finished``, or ``interrupted`` by a signal."""

    status: str
    signal: int | None = None


def run_study(folder: Path, *, address: str | None = None, budget: Budget = UNLIMITED) -> Outcome:
    """Run the stages of a study that are not finished, and return when they are.

    address: of a running Ray cluster; None starts an embedded one that ends with this call. budget: what this run may
    spend. Raises DataError before anything starts if the images are
    missing or not those of the study, and StudyHeld if another process runs the study.
    """
    with only_driver(folder):
        refuse_lost_events(folder)
        return drive_study(folder, address=address, budget=budget)


def drive_study(
    folder: Path,
    *,
    address: str | None = None,
    budget: Budget = UNLIMITED,
    own_environment: MutableMapping[str, str] | None = None,
    early_ray: EarlyRay | None = None,
) -> Outcome:
    """Do what `run_study` does, for a process that holds the study or was started by the one that does.

    own_environment: see `raydml.study.cluster.connected`. early_ray: to be used where no cluster is joined.
    """
    try:
        return _drive(folder, address, budget, own_environment, early_ray)
    except OSError as error:  # before the study has begun; `_run` has put the others into words
        if (fault := fault_of(error)) is None:
            raise
        raise MachineFault(
            f"study {folder.name!r} does not start: {fault.rstrip('.')}. Then resume the study"
        ) from error


def _drive(
    folder: Path,
    address: str | None,
    budget: Budget,
    own_environment: MutableMapping[str, str] | None,
    early_ray: EarlyRay | None,
) -> Outcome:
    deadline_s = None if budget.time_s is None else time.time() + budget.time_s
    study_json = read_study(folder)
    study, machine = settings_of(folder, study_json)
    if is_finished(folder):
        return Outcome("finished")
    if budget.options and "search" not in stages_of(study, study_json["trials"]):
        raise StudyError(
            f"{budget.options[0]} ends a search early, and study {folder.name!r} has none: its trials have no "
            "validation classes, and their number of epochs is fixed. Cure: leave it out; Ctrl-C and resume split the "
            "time"
        )
    address = None if address == "local" else address or address_of_job(own_environment)
    place = StudyPlace.of(folder)
    needs = needs_of(place, machine.data_root, joined=address is not None)
    session = StudySession(folder, place, study, machine, study_json["select_on"], {}, needs, {}, set())
    if budget.options:
        session = session._replace(limit=SearchLimit(str(folder), budget, deadline_s))
    began_s = time.time()
    catalogs = _refuse_other_images(folder, study_json, machine)
    packs = packs_in(machine.cache_dir, began_s - 60) if address is not None else {}  # clocks of file systems differ
    about = description_of(folder, study_json, catalogs.of(parse_trial(study_json["trials"][0])))
    return _run(session, study_json, about, address, budget, own_environment, early_ray, packs, catalogs)


def _run(
    session: StudySession,
    study_json: dict[str, Any],
    about: Mapping[str, Any],
    address: str | None,
    budget: Budget,
    own_environment: MutableMapping[str, str] | None,
    early_ray: EarlyRay | None,
    packs: Mapping[str, int],
    catalogs: Catalogs,
) -> Outcome:
    folder, study, machine = session.folder, session.study, session.machine
    stages = stages_of(study, study_json["trials"])
    session.record(
        "study_started",
        study=study.name,
        study_id=study_json["study_id"],
        config={
            **study_json["study"],
            "select_on": session.metric,
            **({"smoke": True} if study_json.get("smoke") else {}),
        },
        storage=study_json["storage"],
        commit=study_json["commit"],
        dataset=study_json["trials"][0]["data"]["name"],
        planned=planned_stages(study, study_json["trials"]),
        time_limit_s=budget.time_s,
        **({} if budget.device_hours is None else {"max_device_hours": budget.device_hours}),
        **about,
    )
    num_steps = _num_steps(study, study_json["trials"])
    with catch_signals() as received:
        try:
            if address is not None and address == address_of_job(own_environment):
                session.note("This is a job of a Ray cluster: the study runs on that cluster.")
            session.step("starting Ray")
            with _joined(session, address, own_environment, early_ray):
                resources = trial_resources(machine, session.note, joined=address is not None)
                session = session._replace(resources=resources)
                is_measured = False
                for stage in stages:
                    if address is not None:
                        _look_at_nodes(session, received, packs)
                    if not (is_measured or stage == "finalize" or (folder / RESULT_FILES[stage]).exists()):
                        session, is_measured = _with_first_steps(session, study_json, catalogs, received), True
                    _run_stage(session, stage, received)
                if address is not None:
                    _look_at_nodes(session, received, packs)
                session.step("drawing the pictures", num_steps - 2, num_steps)
                illustrate(session)
                merge_reads(folder)
                session.step("stopping Ray")
            write_results(folder, session.record, num_steps)
            session.record("study_finished")
        except (Interrupted, KeyboardInterrupt):
            number = received[0] if received else signal.SIGINT
            session.record("interrupted", signal=number)
            return Outcome("interrupted", number)
        except Exception as error:
            if (fault := fault_of(error)) is not None:
                raise _paused(session, fault) from error
            if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
                raise RayEnded(f"{type(error).__name__}: {error}") from error
            raise
    return Outcome("finished")


@contextmanager
def _joined(
    session: StudySession,
    address: str | None,
    own_environment: MutableMapping[str, str] | None,
    early_ray: EarlyRay | None,
) -> Iterator[None]:
    """Do what `connected` does. Raises MachineFault where a study that has trials finds no cluster any more.

    Its head was lost, for example, and a new driver has taken the place of the one that ended with it.
    """
    with ExitStack() as stack:
        try:
            if early_ray is not None and address is None:
                stack.enter_context(early_ray.used())
            else:
                stack.enter_context(connected(address, own_environment=own_environment))
        except StudyError as error:
            if not read_state(session.folder).trials:
                raise
            raise MachineFault(str(error)) from error
        yield


def _look_at_nodes(session: StudySession, received: list[int], packs: Mapping[str, int]) -> None:
    """Leave out those of the nodes that are new which cannot run a trial, and note what is not right on others.

    received: the signals so far. packs: of the decoded images, as `packs_in` returns them.
    """
    session.step("looking at the nodes")
    session.seen_nodes.update(session.bad_nodes)  # those that a trial has found
    cache_dir = session.machine.cache_dir
    found = look_at_nodes(
        session.needs, session.resources, session.seen_nodes, lambda: bool(received),
        labels=session.machine.node_labels, cache_dir=str(cache_dir) if cache_dir else None, packs=packs,
    )  # fmt: skip
    for note in found.notes:
        session.note(note)
    session.leave_out(found.faults)


def _with_first_steps(
    session: StudySession, study_json: Mapping[str, Any], catalogs: Catalogs, received: list[int]
) -> StudySession:
    """Return the session with the shares of GPUs that trials of each shape need, by their first steps, and record what
    the study is expected to take, where these steps are wanted and no forecast has been made."""
    if received or not is_wanted(session.machine, session.resources):
        return session
    state, trials = read_state(session.folder), [parse_trial(trial) for trial in study_json["trials"]]
    session.step("measuring the first steps of each shape of trial")
    known = measure_shapes(
        session.folder, trials, session.machine, session.needs, session.place, _resources(session), session.nodes(),
        is_stopping=lambda: bool(received), note=session.note,
    )  # fmt: skip
    if received:
        return session
    if session.machine.gpus_per_trial == "auto" and session.resources["gpu"] == 1:
        most = max(stage.num_trials for stage in state.planned.values())
        most = min(most, session.study.search.max_concurrent or most)
        session = session._replace(shares=shares(known, session.machine, most, session.nodes({"gpu": 1.0})))
        for sentence in shares_in_words(session.shares, known):
            session.note(sentence)
    if state.forecast is None and not state.trials:
        unit = "GPU-hours" if session.resources["gpu"] else "CPU-hours"
        found = forecast_of(
            known, session.study, state, trials, catalogs,
            held=lambda trial: (unit, session.resources_of(trial)["gpu" if unit == "GPU-hours" else "cpu"]),
            num_slots=num_slots(session, trials),
        )  # fmt: skip
        if found is not None:
            session.record("forecast", **found._asdict())
            session.note(forecast_in_words(found))
    return session


def _paused(session: StudySession, fault: str) -> MachineFault:
    """Record that the study has stopped before its end, where that can be recorded, and return the error for its user.

    A full disk takes no event either; the starting process then records the interruption later.
    """
    with suppress(OSError):
        session.record("interrupted", signal=None, reason=fault)
    return MachineFault(
        f"study {session.study.name!r} has stopped, and no trial is lost: {fault.rstrip('.')}. Then resume the study"
    )


def _num_steps(study: StudySettings, trials: Sequence[Any]) -> int:
    """Return the steps after the training: the tests of networks and of ensembles, the pictures, report and model."""
    if study.finalize is None:
        return 3
    num_ensembles = min(study.finalize.top, study.confirm.top if study.confirm else len(trials), len(trials))
    return num_tested(study, trials) + (num_ensembles if has_search(trials) else 0) + 3


def _refuse_other_images(folder: Path, study_json: Mapping[str, Any], machine: Machine) -> Catalogs:
    """Raise DataError where the images are not those of the study: no trial could be compared with those before."""
    catalogs = Catalogs(machine, record=ImageRecord.of_study(folder))
    trials = [parse_trial(trial) for trial in study_json["trials"]]
    for trial in trials:
        catalogs.of(trial)
    decode_images(machine, trials, catalogs)
    return catalogs


def _run_stage(session: StudySession, stage: str, received: list[int]) -> None:
    """Run a stage that has no result yet. received: the signals that have arrived so far."""
    result = session.folder / RESULT_FILES[stage]
    if _is_usable(session, result) and not _has_lost_events(session, stage):
        return
    if not received:
        _STAGES[stage](session)
    if received:
        raise Interrupted(received[0])
    if not result.exists():
        raise StudyError(f"stage {stage} stopped before all its trials ended; see {events_path(session.folder)}")


def _has_lost_events(session: StudySession, stage: str) -> bool:
    """Return whether the events have lost the end of a finished stage, or of one of its trials, as after a loss of
    power. What was lost is then noted, and the result of the stage made anew."""
    state = read_state(session.folder)
    lost = [
        key
        for key in sorted(trials_of(session.folder, stage))
        if key not in state.trials or not state.trials[key].ended
    ]
    if stage not in state.stages or not state.stages[stage].finished:
        lost.append("its end")
    if lost:
        session.note(f"events.jsonl has lost {', '.join(lost)}; the result of the stage {stage} is made anew.")
        (session.folder / RESULT_FILES[stage]).unlink()
    return bool(lost)


def _is_usable(
    session: StudySession, file: Path, read: Callable[[Path], object] = read_json, otherwise: str = "It is made anew."
) -> bool:
    """Return whether a file of the study is there and can be read. A damaged one is noted and removed.

    otherwise: the sentence on what happens then.
    """
    if not file.exists():
        return False
    try:
        read(file)
    except (StudyError, SavedEmbeddingsError) as error:
        session.note(f"{str(error).partition(' Cure:')[0]} {otherwise}")
        file.unlink()
        return False
    return True


def search_trials(folder: Path) -> dict[str, Trial]:
    """Return the trials of the search by key, as far as they are known."""
    study_json = read_study(folder)
    return trials_of_search(study_json, read_state(folder).drawn if is_drawn_later(study_json) else {})


def _search(session: StudySession) -> None:
    study_json, state = read_study(session.folder), read_state(session.folder)
    # With a run on a further fold the first fold is over, also where a limit has kept some trials from starting.
    is_over = any(trial.is_further_fold for trial in state.of_stage("search"))
    later = DrawnSearch(session.folder, study_json) if is_drawn_later(study_json) and not is_over else None
    trials = later.trials if later else search_trials(session.folder)
    if is_over:
        trials = {key: trial for key, trial in trials.items() if key in state.trials}
    configurations = {key: fingerprint(trial) for key, trial in trials.items()}
    states = run_trials(session, "search", trials, configurations, session.study.search.scheduler, later)
    trials = later.trials if later else trials
    if session.limit is not None and session.limit.is_over:
        trials = {key: trial for key, trial in trials.items() if key in states}
    elif later is not None and not later.is_over:
        return  # cut short: some have not been drawn
    states = {key: states[key] for key in trials if key in states}  # without those on further folds
    failed = [key for key, state in states.items() if state.ended and state.best is None]
    if len(failed) == len(trials):
        raise StudyError(
            f"no trial of the search has a value of {session.metric}: {_endings(states)}. Nothing can be ranked. "
            f"Cure: {_cure_of(states, session.folder)}"
        )
    if session.study.search.folds == 1:
        _finish(session, "search", trials, states, lambda: rank(states.values()))
    elif all(key in states and states[key].ended for key in trials):
        _search_further_folds(session, trials, states)


def _search_further_folds(
    session: StudySession, searched: Mapping[str, Trial], states: Mapping[str, TrialState]
) -> None:
    """Run the trials that are not significantly worse than the best on the other folds, and rank by the means.

    searched, states: all trials on the first fold, which have ended.
    """
    num_folds, tested = session.study.search.folds, p_values_of(states.values())
    further = further_trials(tested, searched, session.study)
    limit = session.limit and session.limit.of_further_folds()
    if session.limit is not None and limit is None:
        session.note("no configuration is trained on further folds: the limit of the search leaves nothing for them")
        further = {}
    else:
        session.note(note_on_pruned(tested))
    trials = {**searched, **{key: trial for key, (_, trial) in further.items()}}
    found = dict(states)
    if further:
        first_of = {key: key for key in searched} | {key: first for key, (first, _) in further.items()}
        configurations = {key: fingerprint(searched[first]) for key, first in first_of.items()}
        found = run_trials(session._replace(limit=limit), "search", trials, configurations, "none")
    if limit is not None and limit.is_over:
        trials = {key: trial for key, trial in trials.items() if key in found}
    on_further = {key: found[key] for key in further if key in found}

    def ranking() -> list[dict[str, Any]]:
        """Rank, and drop the checkpoints that nothing needs: before the result says that the stage is over."""
        rows = rank_over_folds(states, tested, on_further, num_folds)
        kept = runs_of_use(rows, session.study.keep_checkpoints)
        for key in read_trials(session.folder, "search"):
            if key not in kept:
                drop_checkpoints(session.folder, "search", key)
        return rows

    _finish(session, "search", trials, found, ranking)


def confirm_trials(
    ranking: list[dict[str, Any]], trials: Mapping[str, Trial], study: StudySettings
) -> list[dict[str, Any]]:
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


def keys_of_runs(folder: Path, stage: str, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the rows of a stage after the search by the keys of their trials: ``confirm-000``, ``refit-001``.

    A run of the same trial that exists keeps its key and is not repeated. A run from before the search was given more
    trials counts only if it has a result and still has its checkpoint. All others get free keys.
    """
    known = {trial.trial: trial for trial in read_state(folder).trials.values() if trial.stage == stage}
    # The event that a trial has started may be lost. Its checkpoint then says what it is; without one it has not begun.
    started = {
        key: replace(trial, fingerprint=found)
        for key, trial in known.items()
        if (found := trial.fingerprint or _fingerprint_of_checkpoint(folder, stage, key))
    }
    usable: dict[str, list[str]] = {}
    for key, trial in sorted(started.items()):
        has_result = trial.best is not None or (stage == "refit" and trial.ended == "finished")
        is_kept = has_result and newest_checkpoint(folder, stage, key, whole=False) is not None
        if not trial.is_superseded or not trial.ended or is_kept:
            usable.setdefault(trial.fingerprint, []).append(key)
    free = (key for number in itertools.count() if (key := f"{stage}-{number:03d}") not in started)
    by_key = {}
    for row in rows:
        same = usable.get(fingerprint(row["trial"]))
        by_key[same.pop(0) if same else next(free)] = row
    return by_key


def _fingerprint_of_checkpoint(folder: Path, stage: str, key: str) -> str:
    """Return the fingerprint of the trial whose newest checkpoint this is; empty without one."""
    found = newest_checkpoint(folder, stage, key, whole=False)
    return str(checkpoint.load_card(found).get("fingerprint") or "") if found else ""


def _confirm(session: StudySession) -> None:
    searched = search_trials(session.folder)
    rows = confirm_trials(read_json(session.folder / RESULT_FILES["search"]), searched, session.study)
    by_key = keys_of_runs(session.folder, "confirm", rows)
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
        raise StudyError(f"no configuration finished all its folds and seeds: {_endings(states)}")
    for group in complete:
        interval = t_interval([run["value"] for run in group["runs"]])
        group |= {"mean": interval.mean, "half_width": interval.half_width, "num_runs": len(group["runs"])}
    return sorted(complete, key=lambda group: -group["mean"])


def _refit(session: StudySession) -> None:
    searched = search_trials(session.folder)
    state = read_state(session.folder)
    rows = refit_trials(configurations_to_refit(session.folder, state, searched), searched, session.study)
    for note in notes_on_refits(rows, session.study, state):
        session.note(note)
    by_key = keys_of_runs(session.folder, "refit", rows)
    # Each is checked as a whole: it has another number of epochs and other classes than its searched trial.
    trials = {key: parse_trial(row["trial"].model_dump(mode="json")) for key, row in by_key.items()}
    configurations = {key: row["configuration"] for key, row in by_key.items()}
    for key, trial in trials.items():
        if trains_on_test_classes(trial) and not (key in state.trials and state.trials[key].ended):
            # The process that trains it records each opening of the images.
            name = f"trial {fingerprint(trial)}"
            session.record("test_read", stage="refit", trial=None, checkpoint=name, commit=_commit())
    states = run_trials(session, "refit", trials, configurations, "none")
    _finish(session, "refit", trials, states, lambda: _refitted(session, by_key, states))


def _refitted(
    session: StudySession, rows: Mapping[str, Mapping[str, Any]], states: Mapping[str, TrialState]
) -> list[dict[str, Any]]:
    """Return the rows of refit.json, and note which refits are missing there."""
    found, lost = refitted(rows, states), {state.trial: state for state in lost_refits(states.values())}
    if not found:
        raise StudyError(
            f"no refit reached its last epoch: {_endings(states)}. Cure: smaller learning rates or another number of "
            "epochs, for example, in a new study (--name)"
        )
    if lost:
        session.note(f"without {_endings(lost)}: means and intervals of refits are over those that reached their end")
    return found


def _cure_of(states: Mapping[str, TrialState], folder: Path) -> str:
    """Return what helps where every trial has failed: those that did not diverge can run again as they are."""
    if any(state.ended in RETRIED for state in states.values()):
        return f"remove the cause, and launch.py resume {shlex.quote(str(folder))} --retry-crashed"
    return "smaller learning rates, for example, in a new study (--name)"


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


#: Metric -> ``mean`` and ``half_width``.
Means = dict[str, dict[str, float | None]]


def finalize(session: StudySession) -> None:
    """Test the confirmed winners, or those of a search that is not confirmed: each of their checkpoints once."""
    assert session.study.finalize is not None
    winners = _winners(session.folder, session.study)
    num_trials = sum(len(winner["keys"]) + len(_scored_refits(winner)) for winner in winners)
    session.record(
        "stage_started", stage="finalize", num_trials=num_trials, num_ended=0, max_epochs=0,
        configurations=[winner["configuration"] for winner in winners], num_slots=num_slots(session),
    )  # fmt: skip
    num_ensembles = sum(bool(winner["keys"]) for winner in winners)
    finished, num_done, num_steps = [], 0, num_trials + num_ensembles + 3
    for winner in winners:
        runs = _test_runs(session, winner["stage"], winner["keys"], num_done, num_steps)
        num_done += len(runs)
        if runs:
            num_done += 1
            session.step("testing the ensemble of the folds", num_done, num_steps)
        ensemble = _ensemble(session, winner["runs"])
        refits = _test_runs(session, "refit", _scored_refits(winner), num_done, num_steps)
        num_done += len(refits)
        finished.append(
            {
                "configuration": winner["configuration"],
                "from_trial": winner["from_trial"],
                "runs": runs,
                "metrics": _intervals(runs, "test", ""),
                "untrained": _intervals(runs, "test", "untrained_"),
                "validation": _intervals(runs, "val", ""),
                "untrained_validation": _intervals(runs, "val", "untrained_"),
                "ensemble": ensemble,
                # all have the same, but for extra tests that are not scored for one of them
                "protocols": {k: v for run in (*runs.values(), *refits.values()) for k, v in run["protocols"].items()},
                "refit": winner["refit"] and _tested_refit(winner["refit"], refits),
            }
        )
    write_json(session.folder / RESULT_FILES["finalize"], finished)
    session.record("stage_finished", stage="finalize", ranking=finished)


def _scored_refits(winner: Mapping[str, Any]) -> list[str]:
    """Return the keys of a winner's refits, none where they were trained on the test classes."""
    refit = winner["refit"]
    return [] if refit is None or refit["classes"] == "all" else [run["trial"] for run in refit["runs"]]


def _tested_refit(row: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what final.json says of the refits of a configuration: means and intervals over their seeds.

    There is no interval from fewer than three seeds.
    """
    return {
        "runs": runs,
        "epochs": row["epochs"],
        "classes": row["classes"],
        "num_runs": len(row["runs"]),
        "metrics": _without_wide_intervals(_intervals(runs, "test", ""), len(runs)),
        "untrained": _without_wide_intervals(_intervals(runs, "test", "untrained_"), len(runs)),
    }


def _winners(folder: Path, study: StudySettings) -> list[dict[str, Any]]:
    """Return the configurations to test, best first: ``configuration``, ``from_trial``, the ``stage`` and the ``keys``
    of their trials, the ``runs`` of the confirmation, and the row of their ``refit`` or None."""
    assert study.finalize is not None
    found = folder / RESULT_FILES["refit"]
    refits = {row["configuration"]: row for row in (read_json(found) if found.exists() else [])}
    confirmed, ranked = folder / RESULT_FILES["confirm"], folder / RESULT_FILES["search"]
    if confirmed.exists():
        rows = [
            {**row, "stage": "confirm", "keys": [run["trial"] for run in row["runs"] if run["value"] is not None]}
            for row in read_json(confirmed)
        ][: study.finalize.top]
    elif ranked.exists():
        rows = [
            {
                "configuration": row["fingerprint"],
                "from_trial": row["trial"],
                "stage": "search",
                "keys": [tested_run(folder, row)],
                "runs": [],
            }
            for row in read_json(ranked)
            if row["value"] is not None
        ][: study.finalize.top]
    else:  # without validation classes nothing was ranked
        rows = [{**row, "stage": "refit", "keys": [], "runs": []} for row in refits.values()]
    return [{**row, "refit": refits.get(row["configuration"])} for row in rows]


def _intervals(runs: Mapping[str, Any], part: str, prefix: str) -> Means:
    """Return the means over the runs of the metrics with this prefix (``untrained_`` or none); none without a run."""
    if not runs:
        return {}
    return _means(
        [
            {
                name.removeprefix(prefix): value
                for name, value in run[part].items()
                if name.startswith("untrained_") == bool(prefix)
            }
            for run in runs.values()
        ]
    )


def _means(scores: Sequence[Mapping[str, float]]) -> Means:
    """Return the mean and the half-width of the interval of each metric that every run has.

    Not every run defines every metric: the spectrum of embeddings that leave a direction unused is undefined, say. A
    mean over the others would be a mean over other runs than the rest of the table.
    """
    shared = [name for name in scores[0] if all(name in score for score in scores)]
    intervals = {name: t_interval([score[name] for score in scores]) for name in shared}
    return {name: {"mean": interval.mean, "half_width": interval.half_width} for name, interval in intervals.items()}


def _without_wide_intervals(means: Means, num_seeds: int) -> Means:
    """Return means over seeds, without their intervals where there are fewer than three seeds.

    A t interval of two seeds is 13 times as wide as their distance: too wide to be of use for scores between 0 and 1.
    """
    return means if num_seeds > 2 else {name: {**row, "half_width": None} for name, row in means.items()}


def _ensemble(session: StudySession, runs: Sequence[Mapping[str, Any]]) -> Means:
    """Return the means over the seeds of the metrics of the concatenated embeddings of all folds.

    Empty with one fold. There is no interval from fewer than three seeds.
    """
    by_seed: dict[int, list[Path]] = {}
    for run in sorted(runs, key=lambda run: run["fold"]):
        if run["value"] is not None:
            by_seed.setdefault(run["seed"], []).append(_embeddings_file(session, run["trial"]))
    ensembles = [files for files in by_seed.values() if len(files) > 1]
    if not ensembles:
        return {}
    if not all(file.exists() for files in ensembles for file in files):  # they are large and may have been deleted
        session.note("no ensemble of the folds: some runs' test embeddings were not kept")
        return {}
    for file in (file for files in ensembles for file in files):
        _record_test_read(session, None, file)
    task = evaluate_ensemble_remotely.options(**_resources(session))
    machine = session.machine.model_dump(mode="json")
    place, commit = session.place, _commit()
    scores = _fetch([task.remote([str(file) for file in files], machine, place, commit) for files in ensembles])
    return _without_wide_intervals(_means(scores), len(scores))


def _test_runs(session: StudySession, stage: str, keys: Sequence[str], num_done: int, num_steps: int) -> dict[str, Any]:
    """Return key -> {"val": metrics, "test": metrics, "protocols"}; what an interrupted run has written is read.

    Of a trial without validation classes ``val`` is empty.

    num_done, num_steps: steps before these, and in all.
    """
    scores: dict[str, Any] = {}
    pending: dict[Any, str] = {}
    (session.folder / "final").mkdir(exist_ok=True)
    machine, commit = session.machine.model_dump(mode="json"), _commit()
    files = files_of_study(session.folder)
    task = evaluate_remotely.options(**_resources(session))
    for key in keys:
        written = session.folder / "final" / f"{key}.json"
        if _is_usable(session, written) and _has_whole_embeddings(session, key):
            scores[key] = read_json(written)
            continue
        found = newest_checkpoint(session.folder, stage, key, whole=False)
        if found is None:
            raise StudyError(f"{key} cannot be tested: it has no intact checkpoint in {session.folder / stage}")
        _record_test_read(session, key, found)
        embeddings = str(_embeddings_file(session, key))
        pending[task.remote(str(found), machine, session.place, commit, embeddings)] = key
    while pending:
        number = num_done + len(keys) - len(pending) + 1
        session.step("testing the networks", number, num_steps)
        (ready,), _ = ray.wait(list(pending), num_returns=1)
        key = pending.pop(ready)
        scores[key] = _fetch(ready)
        for name in scores[key]["extra_tests"]:
            _record_test_read(session, key, Path(f"extra test {name}"))
        files.pull(_embeddings_file(session, key))
        write_json(session.folder / "final" / f"{key}.json", scores[key])
    return {key: scores[key] for key in keys}


def _has_whole_embeddings(session: StudySession, key: str) -> bool:
    """Return whether the test embeddings of a run can be read, or were deleted, which is allowed: they are large.

    A run with damaged ones is tested once more, and that read is recorded like the first.
    """
    file = _embeddings_file(session, key)
    return not file.exists() or _is_usable(session, file, load_embeddings, f"{key} is tested once more.")


def illustrate(session: StudySession) -> None:
    """Draw pictures of the winner, its rivals and its test embedding, in a task: a head node may have no GPU."""
    folder = session.folder / "illustrations"
    if _is_usable(session, folder / "illustrations.json"):  # written last
        return
    # Retrievals are drawn of validation classes, and a refit has none.
    validated = {key: path for key, path in top_trials(session.folder).items() if not key.startswith("refit-")}
    chosen = {**illustrated_runs(session.folder), **validated}
    winner = find_winner(session.folder).trial
    tested = [_embeddings_file(session, key) for key in (winner, *list(chosen)[:1])]
    tests = [path for path in tested if path.exists()][:1]
    for path in tests:
        _record_test_read(session, None, path)
    checkpoints = {key: str(path) for key, path in chosen.items()}
    task = illustrate_remotely.options(**_resources(session))
    machine = session.machine.model_dump(mode="json")
    stored = [str(path) for path in tests]
    _fetch(task.remote(checkpoints, machine, str(folder), stored, session.place, _commit()))
    files_of_study(session.folder).pull(folder)


def _record_test_read(session: StudySession, trial: str | None, opened: Path) -> None:
    session.record("test_read", stage="finalize", trial=trial, checkpoint=str(opened), commit=_commit())


def _commit() -> str:
    return checkpoint.git_commit() or "unknown"


def _resources(session: StudySession) -> dict[str, Any]:
    # One process does the work of a task, also where several train a trial.
    held = {"num_cpus": session.resources["cpu"], "num_gpus": min(1.0, session.resources["gpu"])}
    return {**held, "label_selector": session.selector} if session.selector else held


def _embeddings_file(session: StudySession, key: str) -> Path:
    return session.folder / "final" / f"{key}.npz"


def _fetch(references: Any) -> Any:
    """Return ``ray.get``; a mistake of the user that only a worker finds is a StudyError."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if (fault := fault_in(str(error))) is not None:
            raise MachineFault(fault) from error
        if isinstance(error.cause, ValueError):
            raise StudyError(str(error.cause)) from error
        raise


_STAGES = {"search": _search, "confirm": _confirm, "refit": _refit, "finalize": finalize}
