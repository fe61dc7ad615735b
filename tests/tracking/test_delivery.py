"""Delivery to MLflow: real stores (SQLite, a local server), every way a delivery can break off, and what arrives."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, TEMPORARILY_UNAVAILABLE
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name
from rich.console import Console

from raydml.cli.live_view import LiveStudy
from raydml.inference.export import EmbeddingModel, export_model
from raydml.models.network import build_network, preprocessing_for
from raydml.study import events
from raydml.study.driver import read_num_sent
from raydml.study.events import ExportedModel, StudyState, rank, read_trials
from raydml.study.summary import histories
from raydml.tracking import delivery, models
from raydml.tracking.delivery import NUM_AWAY, Tracker, sync
from raydml.tracking.models import (
    Origin,
    log_exported_model,
    log_test_read,
    origin_of,
    requirements,
    resolve_checkpoint,
)
from raydml.tracking.runs import DIGEST, UNSENT
from raydml.tracking.store import MLFLOW_DEFAULTS, TrackingError, connect, default_uri, prepare_store
from raydml.tracking.updates import MAX_PARAM_CHARACTERS, legal_name, params_of, points, shortened, updates_of
from raydml.training import checkpoint
from tests.tracking.fault_proxy import Fault, faulty

pytestmark = pytest.mark.xdist_group("mlflow")
REPOSITORY = Path(__file__).resolve().parents[2]
STUDY_ID = "0123456789abcdef"
START = 1_700_000_000.0


class Spool:
    """Writes a study's events with a clock of its own, one second an event."""

    def __init__(self, storage: Path, study: str = "digits") -> None:
        self.study, self.folder = study, storage / study
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "events.jsonl"
        self.now = START

    def add(self, event: str, **fields: Any) -> None:
        self.now += 1
        events.append(self.path, {"time": self.now, "event": event, **fields}, durable=False)

    def study_started(self, **config: Any) -> None:
        config = {"select_on": "val_map_at_r", "search": {"num_trials": 2}, **config}
        self.add("study_started", study=self.study, study_id=STUDY_ID, config=config, commit="c0ffee",
                 storage=str(self.folder.parent))  # fmt: skip

    def trial_started(self, trial: str, loss: str = "margin", fold: int | None = None, seed: int = 0) -> None:
        config = {
            "seed": seed,
            "data": {"split": {"fold": fold}},
            "epochs": 3,
            "loss": {"name": loss, "margin": 0.2},
            "optimizer": {"learning_rate": 1e-3, "momentum": None},
            "recall_at": [1, 2],
        }
        self.add("trial_started", trial=trial, stage=trial.split("-")[0], fingerprint=f"f{trial[-3:]}", config=config)

    def epoch(self, trial: str, epoch: int, **metrics: float) -> None:
        index = int(trial[-3:])
        metrics = {"train_loss": 1 / epoch, "val_map_at_r": 0.1 * epoch + 0.01 * index, **metrics}
        self.add("epoch", trial=trial, stage=trial.split("-")[0], epoch=epoch, metrics=metrics)

    def ended(self, trial: str, reason: str = "finished", error: str | None = None) -> None:
        self.add("trial_ended", trial=trial, stage=trial.split("-")[0], reason=reason, error=error, checkpoint="/c")

    def trial(self, trial: str, epochs: int = 3, reason: str = "finished", **fields: Any) -> None:
        self.trial_started(trial, **fields)
        for epoch in range(1, epochs + 1):
            self.epoch(trial, epoch)
        self.ended(trial, reason)

    def whole_study(self, picture: Path, model: Path | None = None) -> None:
        self.study_started()
        self.add("stage_started", stage="search", num_trials=3, max_epochs=3)
        self.trial("search-000")
        self.trial("search-001", epochs=1, reason="stopped_early", loss="contrastive")
        self.trial_started("search-002")
        self.epoch("search-002", 1)
        self.epoch("search-002", 2)
        self.add("trial_retried", trial="search-002", stage="search", error="worker died")
        self.epoch("search-002", 1)  # from the checkpoint, hence the same
        self.epoch("search-002", 2, train_loss=0.7)
        self.ended("search-002", "collapsed")
        self.add("stage_finished", stage="search", ranking=[{"trial": "search-000", "val_map_at_r": 0.3}])
        self.add("stage_started", stage="confirm", num_trials=2, max_epochs=3)
        self.trial("confirm-000", fold=0, seed=1)
        self.trial("confirm-001", fold=1, seed=1)
        self.add("stage_finished", stage="confirm", ranking=None)
        self.add("artifact", trial=None, path=str(picture), artifact_path="pictures")
        self.add("artifact", trial="search-000", path=str(picture.parent), artifact_path="folder")
        if model is not None:
            self.add("model", trial="confirm-000", checkpoint="/study/checkpoint_3", folder=str(model), name="digits")
        self.add("test_read", purpose="finalize", checkpoint="/study/checkpoint_3", commit="c0ffee")
        self.add("summary", metrics={"test_recall_at_1": 0.5}, tags={"raydml.winner": "confirm-000"})
        self.add("note", text="nothing to store")
        self.add("study_finished")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery that leaves no processor time to training, and does not wait for a store."""
    monkeypatch.setattr(delivery, "CPU_SHARE", 1.0)
    monkeypatch.setattr(delivery, "POLL_S", 0.05)
    monkeypatch.setattr(delivery, "FIRST_DELAY_S", 0.0)


@pytest.fixture
def spool(storage: Path) -> Spool:
    return Spool(storage)


@pytest.fixture
def picture(storage: Path) -> Path:
    path = storage / "drawn" / "curves.txt"
    path.parent.mkdir()
    path.write_text("a picture")
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    network = {
        "backbone": "convnet",
        "embedding_dim": 8,
        "layer_norm": False,
        "normalize": "l2",
        "freeze_batch_norm": False,
    }
    card = {"network": network, "preprocessing": preprocessing_for("convnet", resize_px=20, crop_px=16).to_dict()}
    weights = build_network(**network, weights="none", seed=1).state_dict()
    checkpoint.save(folder / "checkpoint", state={}, model_card=card, best_weights=weights)
    return export_model(folder / "checkpoint", folder / "model")


def deliver(spool: Spool, uri: str) -> bool:
    return sync(spool.path, uri, spool.study, timeout_s=120)


def runs_of(uri: str) -> dict[str | None, Any]:
    """All runs by trial; a second run of one trial is an error."""
    client = connect(uri)
    experiment = client.get_experiment_by_name("raydml")
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    by_trial = {run.data.tags.get("raydml.trial"): run for run in found}
    assert len(by_trial) == len(found), "one trial has two runs"
    return by_trial


def contents(storage: Path) -> dict[str, list[Any]]:
    """Everything in the store under the names of the trials: what a delivery adds to, and nothing it may change."""
    database = sqlite3.connect(storage / "mlflow.db")
    name = "coalesce((select value from tags t where t.key = 'raydml.trial' and t.run_uuid = {0}.run_uuid), 'study')"
    tables = {
        "runs": "name, status, start_time, end_time, lifecycle_stage, " + name.format("runs"),
        "metrics": "key, value, step, timestamp, is_nan, " + name.format("metrics"),
        "params": "key, value, " + name.format("params"),
        "tags": "key, value, " + name.format("tags"),
        "model_versions": "name, version, run_id",
        "logged_models": "name, status, source_run_id",
        "registered_model_aliases": "name, alias, version",
    }
    rows = {table: sorted(database.execute(f"select {what} from {table}"), key=repr) for table, what in tables.items()}
    database.close()
    # The parent's id differs between stores, and so does the digest of files that hold paths; both are tested apart.
    apart = ("mlflow.parentRunId", "mlflow.user", DIGEST)
    rows["tags"] = [row for row in rows["tags"] if row[0] not in apart]
    # Of the values of a run as a whole the newest counts; how many others there are depends on when it was delivered.
    whole: dict[tuple[str, str], Any] = {}
    for row in rows["metrics"]:
        key, _value, step, timestamp, _is_nan, run = row
        if step == 0 and timestamp >= whole.get((key, run), row)[3]:
            whole[key, run] = row
    rows["metrics"] = [row for row in rows["metrics"] if row[2] > 0 or row is whole[row[0], row[5]]]
    root = storage / "mlartifacts"
    # <experiment folder>/<run id>/artifacts/...: without the id
    rows["files"] = sorted(
        "/".join(path.relative_to(root).parts[1:])
        for path in root.rglob("*")
        if path.is_file() and "models" not in path.parts
    )
    return rows


def assert_same(found: dict[str, list[Any]], expected: dict[str, list[Any]], what: str = "") -> None:
    for table, rows in expected.items():
        missing = [row for row in rows if row not in found[table]]
        added = [row for row in found[table] if row not in rows]
        assert (missing, added) == ([], []), f"{what} {table}"
        assert len(found[table]) == len(rows), f"{what} {table}: a row twice"


def test_mlflow_gets_no_event_before_it_is_on_the_disk(spool: Spool, uri: str, monkeypatch) -> None:
    """After a loss of power the epoch would be trained again, and MLflow would have it twice."""
    spool.study_started()
    spool.trial_started("search-000")
    spool.epoch("search-000", 1)

    def lost(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(delivery, "flush_to_disk", lost)
        assert not sync(spool.path, uri, spool.study, timeout_s=1)
    assert runs_of(uri) == {}
    assert deliver(spool, uri)
    client = connect(uri)
    history = client.get_metric_history(runs_of(uri)["search-000"].info.run_id, "val/map_at_r")
    assert [point.step for point in history] == [1]


def test_a_study_is_one_run_with_its_trials_below_it(spool: Spool, uri: str, picture: Path, storage: Path) -> None:
    spool.whole_study(picture)
    assert deliver(spool, uri)
    runs = runs_of(uri)
    parent = runs.pop(None)
    assert parent.info.run_name == "digits"
    assert parent.info.status == "FINISHED"
    assert parent.data.params["search.num_trials"] == "2"
    assert parent.data.metrics["test/recall_at_1"] == 0.5
    assert parent.data.tags["raydml.winner"] == "confirm-000"
    assert parent.data.tags["mlflow.source.git.commit"] == "c0ffee"
    assert set(runs) == {"search-000", "search-001", "search-002", "confirm-000", "confirm-001"}
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    run = runs["confirm-001"]
    assert run.info.run_name == "confirm-001 margin"
    expected = {
        "stage": "confirm",
        "fold": "1",
        "seed": "1",
        "fingerprint": "f001",
        "loss": "margin",
        "ended": "finished",
    }
    assert {name: run.data.tags[f"raydml.{name}"] for name in expected} == expected
    assert run.data.params == {
        "seed": "1",
        "data.split.fold": "1",
        "epochs": "3",
        "loss.name": "margin",
        "loss.margin": "0.2",
        "optimizer.learning_rate": "0.001",
        "optimizer.momentum": "None",
        "recall_at": "[1, 2]",
    }
    assert "raydml.fold" not in runs["search-000"].data.tags
    client = connect(uri)
    history = client.get_metric_history(run.info.run_id, "val/map_at_r")
    assert [(point.step, round(point.value, 6)) for point in history] == [(1, 0.11), (2, 0.21), (3, 0.31)]
    written = [event["time"] for event in events.read(spool.path) if event.get("trial") == "confirm-001"]
    assert [point.timestamp for point in history] == [int(moment * 1000) for moment in written[1:4]]
    assert run.info.start_time == int(written[0] * 1000)
    assert run.info.end_time == int(written[4] * 1000)
    experiment = client.get_experiment_by_name("raydml")
    assert experiment.artifact_location == (storage / "mlartifacts").as_uri()
    assert [item.path for item in client.list_artifacts(parent.info.run_id, "pictures")] == ["pictures/curves.txt"]
    assert [item.path for item in client.list_artifacts(runs["search-000"].info.run_id, "folder")] == [
        "folder/curves.txt"
    ]
    ranking = Path(client.download_artifacts(parent.info.run_id, "ranking_search.json"))
    assert json.loads(ranking.read_text())[0]["trial"] == "search-000"
    (read,) = client.list_artifacts(parent.info.run_id, "test_reads")
    read_event = json.loads(Path(client.download_artifacts(parent.info.run_id, read.path)).read_text())
    assert (read_event["purpose"], read_event["commit"]) == ("finalize", "c0ffee")


def test_why_a_trial_ended_decides_the_status(spool: Spool, uri: str) -> None:
    good, bad = ["finished", "stopped_early"], ["non_finite_loss", "collapsed", "crashed"]
    spool.study_started()
    for index, reason in enumerate(good + bad):
        spool.trial_started(f"search-{index:03d}")
        spool.ended(f"search-{index:03d}", reason, f"it is {reason}" if reason in bad else None)
    spool.add("study_finished")
    assert deliver(spool, uri)
    runs = runs_of(uri)
    for index, reason in enumerate(good + bad):
        run = runs[f"search-{index:03d}"]
        assert run.info.status == ("FINISHED" if reason in good else "FAILED")
        assert run.data.tags["raydml.ended"] == reason
        assert run.data.tags.get("raydml.error") == (f"it is {reason}" if reason in bad else None)


def test_values_that_are_not_finite_are_kept_as_nan_and_named(spool: Spool, uri: str) -> None:
    spool.study_started()
    spool.trial_started("search-000")
    spool.epoch("search-000", 1)
    spool.epoch("search-000", 2, train_loss=math.nan, gradient_norm=math.inf)
    spool.ended("search-000", "non_finite_loss")
    spool.add("study_finished")
    assert deliver(spool, uri)
    run = runs_of(uri)["search-000"]
    assert math.isnan(run.data.metrics["train/loss"])
    assert math.isnan(run.data.metrics["train/gradient_norm"])
    assert run.data.tags["raydml.non_finite"] == "train_loss = nan in step 2; gradient_norm = inf in step 2"


def test_large_configurations_and_many_epochs_pass_the_limits_of_a_request(spool: Spool, uri: str) -> None:
    spool.study_started(**{f"key{index}": index for index in range(250)}, text="x" * 7000)
    spool.trial_started("search-000")
    for epoch in range(1, 301):
        spool.epoch("search-000", epoch, **{f"recall@{k}": 0.5 for k in range(5)})
    spool.ended("search-000")
    spool.add("study_finished")
    assert deliver(spool, uri)
    runs = runs_of(uri)
    assert len(runs[None].data.params) == 250 + 3
    assert len(runs[None].data.params["text"]) == MAX_PARAM_CHARACTERS
    history = connect(uri).get_metric_history(runs["search-000"].info.run_id, "train/recall_at_4")
    assert [point.step for point in history] == list(range(1, 301))


def test_a_second_delivery_adds_nothing(spool: Spool, uri: str, picture: Path, exported: Path, storage: Path) -> None:
    spool.whole_study(picture, exported)
    assert deliver(spool, uri)
    before = contents(storage)
    assert before["model_versions"]
    assert before["files"]
    assert deliver(spool, uri)
    assert_same(contents(storage), before)


def test_any_way_of_cutting_the_spool_gives_the_same_runs(tmp_path: Path, empty_store: Path, picture_of: Any) -> None:
    """Deliveries that each see a little more, as after kills at every moment, against one delivery at the end."""
    found = {}
    for way in ("at_once", "in_bits"):  # names of one length: the spool holds the path, and offsets are compared
        storage = tmp_path / way
        storage.mkdir()
        shutil.copy(empty_store, storage / "mlflow.db")
        spool = Spool(storage)
        spool.whole_study(picture_of(tmp_path))
        data = spool.path.read_bytes()
        if way == "in_bits":
            cuts = np.random.default_rng(0).choice(len(data), size=6, replace=False)
            for cut_at in sorted(int(cut_at) for cut_at in cuts):
                spool.path.write_bytes(data[:cut_at])
                deliver(spool, default_uri(storage))
            spool.path.write_bytes(data)
        assert deliver(spool, default_uri(storage))
        found[way] = contents(storage)
    assert_same(found["in_bits"], found["at_once"])


@pytest.fixture
def picture_of() -> Any:
    def make(folder: Path) -> Path:
        path = folder / "drawn" / "curves.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("a picture")
        return path

    return make


class Lossy:
    """The real client; request number ``breaks`` gets through, or not, and then the connection is lost."""

    WRITES = (
        "create_run", "update_run", "set_terminated", "set_tag", "delete_tag", "log_batch", "log_text", "log_artifact",
        "log_artifacts", "create_logged_model", "log_model_artifacts", "finalize_logged_model", "log_outputs",
        "create_registered_model", "update_registered_model", "create_model_version", "set_registered_model_alias",
        "set_logged_model_tags", "set_model_version_tag", "log_inputs",
    )  # fmt: skip

    def __init__(self, client: MlflowClient, breaks: int, arrives: bool) -> None:
        self._client, self._breaks, self._arrives = client, breaks, arrives
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in self.WRITES:
            return method

        def request(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            breaks = len(self.calls) == self._breaks
            if breaks and not self._arrives:
                raise ConnectionError("lost before it arrived")
            answer = method(*arguments, **named)
            if breaks:
                raise ConnectionError("lost after it arrived")
            return answer

        return request


def interrupted_and_resumed(spool: Spool, picture: Path, model: Path) -> None:
    spool.study_started()
    spool.trial("search-000")
    spool.trial_started("search-001")
    spool.epoch("search-001", 1)
    spool.add("interrupted", signal=2)
    spool.study_started(added_later=1)
    spool.trial_started("search-001")
    spool.epoch("search-001", 1)  # redone from an older checkpoint
    spool.epoch("search-001", 2)
    spool.ended("search-001")
    spool.add("artifact", trial=None, path=str(picture), artifact_path="pictures")
    spool.add("model", trial=None, checkpoint="/study/checkpoint_2", folder=str(model), name="digits")
    spool.add("study_finished")


@pytest.mark.slow
@pytest.mark.parametrize("arrives", [False, True], ids=["before", "after"])
def test_a_connection_lost_at_any_request_leaves_no_trace(
    tmp_path: Path, empty_store: Path, picture_of: Any, exported: Path, arrives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Break off at request 1, 2, 3, ...; after the next delivery the store is as if nothing had happened."""
    breaks, names, reference = 0, ["one more"], {}
    while breaks <= len(names):
        storage = tmp_path / f"{breaks:02d}"
        storage.mkdir()
        shutil.copy(empty_store, storage / "mlflow.db")
        spool = Spool(storage)
        interrupted_and_resumed(spool, picture_of(tmp_path), exported)
        clients: list[Lossy] = []

        def lossy(uri: str, breaks: int = breaks, clients: list[Lossy] = clients) -> Any:
            clients.append(Lossy(connect(uri), breaks if not clients else 0, arrives))
            return clients[-1]

        monkeypatch.setattr(delivery, "connect", lossy)
        assert deliver(spool, default_uri(storage)), f"broken at request {breaks}"
        found = contents(storage)
        found["model_versions"] = [row[:2] for row in found["model_versions"]]
        # A model whose storing broke off may stay behind unregistered; only finished ones count.
        found["logged_models"] = [row[:2] for row in found["logged_models"] if "READY" in repr(row)][:1]
        if breaks == 0:
            names, reference = clients[0].calls, found
            assert len(names) > 10
        else:
            assert len(clients) == 2, "the delivery did not begin again"
        assert_same(found, reference, f"broken at request {breaks}, {names[breaks - 1]}:")
        breaks += 1


