"""The trials of one stage through Ray Tune: those that have not ended, each from its newest checkpoint.

A restart is a *new* Tune run over the trials that have not ended, and its scheduler reads their history from the
events. ``Tuner.restore`` is not used: it forgets ASHA's rungs, follows a pickled snapshot that lags behind the
checkpoints on disk, and silently starts over when that snapshot was cut off (docs/LOG.md).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune.logger import JsonLoggerCallback

from raydml.config.trial import Machine, StudySettings, Trial, fingerprint
from raydml.study import events
from raydml.study.actor import TrialActor
from raydml.study.events import StudyState, TrialState, events_path, rank, read_state, read_trials, reduce_events
from raydml.study.folder import newest_checkpoint
from raydml.study.scheduler import Asha, SyncHalving, trial_key
from raydml.study.time_limit import TimeLimit
from raydml.training import checkpoint


class StudySession(NamedTuple):
    """One run of a study by a driver.

    metric: what trials are ranked by. resources: CPUs and GPUs of each trial. limit: ends the search; None lets it run.
    """

    folder: Path
    study: StudySettings
    machine: Machine
    metric: str
    resources: dict[str, float]
    limit: TimeLimit | None = None

    def record(self, event: str, **fields: Any) -> None:
        """Append an event to the study's file."""
        events.append(events_path(self.folder), {"event": event, **fields})

    def step(self, name: str, number: int = 0, total: int = 0) -> None:
        """Record what the study does from now on beside training, and which of how many steps it is."""
        self.record("step", name=name, number=number, total=total)

    def note(self, text: str) -> None:
        """Record a sentence for the user."""
        self.record("note", text=text)


