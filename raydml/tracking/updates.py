"""Events of a study as updates of its MLflow runs: one update for each run that has something new.

This module uses neither MLflow nor a clock. Names, lengths and values are made legal here, so that nothing is sent
which the tracking server would refuse. ``None`` as a key means the study's own (parent) run.

Parameters, tags and status of a run follow from the study's state. Metrics are appended: MLflow keeps every point, and
of several at one step the one with the latest time counts. An epoch that is reported a second time therefore sends the
values that differ from the first report, with the time of the second, and what counts in MLflow is what counts in the
state. (Points of epochs that a trial has lost and not reached again stay in MLflow.) Which points are sent depends on
the events alone, not on how many deliveries they came in.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from raydml.analysis.trials import TrialState
from raydml.config.recipe import flatten
from raydml.study.events import Event, ExportedModel, Record, StudyState, changed_metrics, reduce_event

#: Longest values that MLflow stores whole (a tag: the limit of older servers; newer ones take 8000).
MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS, MAX_KEY_CHARACTERS, MAX_NON_FINITE_CHARACTERS = 6000, 5000, 250, 500
#: Metric whose value is its own step: its latest value is the number of epochs that a run has reached.
EPOCH_METRIC = "epoch"
#: MLflow status of a run by the state of its trial or study; any other state is a failure.
STATUS = {
    "waiting": "RUNNING",
    "running": "RUNNING",
    "retrying": "RUNNING",
    "interrupted": "KILLED",
    "finished": "FINISHED",
    "stopped_early": "FINISHED",
    "time": "FINISHED",
}


class Point(NamedTuple):
    """One value of a metric; ``time_ms`` is the event's, so that a repeated delivery is an exact duplicate."""

    name: str
    value: float
    step: int
    time_ms: int


class File(NamedTuple):
    """A file to store with a run: the file or folder ``path``, or ``text``. ``artifact_path``: the folder it goes to,
    or for a text its whole name."""

    artifact_path: str
    path: Path | None = None
    text: str = ""


@dataclass
class RunUpdate:
    """Everything new about one run. ``offset`` is the one behind the last event in it; parameters and tags are those
    of the whole run."""

    trial: str | None
    name: str
    start_ms: int
    offset: int = 0
    status: str | None = None
    end_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    models: list[ExportedModel] = field(default_factory=list)


def updates_of(
    records: Iterable[Record], state: StudyState, delivered: Mapping[str | None, int], folder: Path
) -> tuple[StudyState, list[RunUpdate]]:
    """Reduce events in their order; return the state after them and an update for each run that they concern.

    state: the study before the events. delivered: for each run the offset up to which it has its events; those change
    the state but are not sent again. folder: where the study is now. The update of the study's own run comes first: the
    other runs name it as parent.
    """
    updates: dict[str | None, RunUpdate] = {}
    for record in records:
        before, state = state, reduce_event(state, record.event)
        kind = record.event.get("event")
        if kind not in _OF_STUDY and kind not in _OF_TRIAL:
            continue
        run = record.event.get("trial") if kind in _OF_TRIAL else None
        if record.end <= delivered.get(run, 0):
            continue
        update = updates.setdefault(run, RunUpdate(run, run or state.study, _ms(state.time_s)))
        update.offset = record.end
        _add_news(update, before, state, folder)
    for run, update in updates.items():
        if run is None:
            _describe_study(update, state)
        elif run in state.trials:
            _describe_trial(update, state.trials[run])
    return state, sorted(updates.values(), key=lambda update: update.trial is not None)


_OF_STUDY = frozenset(
    {"study_started", "stage_started", "stage_finished", "summary", "test_read", "study_finished", "interrupted"}
)
#: Of one trial, or, where their trial is None, of the study.
_OF_TRIAL = frozenset({"trial_started", "epoch", "trial_retried", "trial_ended", "artifact", "model"})


def _add_news(update: RunUpdate, before: StudyState, after: StudyState, folder: Path) -> None:
    """Add what one event, between two states, appends to a run: points, files and models."""
    update.files += [
        File(one.artifact_path, _moved(one.path, after, folder)) for one in after.artifacts[len(before.artifacts) :]
    ]
    update.files += [file_of_test_read(read) for read in after.test_reads[len(before.test_reads) :]]
    update.models += [_moved_model(one, after, folder) for one in after.models[len(before.models) :]]
    if after.summary is not before.summary:
        update.points += points(after.summary.metrics, 0, _ms(after.summary.time_s))
    for name, stage in after.stages.items():
        if stage.ranking is not None and stage is not before.stages.get(name):
            update.files.append(File(f"ranking_{name}.json", text=json.dumps(stage.ranking, indent=1) + "\n"))
    trial = after.trials.get(update.trial or "")
    if trial is None or trial.num_epochs not in trial.reports:
        return
    report, reported = trial.reports[trial.num_epochs], before.trials.get(trial.trial)
    earlier = reported.reports.get(trial.num_epochs) if reported else None
    if report is not earlier:
        update.points += points(changed_metrics(earlier, report), trial.num_epochs, _ms(report.time_s))
    if earlier is None:
        # Last: a run that has this point has the whole epoch.
        update.points.append(Point(EPOCH_METRIC, float(trial.num_epochs), trial.num_epochs, _ms(report.time_s)))


