"""Events of a study as updates of its MLflow runs: one update for each run that has something new.

This module uses neither MLflow nor a clock. Names, lengths and values are made legal here, so that nothing is sent
which the tracking server would refuse. ``None`` as a key means the study's own (parent) run.

Parameters, tags and status of a run follow from the study's state. Metrics are appended: MLflow keeps every point, and
of several at one step the one with the latest time counts. An epoch that is reported a second time therefore sends the
values that differ from the first report, with the time of the second, and what counts in MLflow is what counts in the
state. (Points of epochs that a trial has lost and not reached again stay in MLflow.) Which points are sent depends on
the events alone, not on how many deliveries they came in; but of a value of the run as a whole, which has step 0, a
delivery sends the newest only.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from raydml.analysis.trials import TrialState, parameters_of
from raydml.config.recipe import flatten
from raydml.config.refit import trained_on, validates
from raydml.inference.footprint import footprint_metrics
from raydml.report.text import markdown_text
from raydml.study.events import (
    Event,
    ExportedModel,
    Record,
    Reduction,
    StudyState,
    changed_metrics,
    letters_of,
    reduce_events,
)
from raydml.study.rungs import milestones
from raydml.study.summary import question_of

#: Longest values that MLflow stores whole (a tag: the limit of older servers; newer ones take 8000).
MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS, MAX_KEY_CHARACTERS, MAX_NON_FINITE_CHARACTERS = 6000, 5000, 250, 500
MAX_DIGEST_CHARACTERS = 36
#: In a note, the address of the run's own page, which is known when the note is sent.
RUN_PAGE = "{run page}"
#: Beginning of a metric's name in the events -> the group of its chart in MLflow. The first that fits counts.
GROUPS = {
    "search_best_val_": "search/best_",
    "footprint_": "footprint/",
    "confirmed_val_": "confirmed/",
    "test_untrained_": "untrained/",
    "test_refit_untrained_": "refit/untrained_",
    "test_refit_": "refit/",
    "test_ensemble_": "ensemble/",
    "val_untrained_": "untrained/val_",
    "untrained_": "untrained/",
    "test_": "test/",
    "val_": "val/",
    "train_": "train/",
    "images_per_s": "speed/images_per_s",
    "epoch_s": "speed/epoch_s",
    "peak_memory_bytes": "system/peak_memory_bytes",
    "system_": "system/",
}
#: Metrics of a single point, which has step 0: the number of epochs that a run has reached, and its best epoch.
EPOCHS, BEST = "train/epochs", "best/"
NUM_DIGITS = 6  # significant ones, of every value: MLflow shows all that it has
#: MLflow status of a run by the state of its trial or study; any other state is a failure.
STATUS = {
    "waiting": "RUNNING",
    "running": "RUNNING",
    "retrying": "RUNNING",
    "interrupted": "KILLED",
    "finished": "FINISHED",
    "stopped_early": "FINISHED",
    "time": "FINISHED",
    "budget": "FINISHED",
    "settled": "FINISHED",
}


class Point(NamedTuple):
    """One value of a metric; ``time_ms`` is the event's, so that a repeated delivery is an exact duplicate."""

    name: str
    value: float
    step: int
    time_ms: int


class DatasetPart(NamedTuple):
    """The images that a run trains on, validates on or is tested on. digest: hash of all images of the data set."""

    name: str
    digest: str
    context: str  # train, validation or test
    sizes: Mapping[str, int]  # numbers of ``images`` and ``classes``, where they are known


class File(NamedTuple):
    """A file to store with a run: the file or folder ``path``, or ``text``. ``artifact_path``: the folder it goes to,
    or for a text its whole name."""

    artifact_path: str
    path: Path | None = None
    text: str = ""


@dataclass
class News:
    """What one event appends to a run: points, and what is attached to it (files, models, data sets)."""

    points: list[Point] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    models: list[ExportedModel] = field(default_factory=list)
    datasets: list[DatasetPart] = field(default_factory=list)