def test_an_interruption_ends_the_runs_and_a_resume_continues_them(spool: Spool, uri: str) -> None:
    spool.study_started()
    spool.trial("search-000")
    spool.trial_started("search-001")
    spool.epoch("search-001", 1)
    spool.add("interrupted", signal=2)
    assert deliver(spool, uri)
    first = runs_of(uri)
    statuses = {trial: run.info.status for trial, run in first.items()}
    assert statuses == {None: "KILLED", "search-000": "FINISHED", "search-001": "KILLED"}
    assert first["search-001"].data.tags["raydml.ended"] == "interrupted"
    spool.study_started(search={"num_trials": 5})
    spool.trial_started("search-001")
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    wait_for(lambda: runs_of(uri)["search-001"].info.status == "RUNNING")
    running = runs_of(uri)
    assert running[None].info.status == "RUNNING"
    assert running["search-000"].info.status == "FINISHED"
    assert "raydml.ended" not in running["search-001"].data.tags
    spool.epoch("search-001", 1)
    spool.epoch("search-001", 2)
    spool.ended("search-001")
    spool.add("study_finished")
    assert tracker.finish(60)
    assert read_num_sent(tracker.events_path.parent) == len(tracker.events_path.read_text().splitlines())
    assert tracker.hint() == ""
    last = runs_of(uri)
    assert {trial: run.info.run_id for trial, run in last.items()} == {t: run.info.run_id for t, run in first.items()}
    assert {run.info.status for run in last.values()} == {"FINISHED"}
    history = connect(uri).get_metric_history(last["search-001"].info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2]
    assert last[None].data.params["search.num_trials"] == "2"
    assert last[None].data.tags["raydml.changed.search.num_trials"] == "5"