def _moved(path: Path, state: StudyState, folder: Path) -> Path:
    """Return where a file of an event is now: studies are copied, moved and renamed with their storage folder.

    state: right after the event; its storage is the one at that time. folder: the study's own, now.
    """
    for then, now in ((Path(state.storage, state.study), folder), (Path(state.storage), folder.parent)):
        if state.storage and path.is_relative_to(then):
            return now / path.relative_to(then)
    return path


def _moved_model(model: ExportedModel, state: StudyState, folder: Path) -> ExportedModel:
    """Return the model with the place of its folder now, and its checkpoint as a path within the study."""
    checkpoint = _moved(Path(model.checkpoint), state, folder)
    within = checkpoint.relative_to(folder) if checkpoint.is_relative_to(folder) else checkpoint
    return replace(model, folder=_moved(model.folder, state, folder), checkpoint=str(within))


def _describe_study(update: RunUpdate, study: StudyState) -> None:
    update.params = params_of(study.config)
    _set_status(update, study.state, study.changed_s)
    update.tags |= {"mlflow.source.git.commit": study.commit, "raydml.stage": study.stage}
    if study.test_reads:
        update.tags["raydml.last_test_read"] = _moment(study.test_reads[-1])
    update.tags |= {legal_name(name): _text(value) for name, value in study.summary.tags.items()}
    update.tags["raydml.non_finite"] = _non_finite({0: study.summary.metrics})
    _make_tags_legal(update)


def _describe_trial(update: RunUpdate, trial: TrialState) -> None:
    update.name = " ".join(filter(None, (trial.trial, trial.recipe)))
    update.params = params_of(trial.config)
    _set_status(update, trial.state, trial.changed_s)
    facts: dict[str, Any] = {
        "stage": trial.stage,
        "fold": trial.fold,
        "seed": trial.seed,
        "fingerprint": trial.fingerprint,
        "configuration": trial.configuration,
        **{block: (trial.config.get(block) or {}).get("name") for block in ("loss", "miner", "method")},
        "error": trial.error if trial.ended else None,
        "retries": trial.num_retries or None,
        "retried_after": trial.retried_after,
        "non_finite": _non_finite(trial.epochs),
    }
    update.tags |= {f"raydml.{name}": str(fact) for name, fact in facts.items() if fact is not None}
    _make_tags_legal(update)


def _set_status(update: RunUpdate, state: str, changed_s: float) -> None:
    update.status = STATUS.get(state, "FAILED")
    if update.status != "RUNNING":
        update.end_ms = _ms(changed_s)
        update.tags["raydml.ended"] = state


def _make_tags_legal(update: RunUpdate) -> None:
    update.tags = {name: shortened(text, MAX_TAG_CHARACTERS) for name, text in update.tags.items() if text}


def _non_finite(epochs: Mapping[int, Mapping[str, Any]]) -> str:
    """Name the first values that are not finite: ``train_loss = nan in step 2; ...``."""
    found = (
        f"{name} = {float(value)} in step {step}"
        for step, metrics in epochs.items()
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not math.isfinite(value)
    )
    return shortened("; ".join(found), MAX_NON_FINITE_CHARACTERS)


def file_of_test_read(read: Event) -> File:
    """Return the record of one read of the test classes as it is stored with a run: ``test_reads/<time>.json``."""
    text = json.dumps({name: value for name, value in read.items() if name != "event"}, indent=1) + "\n"
    return File(f"test_reads/{_moment(read)}.json", text=text)


def _moment(event: Event) -> str:
    return datetime.fromtimestamp(float(event["time"]), tz=timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


def params_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return nested settings as MLflow parameters: ``{"optimizer": {"learning_rate": 1e-3}}`` gives
    ``{"optimizer.learning_rate": "0.001"}``. A leading ``trial.`` is dropped, lists become JSON."""
    return {
        legal_name(name.removeprefix("trial.")): shortened(_text(value), MAX_PARAM_CHARACTERS)
        for name, value in flatten(config, keep_empty=True).items()
    }


def points(metrics: Mapping[str, Any], step: int, time_ms: int) -> list[Point]:
    """Return the numbers among ``metrics`` as points; texts and None are left out.

    NaN is stored as NaN. An infinity becomes NaN as well: MLflow would store it as 1.8e308, which ruins every chart.
    """
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    return [
        Point(legal_name(name), number if math.isfinite(number) else math.nan, step, time_ms)
        for name, number in numbers.items()
    ]


def legal_name(name: str) -> str:
    """Return a name that MLflow accepts for a metric, parameter or tag: ``recall@1`` becomes ``recall_at_1``."""
    name = re.sub(r"[^\w.\- :/]", "_", str(name).replace("@", "_at_"))[:MAX_KEY_CHARACTERS]
    if name.startswith(("/", "..")) or posixpath.normpath(name) != name or name == ".":
        # MLflow also refuses a name that, as a path, would mean another one.
        name = name.replace("/", "_").replace("..", "__")
    return name if name not in ("", ".") else "_"


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else str(value)


def _ms(time_s: float) -> int:
    return int(time_s * 1000)