@dataclass
class RunUpdate:
    """Everything new about one run. ``offset`` is the one behind the last event in it; parameters and tags are those
    of the whole run. attached: for each event with attachments, by the offset behind it, its news."""

    trial: str | None
    name: str
    start_ms: int
    offset: int = 0
    status: str | None = None
    end_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    attached: dict[int, News] = field(default_factory=dict)

    @property
    def files(self) -> list[File]:
        return [file for news in self.attached.values() for file in news.files]

    @property
    def models(self) -> list[ExportedModel]:
        return [model for news in self.attached.values() for model in news.models]

    @property
    def datasets(self) -> list[DatasetPart]:
        return [part for news in self.attached.values() for part in news.datasets]


def updates_of(
    records: Iterable[Record],
    state: StudyState,
    delivered: Mapping[str | None, int],
    folder: Path,
    *,
    unsent: Mapping[str | None, Collection[int]] | None = None,
    damaged: dict[str, str] | None = None,
) -> tuple[StudyState, list[RunUpdate]]:
    """Reduce events in their order; return the state after them and an update for each run that they concern.

    state: the study before the events. delivered: for each run the offset up to which it has its events; those change
    the state but are not sent again. unsent: for each run the offsets of delivered events whose attachments the store
    has refused; these are part of the update. folder: where the study is now. The update of the study's own run comes
    first: the other runs name it as parent.

    An event that cannot be read changes nothing. damaged: gets the place of each such event, with the error.
    """
    updates: dict[str | None, RunUpdate] = {}
    damaged = {} if damaged is None else damaged
    reduction, added = Reduction(state), list[Event]()
    for record in records:
        before = reduction.before(record.event)
        try:
            reduction.add(record.event)
            after = reduction.now()
            found = _news_of_runs(record, before, after, folder, delivered, unsent or {})
        except Exception as error:  # a damaged line: whatever its values are, the rest of the study is delivered
            reduction = Reduction(reduce_events(added, state))
            damaged[f"the line before byte {record.end}"] = f"{type(error).__name__}: {error}"
            continue
        added.append(record.event)
        for run, news in found.items():
            update = updates.setdefault(run, RunUpdate(run, run or after.study, _ms(after.time_s)))
            update.offset = max(record.end, delivered.get(run, 0))
            if record.end > delivered.get(run, 0):
                update.points += news.points
            if news.files or news.models or news.datasets:
                update.attached[record.end] = news
    state = reduction.now()
    for run, update in updates.items():
        update.points = _without_superseded(update.points)
        try:
            if run is None:
                _describe_study(update, state, folder)
            elif run in state.trials:
                _describe_trial(update, state.trials[run], state)
        except Exception as error:  # the settings in a damaged line: points and files of the run do not depend on them
            damaged[f"the settings of {run or state.study}"] = f"{type(error).__name__}: {error}"
    return state, sorted(updates.values(), key=lambda update: update.trial is not None)


def _without_superseded(found: list[Point]) -> list[Point]:
    """Return the points without those of a run as a whole that a later one replaces: half of all, and never shown."""
    newest = {point.name: point for point in found if point.step == 0}
    return [point for point in found if point.step > 0 or point is newest[point.name]]


def _news_of_runs(
    record: Record,
    before: StudyState,
    after: StudyState,
    folder: Path,
    delivered: Mapping[str | None, int],
    unsent: Mapping[str | None, Collection[int]],
) -> dict[str | None, News]:
    """Return what one event, between two states, appends to each run that does not have it."""
    kind = record.event.get("event")
    if kind not in _OF_STUDY and kind not in _OF_TRIAL:
        return {}
    runs = [
        run for run in _runs_of(record.event) if record.end > delivered.get(run, 0) or record.end in unsent.get(run, ())
    ]
    return {run: _news(run, record.event, before, after, folder) for run in runs}


_OF_STUDY = frozenset(
    {"study_started", "stage_started", "stage_finished", "summary", "test_read", "study_finished", "interrupted"}
)
#: Of one trial, or, where their trial is None, of the study.
_OF_TRIAL = frozenset({"trial_started", "epoch", "trial_retried", "trial_ended", "artifact", "model"})


def _runs_of(event: Event) -> list[str | None]:
    """Return the runs that an event concerns: its trial's, or the study's and those of the trials that it tested."""
    if event.get("event") in _OF_TRIAL:
        return [event.get("trial")]
    return [None, *_tested(event)]