def test_runs_of_a_killed_driver_are_ended_by_the_next_delivery(spool: Spool, uri: str) -> None:
    spool.study_started()
    spool.trial_started("search-000")
    spool.epoch("search-000", 1)
    with open(spool.path, "ab") as file:
        file.write(b'{"event":"epoch","trial":"search-0')
    assert deliver(spool, uri)
    runs = runs_of(uri)
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert runs["search-000"].info.end_time == int(spool.now * 1000)


def test_a_trial_without_a_recorded_end_does_not_stay_running(spool: Spool, uri: str) -> None:
    spool.study_started()
    spool.trial_started("search-000")
    spool.add("study_finished")
    assert deliver(spool, uri)
    run = runs_of(uri)["search-000"]
    assert (run.info.status, run.data.tags["raydml.ended"]) == ("KILLED", "unrecorded")
    assert runs_of(uri)[None].info.status == "FINISHED"


def test_a_retried_trial_runs_on_and_counts_its_retries(spool: Spool, uri: str) -> None:
    spool.study_started()
    spool.trial_started("search-000")
    spool.epoch("search-000", 1)
    for _ in range(2):
        spool.add("trial_retried", trial="search-000", stage="search", error="worker died")
    spool.epoch("search-000", 2)
    spool.ended("search-000")
    spool.add("study_finished")
    assert deliver(spool, uri)
    tags = runs_of(uri)["search-000"].data.tags
    assert (tags["raydml.retries"], tags["raydml.retried_after"]) == ("2", "worker died")
    assert "raydml.error" not in tags


@pytest.mark.parametrize("name", [None, "my favourite"])
def test_a_run_that_was_made_before_its_settings_were_known_gets_them(spool: Spool, uri: str, name: str | None) -> None:
    """An actor that dies before its trial has started, as where a node is lost."""
    spool.study_started()
    spool.trial("search-000")
    spool.add("trial_retried", trial="search-001", stage="search", error="The actor never ran")
    deliver(spool, uri)
    if name:
        connect(uri).update_run(runs_of(uri)["search-001"].info.run_id, name=name)
    spool.trial("search-001")
    spool.add("study_finished")
    assert deliver(spool, uri)
    usual, late = (runs_of(uri)[key] for key in ("search-000", "search-001"))
    assert late.info.run_name == (name or usual.info.run_name.replace("000", "001"))
    assert late.info.run_name != "search-001", "it has more than its key"
    assert late.data.params == usual.data.params
    assert (
        len(connect(uri).list_artifacts(late.info.run_id)) == len(connect(uri).list_artifacts(usual.info.run_id)) == 1
    )


def test_a_lost_database_is_filled_anew(
    spool: Spool, uri: str, picture: Path, storage: Path, empty_store: Path
) -> None:
    spool.whole_study(picture)
    assert deliver(spool, uri)
    before = contents(storage)
    shutil.copy(empty_store, storage / "mlflow.db")
    shutil.rmtree(storage / "mlartifacts")
    assert deliver(spool, uri)
    assert_same(contents(storage), before)


def test_a_run_that_was_deleted_is_left_alone(spool: Spool, uri: str) -> None:
    spool.study_started()
    spool.trial_started("search-000")
    assert deliver(spool, uri)
    connect(uri).delete_run(runs_of(uri)["search-000"].info.run_id)
    spool.epoch("search-000", 1)
    spool.epoch("search-000", 2)
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    assert not tracker.finish(60)
    assert list(runs_of(uri)) == [None]
    (problem,) = tracker.problems
    assert f"run 'search-000': it was deleted in MLflow. Cure: MLFLOW_TRACKING_URI={uri} mlflow runs restore" in problem
    connect(uri).restore_run(problem.split()[-1])
    assert deliver(spool, uri)
    assert steps(uri, "search-000") == [1, 2]


