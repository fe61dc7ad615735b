"""The runs of one study in an MLflow store: found again by their tags, and brought up to date.

Tags in the store identify the runs, not a file beside the study: a second delivery of the same events finds the same
runs, and a store that was lost is filled again. Each study has one writer (raydml.tracking.delivery holds a lock).
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID as PARENT

from raydml.ops.addresses import without_secrets
from raydml.study.events import ExportedModel
from raydml.tracking.store import first_line, is_transient, without_retries
from raydml.tracking.updates import RUN_PAGE, DatasetPart, File, News, RunUpdate

#: Below the limits of one REST request (1000 metrics, 100 parameters, 100 tags, 1000 of all together).
MAX_METRICS, MAX_PARAMS, MAX_TAGS = 800, 100, 100
#: Tags of a run: how far it is, the digest of the events before (with that offset), which of these lack attachments.
OFFSET, DIGEST, UNSENT = "raydml.spool_offset", "raydml.spool_digest", "raydml.unsent_events"
MAX_UNSENT = 300  # offsets in one tag
#: Why raydml has deleted a run, in its tag ``raydml.ended``.
SURPLUS, REPLACED = "created twice", "its events were replaced"
T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass
class KnownRun:
    """A run as the store has it.

    offset: up to where in the event file its events have arrived, but for the attachments of the events in `unsent`,
    which are named by the offsets behind them. digest: of what the event file held before the offset; empty if unknown.
    is_held: whether a request of this delivery failed, so that its events wait for the next one.
    """

    run_id: str
    name: str
    status: str
    deleted: bool
    tags: dict[str, str]
    params: dict[str, str]
    offset: int
    unsent: frozenset[int] = frozenset()
    digest: str = ""
    is_held: bool = False


class StudyRuns:
    """The runs of one study in one store: one for the study, and below it one for each trial."""

    def __init__(self, client: MlflowClient, experiment: str, study: str, study_id: str) -> None:
        self.client, self.experiment, self.study, self.study_id = client, experiment, study, study_id
        #: What the store does not have, by what it is: a message for each.
        self.missing: dict[str, str] = {}
        #: Whether a request was refused that can be sent again, and whether one of them may succeed by itself: the
        #: store was unavailable for it.
        self.is_incomplete, self.may_arrive = False, False
        self.known: dict[str | None, KnownRun] = {}
        self._look_up()

    def offsets(self) -> dict[str | None, int]:
        """Return for each run the offset in the event file up to which it is complete."""
        return {trial: run.offset for trial, run in self.known.items()}

    def unsent(self) -> dict[str | None, frozenset[int]]:
        """Return for each run the offsets behind the events before that whose attachments it lacks."""
        return {trial: run.unsent for trial, run in self.known.items() if run.unsent}

    def apply(self, update: RunUpdate, log_model: Callable[[str, ExportedModel], None], digest: str = "") -> None:
        """Bring one run up to date; what it has already is not sent again, and the offset is sent last.

        ``log_model(run_id, model)`` stores a model. digest: of what the event file holds before the update's offset.
        An attachment that the store refuses becomes a part of `missing`, and its event of the run's ``unsent``; the
        rest of the run goes on. If another request is refused, the run is held: the next delivery sends the same
        again. Raises the error of a store that does not answer.
        """
        run = self.known.get(update.trial)
        if run is not None and run.is_held:
            return
        try:
            if run is None and update.trial is not None and None not in self.known:
                return  # a trial's run names the study's as its parent, which the store has just refused
            run = run or self._create(update)
            if not run.deleted:
                self._bring_up_to_date(run, update, log_model, digest)
                return
        except Exception as error:
            self._refuse(f"run {update.name!r}", error)
            if run is not None:
                run.is_held = True
            return
        self._report_deleted(update.trial, run)
        run.offset = update.offset

    def replace(self, trials: Iterable[str | None]) -> None:
        """Delete the runs of trials whose events are not those that were sent; `apply` then makes them again."""
        for trial in trials:
            self._delete(self.known.pop(trial), REPLACED)

    def close_running(self, time_ms: int, reason: str) -> None:
        """End every run that is still RUNNING as KILLED, because no driver works on it any more.

        The states first: there may be little time, and a run that looks as if it ran misleads.
        """
        running = [run for run in self.known.values() if run.status == "RUNNING" and not run.deleted]
        for run in running:
            self.client.set_terminated(run.run_id, "KILLED", time_ms)
            run.status = "KILLED"
        for run in running:
            self.client.set_tag(run.run_id, "raydml.ended", reason)
            run.tags["raydml.ended"] = reason

    def report_deleted(self) -> None:
        """Report each run that was deleted in MLflow, with the command that brings it back."""
        for trial, run in self.known.items():
            if run.deleted:
                self._report_deleted(trial, run)

    # --- inside ---

    def _look_up(self) -> None:
        """Fill `known` with the runs of the store, and delete surplus ones.

        A run exists twice where the answer to the request that created it was lost on its way and the request was sent
        again. The one with the most events stays, of equal ones the older. A run that somebody deleted counts only
        where no other one has its identity.
        """
        runs = sorted(self._search(), key=lambda run: (run.info.lifecycle_stage != "deleted", -run.info.start_time))
        for run in runs:
            trial, new = run.data.tags.get("raydml.trial"), _known_run(run)
            if new.deleted and new.tags.get("raydml.ended") in (SURPLUS, REPLACED):
                continue
            before = self.known.get(trial)
            if before is None or before.deleted:
                self.known[trial] = new
                continue
            self.known[trial], surplus = (new, before) if new.offset >= before.offset else (before, new)
            self._delete(surplus, SURPLUS)
            _logger.info("run %r was in MLflow twice; the copy was deleted", run.info.run_name)
        self._set_parent()

    def _set_parent(self) -> None:
        """Put the trials below the study's run, which may be another one than when they were created."""
        if None not in self.known:
            return
        parent = self.known[None].run_id
        for trial, run in self.known.items():
            if trial is not None and not run.deleted and run.tags.get(PARENT) != parent:
                self.client.set_tag(run.run_id, PARENT, parent)
                run.tags[PARENT] = parent

    def _delete(self, run: KnownRun, reason: str) -> None:
        if not run.deleted:
            self.client.set_tag(run.run_id, "raydml.ended", reason)
            self.client.delete_run(run.run_id)

    def _search(self) -> Iterator[Run]:
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                f"tags.`raydml.study_id` = '{self.study_id}'",
                run_view_type=ViewType.ALL,
                max_results=500,
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _create(self, update: RunUpdate) -> KnownRun:
        identity = {"raydml.study_id": self.study_id, "raydml.study": self.study}
        if update.trial is not None:
            identity |= {"raydml.trial": update.trial, PARENT: self.known[None].run_id}
        # The identity is part of the request that creates the run: after a crash the run can still be found.
        with without_retries():
            run = self.client.create_run(self.experiment, update.start_ms, identity, run_name=update.name)
        self.known[update.trial] = _known_run(run)
        if update.trial is None:
            self._set_parent()
        return self.known[update.trial]

    def _bring_up_to_date(
        self, run: KnownRun, update: RunUpdate, log_model: Callable[[str, ExportedModel], None], digest: str
    ) -> None:
        if update.status is not None and run.status not in (update.status, "RUNNING"):
            self._forget_end(run, update.status)
        if run.name == update.trial != update.name:  # made before its settings were known, and not renamed by a user
            self.client.update_run(run.run_id, name=update.name)
            run.name = update.name
        unsent = run.unsent - set(update.attached)
        for end, news in update.attached.items():
            if not self._attach(run, update.trial or self.study, news, log_model):
                unsent |= {end}
        if update.status not in (None, "RUNNING") and run.status != update.status:
            self.client.set_terminated(run.run_id, update.status, update.end_ms)
            run.status = str(update.status)
        listed = sorted(unsent)[:MAX_UNSENT]
        # Where the tag has no room for all, the run is complete up to the first that it does not name.
        offset = update.offset if len(listed) == len(unsent) else sorted(unsent)[MAX_UNSENT] - 1
        progress = {OFFSET: str(offset), DIGEST: f"{offset}:{digest}" if offset == update.offset else ""}
        if listed:
            progress[UNSENT] = " ".join(map(str, listed))
        self._log_batches(run, update, progress)
        if not listed and run.unsent:
            self.client.delete_tag(run.run_id, UNSENT)
        run.offset, run.unsent = offset, frozenset(listed)

    def _forget_end(self, run: KnownRun, status: str) -> None:
        if status == "RUNNING":
            self.client.update_run(run.run_id, status="RUNNING")
            run.status = "RUNNING"
        for tag in ("raydml.ended", "raydml.error"):
            if run.tags.pop(tag, None) is not None:
                self.client.delete_tag(run.run_id, tag)

    def _attach(self, run: KnownRun, name: str, news: News, log_model: Callable[[str, ExportedModel], None]) -> bool:
        """Send the attachments of one event; return whether the store has taken all of them."""
        sent = [
            self._attempt(f"artifact {file.path or file.artifact_path} of {name}", self._log_file, run.run_id, file)
            for file in news.files
        ]
        if news.datasets:
            inputs = [_input_of(part) for part in {part.name: part for part in news.datasets}.values()]
            sent.append(self._attempt(f"data sets of {name}", self.client.log_inputs, run.run_id, inputs))
        sent += [self._attempt(f"model {model.name!r}", log_model, run.run_id, model) for model in news.models]
        return all(sent)

    def _log_file(self, run_id: str, file: File) -> None:
        if file.path is None:
            self.client.log_text(run_id, file.text, file.artifact_path)
        elif file.path.is_dir():
            self.client.log_artifacts(run_id, str(file.path), file.artifact_path or file.path.name)
        elif file.path.exists():
            self.client.log_artifact(run_id, str(file.path), file.artifact_path or None)
        else:
            raise FileNotFoundError(f"{file.path} does not exist any more")

    def _log_batches(self, run: KnownRun, update: RunUpdate, progress: dict[str, str]) -> None:
        """Send parameters, tags and points. progress: tags that say how far the run is, which are sent last."""
        params = {name: text for name, text in update.params.items() if name not in run.params}
        # MLflow never changes the value of a parameter; the new one of a resumed study becomes a tag.
        changed = {
            f"raydml.changed.{name}"[:250]: text
            for name, text in update.params.items()
            if run.params.get(name, text) != text
        }
        page = f"#/experiments/{self.experiment}/runs/{run.run_id}"
        tags = {**changed, **{name: text.replace(RUN_PAGE, page) for name, text in update.tags.items()}}
        tags = {name: text for name, text in tags.items() if run.tags.get(name) != text}
        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in update.points]
        parts: Iterator[tuple[list[Any], ...]] = zip_longest(
            _pieces(metrics, MAX_METRICS),
            _pieces([Param(name, text) for name, text in params.items()], MAX_PARAMS),
            _pieces([RunTag(name, text) for name, text in tags.items()], MAX_TAGS),
            fillvalue=[],
        )
        requests_ = [[list(part) for part in request] for request in parts] or [[[], [], []]]
        if len(requests_[-1][2]) > MAX_TAGS - len(progress):
            requests_.append([[], [], []])
        # The very last thing: everything up to here has arrived.
        requests_[-1][2] += [RunTag(name, text) for name, text in progress.items()]
        for metrics_, params_, tags_ in requests_:
            self.client.log_batch(run.run_id, metrics_, params_, tags_)
        run.tags |= tags
        run.params |= params

    def _attempt(self, what: str, request: Callable[..., Any], *arguments: Any) -> bool:
        """Send a request whose refusal must not hold up the rest of the study; return whether it was taken."""
        try:
            request(*arguments)
        except Exception as error:
            self._refuse(what, error)
            return False
        return True

    def _refuse(self, what: str, error: Exception) -> None:
        """Note what a request could not store. Raises its error if the store answers no other request either."""
        if is_transient(error):
            try:
                self.client.get_experiment(self.experiment)
            except Exception:
                raise error from None
            self.may_arrive = True
        self.is_incomplete = True
        self.missing[what] = f"{what}: {type(error).__name__}: {first_line(error)}"

    def _report_deleted(self, trial: str | None, run: KnownRun) -> None:
        what, store = f"run {trial or self.study!r}", without_secrets(self.client.tracking_uri)
        cure = f"MLFLOW_TRACKING_URI={shlex.quote(store)} mlflow runs restore --run-id {run.run_id}"
        self.missing[what] = f"{what}: it was deleted in MLflow. Cure: {cure}"


def _input_of(part: DatasetPart) -> DatasetInput:
    profile = {f"num_{what}": number for what, number in part.sizes.items()}
    source = json.dumps({"name": part.name})
    dataset = Dataset(part.name, part.digest, source_type="raydml", source=source, profile=json.dumps(profile))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, part.context)])


def _pieces(values: list[T], size: int) -> list[list[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _known_run(run: Run) -> KnownRun:
    tags = dict(run.data.tags)
    offset = int(tags.get(OFFSET, 0))
    place, _, digest = tags.get(DIGEST, "").partition(":")
    return KnownRun(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=run.info.status,
        deleted=run.info.lifecycle_stage == "deleted",
        tags=tags,
        params=dict(run.data.params),
        offset=offset,
        unsent=frozenset(int(text) for text in tags.get(UNSENT, "").split() if text.isdecimal()),
        digest=digest if place == str(offset) else "",
    )