def _tested(event: Event) -> dict[str, Mapping[str, Any]]:
    """Return key -> ``test``, its metrics on the test classes, of the runs and refits that finalize has tested."""
    if event.get("event") != "stage_finished" or event.get("stage") != "finalize":
        return {}
    return {
        key: scores
        for row in event.get("ranking") or ()
        if isinstance(row, Mapping)
        for runs in (row.get("runs"), (row.get("refit") or {}).get("runs"))
        if isinstance(runs, Mapping)
        for key, scores in runs.items()
    }


def _news(run: str | None, event: Event, before: StudyState, after: StudyState, folder: Path) -> News:
    """Return what one event, between two states, appends to a run."""
    news = News()
    if run is None:
        _add_news_of_study(news, event, after)
    elif event.get("event") == "trial_started" and (run not in before.trials or not before.trials[run].config):
        started = after.trials[run]
        news.files.append(_config_file(started.config))
        news.datasets += _datasets(after, started, ("train", "validation"))
    elif run in _tested(event):
        scores = {f"test_{name}": value for name, value in _tested(event)[run].get("test", {}).items()}
        scores = {name.replace("test_untrained_", "untrained_"): value for name, value in scores.items()}
        scores |= footprint_metrics(_tested(event)[run].get("footprint"))
        news.points += points(grouped(scores), 0, _ms(after.time_s))
        news.datasets += _datasets(after, after.trials.get(run), ("test",))
        return news
    news.files += [
        File(one.artifact_path, _moved(one.path, after, folder)) for one in after.artifacts[len(before.artifacts) :]
    ]
    news.files += [file_of_test_read(read) for read in after.test_reads[len(before.test_reads) :]]
    news.models += [moved_model(one, after, folder) for one in after.models[len(before.models) :]]
    if after.summary is not before.summary:
        news.points += points(grouped(after.summary.metrics), 0, _ms(after.summary.time_s))
    for name, stage in after.stages.items():
        if stage.ranking is not None and stage is not before.stages.get(name):
            news.files.append(File(f"ranking_{name}.json", text=json.dumps(stage.ranking, indent=1) + "\n"))
    trial = after.trials.get(run or "")
    if trial is None or trial.num_epochs not in trial.reports:
        return news
    report, reported = trial.reports[trial.num_epochs], before.trials.get(trial.trial)
    earlier = reported.reports.get(trial.num_epochs) if reported else None
    if report is not earlier:
        metrics = grouped(changed_metrics(earlier, report))
        if not _is_scheduled(trial.config):  # a flat line; the value is a parameter
            metrics.pop("train/learning_rate", None)
        news.points += points(metrics, trial.num_epochs, _ms(report.time_s))
    best, best_before = _best_epoch(trial), _best_epoch(reported) if reported else {}
    changed = {name: value for name, value in best.items() if best_before.get(name) != value}
    news.points += points({**changed, EPOCHS: trial.num_epochs}, 0, _ms(report.time_s))
    return news


def _add_news_of_study(news: News, event: Event, after: StudyState) -> None:
    if event.get("event") == "study_started":
        settings = {"study": after.config, "trial": nested(after.constant), "varies": list(after.varying or ())}
        news.files.append(_config_file(settings))
    for key in _tested(event):
        news.datasets += _datasets(after, after.trials.get(key), ("train", "validation", "test"))


