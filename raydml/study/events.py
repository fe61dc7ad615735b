"""The events of a study, and the one reduction of them to the state of the study.

The file is append-only, one JSON object a line, in the order in which things happened. The driver writes it. To the
delivery to MLflow it is the spool: what waits in it is sent when the server can take it. A line is one ``write`` to a
file opened for appending, so a reader sees whole lines, or the beginning of the last one. Byte offsets in the file
never change, so the offset behind its line identifies an event.

``reduce_event(state, event)`` gives the next :class:`StudyState`. Resuming, the live table, ``launch.py status``, the
report and the delivery to MLflow all read it, so they agree on the same file. How a repeated epoch counts is described
at :class:`raydml.analysis.trials.TrialState`.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from raydml.analysis.trials import LIMITS, MOVES, EpochReport, TrialState, searched_trials
from raydml.study.event_fields import is_event

_logger = logging.getLogger("raydml")
_MAX_NAMED_LINES = 5
#: In the order in which they run; a study may lack some.
STAGES = ("search", "confirm", "refit", "finalize")


class Record(NamedTuple):
    """An event and the byte offset just behind its line."""

    event: dict[str, Any]
    end: int


def events_path(folder: Path) -> Path:
    """Return the file of events of the study in a folder."""
    return folder / "events.jsonl"


def append(path: Path, event: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write one event as one line, with the current ``time`` (seconds since 1970) unless it has a time.

    ``durable``: wait until the line is on the disk (fsync, well below a millisecond on a local SSD); without it a
    crash of the machine, not of the process, may lose the last lines. NaN and infinite numbers are written as Python's
    ``json`` writes them. Raises TypeError for a value that is not plain.
    """
    line = json.dumps({"time": time.time(), **event}, default=_plain, separators=(",", ":")).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if _ends_within_line(descriptor):
            # A writer was killed in the middle of a line. That part stays as a line that readers skip.
            line = b"\n" + line
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(path))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def records(path: Path, offset: int = 0, until: int | None = None) -> tuple[list[Record], int]:
    """Return the events whose lines are between ``offset`` and ``until``, and the offset to read on from.

    ``offset`` is 0 or what an earlier call returned. A last line without its newline is left for the next call; a line
    that is not a JSON object (its writer was killed) is skipped. A process that reads from the beginning warns of each
    such line once. A file that does not exist holds no events.
    """
    begin = offset
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read() if until is None else file.read(max(until - offset, 0))
    except FileNotFoundError:
        return [], offset
    found, broken = [], []
    end = data.rfind(b"\n") + 1
    for line in data[:end].splitlines(keepends=True):
        offset += len(line)
        event = parse_line(line)
        if event is not None:
            found.append(Record(event, offset))
        elif begin == 0:
            broken.append(offset - len(line))
    if broken:
        _warn_of_broken_lines(path, tuple(broken))
    if begin == 0 and b"\0" in data[end:]:
        _warn_of_zeros(path, end, len(data) - end)
    return found, offset


@functools.cache
def _warn_of_broken_lines(path: Path, offsets: tuple[int, ...]) -> None:
    for offset in offsets[:_MAX_NAMED_LINES]:
        _logger.warning("%s: the line at byte %d is not an event (its writer was killed?); it is skipped", path, offset)
    if len(offsets) > _MAX_NAMED_LINES:
        _logger.warning("%s: %d further lines are not events; they are skipped", path, len(offsets) - _MAX_NAMED_LINES)


@functools.cache
def _warn_of_zeros(path: Path, offset: int, num_bytes: int) -> None:
    _logger.warning(
        "%s: the last %d bytes, from byte %d, are zeros or part of a line, as a loss of power leaves them; the events "
        "that were there are lost",
        path,
        num_bytes,
        offset,
    )


def read(path: Path) -> list[dict[str, Any]]:
    """Return all events of the file, oldest first."""
    return read_from(path)[0]


