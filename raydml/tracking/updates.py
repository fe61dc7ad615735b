"""What the events of a study mean for its MLflow runs: a fold from lines of the spool to one update a run.

No MLflow here and no clock: names, limits and values are made legal in this module, so that nothing the tracking
server would refuse is ever sent. ``None`` as a key means the study's own (parent) run.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from raydml.config.recipe import flatten, recipe_of
from raydml.study.events import Record

#: Longest values that MLflow stores whole (a tag: the limit of older servers; newer ones take 8000).
MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS, MAX_KEY_CHARACTERS = 6000, 5000, 250
#: Metric whose value is its own step: its latest value tells how far a run has got, without another request.
EPOCH_METRIC = "epoch"
#: MLflow status of a run by the reason for which its trial ended.
ENDED_STATUS = {
    "finished": "FINISHED",
    "stopped_early": "FINISHED",
    "non_finite_loss": "FAILED",
    "collapsed": "FAILED",
    "crashed": "FAILED",
}


class Point(NamedTuple):
    """One value of a metric; ``time_ms`` is the event's, so that a repeated delivery is an exact duplicate."""

    name: str
    value: float
    step: int
    time_ms: int


class File(NamedTuple):
    """Something to store with a run: the file or folder ``path``, or ``text``. ``artifact_path``: the folder it goes
    to, or for a text its whole name."""

    artifact_path: str
    path: Path | None = None
    text: str = ""


@dataclass
class RunUpdate:
    """Everything new about one run. ``offset`` lies behind the last event in it."""

    trial: str | None
    name: str
    start_ms: int
    offset: int = 0
    status: str | None = None
    end_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    epochs: dict[int, list[Point]] = field(default_factory=dict)
    summary: list[Point] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    models: list[Mapping[str, Any]] = field(default_factory=list)
    num_retries: int = 0

    def run_again(self) -> None:
        self.status, self.end_ms = "RUNNING", None
        self.tags.pop("raydml.ended", None)
        self.tags.pop("raydml.error", None)

    def end(self, status: str, reason: str, time_ms: int) -> None:
        self.status, self.end_ms = status, time_ms
        self.tags["raydml.ended"] = reason


@dataclass
class Updates:
    """One update a run, and the moment of an interruption that nothing followed (every run still RUNNING ends)."""

    runs: dict[str | None, RunUpdate] = field(default_factory=dict)
    interrupted_ms: int | None = None


def fold(records: Iterable[Record], study: str, delivered: Mapping[str | None, int]) -> Updates:
    """One update a run from events in their order.

    ``delivered``: for each run the offset up to which it has its events; those are left out. Of an epoch told twice
    (a trial redone from its last checkpoint) the first telling counts.
    """
    updates = Updates()
    for record in records:
        kind, trial = record.event.get("event"), record.event.get("trial")
        if kind in _ABOUT_STUDY:
            trial = None
        elif kind not in _FOLD:
            continue
        if kind == "interrupted":
            updates.interrupted_ms = _time_ms(record.event)
        elif kind in ("study_started", "trial_started", "epoch", "study_finished"):
            updates.interrupted_ms = None
        if record.end <= delivered.get(trial, 0):
            continue
        if trial not in updates.runs:
            updates.runs[trial] = RunUpdate(trial, trial or study, _time_ms(record.event))
        update = updates.runs[trial]
        _FOLD[kind](update, record.event)
        update.offset = record.end
    return updates


# --- one event ------------------------------------------------------------------------------------------------------