class StudyEvents(tune.Callback):
    """Writes what Tune does into the study's event file, and deletes checkpoints of losing trials as they lose.

    Tune pickles its callbacks, hence plain data; the state of the study is left out and read from the file again.
    """

    def __init__(self, folder: str, stage: str, keep: int | None, max_bytes: int | None) -> None:
        self._folder, self._stage = folder, stage
        self._keep, self._max_bytes = keep, max_bytes
        self._offset, self._state = 0, StudyState()  # of the events read so far

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_offset": 0, "_state": StudyState()}

    def _append(self, event: str, trial: Any, **fields: Any) -> None:
        path = events_path(Path(self._folder))
        events.append(path, {"event": event, "stage": self._stage, "trial": trial_key(trial), **fields})

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        run = trial.config["run"]
        config = run["trial"]
        self._append(
            "trial_started",
            trial,
            fingerprint=run["fingerprint"],
            configuration=run["configuration"],
            config=config,
            fold=config["data"]["split"]["fold"],
            seed=config["seed"],
        )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any  # noqa: ARG002
    ) -> None:  # fmt: skip
        record = result["record"]
        metrics = {name: value for name, value in record.items() if name not in ("epoch", "ended")}
        self._append("epoch", trial, epoch=record["epoch"], metrics=metrics)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._append("trial_retried", trial, error=_last_line(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        record = (trial.last_result or {}).get("record", {})
        self._end(trial, record.get("ended") or "stopped_early", None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._end(trial, "crashed", _last_line(trial))

    def _end(self, trial: Any, reason: str, error: str | None) -> None:
        self._append("trial_ended", trial, reason=reason, error=error)
        if self._keep is not None:
            folder = Path(self._folder)
            new, self._offset = events.read_from(events_path(folder), self._offset)
            self._state = reduce_events(new, self._state)
            retain(folder, self._stage, self._state.of_stage(self._stage), self._keep, self._max_bytes)


def _last_line(trial: Any) -> str:
    """Return the exception of a failed trial, without Ray's traceback."""
    file = trial.error_file
    if not file or not Path(file).exists():
        return "unknown"
    lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1] if lines else "unknown"


def retain(folder: Path, stage: str, trials: Iterable[TrialState], keep: int, max_bytes: int | None) -> None:
    """Keep the checkpoints of the best ``keep`` ended trials of a stage, within ``max_bytes``; delete the others'.

    Checkpoints of trials that have not ended are never deleted.
    """
    used = 0
    for place, row in enumerate(rank(trial for trial in trials if trial.ended)):
        used += sum(
            file.stat().st_size for path in _checkpoints(folder, stage, row["trial"]) for file in path.iterdir()
        )
        # The winner's checkpoints are kept even beyond the limit: without them the search is lost.
        if place and (place >= keep or (max_bytes is not None and used > max_bytes)):
            drop_checkpoints(folder, stage, row["trial"])


def drop_checkpoints(folder: Path, stage: str, key: str) -> None:
    """Delete the checkpoints of a trial. One that cannot be deleted is reported in a note, and the study goes on."""
    for path in _checkpoints(folder, stage, key):
        try:
            shutil.rmtree(path)
        except OSError as error:
            events.append(events_path(folder), {"event": "note", "text": f"cannot delete {path}: {error}"})


def _checkpoints(folder: Path, stage: str, key: str) -> list[Path]:
    return sorted((folder / stage).glob(f"run-*/{key}/checkpoint_*"))


def run_trials(session: StudySession, stage: str, trials: Mapping[str, Trial], configurations: Mapping[str, str],
                scheduler: str) -> dict[str, TrialState]:  # fmt: skip
    """Run the trials of a stage that have not ended, and return the states of all its trials by key.

    Where the time limit ends the search, the trials that run end with the reason ``time``; others never start.

    configurations: for each key the fingerprint of the searched configuration. scheduler: ``asha``, ``sync``, ``none``.
    """
    folder, study, metric = session.folder, session.study, session.metric
    known = read_state(folder).trials
    states = {key: known[key] for key in trials if key in known}
    waiting = {key: trial for key, trial in trials.items() if key not in states or not states[key].ended}
    session.record(
        "stage_started", stage=stage, num_trials=len(trials), num_ended=len(trials) - len(waiting),
        max_epochs=max(trial.epochs for trial in trials.values()), resources=session.resources,
        configurations=[] if stage == "search" else list(dict.fromkeys(configurations.values())),
        num_slots=num_slots(session), reused=list(states),
    )  # fmt: skip
    if not waiting:
        return states
    resume_from = {key: newest_checkpoint(folder, stage, key) for key in waiting}
    configs = [
        {
            "key": key,
            "trial": trial.model_dump(mode="json"),
            "fingerprint": fingerprint(trial),
            "configuration": configurations[key],
            "machine": session.machine.model_dump(mode="json"),
            "metric": metric,
            "reads": str(folder / "test_reads.jsonl"),
            "resume_from": str(resume_from[key]) if resume_from[key] else None,
        }
        for key, trial in waiting.items()
    ]
    ended = [key for key in trials if key not in waiting]
    search = stage == "search"
    number = len(list((folder / stage).glob("run-*")))
    limit = session.limit if search else None
    session.step("starting the trials")
    tuner = tune.Tuner(
        tune.with_resources(TrialActor, session.resources),
        # Each configuration is one value of the grid: what runs is what was validated and fingerprinted.
        param_space={"run": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(session, scheduler, trials, ended, _history(states, resume_from)),
            max_concurrent_trials=study.search.max_concurrent or 0,
            reuse_actors=True,
            trial_name_creator=trial_key,
            trial_dirname_creator=trial_key,
        ),
        run_config=tune.RunConfig(
            name=f"run-{number:03d}",
            storage_path=str(folder / stage),
            stop=limit,
            failure_config=tune.FailureConfig(max_failures=study.max_retries),
            # Two, because the newest may be cut off; each holds the weights of the best epoch.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_frequency=1),
            callbacks=[
                JsonLoggerCallback(),  # Tune itself reads these files
                StudyEvents(str(folder), stage, study.keep_checkpoints if search else None,
                            int(study.max_checkpoint_gib * 2**30) if study.max_checkpoint_gib else None)
            ],
            verbose=0,
        ),
    )  # fmt: skip
    tuner.fit()
    if limit is not None and limit.is_over:
        _end_by_time(session, trials)
    return read_trials(folder, stage)


def _end_by_time(session: StudySession, trials: Mapping[str, Trial]) -> None:
    """Record the end of the trials that Tune stopped for the time limit: it does not report them."""
    states = read_trials(session.folder, "search")
    for key, state in states.items():
        if not state.ended:
            session.record("trial_ended", stage="search", trial=key, reason="time", error=None)
    session.note(f"the time limit ended the search: {len(states)} of {len(trials)} trials started")


def num_slots(session: StudySession) -> int:
    """Return how many trials the cluster, as it is now, has room for at once."""
    cluster, held = ray.cluster_resources(), session.resources
    rooms = [cluster.get(name.upper(), 0.0) // held[name] for name in ("cpu", "gpu") if held[name]]
    return max(1, int(min([*rooms, session.study.search.max_concurrent or math.inf])))


def _history(
    states: Mapping[str, TrialState], resume_from: Mapping[str, Path | None]
) -> dict[str, list[tuple[int, float]]]:
    """Return the values that no trial will report again (see :class:`raydml.study.scheduler.Asha`)."""
    history = {}
    for key, state in states.items():
        rows = state.curve(state.metric)
        if not state.ended:
            found = resume_from[key]
            resumed = checkpoint.load_card(found)["epoch"] if found else 0
            rows = [(epoch, value) for epoch, value in rows if epoch < resumed]
        history[key] = rows
    return history


def _scheduler(
    session: StudySession, name: str, trials: Mapping[str, Trial], ended: list[str], history: dict[str, Any]
) -> Any:
    search = session.study.search
    if name == "none":
        return None
    rungs: dict[str, Any] = {
        "metric": session.metric,
        "max_epochs": max(trial.epochs for trial in trials.values()),
        "grace_epochs": search.grace_epochs,
        "reduction_factor": search.reduction_factor,
        "history": history,
    }
    return Asha(**rungs) if name == "asha" else SyncHalving(**rungs, keys=list(trials), ended=ended)