def read_from(path: Path, offset: int = 0, until: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Return events without their offsets, and the offset to read on from; see :func:`records`."""
    found, offset = records(path, offset, until)
    return [record.event for record in found], offset


def _ends_within_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line, None where it is damaged: no JSON object, or without what its kind must have."""
    try:
        event = json.loads(line)
        return event if isinstance(event, dict) and is_event(event) else None
    except (ValueError, RecursionError):  # also JSONDecodeError and UnicodeDecodeError: a line that was cut off
        return None


def _plain(value: object) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays; NumPy itself is slow to import
        return value.tolist()
    raise TypeError(f"an event holds plain values, not {type(value).__name__}: {value!r}")


Event = Mapping[str, Any]


@dataclass(frozen=True)
class StageState:
    """A stage: `num_trials` trials of at most `max_epochs` epochs, and its result once it has finished.

    num_slots: how many trials the cluster has room for at once. started_s: when the stage last started (seconds since
    1970).
    """

    stage: str
    num_trials: int = 0
    max_epochs: int = 0
    finished: bool = False
    ranking: tuple[Mapping[str, Any], ...] | None = None
    num_slots: int = 1
    started_s: float = 0.0


@dataclass(frozen=True)
class StudyStep:
    """Something that a study does beside training: its name, and which of how many steps of its stage it is.

    total: 0 where the steps are not counted. started_s: seconds since 1970.
    """

    name: str
    number: int = 0
    total: int = 0
    started_s: float = 0.0


@dataclass(frozen=True)
class Extension:
    """A search that was given more trials: how many it had, and when (seconds since 1970)."""

    num_trials_before: int
    time_s: float


@dataclass(frozen=True)
class Artifact:
    """A file or folder for MLflow, with the trial whose run it belongs to; None is the study's own run."""

    path: Path
    artifact_path: str
    trial: str | None = None


@dataclass(frozen=True)
class ExportedModel:
    """An exported folder to register as a version of `name`. checkpoint: what it was exported from."""

    name: str
    folder: Path
    checkpoint: str
    trial: str | None = None


@dataclass(frozen=True)
class SummaryNumbers:
    """The few numbers of a finished study, for its own MLflow run."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, Any] = field(default_factory=dict)
    time_s: float = 0.0


@dataclass(frozen=True)
class RecordedForecast:
    """What a study was expected to take before its first trial.

    seconds: until its report. device_hours: of training, in `unit` ("GPU-hours" or "CPU-hours").
    """

    seconds: float
    device_hours: float
    unit: str


class DrawnConfiguration(NamedTuple):
    """A configuration that the searcher has proposed while the search ran, and its point as in `TrialDraws`."""

    config: Mapping[str, Any]
    point: Mapping[str, Any]


@dataclass(frozen=True)
class StudyState:
    """A study as its events describe it.

    state: waiting, running, interrupted or finished; changed_s is when it last changed, time_s when the newest event
    was written (seconds since 1970). metric: what trials are ranked by. trials: by key, such as ``search-003``, in the
    order in which they started. cpus, gpus: what each trial holds. test_reads: the recorded reads of the test classes.
    constant: the parameters that all searched trials share; varying: the names of the others, None in older studies.
    splits: for each split, such as ``search``, ``fold 0`` and ``refit``, the numbers of ``images`` and ``classes`` of
    each part. user, command: who started the study, and how. forecast: from measured steps, None without one.
    forecast_s: how long the study had been active when it was made. drawn: the configurations that were drawn while the
    search ran, by the keys of their trials.
    """

    study: str = ""
    study_id: str = ""
    storage: str = ""
    commit: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "val_map_at_r"
    state: str = "waiting"
    changed_s: float = 0.0
    time_s: float = 0.0
    stage: str = ""
    cpus: float = 0.0
    gpus: float = 0.0
    stages: Mapping[str, StageState] = field(default_factory=dict)
    trials: Mapping[str, TrialState] = field(default_factory=dict)
    configurations: tuple[str, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    models: tuple[ExportedModel, ...] = ()
    test_reads: tuple[Event, ...] = ()
    summary: SummaryNumbers = SummaryNumbers()
    notes: tuple[str, ...] = ()
    planned: Mapping[str, StageState] = field(default_factory=dict)
    dataset: str = ""
    active_s: float = 0.0
    time_limit_s: float | None = None
    max_device_hours: float | None = None
    step: StudyStep | None = None
    extensions: tuple[Extension, ...] = ()
    constant: Mapping[str, Any] = field(default_factory=dict)
    varying: tuple[str, ...] | None = None
    splits: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    user: str = ""
    command: str = ""
    forecast: RecordedForecast | None = None
    forecast_s: float = 0.0
    drawn: Mapping[str, DrawnConfiguration] = field(default_factory=dict)

    def of_stage(self, stage: str) -> list[TrialState]:
        """Return the trials of a stage in the order of their keys, without those that a longer search superseded."""
        found = (trial for trial in self.trials.values() if trial.stage == stage and not trial.is_superseded)
        return sorted(found, key=lambda trial: trial.trial)

    @property
    def searched(self) -> list[TrialState]:
        """The trials of the search on its first fold, in the order of their keys."""
        return searched_trials(self.of_stage("search"))

    def best_of_stage(self, stage: str) -> TrialState | None:
        """Return the trial with the highest value of the metric; of equal ones the first. In the search only the first
        fold counts: values on different folds cannot be compared."""
        trials = self.searched if stage == "search" else self.of_stage(stage)
        scored = [trial for trial in trials if trial.best is not None]
        return max(scored, key=lambda trial: trial.best or 0.0, default=None)

    @property
    def classes(self) -> dict[str, int]:
        """The number of classes of each part of the search's split: ``train``, ``val`` and ``test``."""
        return {part: sizes["classes"] for part, sizes in self.splits.get("search", {}).items()}

    @property
    def num_tested(self) -> int:
        """Networks that finalize has begun to test, since the search was last given more trials."""
        since_s = self.extensions[-1].time_s if self.extensions else 0.0
        tested = {read.get("trial") for read in self.test_reads if float(read.get("time", 0.0)) >= since_s}
        return len(tested - {None})


class Reduction:
    """The state of a study to which events are added one by one. What one costs does not grow with the study.

    (What concerns every trial, as an interruption does, is an exception.)
    """

    def __init__(self, state: StudyState | None = None) -> None:
        before = state or StudyState()
        # A copy that can be changed: a new frozen state for each event takes three times as long.
        copied = {"stages": dict(before.stages), "trials": dict(before.trials), "drawn": dict(before.drawn)}
        self._study = SimpleNamespace(**{**vars(before), **copied})
        self._reports: dict[str, dict[int, EpochReport]] = {}  # copied once a trial, not once an epoch

    def add(self, event: Event) -> None:
        """Change the state by the next event. One of an unknown kind changes nothing but the time."""
        study = self._study
        time_s = max(study.time_s, float(event.get("time", 0.0)))
        # From the last event of a killed driver to the next start nothing ran.
        if study.state == "running" and event.get("event") != "study_started":
            study.active_s += time_s - study.time_s
        study.time_s = time_s
        _apply(study, event, self._reports)

    @property
    def trials(self) -> Mapping[str, TrialState]:
        """The trials by key. The next event changes them."""
        trials: dict[str, TrialState] = self._study.trials
        return trials

    def now(self) -> StudyState:
        """Return the state until the next event, which changes its trials and stages."""
        return StudyState(**vars(self._study))

    def before(self, event: Event) -> StudyState:
        """Return the state before an event, with no trial but the one that the event is about.

        The event does not change what was returned.
        """
        key = str(event.get("trial"))
        self._reports.pop(key, None)
        trials = {key: self.trials[key]} if key in self.trials else {}
        return replace(self.now(), stages=dict(self._study.stages), trials=trials, drawn={})

    def copy(self) -> StudyState:
        """Return the state as it is; it does not change. This costs as much as there are trials."""
        self._reports = {}
        study = self._study
        return replace(self.now(), stages=dict(study.stages), trials=dict(study.trials), drawn=dict(study.drawn))


def reduce_event(state: StudyState, event: Event) -> StudyState:
    """Return the state after one event. This copies the given state: for many events there is `Reduction`."""
    return reduce_events([event], state)


def reduce_events(several: Iterable[Event], state: StudyState | None = None) -> StudyState:
    """Return the state after several events in their order; the given state does not change."""
    reduction = Reduction(state)
    for event in several:
        reduction.add(event)
    return reduction.now()


class StudyReader:
    """The state of a study that is read while its events are written: each event is read and reduced once.

    A copy that was pickled has read nothing, and begins anew.
    """

    def __init__(self, folder: Path) -> None:
        self._path = events_path(folder)
        self._offset, self._reduction = 0, Reduction()

    def __reduce__(self) -> tuple[Any, ...]:
        return StudyReader, (self._path.parent,)

    def read_on(self) -> list[dict[str, Any]]:
        """Read the events that are new, and return them."""
        new, self._offset = read_from(self._path, self._offset)
        for event in new:
            self._reduction.add(event)
        return new

    @property
    def trials(self) -> Mapping[str, TrialState]:
        """The trials by key. The next event changes them."""
        return self._reduction.trials

    def now(self) -> StudyState:
        """Return the state until the next event, which changes its trials and stages."""
        return self._reduction.now()


def read_state(folder: Path) -> StudyState:
    """Return the state of the study in a folder; that of a study without events is ``waiting``."""
    return reduce_events(read(events_path(folder)))


def read_trials(folder: Path, stage: str) -> dict[str, TrialState]:
    """Return the trials of a stage that have started, by key, in the order of their keys."""
    return {trial.trial: trial for trial in read_state(folder).of_stage(stage)}


def letters_of(study: StudyState) -> dict[str, str]:
    """Return the letter of each configuration that was confirmed, refitted or tested, by its fingerprint.

    A is the best of the search. A configuration keeps its letter when a longer search confirms others.
    """
    return {name: letter_of(number) for number, name in enumerate(configurations_of(study))}


def configurations_of(study: StudyState | SimpleNamespace) -> tuple[str, ...]:
    """Return the fingerprints of these configurations in the order of their letters.

    The events of older studies do not list them; there they are in the order of their trials' keys.
    """
    if study.configurations:
        return tuple(study.configurations)
    by_key = sorted((t for t in study.trials.values() if t.stage == "confirm"), key=lambda trial: trial.trial)
    return tuple(dict.fromkeys(trial.configuration for trial in by_key if trial.configuration))


def letter_of(number: int) -> str:
    """Return A ... Z, then A2 ... Z2."""
    turn, place = divmod(number, 26)
    return chr(ord("A") + place) + (str(turn + 1) if turn else "")


def rank(trials: Iterable[TrialState]) -> list[dict[str, Any]]:
    """Return a row for each trial, best first: by the best epoch's value, then by key; those without a value last."""
    rows = [
        {
            "trial": trial.trial,
            "fingerprint": trial.fingerprint,
            "value": trial.best,
            "epoch_of_best": trial.epoch_of_best,
            "epochs": trial.num_epochs,
            "ended": trial.ended,
        }
        for trial in trials
    ]
    return sorted(rows, key=lambda row: (row["value"] is None, -(row["value"] or 0.0), row["trial"]))


def _apply(study: SimpleNamespace, event: Event, reports: dict[str, dict[int, EpochReport]]) -> None:
    """Change the copy of a state by one event. reports: those of the trials that this reduction has copied, by key."""
    match event.get("event"):
        case "study_started":
            study.study, study.study_id = str(event.get("study", "")), str(event.get("study_id", ""))
            study.storage, study.commit = str(event.get("storage") or ""), str(event.get("commit") or "")
            study.config = event.get("config") or {}
            study.metric = str(study.config.get("select_on") or study.metric)
            study.state, study.changed_s = "running", study.time_s
            study.time_limit_s, study.max_device_hours = event.get("time_limit_s"), event.get("max_device_hours")
            study.step = None
            study.dataset = str(event.get("dataset") or study.dataset)
            study.constant = event.get("constant") or {}
            study.varying = None if event.get("varying") is None else tuple(event["varying"])
            study.splits = event.get("splits") or {}
            study.user, study.command = str(event.get("user") or ""), str(event.get("command") or "")
            study.planned = {
                row["stage"]: StageState(row["stage"], row["num_trials"], row["max_epochs"])
                for row in event.get("planned") or ()
            }
        case "step":
            number, total = int(event.get("number") or 0), int(event.get("total") or 0)
            study.step = StudyStep(str(event.get("name", "")), number, total, study.time_s)
        case "stage_started":
            study.state, study.stage = "running", str(event["stage"])
            held = event.get("resources") or {"cpu": study.cpus, "gpu": study.gpus}
            study.cpus, study.gpus = float(held["cpu"]), float(held["gpu"])
            num_trials, max_epochs = int(event.get("num_trials") or 0), int(event.get("max_epochs") or 0)
            num_slots = int(event.get("num_slots") or 1)
            study.stages[study.stage] = StageState(
                study.stage, num_trials, max_epochs, num_slots=num_slots, started_s=study.time_s
            )
            study.step = None
            for key in set(event.get("reused") or ()) & set(study.trials):
                study.trials[key] = replace(study.trials[key], is_superseded=False)
            known = configurations_of(study)
            study.configurations = tuple(dict.fromkeys([*known, *event.get("configurations", ())]))
        case "stage_finished":
            name, rows = str(event["stage"]), event.get("ranking")
            stage = study.stages.get(name, StageState(name))
            ranking = None if rows is None else tuple(row for row in rows if isinstance(row, Mapping))
            study.stages[name] = replace(stage, finished=True, ranking=ranking)
        case "trial_started" | "epoch" | "trial_retried" | "trial_ended":
            _apply_to_trial(study, event, reports)
        case "trial_drawn":
            study.drawn[str(event["trial"])] = DrawnConfiguration(event["config"], event["point"])
        case "artifact":
            artifact = Artifact(Path(event["path"]), str(event.get("artifact_path") or ""), event.get("trial"))
            study.artifacts = (*study.artifacts, artifact)
        case "model":
            folder, name = Path(event["folder"]), str(event["name"])
            model = ExportedModel(name, folder, str(event.get("checkpoint") or folder), event.get("trial"))
            study.models = (*study.models, model)
        case "test_read":
            study.test_reads = (*study.test_reads, event)
        case "summary":
            study.summary = SummaryNumbers(event.get("metrics") or {}, event.get("tags") or {}, study.time_s)
        case "note":
            study.notes = (*study.notes, str(event.get("text", "")))
        case "forecast":
            study.forecast = RecordedForecast(float(event["seconds"]), float(event["device_hours"]), str(event["unit"]))
            study.forecast_s = study.active_s
        case "search_extended":
            study.forecast = None  # it was for fewer trials
            _reopen(study, int(event["num_trials_before"]))
        case "trials_reopened":
            _retry(study, str(event["stage"]), list(event["trials"]), was_over=bool(event.get("was_over")))
        case "interrupted":
            study.state, study.changed_s, study.step = "interrupted", study.time_s, None
            for key, trial in study.trials.items():
                if not trial.ended:
                    study.trials[key] = replace(trial, state="interrupted", changed_s=study.time_s)
        case "study_finished":
            study.state, study.changed_s, study.step = "finished", study.time_s, None


def _reopen(study: SimpleNamespace, num_trials_before: int) -> None:
    """Return a study to its search: the stages after it have not begun, and trials that the time ended can go on."""
    study.extensions = (*study.extensions, Extension(num_trials_before, study.time_s))
    study.state, study.changed_s, study.step = "interrupted", study.time_s, None
    study.active_s = 0.0
    _open_stage(study, "search")
    for key, trial in study.trials.items():
        if trial.stage == "search" and trial.ended in LIMITS:
            study.trials[key] = replace(trial, state="interrupted", changed_s=study.time_s)


def _open_stage(study: SimpleNamespace, stage: str) -> None:
    """Make a stage the current one, without a result. The later ones have not begun: their trials are superseded."""
    # By the order of all stages: the line of one that has begun may be lost.
    later = STAGES[STAGES.index(stage) + 1 :] if stage in STAGES else ()
    study.stage = stage
    study.stages = {name: one for name, one in study.stages.items() if name not in later}
    study.stages[stage] = replace(study.stages.get(stage, StageState(stage)), finished=False, ranking=None)
    for key, trial in study.trials.items():
        # Trials of the search may be compared with another one now: which of them have further folds is decided anew.
        if trial.stage in later or (stage == "search" and trial.is_further_fold):
            study.trials[key] = replace(trial, is_superseded=True)


def _retry(study: SimpleNamespace, stage: str, keys: Sequence[str], *, was_over: bool) -> None:
    """Let trials of a stage that have failed go on. was_over: the stage had its result, and is open again now."""
    for key in set(keys) & study.trials.keys():
        study.trials[key] = replace(
            study.trials[key], state="interrupted", error=None, retry_reasons=(), changed_s=study.time_s
        )
    study.state, study.changed_s, study.step = "interrupted", study.time_s, None
    if was_over:
        _open_stage(study, stage)


def _apply_to_trial(study: SimpleNamespace, event: Event, reports: dict[str, dict[int, EpochReport]]) -> None:
    """Change one trial. In a file whose beginning was lost it may be one that has not started."""
    key = str(event["trial"])
    trial = study.trials.get(key) or TrialState(key, str(event.get("stage", study.stage)), study.metric)
    changes: dict[str, Any]
    match event["event"]:
        case "trial_started":  # one that starts again, after a resume, keeps the epochs it has reported
            names = {name: str(event.get(name) or "") for name in ("fingerprint", "configuration")}
            changes = {"config": event.get("config") or {}, **names, "state": "running", "error": None}
            changes["started_s"], study.step = study.time_s, None
            changes["gpus"] = None if event.get("gpus") is None else float(event["gpus"])
        case "epoch":
            number, report = int(event["epoch"]), EpochReport(event.get("metrics") or {}, study.time_s, trial.gpus)
            if key not in reports:
                reports[key] = dict(trial.reports)
            # Nothing new: the epoch of the checkpoint that the trial goes on from.
            if number not in trial.reports or changed_metrics(trial.reports[number], report):
                reports[key][number] = report
            state = trial.state if trial.ended else "running"
            changes = {"reports": reports[key], "num_epochs": number, "state": state}
        case "trial_retried":
            error = str(event.get("error") or "")
            reason = str(event.get("reason") or "")
            if reason in MOVES:
                changes = {"num_moves": trial.num_moves + 1}
            else:
                changes = {"num_retries": trial.num_retries + 1, "retried_after": error}
            changes |= {"state": "retrying", "error": None, **_device_of(event)}
            if reason:
                changes["retry_reasons"] = (*trial.retry_reasons, reason)
        case _:
            changes = {"state": str(event.get("reason") or "finished"), "error": event.get("error") or None}
            changes["class_values"] = tuple(event.get("class_values") or ())
            changes |= _device_of(event)
    if key not in study.trials or changes["state"] != trial.state:
        changes["changed_s"] = study.time_s
    study.trials[key] = replace(trial, **changes)


def _device_of(event: Event) -> dict[str, str]:
    """Return where a trial has trained: its node and its device, where the event says it."""
    return {name: str(event[name]) for name in ("node", "device") if event.get(name)}


def changed_metrics(before: EpochReport | None, after: EpochReport) -> dict[str, float]:
    """Return the metrics of a report that an earlier report of the same epoch has not, or has with another value."""
    known: Mapping[str, Any] = before.metrics if before else {}
    # NaN does not equal itself, but its text does.
    return {
        name: value for name, value in after.metrics.items() if name not in known or repr(known[name]) != repr(value)
    }