def test_a_run_that_was_created_twice_is_left_once(spool: Spool, uri: str) -> None:
    spool.study_started()
    spool.trial("search-000")
    assert deliver(spool, uri)
    client = connect(uri)
    first = runs_of(uri)
    for run in first.values():  # the request that created it, sent again
        identity = ("raydml.study_id", "raydml.study", "raydml.trial", "mlflow.parentRunId")
        tags = {name: run.data.tags[name] for name in identity if name in run.data.tags}
        client.create_run(run.info.experiment_id, run.info.start_time, tags, run_name=run.info.run_name)
    spool.trial("search-001")
    spool.add("study_finished")
    assert deliver(spool, uri)
    runs = runs_of(uri)  # fails where a trial has two runs
    assert {key: runs[key].info.run_id for key in first} == {key: run.info.run_id for key, run in first.items()}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    deleted = client.search_runs([runs[None].info.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert {run.data.tags["raydml.ended"] for run in deleted} == {"created twice"}
    assert len(deleted) == 2


def test_a_lost_file_is_reported_and_holds_nothing_up(spool: Spool, uri: str, storage: Path) -> None:
    spool.study_started()
    spool.add("artifact", trial="search-000", path=str(storage / "gone.png"), artifact_path="pictures")
    spool.trial("search-000")
    spool.add("study_finished")
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    assert not tracker.finish(60)
    assert len(tracker.problems) == 1
    assert "gone.png does not exist any more" in tracker.hint()
    assert runs_of(uri)["search-000"].data.metrics["train/epochs"] == 3


def test_a_store_that_was_away_before_the_end_is_not_waited_for(
    spool: Spool, uri: str, failing: dict[str, int]
) -> None:
    failing["connect"] = 1_000_000
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    spool.study_started()
    wait_for(lambda: failing["connect"] < 1_000_000 - NUM_AWAY)
    began_s = time.monotonic()
    assert not tracker.finish(60)
    assert time.monotonic() - began_s < 10
    assert "has not received everything (refused). Nothing is lost" in tracker.hint()


def test_two_writers_for_one_study_are_refused(spool: Spool, uri: str) -> None:
    spool.study_started()
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    with pytest.raises(TrackingError, match="another process is delivering study 'digits'"):
        sync(spool.path, uri, spool.study)
    tracker.finish(60)
    assert deliver(spool, uri)


def test_studies_of_one_name_are_kept_apart_by_their_id(spool: Spool, uri: str, storage: Path) -> None:
    spool.study_started()
    spool.add("study_finished")
    assert deliver(spool, uri)
    other = Spool(storage / "elsewhere")
    other.add("study_started", study="digits", study_id="another", config={}, storage=str(storage))
    other.add("study_finished")
    assert deliver(other, uri)
    found = connect(uri).search_runs([connect(uri).get_experiment_by_name("raydml").experiment_id])
    assert sorted(run.data.tags["raydml.study_id"] for run in found) == [STUDY_ID, "another"]


def test_a_store_that_does_not_answer_costs_the_study_nothing(spool: Spool) -> None:
    tracker = Tracker(spool.path, f"http://user:secret@127.0.0.1:{free_port()}", spool.study)
    tracker.start()
    began = time.monotonic()
    spool.study_started()
    spool.trial("search-000")
    assert time.monotonic() - began < 1
    assert not tracker.finish(2)
    assert time.monotonic() - began < 6
    assert "launch.py sync digits" in tracker.hint()
    assert "secret" not in tracker.hint()


class Failing:
    """The real client; ``failing[name]`` requests of that name are answered with 503 before one gets through."""

    def __init__(self, client: MlflowClient, failing: dict[str, int]) -> None:
        self._client, self._failing = client, failing

    def __getattr__(self, name: str) -> Any:
        if self._failing.get(name, 0) > 0:
            return self._refuse(name)
        return getattr(self._client, name)

    def _refuse(self, name: str) -> Any:
        def request(*_: Any, **__: Any) -> Any:
            self._failing[name] -= 1
            raise MlflowException("503 Service Unavailable", TEMPORARILY_UNAVAILABLE)

        return request


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Number of requests of each name that fail from now on; ``connect`` fails like a server that is away."""
    counts: dict[str, int] = {}

    def connect_or_not(uri: str) -> Any:
        if counts.get("connect", 0) > 0:
            counts["connect"] -= 1
            raise ConnectionError("refused")
        return Failing(connect(uri), counts)

    monkeypatch.setattr(delivery, "connect", connect_or_not)
    return counts


def steps(uri: str, trial: str) -> list[int]:
    return [point.step for point in connect(uri).get_metric_history(runs_of(uri)[trial].info.run_id, "val/map_at_r")]


def test_an_outage_loses_nothing(spool: Spool, uri: str, failing: dict[str, int]) -> None:
    """A server that is away for many tries, then failing requests, at once and again later."""
    failing |= {"connect": 7, "log_batch": 1}
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    spool.study_started()
    spool.trial_started("search-000")
    spool.epoch("search-000", 1)
    wait_for(lambda: steps(uri, "search-000") == [1])
    assert failing == {"connect": 0, "log_batch": 0}
    failing["log_batch"] = 1
    spool.epoch("search-000", 2)
    wait_for(lambda: steps(uri, "search-000") == [1, 2])
    assert failing["log_batch"] == 0
    spool.ended("search-000")
    spool.add("study_finished")
    assert tracker.finish(60), tracker.hint()
    assert tracker.problems == []
    assert steps(uri, "search-000") == [1, 2]


def test_a_file_that_is_refused_for_long_is_stored_in_the_end_and_holds_nothing_up(
    spool: Spool, uri: str, picture: Path, failing: dict[str, int]
) -> None:
    failing["log_artifact"] = 1_000_000
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    spool.study_started()
    spool.add("artifact", trial=None, path=str(picture), artifact_path="pictures")
    spool.trial_started("search-000")
    spool.epoch("search-000", 1)
    wait_for(lambda: steps(uri, "search-000") == [1])
    refused = [f"artifact {picture} of digits"]
    wait_for(lambda: [text.partition(":")[0] for text in tracker.problems] == refused)  # said behind the values
    assert "1 part of the study" in tracker.hint()
    assert "complete it: launch.py sync digits" in tracker.hint()
    assert runs_of(uri)[None].data.tags[UNSENT].isdecimal()
    wait_for(lambda: failing["log_artifact"] < 1_000_000 - 10)  # it is tried again, many times
    failing["log_artifact"] = 0
    wait_for(lambda: connect(uri).list_artifacts(runs_of(uri)[None].info.run_id, "pictures"))
    spool.ended("search-000")
    spool.add("study_finished")
    assert tracker.finish(60), tracker.hint()
    assert (tracker.problems, tracker.hint()) == ([], "")
    assert UNSENT not in runs_of(uri)[None].data.tags
    assert steps(uri, "search-000") == [1]


def test_a_run_whose_values_are_refused_waits_and_the_others_go_on(
    spool: Spool, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is new about it while it waits does not overtake what was refused."""
    refused: list[str] = []

    class Poisoned(Failing):
        def log_batch(self, run_id: str, *values: Any) -> None:
            if self._client.get_run(run_id).data.tags.get("raydml.trial") == "search-000" and not refused:
                refused.append(run_id)
                raise MlflowException("HTTP 500", INTERNAL_ERROR)
            self._client.log_batch(run_id, *values)

    monkeypatch.setattr(delivery, "connect", lambda uri: Poisoned(connect(uri), {}))
    monkeypatch.setattr(delivery, "FIRST_DELAY_S", 4.0)
    spool.study_started()
    for trial in ("search-000", "search-001"):
        spool.trial_started(trial)
        spool.epoch(trial, 1)
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    wait_for(lambda: steps(uri, "search-001") == [1])
    for trial in ("search-000", "search-001"):
        spool.epoch(trial, 2)
    wait_for(lambda: steps(uri, "search-001") == [1, 2])
    assert steps(uri, "search-000") == []
    wait_for(lambda: steps(uri, "search-000") == [1, 2])
    spool.add("study_finished")
    assert tracker.finish(60), tracker.hint()


def test_a_store_that_is_away_for_days_is_tried_again_for_ever(
    spool: Spool, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a thousand failures in a row, about nine hours, the delay is what it was after six."""
    monkeypatch.setattr(delivery, "FIRST_DELAY_S", 1.0)
    tracker = Tracker(spool.path, uri, spool.study)
    delays = [tracker._next_delay() for _ in range(1100)]
    assert delays[:6] == [1, 2, 4, 8, 16, 30]
    assert set(delays[6:]) == {30}


def test_what_the_artifact_store_refuses_once_is_sent_by_sync(
    spool: Spool, uri: str, storage: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full or read-only disk during the study; `sync` says that it lacks something until it has it."""
    monkeypatch.setattr(models, "_save", lambda local, folder, _model: shutil.copytree(folder, local))
    spool.study_started()
    spool.trial("search-000")
    spool.add("model", trial=None, checkpoint="/c", folder=str(exported), name="digits")
    spool.add("stage_finished", stage="search", ranking=[{"trial": "search-000"}])
    spool.add("study_finished")
    artifacts = storage / "mlartifacts"
    artifacts.write_text("in the way: nothing can be stored below")
    tracker = Tracker(spool.path, uri, spool.study)
    tracker.start()
    assert not tracker.finish(60)
    assert "lacks 4 parts of the study" in tracker.hint()
    assert steps(uri, "search-000") == [1, 2, 3]
    assert {run.info.status for run in runs_of(uri).values()} == {"FINISHED"}
    artifacts.unlink()
    with monkeypatch.context() as context:  # the points are not sent again
        context.setattr("raydml.tracking.runs.Metric", None)
        assert deliver(spool, uri)
    names = sorted(path.name for path in artifacts.rglob("*") if path.is_file() and "models" not in path.parts)
    assert names == ["config.yaml", "config.yaml", "ranking_search.json"]
    assert len(connect(uri).search_model_versions("name = 'digits'")) == 1
    assert {UNSENT} & {tag for run in runs_of(uri).values() for tag in run.data.tags} == set()


def test_more_refused_files_than_a_tag_can_name_all_arrive(
    spool: Spool, uri: str, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydml.tracking.runs.MAX_UNSENT", 2)
    spool.study_started()
    for number in range(5):
        spool.add("test_read", purpose=f"read {number}")
    (storage / "mlartifacts").write_text("in the way")
    assert not deliver(spool, uri), "it is still in the way"
    (storage / "mlartifacts").unlink()
    assert deliver(spool, uri)
    reads = [json.loads(path.read_text()) for path in (storage / "mlartifacts").rglob("test_reads/*.json")]
    assert sorted(read["purpose"] for read in reads) == [f"read {number}" for number in range(5)]


@pytest.fixture
def embedded(exported: Path) -> tuple[np.ndarray, np.ndarray]:
    """Three images, and what the exported model makes of them."""
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    return images, EmbeddingModel.load(exported).embed(images)


@pytest.mark.slow
def test_the_winner_is_a_model_that_loads_elsewhere(
    spool: Spool, uri: str, picture: Path, exported: Path, embedded: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    """In another process, in another folder, without the checkout on its path and without pickle."""
    spool.whole_study(picture, exported)
    assert deliver(spool, uri)
    images, expected = embedded
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy as np, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/digits@champion')\n"
        "np.save('found.npy', model.predict(np.load('images.npy')))\n"
        "import raydml.inference.export; print(raydml.inference.export.__file__)\n"
    )
    elsewhere = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    elsewhere.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, uri], cwd=tmp_path, env=elsewhere, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert str(REPOSITORY) not in done.stdout, "the code did not come from the model"
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected, atol=1e-6)


def test_the_winner_is_found_in_mlflow_by_its_run_and_by_its_name(
    spool: Spool, uri: str, picture: Path, exported: Path, embedded: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    spool.whole_study(picture, exported)
    assert deliver(spool, uri)
    images, expected = embedded
    version = connect(uri).get_model_version_by_alias("digits", "champion")
    run = runs_of(uri)["confirm-000"]
    assert version.run_id == run.info.run_id
    assert run.data.tags["raydml.model"] == "models:/digits/1"
    assert run.info.status == "FINISHED"
    for target in (
        f"runs:/{run.info.run_id}",
        f"runs:/{run.info.run_id}/model",
        "models:/digits/1",
        "models:/digits@champion",
    ):
        np.testing.assert_array_equal(EmbeddingModel.load(resolve_checkpoint(target, uri)).embed(images), expected)
    picture_path = resolve_checkpoint(f"runs:/{runs_of(uri)[None].info.run_id}/pictures/curves.txt", uri)
    assert picture_path.read_text() == "a picture"
    away = resolve_checkpoint("models:/digits/1", uri, tmp_path / "away")
    assert away.is_relative_to(tmp_path / "away")
    with pytest.raises(TrackingError, match="holds no model"):
        resolve_checkpoint(f"runs:/{runs_of(uri)['search-000'].info.run_id}", uri)
    for target in (
        "models:/nothing/1",
        "models:/digits/9",
        "models:/digits@absent",
        "runs:/" + 32 * "0",
        f"runs:/{run.info.run_id}/none",
    ):
        with pytest.raises(TrackingError, match="not found in MLflow"):
            resolve_checkpoint(target, uri)
    with pytest.raises(TrackingError, match="expected runs:/RUN_ID"):
        resolve_checkpoint("models:/digits", uri)


def summary_of(study: Path, mean: float) -> None:
    """What the model card reads of a finished study."""
    score = {"map_at_r": {"mean": 0.602, "half_width": 0.021}}
    final = {"metrics": score, "untrained": {"map_at_r": {"mean": 0.103, "half_width": 0.002}}, "validation": score}
    final |= {"ensemble": {}, "protocols": {"leave_one_out": "leave one out: each of 50 images"}, "runs": [{}] * 4}
    final["refit"] = {"metrics": {"map_at_r": {"mean": 0.711, "half_width": 0.031}}, "num_runs": 3, "epochs": 14}
    final["refit"]["untrained"] = {"map_at_r": {"mean": 0.1, "half_width": None}}
    confirmed = {"mean": mean, "half_width": 0.01, "runs": [{}] * 4}
    plan = {
        "folds": 2,
        "seeds": 2,
        "stages": ["search", "confirm", "refit"],
        "refit": {"epochs": "confirmed", "seeds": 3},
    }
    summary = {"metric": "val_map_at_r", "question": "which loss?", "plan": plan}
    (study / "summary.json").write_text(json.dumps({**summary, "final": [final], "confirm": [confirmed]}))


def test_a_registered_model_describes_itself_and_the_champion_is_the_better_one(
    spool: Spool, uri: str, storage: Path, exported: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(exported, tmp_path / "exported")
    client = connect(uri)
    run_id = client.create_run(prepare_store(uri, storage)).info.run_id

    def register(mean: float, content: str = "0b7e9c32", **split: float) -> Any:
        """Another winner, with this mean on these images."""
        summary_of(spool.folder, mean)
        card = json.loads((model / "config.json").read_text())
        card["trial"] = {
            "data": {"name": "glyphs", "content": content, "split": {"fold": None if split else 1, **split}},
            "loss": {"name": "margin"},
            "epochs": 14,
        }
        card["split"] = {"train": [1, 2, 3, 4, 5, 6]}
        (model / "config.json").write_text(json.dumps(card))
        number = len(client.search_model_versions("name = 'digits'")) + 1
        source = ExportedModel("digits", model, f"confirm/checkpoint_{number}")
        assert log_exported_model(client, run_id, source, spool.folder) == f"models:/digits/{number}"
        return client.get_model_version("digits", str(number))

    first = register(0.5)
    for words in ("0.6020 ± 0.0210", "0.1030", "glyphs", "margin", "leave one out", "which loss?", "means over 4"):
        assert words in first.description
    assert client.get_registered_model("digits").description == first.description
    (found,) = client.search_logged_models(
        [client.get_run(run_id).info.experiment_id], order_by=[{"field_name": "metrics.test/map_at_r"}]
    )
    assert found.model_id in first.source
    (tested,) = [metric for metric in found.metrics if metric.key == "test/map_at_r"]
    assert (tested.value, tested.dataset_name, tested.dataset_digest) == (0.602, "glyphs test", "0b7e9c32")
    assert json.loads(found.tags["mlflow.modelVersions"]) == [{"name": "digits", "version": "1"}]
    place = found.artifact_location.removeprefix("file://")
    stored = Model.load(place)
    assert stored.signature.outputs.inputs[0].shape == (-1, 8)
    example = stored.load_input_example(place)
    assert mlflow.pyfunc.load_model(found.artifact_location).predict(example).shape == (1, 8)

    def aliases() -> tuple[str, str]:
        found = client.get_registered_model("digits").aliases
        return str(found["challenger"]), str(found["champion"])

    assert aliases() == ("1", "1")
    said = register(0.4).tags["raydml.compared"]
    assert aliases() == ("2", "1")
    assert "champion stays with version 1: validation MAP@R 0.4000 against 0.5000" in said
    assert "champion moved here from version 1" in register(0.6).tags["raydml.compared"]
    assert aliases() == ("3", "3")
    assert "cannot be compared" in register(0.9, content="other").tags["raydml.compared"]
    assert aliases() == ("4", "3")

    # A refit has seen classes that a fold model has not, so the two are not compared.
    refit = register(0.7, val_fraction=0.0)
    assert "cannot be compared" in refit.tags["raydml.compared"]
    assert refit.tags["raydml.trained_on"] == "all development classes"
    card = " ".join(refit.description.split())
    for words in ("trained on all 6 development classes for 14 epochs", "No class validated it", "0.7110 ± 0.0310"):
        assert words in card
    assert "The scores of refits are means over 3 seeds" in card
    assert "Of several seeds it is the first" in card
    logged = client.get_logged_model(re.search("m-[0-9a-f]{32}", refit.source).group())
    scores = {metric.key: metric.value for metric in logged.metrics}
    assert scores == {"refit/map_at_r": 0.711, "refit/untrained_map_at_r": 0.1, "confirmed/map_at_r": 0.7}
    client.set_registered_model_alias("digits", "champion", refit.version)
    everything = register(0.9, val_fraction=0.0, test_fraction=0.0)
    assert "cannot be compared" in everything.tags["raydml.compared"]
    assert everything.tags["raydml.trained_on"].endswith("never scored on them")
    assert "it is never scored" in everything.description


def test_sync_makes_a_deleted_model_again_and_reports_deleted_runs(
    spool: Spool, uri: str, exported: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool.study_started()
    spool.trial("confirm-000")
    spool.add("model", trial=None, checkpoint="/c", folder=str(exported), name="digits")
    spool.add("study_finished")
    assert deliver(spool, uri)
    client = connect(uri)
    client.delete_registered_model("digits")
    assert sync(spool.path, uri, spool.study, complete=True)
    assert str(client.get_model_version_by_alias("digits", "champion").version) == "1"
    assert "registered again as models:/digits/1" in caplog.text
    assert sync(spool.path, uri, spool.study, complete=True)
    assert len(client.search_model_versions("name = 'digits'")) == 1, "once"
    client.delete_model_version("digits", "1")
    assert sync(spool.path, uri, spool.study, complete=True)
    assert len(client.search_model_versions("name = 'digits'")) == 1
    run_id = runs_of(uri)[None].info.run_id
    client.delete_run(run_id)
    assert not sync(spool.path, uri, spool.study, complete=True)
    assert "run 'digits': it was deleted in MLflow. Cure: MLFLOW_TRACKING_URI=" in caplog.text
    assert f"mlflow runs restore --run-id {run_id}" in caplog.text


def test_a_model_holds_nothing_of_the_folder_the_command_was_typed_in(
    spool: Spool, uri: str, storage: Path, exported: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A uv.lock names registries; MLflow would copy it, and the project beside it, into the model."""
    project = storage / "project"
    project.mkdir()
    (project / "uv.lock").write_text('version = 1\nsource = { registry = "https://secret.example/simple" }\n')
    (project / "pyproject.toml").write_text('[project]\nname = "theirs"\nversion = "1"\n')
    (project / ".python-version").write_text("3.11\n")
    monkeypatch.chdir(project)
    monkeypatch.delenv("MLFLOW_UV_AUTO_DETECT", raising=False)
    folder = shutil.copytree(exported, storage / "a%20b #1?%" / "model")  # what MLflow would read as an address
    spool.study_started()
    spool.trial("confirm-000")
    spool.add("model", trial="confirm-000", checkpoint="/c", folder=str(folder), name="digits")
    spool.add("study_finished")
    assert deliver(spool, uri)
    stored = [path for path in (storage / "mlartifacts").rglob("*") if path.is_file()]
    assert "MLmodel" in {path.name for path in stored}
    assert {"uv.lock", "pyproject.toml", ".python-version"} & {path.name for path in stored} == set()
    assert [path for path in stored if b"secret.example" in path.read_bytes()] == []
    (requirements_txt,) = [path for path in stored if path.name == "requirements.txt"]
    assert requirements_txt.read_text().split() == requirements()
    out, err = capfd.readouterr()
    assert "uv" not in out + err


def test_a_read_of_the_test_classes_is_recorded_with_the_run_of_a_fetched_model(
    spool: Spool, uri: str, picture: Path, exported: Path
) -> None:
    spool.whole_study(picture, exported)
    assert deliver(spool, uri)
    run_id = runs_of(uri)["confirm-000"].info.run_id
    client = connect(uri)
    origin = Origin(uri, run_id, "digits", STUDY_ID)
    targets = [f"runs:/{run_id}", f"runs:/{run_id}/checkpoint", "models:/digits/1", "models:/digits@champion"]
    assert {origin_of(target, uri) for target in targets} == {origin}
    with pytest.raises(TrackingError, match="not found in MLflow"):
        origin_of("models:/digits/9", uri)
    read = {"time": START, "event": "test_read", "checkpoint": targets[0], "commit": "c0ffee"}
    log_test_read(origin, read)
    (item,) = client.list_artifacts(run_id, "test_reads")
    assert item.path == "test_reads/20231114T221320.000000Z.json"
    assert json.loads(Path(client.download_artifacts(run_id, item.path)).read_text()) == {
        "time": START,
        "checkpoint": targets[0],
        "commit": "c0ffee",
    }
    source = client.get_model_version("digits", "1").source
    client.create_model_version("digits", source=source)
    by_hand = origin_of("models:/digits/2", uri)
    assert by_hand == Origin(uri, "", "", "")
    with pytest.raises(TrackingError, match="registered without a run"):
        log_test_read(by_hand, read)
    with pytest.raises(TrackingError, match="cannot be recorded with run"):
        log_test_read(origin._replace(run_id=32 * "0"), read)


@pytest.mark.slow
def test_the_requirements_of_a_model_cover_what_its_code_imports() -> None:
    """What a fresh interpreter loads with raydml.export belongs to a required distribution or to what it requires."""
    code = (
        "import sys, json, importlib.metadata as m, re\n"
        "import raydml.inference.export\n"
        "owners = m.packages_distributions()\n"
        "loaded = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names) - {'raydml'}\n"
        "print(json.dumps(sorted({owners[name][0].lower().replace('_', '-') for name in loaded if name in owners})))\n"
        "def close(names):\n"
        "    seen, todo = set(), list(names)\n"
        "    while todo:\n"
        "        name = todo.pop().lower().replace('_', '-')\n"
        "        if name in seen: continue\n"
        "        seen.add(name)\n"
        "        try: needs = m.requires(name) or []\n"
        "        except m.PackageNotFoundError: continue\n"
        "        todo += [re.match(r'[\\w.-]+', need).group() for need in needs if 'extra ==' not in need]\n"
        "    return seen\n"
        "print(json.dumps(sorted(close(sys.argv[1:]))))\n"
    )
    names = [line.partition("==")[0] for line in requirements()]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loaded, covered = (set(json.loads(line)) for line in done.stdout.splitlines())
    assert "torch" in loaded
    taken_if_there = {"tqdm", "nvidia-ml-py"}
    assert not loaded - covered - taken_if_there, "torch takes these where it finds them, and does without"
    assert all("+" not in line and "==" in line for line in requirements())


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("recall@1", "recall_at_1"),
        ("val_map_at_r", "val_map_at_r"),
        ("a/b c:d.e-f", "a/b c:d.e-f"),
        ("loss [mean]", "loss _mean_"),
        ("../x", None),
        ("/x", None),
        ("a//b", None),
        ("a/./b", None),
        (".", None),
        ("..", None),
        ("", None),
        ("é@µ", None),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_are_what_mlflow_takes(name: str, legal: str | None) -> None:
    found = legal_name(name)
    assert legal is None or found == legal
    for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        validate(found)


def test_settings_become_dotted_texts() -> None:
    config = {
        "trial": {"optimizer": {"learning_rate": 1e-4}},
        "a": {"b": None, "c": True},
        "list": [1, "x"],
        "empty": {},
    }
    assert params_of(config) == {
        "optimizer.learning_rate": "0.0001",
        "a.b": "None",
        "a.c": "True",
        "list": '[1, "x"]',
        "empty": "{}",
    }
    assert shortened("abcdefgh", 6) == "abc..."


def test_only_numbers_are_metrics() -> None:
    found = points({"a": 1, "b": True, "text": "x", "none": None, "bad": -math.inf}, 4, 5000)
    assert [(point.name, point.step, point.time_ms) for point in found] == [
        ("a", 4, 5000),
        ("b", 4, 5000),
        ("bad", 4, 5000),
    ]
    assert [point.value for point in found[:2]] == [1.0, 1.0]
    assert math.isnan(found[2].value)


def test_what_a_run_has_already_is_not_sent_again(spool: Spool) -> None:
    spool.study_started()
    spool.trial("search-000")
    records, end = events.records(spool.path)
    state, (study, trial) = updates_of(records, StudyState(), {None: 0, "search-000": records[2].end}, spool.folder)
    assert (study.trial, trial.trial) == (None, "search-000")
    assert [point.step for point in trial.points if point.name == "train/loss"] == [2, 3]
    assert trial.offset == end
    assert updates_of(records, StudyState(), {None: end, "search-000": end}, spool.folder) == (state, [])


def test_files_of_a_study_that_was_moved_are_sent_from_where_they_are(spool: Spool) -> None:
    """Each event has the paths of the moment; a resume after a move has recorded new ones."""
    here = spool.folder
    for storage in ("/first/place", "/second/place"):
        spool.add("study_started", study="digits", study_id=STUDY_ID, config={}, storage=storage)
        spool.add("artifact", trial=None, path=f"{storage}/digits/report", artifact_path="report")
        spool.add("artifact", trial=None, path=f"{storage}/galleries/fruit", artifact_path="galleries/fruit")
    spool.add("artifact", trial=None, path="/away/gallery", artifact_path="galleries/gallery")
    spool.add("model", trial=None, folder="/second/place/digits/model", name="raydml-digits",
              checkpoint="/second/place/digits/confirm/run-000/confirm-001/checkpoint_000002")  # fmt: skip
    (_, (update,)) = updates_of(events.records(spool.path)[0], StudyState(), {}, here)
    expected = [here / "report", here.parent / "galleries" / "fruit"]
    assert [file.path for file in update.files if file.path] == [*expected, *expected, Path("/away/gallery")]
    (model,) = update.models
    assert (model.folder, model.checkpoint) == (here / "model", "confirm/run-000/confirm-001/checkpoint_000002")


def test_all_readers_count_the_last_report_of_a_repeated_epoch(spool: Spool, uri: str) -> None:
    """A crash loses epochs 3 and 4: the trial repeats its checkpoint's epoch 2 and trains the others again."""
    spool.study_started()
    spool.trial_started("search-000")
    for epoch, value in ((1, 0.1), (2, 0.2), (3, 0.9), (4, 0.3)):
        spool.epoch("search-000", epoch, val_map_at_r=value)
    spool.add("trial_retried", trial="search-000", stage="search", error="worker died")
    for epoch, value in ((2, 0.2), (3, 0.4), (4, 0.3)):
        spool.epoch("search-000", epoch, val_map_at_r=value)
    spool.ended("search-000")
    expected = [(1, 0.1), (2, 0.2), (3, 0.4), (4, 0.3)]
    resumed = read_trials(spool.folder, "search")
    assert resumed["search-000"].curve("val_map_at_r") == expected
    (row,) = rank(resumed.values())
    assert (row["value"], row["epoch_of_best"], row["epochs"]) == (0.4, 3, 4)
    (history,) = histories(spool.folder)
    assert history.curve("val_map_at_r") == expected
    with LiveStudy(spool.path, console=Console(file=io.StringIO())) as live:
        wait_for(lambda: live.study.trials["search-000"].ended)
    assert live.study.trials["search-000"].curve("val_map_at_r") == expected
    assert deliver(spool, uri)
    run = runs_of(uri)["search-000"]
    sent = connect(uri).get_metric_history(run.info.run_id, "val/map_at_r")
    counts = {point.step: point.value for point in sorted(sent, key=lambda point: point.timestamp)}
    assert sorted(counts.items()) == expected
    assert sorted(point.step for point in sent) == [1, 2, 3, 3, 4], "only what has changed is sent a second time"
    assert run.data.metrics["val/map_at_r"] == 0.3
    assert (run.data.metrics["best/map_at_r"], run.data.metrics["best/epoch"]) == (0.4, 3), (
        "what the table is sorted by"
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(KeyError, OSError, AttributeError):
            if condition():
                return
        time.sleep(0.1)
    raise AssertionError("it did not happen in time")


@contextlib.contextmanager
def server(storage: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", default_uri(storage), "--artifacts-destination", str(storage / "served"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(storage / "server.log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group is the server's own
        process.wait(30)


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_study_misses_nothing(
    spool: Spool, storage: Path, picture: Path, exported: Path
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with server(storage, port):
        prepare_store(uri, storage)
        tracker = Tracker(spool.path, uri, spool.study)
        tracker.start()
        spool.study_started()
        spool.trial("search-000")
        spool.trial_started("search-001")
        spool.epoch("search-001", 1, train_loss=math.nan)
        wait_for(lambda: math.isnan(runs_of(uri)["search-001"].data.metrics["train/loss"]))
    spool.epoch("search-001", 2)
    spool.ended("search-001")
    time.sleep(3)
    spool.trial("confirm-000", fold=0)
    spool.add("artifact", trial=None, path=str(picture), artifact_path="pictures")
    with server(storage, port):
        spool.add("model", trial="confirm-000", checkpoint="/c3", folder=str(exported), name="digits")
        spool.add("study_finished")
        assert tracker.finish(90), tracker.hint()
        runs = runs_of(uri)
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        assert set(runs) == {None, "search-000", "search-001", "confirm-000"}
        client = connect(uri)
        history = client.get_metric_history(runs["search-001"].info.run_id, "val/map_at_r")
        assert [point.step for point in history] == [1, 2]
        (item,) = client.list_artifacts(runs[None].info.run_id, "pictures")
        assert Path(client.download_artifacts(runs[None].info.run_id, item.path)).read_text() == "a picture"
        model = EmbeddingModel.load(resolve_checkpoint("models:/digits@champion", uri))
        images = np.zeros((1, 20, 20, 3), dtype=np.uint8)
        np.testing.assert_array_equal(model.embed(images), EmbeddingModel.load(exported).embed(images))
        assert list((storage / "served").rglob("curves.txt")), "the artifacts did not go through the server"
    # The server is gone again: a delivery straight to its database is refused, and changes nothing there.
    before = contents(storage)
    with pytest.raises(TrackingError, match="which only the MLflow server of this database can write"):
        deliver(spool, default_uri(storage))
    assert_same(contents(storage), before)


@pytest.mark.slow
def test_a_delivery_killed_at_random_moments_ends_complete(tmp_path: Path, empty_store: Path, picture_of: Any) -> None:
    """kill -9 of the delivering process itself, again and again, against an undisturbed delivery."""
    found = {}
    for way in ("calm", "kill"):
        storage = tmp_path / way
        storage.mkdir()
        shutil.copy(empty_store, storage / "mlflow.db")
        spool = Spool(storage)
        spool.whole_study(picture_of(tmp_path))
        code = (
            "import sys; from pathlib import Path; from raydml.tracking.delivery import sync\n"
            "print('go', flush=True); sync(Path(sys.argv[1]), sys.argv[2], 'digits')\n"
        )
        generator = np.random.default_rng(1)
        for _ in range(6 if way == "kill" else 0):
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(spool.path), default_uri(storage)],
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
            )
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(float(generator.uniform(0.05, 0.8)))
            process.kill()
            process.wait(30)
            process.stdout.close()
        assert deliver(spool, default_uri(storage))
        found[way] = contents(storage)
    assert_same(found["kill"], found["calm"])


def test_the_log_of_a_delivery_is_quiet(
    spool: Spool, uri: str, picture: Path, exported: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It runs beside the live table of trials."""
    spool.whole_study(picture, exported)
    assert deliver(spool, uri)
    out, err = capfd.readouterr()
    assert out + err == ""


def test_damaged_lines_are_left_out_and_the_rest_is_delivered(
    spool: Spool, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever stands in a line; the expected store is that of the same study without these lines."""
    spool.study_started()
    spool.trial_started("search-000")
    spool.epoch("search-000", 1)
    with open(spool.path, "ab") as file:
        for line in (
            b"{}",
            b'{"event":"epoch","stage":"search","trial":"search-000"}',
            b'{"time":"x","event":"epoch","trial":"search-000","epoch":2,"metrics":{}}',
            b'{"event":"epoch","trial":"search-000","epoch":{},"metrics":[]}',
            b'{"event":"stage_finished","ranking":3}',
            b'{"event":"artifact","trial":"search-000"}',
            b'{"event":"model","trial":null}',
            b'{"event":"summary","metrics":[1],"tags":7}',
            b'{"event":["trial_started"],"trial":{}}',
            b'{"event":"trial_started","trial":"search-009","config":[1]}',
            b'{"event":"stage_finished","stage":"finalize","ranking":[{"runs":{"search-000":5}}]}',
            b"\x00\x00\x00 not an event",
        ):
            file.write(line + b"\n")
    spool.epoch("search-000", 2)
    spool.ended("search-000")
    spool.add("study_finished")
    assert deliver(spool, uri)
    assert steps(uri, "search-000") == [1, 2]
    runs = runs_of(uri)
    assert (runs["search-000"].info.status, runs[None].info.status) == ("FINISHED", "FINISHED")
    assert runs["search-000"].data.params["loss.margin"] == "0.2"
    skipped = [message for message in caplog.messages if "not an event" in message or "not events" in message]
    assert len(skipped) == 6, "five lines and the number of the others, once"
    assert "7 further lines are not events" in skipped[-1]


def test_a_spool_put_back_from_a_backup_replaces_what_mlflow_has_of_other_events(
    spool: Spool, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    spool.study_started()
    spool.trial("search-000")
    backup = spool.path.read_bytes()
    spool.trial("search-001")
    spool.trial_started("search-002")
    spool.epoch("search-002", 1, train_loss=0.25)
    assert deliver(spool, uri)
    before = runs_of(uri)
    assert deliver(spool, uri)
    assert {run.info.run_id for run in runs_of(uri).values()} == {run.info.run_id for run in before.values()}
    assert "backup" not in caplog.text
    spool.path.write_bytes(backup)
    spool.add("interrupted", signal=15)
    spool.study_started()
    spool.trial_started("search-001", loss="contrastive")
    spool.epoch("search-001", 1, train_loss=0.125)
    spool.ended("search-001", "stopped_early")
    spool.add("study_finished")
    assert deliver(spool, uri)
    assert "put back from a backup?): 2 runs are made again" in caplog.text
    after = runs_of(uri)
    assert set(after) == {None, "search-000", "search-001"}, "search-002 is in the backup's future"
    assert after["search-000"].info.run_id == before["search-000"].info.run_id, "its events are the same"
    history = connect(uri).get_metric_history(after["search-001"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.125)]
    assert after["search-001"].data.params["loss.name"] == "contrastive"
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    trash = connect(uri).search_runs([after[None].info.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    assert {run.info.run_id for run in trash} == {before["search-001"].info.run_id, before["search-002"].info.run_id}
    assert sync(spool.path, uri, spool.study, complete=True)
    assert {run.info.run_id for run in runs_of(uri).values()} == {run.info.run_id for run in after.values()}


def test_a_study_whose_own_run_is_gone_has_its_trials_below_the_new_one(spool: Spool, uri: str) -> None:
    """As `mlflow gc` leaves it, which removes a run of the trash for good."""
    spool.study_started()
    spool.trial("search-000")
    assert deliver(spool, uri)
    client, old = connect(uri), runs_of(uri)[None].info.run_id
    client.set_tag(old, "raydml.study_id", "erased")
    client.delete_run(old)
    assert deliver(spool, uri)
    runs = runs_of(uri)
    assert set(runs) == {None, "search-000"}
    assert runs[None].info.run_id != old
    assert runs["search-000"].data.tags["mlflow.parentRunId"] == runs[None].info.run_id


def first(number: int, part: str, fault: Fault) -> Callable[[str], Fault | None]:
    """The fault for as many requests whose path has this part."""
    seen: list[str] = []

    def fault_of(path: str) -> Fault | None:
        seen.extend([path] if part in path else [])
        return fault if part in path and len(seen) <= number else None

    return fault_of


@pytest.mark.slow
def test_whatever_a_network_does_to_the_requests_nothing_is_lost_or_twice(
    tmp_path: Path, empty_store: Path, picture_of: Any, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a delivery straight to a database. One server for all ways, because one takes seconds to start."""
    for variable, value in MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(variable.name, str(value))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0.01")  # to wait less
    # Two files in place of two hundred.
    monkeypatch.setattr(models, "_save", lambda local, folder, _model: shutil.copytree(folder, local))
    storage = tmp_path / "calm"
    storage.mkdir()
    shutil.copy(empty_store, storage / "mlflow.db")
    calm = Spool(storage)
    calm.whole_study(picture_of(tmp_path), exported)
    assert deliver(calm, default_uri(storage))
    expected = facts_of_runs(default_uri(storage), STUDY_ID)
    chance = np.random.default_rng(0)
    ways: dict[str, Callable[[str], Fault | None]] = {
        "half of all requests are answered 500": lambda _: Fault(500) if chance.random() < 0.5 else None,
        "a third of all answers are lost": lambda _: Fault(None, arrives=True) if chance.random() < 0.3 else None,
        "the answers to new runs are lost": first(4, "runs/create", Fault(None, arrives=True)),
        "new runs are answered 502 and made": first(4, "runs/create", Fault(502, arrives=True)),
        "files are refused as too large": first(6, "PUT ", Fault(413)),
        "models are refused": first(20, "logged-models", Fault(503)),
    }
    port = free_port()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with server(tmp_path, port):
        for number, (what, fault_of) in enumerate(ways.items()):
            spool = Spool(tmp_path / f"{number}")
            for event in events.read(calm.path):
                changed = {"study_started": {"study_id": f"{number:016d}"}, "model": {"name": f"digits-{number}"}}
                events.append(spool.path, {**event, **changed.get(event["event"], {})}, durable=False)
            with faulty(port, fault_of) as uri:
                tracker = Tracker(spool.path, uri, spool.study)
                tracker.start()
                assert tracker.finish(60), f"{what}: {tracker.hint()}"
            direct = f"http://127.0.0.1:{port}"
            assert facts_of_runs(direct, f"{number:016d}") == expected, what
            assert len(connect(direct).search_model_versions(f"name = 'digits-{number}'")) == 1, what


def facts_of_runs(uri: str, study_id: str) -> dict[str | None, Any]:
    """Trial -> what its only run holds."""
    client = connect(uri)
    experiment = client.get_experiment_by_name("raydml").experiment_id
    facts: dict[str | None, Any] = {}
    for run in client.search_runs([experiment], f"tags.`raydml.study_id` = '{study_id}'", max_results=1000):
        trial = run.data.tags.get("raydml.trial")
        assert trial not in facts, f"{trial} is there twice"
        points = {}
        for name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            points[name] = sorted((point.step, point.timestamp, repr(point.value)) for point in history)
        files = sorted(item.path for item in client.list_artifacts(run.info.run_id))
        facts[trial] = (run.info.status, run.data.params, points, files)
    return facts