def _study_started(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.run_again()
    update.params |= params_of(event.get("config") or {})
    if event.get("commit"):
        update.tags["mlflow.source.git.commit"] = str(event["commit"])


def _stage_started(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.tags["raydml.stage"] = str(event["stage"])


def _stage_finished(update: RunUpdate, event: Mapping[str, Any]) -> None:
    if event.get("ranking") is not None:
        text = json.dumps(event["ranking"], indent=1) + "\n"
        update.files.append(File(f"ranking_{event['stage']}.json", text=text))


def _trial_started(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.run_again()
    config: Mapping[str, Any] = event.get("config") or {}
    config = config.get("trial", config)
    update.params |= params_of(config)
    facts = {name: event.get(name) for name in ("stage", "fold", "seed", "fingerprint", "configuration")}
    facts |= {name: (config.get(name) or {}).get("name") for name in ("loss", "miner", "method")}
    update.tags |= {f"raydml.{name}": str(fact) for name, fact in facts.items() if fact is not None}
    update.name = " ".join(filter(None, (str(event["trial"]), recipe_of(config))))


def _epoch(update: RunUpdate, event: Mapping[str, Any]) -> None:
    if update.status != "RUNNING":
        update.run_again()
    epoch, time_ms = int(event["epoch"]), _time_ms(event)
    if epoch in update.epochs:
        return
    update.epochs[epoch] = [
        *points(event.get("metrics") or {}, epoch, time_ms, update.tags),
        # Last: whoever finds this point finds the whole epoch.
        Point(EPOCH_METRIC, float(epoch), epoch, time_ms),
    ]


def _trial_retried(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.run_again()
    update.num_retries += 1
    update.tags["raydml.retried_after"] = cut(str(event.get("error")), MAX_TAG_CHARACTERS)


def _trial_ended(update: RunUpdate, event: Mapping[str, Any]) -> None:
    reason = str(event["reason"])
    update.end(ENDED_STATUS.get(reason, "FAILED"), reason, _time_ms(event))
    for name in ("error", "checkpoint"):
        if event.get(name):
            update.tags[f"raydml.{name}"] = cut(str(event[name]), MAX_TAG_CHARACTERS)


def _artifact(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.files.append(File(str(event.get("artifact_path") or ""), path=Path(event["path"])))


def _model(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.models.append(event)


def _summary(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.summary += points(event.get("metrics") or {}, 0, _time_ms(event), update.tags)
    for name, value in (event.get("tags") or {}).items():
        update.tags[legal_name(name)] = cut(_text(value), MAX_TAG_CHARACTERS)


def _test_read(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.files.append(file_of_test_read(event))
    update.tags["raydml.last_test_read"] = _moment(event)


def _study_finished(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.end("FINISHED", "finished", _time_ms(event))


def _interrupted(update: RunUpdate, event: Mapping[str, Any]) -> None:
    update.end("KILLED", "interrupted", _time_ms(event))


_FOLD: dict[Any, Callable[[RunUpdate, Mapping[str, Any]], None]] = {
    "study_started": _study_started,
    "stage_started": _stage_started,
    "stage_finished": _stage_finished,
    "trial_started": _trial_started,
    "epoch": _epoch,
    "trial_retried": _trial_retried,
    "trial_ended": _trial_ended,
    "artifact": _artifact,
    "model": _model,
    "summary": _summary,
    "test_read": _test_read,
    "study_finished": _study_finished,
    "interrupted": _interrupted,
}
_ABOUT_STUDY = frozenset(
    {"study_started", "stage_started", "stage_finished", "summary", "test_read", "study_finished", "interrupted"}
)


def file_of_test_read(event: Mapping[str, Any]) -> File:
    """The record of one read of the test classes as it lies with a run: ``test_reads/<time>.json``."""
    text = json.dumps({name: value for name, value in event.items() if name != "event"}, indent=1) + "\n"
    return File(f"test_reads/{_moment(event)}.json", text=text)


def _moment(event: Mapping[str, Any]) -> str:
    return datetime.fromtimestamp(float(event["time"]), tz=timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


# --- making things legal ----------------------------------------------------------------------------------------------


def params_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return nested settings as MLflow params: ``{"optimizer": {"learning_rate": 1e-3}}`` gives
    ``{"optimizer.learning_rate": "0.001"}``. A leading ``trial.`` is dropped, lists become JSON."""
    return {
        legal_name(name.removeprefix("trial.")): cut(_text(value), MAX_PARAM_CHARACTERS)
        for name, value in flatten(config, keep_empty=True).items()
    }


def points(metrics: Mapping[str, Any], step: int, time_ms: int, tags: dict[str, str]) -> list[Point]:
    """The numbers among ``metrics`` (texts and None are no series).

    NaN is stored as NaN. MLflow would store an infinity as 1.8e308 and ruin every chart: it is stored as NaN too. The
    tag ``raydml.non_finite`` names the first values that were not finite.
    """
    found = []
    for name, value in metrics.items():
        if not isinstance(value, (int, float)):
            continue
        number = float(value)
        if not math.isfinite(number):
            known = tags.get("raydml.non_finite", "")
            note = f"{name} = {number} in step {step}"
            tags["raydml.non_finite"] = cut(f"{known}; {note}" if known else note, 500)
            number = math.nan
        found.append(Point(legal_name(name), number, step, time_ms))
    return found


def legal_name(name: str) -> str:
    """A name MLflow takes for a metric, parameter or tag: ``recall@1`` becomes ``recall_at_1``."""
    name = re.sub(r"[^\w.\- :/]", "_", str(name).replace("@", "_at_"))[:MAX_KEY_CHARACTERS]
    if name.startswith(("/", "..")) or posixpath.normpath(name) != name or name == ".":
        # MLflow also refuses what would be another name if it were a path.
        name = name.replace("/", "_").replace("..", "__")
    return name if name not in ("", ".") else "_"


def cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else str(value)


def _time_ms(event: Mapping[str, Any]) -> int:
    return int(float(event["time"]) * 1000)