def _config_file(settings: Mapping[str, Any]) -> File:
    return File("config.yaml", text=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _datasets(study: StudyState, trial: TrialState | None, contexts: Iterable[str]) -> list[DatasetPart]:
    """Return the parts of a trial's data set; none for an older study, whose events do not have their sizes."""
    if trial is None:
        return []
    data = trial.config.get("data") or {}
    place = "refit" if trial.stage == "refit" else f"fold {trial.fold}"
    split = place if place in study.splits else "search"
    parts = study.splits.get(split) or {}
    name = f"{data.get('name', study.dataset)} {split}"
    digest = str(data.get("content") or "")[:MAX_DIGEST_CHARACTERS]
    named = {"train": "train", "validation": "val", "test": "test"}
    return [
        DatasetPart(f"{data.get('name')} test" if context == "test" else f"{name} {context}", digest, context, sizes)
        for context in contexts
        if digest and (sizes := parts.get(named[context])) and sizes.get("classes", 1)
    ]


def _best_epoch(trial: TrialState) -> dict[str, float]:
    """Return the validation metrics of a trial's best epoch and its number, as the columns and the order of the table
    of runs: their values of the last epoch, which MLflow shows otherwise, belong to weights that are not kept."""
    if trial.epoch_of_best is None:
        return {}
    found = {
        f"{BEST}{name.removeprefix('val_')}": value
        for name, value in trial.epochs[trial.epoch_of_best].items()
        if name.startswith("val_")
    }
    selected = {} if trial.best is None else {f"{BEST}selected": trial.best}
    return {**found, **selected, f"{BEST}epoch": trial.epoch_of_best}


def _is_scheduled(config: Mapping[str, Any]) -> bool:
    schedule = config.get("schedule") or {}
    return schedule.get("name", "constant") != "constant" or bool(schedule.get("warmup_epochs"))


def _moved(path: Path, state: StudyState, folder: Path) -> Path:
    """Return where a file of an event is now: studies are copied, moved and renamed with their storage folder.

    state: right after the event; its storage is the one at that time. folder: the study's own, now.
    """
    for then, now in ((Path(state.storage, state.study), folder), (Path(state.storage), folder.parent)):
        if state.storage and path.is_relative_to(then):
            return now / path.relative_to(then)
    return path


def moved_model(model: ExportedModel, state: StudyState, folder: Path) -> ExportedModel:
    """Return the model with the place of its folder now, and its checkpoint as a path within the study."""
    checkpoint = _moved(Path(model.checkpoint), state, folder)
    within = checkpoint.relative_to(folder) if checkpoint.is_relative_to(folder) else checkpoint
    return replace(model, folder=_moved(model.folder, state, folder), checkpoint=str(within))


def _describe_study(update: RunUpdate, study: StudyState, folder: Path) -> None:
    update.params = params_of({**study.config, **study.constant})
    _set_status(update, study.state, study.changed_s)
    update.tags |= {**_origin(study), "raydml.stage": study.stage, "mlflow.note.content": _note(folder)}
    update.tags |= {f"raydml.{name}": text for name, text in search_words(study.config).items()}
    update.tags["raydml.command"] = study.command
    if study.config.get("smoke"):
        update.tags["raydml.smoke"] = "true"
    if study.test_reads:
        update.tags["raydml.last_test_read"] = _moment(study.test_reads[-1])
    update.tags |= {legal_name(name): _text(value) for name, value in study.summary.tags.items()}
    update.tags["raydml.non_finite"] = _non_finite({0: study.summary.metrics})
    _make_tags_legal(update)


def _describe_trial(update: RunUpdate, trial: TrialState, study: StudyState) -> None:
    letter = letters_of(study).get(trial.configuration) if trial.stage in ("confirm", "refit") else None
    fold = "" if trial.stage == "refit" else f"fold {trial.fold} "
    place = f"{letter} {fold}seed {trial.seed}" if letter else None
    update.name = " ".join(filter(None, (trial.trial, place, trial.recipe)))
    update.params = _params_of_trial(trial, study)
    update.tags |= _origin(study)
    _set_status(update, trial.state, trial.changed_s)
    facts: dict[str, Any] = {
        "stage": trial.stage,
        "fold": trial.fold,
        "from_trial": trial.searched if trial.is_further_fold else None,
        "seed": trial.seed,
        "recipe": trial.recipe or None,
        "fingerprint": trial.fingerprint,
        "configuration": letter,
        "trained_on": None if validates(trial.config) else trained_on(trial.config),
        **{block: (trial.config.get(block) or {}).get("name") for block in ("loss", "miner", "method")},
        "error": trial.error if trial.ended else None,
        "retries": trial.num_retries or None,
        "moves": trial.num_moves or None,
        "retried_after": trial.retried_after,
        "gpus": trial.gpus,
        **(_place_in_search(trial, study) if trial.stage == "search" else {}),
        "node": trial.node or None,
        "device": trial.device or None,
        "non_finite": _non_finite(trial.epochs),
    }
    update.tags |= {f"raydml.{name}": str(fact) for name, fact in facts.items() if fact is not None}
    _make_tags_legal(update)


def search_words(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the searcher and of the scheduler of a study. config: its settings."""
    search = config.get("search") or {}
    searcher = (search.get("searcher") or {}).get("name", "random")
    return {"searcher": str(searcher), "scheduler": str(search.get("scheduler", ""))}


def _place_in_search(trial: TrialState, study: StudyState) -> dict[str, str | None]:
    """Return who has proposed a searched trial, and how many of the rungs of its search it has reached."""
    words, search = search_words(study.config), study.config.get("search") or {}
    is_random = trial.searched not in study.drawn and words["searcher"] in ("tpe", "gp")
    plan = study.stages.get("search")
    rungs = []
    is_halved = words["scheduler"] not in ("", "none") and not trial.is_further_fold
    if is_halved and plan is not None and plan.max_epochs:
        rungs = milestones(
            max_epochs=plan.max_epochs,
            grace_epochs=int(search.get("grace_epochs", 1)),
            reduction_factor=int(search.get("reduction_factor", 3)),
        )
    reached = sum(rung <= trial.num_epochs for rung in rungs)
    return {
        "searcher": "random" if is_random else words["searcher"],
        "bracket": f"rung {reached} of {len(rungs)}" if rungs else None,
    }


def _params_of_trial(trial: TrialState, study: StudyState) -> dict[str, str]:
    """Return what differs between the trials of a study; everything of a trial of an older study."""
    if study.varying is None:
        return params_of(trial.config)
    parameters = {name: value for name, value in parameters_of(trial.config).items() if name in study.varying}
    own = {"confirm": {"fold": trial.fold, "seed": trial.seed}}
    own |= {"refit": {"seed": trial.seed, "epochs": trial.config.get("epochs")}}
    own |= {"search": {"fold": trial.fold}} if trial.is_further_fold else {}
    return params_of({**own.get(trial.stage, {}), **parameters})


def _origin(study: StudyState) -> dict[str, str]:
    """Return MLflow's own tags for who started a run, with which command and code."""
    return {
        "mlflow.user": study.user,
        "mlflow.source.name": source_of(study.command),
        "mlflow.source.type": "LOCAL" if study.command else "",
        "mlflow.source.git.commit": study.commit,
    }


def source_of(command: str) -> str:
    """Return a command without its options and folders: ``python launch.py sweep digits.yaml``.

    MLflow shows what follows the last slash: of a whole command, the end of some path or address among its options.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation without its end
        words = command.split()
    return " ".join(_without_folders(word) for word in takewhile(lambda word: word[:2] != "--", words))


def _without_folders(word: str) -> str:
    call = "Study.start(" if word.startswith("Study.start(") else ""  # of the Python interface
    return call + word.removeprefix(call).rstrip("/").rpartition("/")[2]


def _note(folder: Path) -> str:
    """Return the description of a study's run: its summary, or while it has none its question."""
    summary, space = folder / "summary.md", folder / "space.yaml"
    if summary.exists():
        text = summary.read_text(encoding="utf-8", errors="replace").partition("\n## ")[0].strip()
        return f"{text}\n\n[Report]({RUN_PAGE}/artifacts/report/report.html)"
    question = question_of(space.read_text(encoding="utf-8", errors="replace")) if space.exists() else None
    return markdown_text(question[:1].upper() + question[1:]) if question else ""


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
    return [
        Point(legal_name(name), point_value(value), step, time_ms)
        for name, value in metrics.items()
        if isinstance(value, (int, float))
    ]


def point_value(value: float) -> float:
    """Return a value as MLflow stores it: with few digits, because MLflow shows all that it has."""
    return float(f"{value:.{NUM_DIGITS}g}") if math.isfinite(value) else math.nan


def grouped(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics of events under the names that MLflow groups: ``val_map_at_r`` becomes ``val/map_at_r``.

    The best value so far is left out: see `_best_epoch`.
    """
    return {_grouped(name): value for name, value in metrics.items() if not name.startswith("best_val_")}


def _grouped(name: str) -> str:
    for beginning, group in GROUPS.items():
        if name.startswith(beginning):
            return group + name.removeprefix(beginning)
    return f"train/{name}"


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with dotted names as nested blocks. A value beside a block of its name is the block's ``name``:
    ``{"loss": "margin", "loss.margin.beta": 1}`` gives ``{"loss": {"name": "margin", "margin": {"beta": 1}}}``."""
    blocks: dict[str, Any] = {}
    for name, value in settings.items():
        *path, last = name.split(".")
        block = blocks
        for part in path:
            if not isinstance(block.setdefault(part, {}), dict):
                block[part] = {"name": block[part]}
            block = block[part]
        if isinstance(block.get(last), dict):
            block[last]["name"] = value
        else:
            block[last] = value
    return blocks


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
