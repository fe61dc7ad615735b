"""The runs of one study in an MLflow store: found again by their tags, and brought up to date.

Tags in the store identify the runs, not a file beside the study: a second delivery of the same events finds the same
runs, and a store that was lost is filled again. Each study has one writer (raydml.tracking.delivery holds a lock).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from raydml.study.events import ExportedModel
from raydml.tracking.store import is_transient, redacted
from raydml.tracking.updates import RUN_PAGE, DatasetPart, File, RunUpdate

#: Below the limits of one REST request (1000 metrics, 100 parameters, 100 tags, 1000 of all together).
MAX_METRICS, MAX_PARAMS, MAX_TAGS = 800, 100, 100
T = TypeVar("T")
_logger = logging.getLogger(__name__)


@dataclass
class KnownRun:
    """A run as the store has it. ``offset``: up to where in the event file its events have arrived."""

    run_id: str
    status: str
    deleted: bool
    tags: dict[str, str]
    params: dict[str, str]
    offset: int


class StudyRuns:
    """The runs of one study in one store: one for the study, and below it one for each trial."""

    def __init__(self, client: MlflowClient, experiment: str, study: str, study_id: str) -> None:
        self.client, self.experiment, self.study, self.study_id = client, experiment, study, study_id
        #: A message for each permanent refusal of the store; the rest of the study is still delivered.
        self.refused: list[str] = []
        #: Whether transient errors count as refusals too, during one delivery (see PATIENCE in delivery.py).
        self.refuse_transient = False
        self.known: dict[str | None, KnownRun] = {}
        self._look_up()

    def offsets(self) -> dict[str | None, int]:
        """Return for each run the offset in the event file up to which it is complete."""
        return {trial: run.offset for trial, run in self.known.items()}

    def apply(self, update: RunUpdate, log_model: Callable[[str, ExportedModel], None]) -> None:
        """Bring one run up to date; what it has already is not sent again, and the offset is sent last.

        ``log_model(run_id, model)`` stores a model. After an error that :func:`is_transient` accepts, the same update
        can be applied again.
        """
        run = self.known.get(update.trial) or self._create(update)
        if run.deleted:
            self._refuse(f"run {update.name!r} was deleted in MLflow; its new events are left out")
            run.offset = update.offset
            return
        if update.status is not None and run.status != update.status and run.status != "RUNNING":
            self._run_again(run)
        for file in update.files:
            self._attempt(f"artifact {file.path or file.artifact_path}", self._log_file, run.run_id, file)
        if update.datasets:
            inputs = [_input_of(part) for part in {part.name: part for part in update.datasets}.values()]
            self._attempt("data sets", self.client.log_inputs, run.run_id, inputs)
        for model in update.models:
            self._attempt(f"model {model.name!r}", log_model, run.run_id, model)
        if update.status not in (None, "RUNNING") and run.status != update.status:
            self.client.set_terminated(run.run_id, update.status, update.end_ms)
            run.status = str(update.status)
        self._log_batches(run, update)
        run.offset = update.offset

    def close_running(self, time_ms: int, reason: str) -> None:
        """End every run that is still RUNNING as KILLED, because no driver works on it any more."""
        for run in self.known.values():
            if run.status == "RUNNING" and not run.deleted:
                self.client.set_tag(run.run_id, "raydml.ended", reason)
                self.client.set_terminated(run.run_id, "KILLED", time_ms)
                run.status = "KILLED"

    def report_deleted(self) -> None:
        """Report each run that was deleted in MLflow, with the command that brings it back."""
        for trial, run in self.known.items():
            if run.deleted:
                cure = f"mlflow runs restore --run-id {run.run_id}"
                self._refuse(f"run {trial or self.study!r} was deleted in MLflow. Cure: {cure}")

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
            before = self.known.get(trial)
            if before is None or before.deleted:
                self.known[trial] = new
                continue
            self.known[trial], surplus = (new, before) if new.offset >= before.offset else (before, new)
            self.client.set_tag(surplus.run_id, "raydml.ended", "created twice")
            self.client.delete_run(surplus.run_id)
            _logger.info("run %r was in MLflow twice; the copy was deleted", run.info.run_name)

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
            identity |= {"raydml.trial": update.trial, "mlflow.parentRunId": self.known[None].run_id}
        # The identity is part of the request that creates the run: after a crash the run can still be found.
        run = self.client.create_run(self.experiment, update.start_ms, identity, run_name=update.name)
        self.known[update.trial] = _known_run(run)
        return self.known[update.trial]

    def _run_again(self, run: KnownRun) -> None:
        self.client.update_run(run.run_id, status="RUNNING")
        run.status = "RUNNING"
        for tag in ("raydml.ended", "raydml.error"):
            if run.tags.pop(tag, None) is not None:
                self.client.delete_tag(run.run_id, tag)

    def _log_file(self, run_id: str, file: File) -> None:
        if file.path is None:
            self.client.log_text(run_id, file.text, file.artifact_path)
        elif file.path.is_dir():
            self.client.log_artifacts(run_id, str(file.path), file.artifact_path or file.path.name)
        elif file.path.exists():
            self.client.log_artifact(run_id, str(file.path), file.artifact_path or None)
        else:
            raise FileNotFoundError(f"{file.path} does not exist any more")

    def _log_batches(self, run: KnownRun, update: RunUpdate) -> None:
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
        if len(requests_[-1][2]) == MAX_TAGS:
            requests_.append([[], [], []])
        # The very last thing: everything up to here has arrived.
        requests_[-1][2].append(RunTag("raydml.spool_offset", str(update.offset)))
        for metrics_, params_, tags_ in requests_:
            self._attempt(f"values of run {update.name!r}", self.client.log_batch, run.run_id, metrics_, params_, tags_)
        run.tags |= tags
        run.params |= params

    def _attempt(self, what: str, request: Callable[..., Any], *arguments: Any) -> None:
        """Send a request whose refusal must not hold up the rest of the study: it is reported and not sent again."""
        try:
            request(*arguments)
        except Exception as error:
            if is_transient(error) and not self.refuse_transient:
                raise
            self._refuse(f"{what}: {type(error).__name__}: {redacted(str(error))[:500]}")

    def _refuse(self, text: str) -> None:
        if text in self.refused:
            return
        self.refused.append(text)
        _logger.warning("not stored in MLflow: %s", text)


def _input_of(part: DatasetPart) -> DatasetInput:
    profile = {f"num_{what}": number for what, number in part.sizes.items()}
    source = json.dumps({"name": part.name})
    dataset = Dataset(part.name, part.digest, source_type="raydml", source=source, profile=json.dumps(profile))
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, part.context)])


def _pieces(values: list[T], size: int) -> list[list[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _known_run(run: Run) -> KnownRun:
    tags = dict(run.data.tags)
    return KnownRun(
        run_id=run.info.run_id,
        status=run.info.status,
        deleted=run.info.lifecycle_stage == "deleted",
        tags=tags,
        params=dict(run.data.params),
        offset=int(tags.get("raydml.spool_offset", 0)),
    )
