"""A study with the MLflow server of a team: PostgreSQL, artifacts through the server, logins. All of it real."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raydml.search_space.space import load_space
from raydml.study import events
from raydml.study.folder import create_study, read_json
from raydml.tracking.delivery import Tracker, sync
from raydml.tracking.store import StoreUnavailable, TrackingError, connect, reach_store
from tests.study.small import ONE_PROCESS, leave_pictures_out
from tests.tracking.team_server import FILES, Login, TeamServer, settings_of, team_server, what_is_missing

REPOSITORY = Path(__file__).resolve().parents[2]
DIGITS = REPOSITORY / "search_spaces" / "digits.yaml"
MISSING = what_is_missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.xdist_group("team server"),
    pytest.mark.timeout(800),
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "nothing is missing"),
]
COMMAND = [sys.executable, str(REPOSITORY / "launch.py")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeamServer]:
    with team_server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def ann(server: TeamServer) -> Login:
    return server.add_user("ann")


def environment_of(login: Login | None, **others: str) -> dict[str, str]:
    """The environment of a command, with a login or without one."""
    environment = {**os.environ, **others}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        environment.pop(name, None)
    if login is not None:
        environment |= {"MLFLOW_TRACKING_USERNAME": login.user, "MLFLOW_TRACKING_PASSWORD": login.password}
    return environment


def run(
    login: Login | None, *arguments: object, timeout_s: float = 240, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, env=environment_of(login), cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture
def as_ann(monkeypatch: pytest.MonkeyPatch, ann: Login) -> None:
    """The login of this process."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ann.user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ann.password)


class Written:
    """A study whose events are written by hand: trials with a few epochs."""

    def __init__(self, storage: Path, name: str) -> None:
        space = load_space(DIGITS, ["machine.device=cpu", f"study.name={name}"])
        self.folder = create_study(space, storage=storage, tracking_uri="sqlite:///unused.db", space_text="text")
        self.name, self.path = self.folder.name, events.events_path(self.folder)

    def add(self, event: str, **fields: Any) -> None:
        events.append(self.path, {"event": event, **fields})

    def start(self) -> None:
        self.add(
            "study_started", study=self.name, study_id=read_json(self.folder / "study.json")["study_id"], config={}
        )

    def trial(self, number: int, num_epochs: int) -> None:
        names = {"stage": "search", "trial": f"search-{number:03d}"}
        self.add("trial_started", **names, config={"seed": number, "epochs": num_epochs, "loss": {"name": "margin"}})
        for epoch in range(1, num_epochs + 1):
            metrics = {"val_map_at_r": number + epoch / 8, "train_loss": 1 / epoch}
            self.add("epoch", **names, epoch=epoch, metrics=metrics)
        self.add("trial_ended", **names, reason="finished", error=None, checkpoint="/c")


#: Beginnings of names in the events, and what MLflow has for them; others are in the group train.
NAMES = {"val_": "val/", "train_": "train/", "system_": "system/", "peak_memory": "system/peak_memory"}
NAMES |= {"images_per_s": "speed/images_per_s", "epoch_s": "speed/epoch_s"}


def written_histories(folder: Path) -> dict[tuple[str, str], dict[int, float]]:
    """(trial, metric of MLflow) -> epoch -> value, from the events alone."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for event in events.read(events.events_path(folder)):
        if event["event"] != "epoch":
            continue
        for name, value in event["metrics"].items():
            if not isinstance(value, (int, float)) or name.startswith("best_val_"):
                continue
            beginning = next((one for one in NAMES if name.startswith(one)), "")
            key = NAMES.get(beginning, "train/") + name.removeprefix(beginning)
            found.setdefault((event["trial"], key), {})[event["epoch"]] = value
    return found


def runs_of(uri: str, study: str) -> dict[str | None, Any]:
    """The runs of a study by trial; a second run of one trial is an error."""
    client = connect(uri)
    experiment = client.get_experiment_by_name("raydml")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.`raydml.study` = '{study}'", max_results=1000)
    by_trial = {run.data.tags.get("raydml.trial"): run for run in found}
    assert len(by_trial) == len(found), "one trial has two runs"
    return by_trial


def assert_delivered(uri: str, folder: Path) -> dict[str | None, Any]:
    """Each epoch of the events is there once, with its value and no other.

    A learning rate that does not change is a parameter of the run.
    """
    client, runs, expected = connect(uri), runs_of(uri, folder.name), written_histories(folder)
    assert expected
    for (trial, name), points in expected.items():
        if name == "train/learning_rate" and len(set(points.values())) == 1:
            points = {}
        history = client.get_metric_history(runs[trial].info.run_id, name)
        assert [point.step for point in history] == sorted(points), (trial, name)
        for point in history:
            assert point.value == pytest.approx(points[point.step], rel=1e-5, nan_ok=True), (trial, name)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    return runs


def test_two_studies_of_two_users_begin_at_once_in_an_empty_store(
    server: TeamServer, ann: Login, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both make the experiment, which one of them loses, and the other user's runs go into it."""
    bob = server.add_user("bob")
    logins, studies, commands = {"first": ann, "second": bob}, {}, []
    for name in logins:
        studies[name] = study = Written(tmp_path, name)
        study.start()
        for number in range(4):
            study.trial(number, num_epochs=5)
        study.add("study_finished")
    for name, login in logins.items():
        words = [*COMMAND, "sync", name, "--storage", str(tmp_path), "--tracking-uri", server.uri]
        commands.append(
            subprocess.Popen(
                words, env=environment_of(login), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [command.communicate(timeout=200)[0] for command in commands]
    assert [command.returncode for command in commands] == [0, 0], said
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", bob.user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", bob.password)
    for name, study in studies.items():
        assert len(assert_delivered(server.uri, study.folder)) == 5, name
    experiments = [one.name for one in MlflowClient(server.uri).search_experiments()]
    assert experiments.count("raydml") == 1


@pytest.fixture(scope="module")
def swept(server: TeamServer, ann: Login, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study of eight trials on Ray, which reports to the server, and what its command printed."""
    storage = tmp_path_factory.mktemp("studies")
    words = ["sweep", DIGITS, "--num-trials", 8, "--max-epochs", 2, "--stages", "search,finalize", *ONE_PROCESS]
    leave_pictures_out(storage / "digits")
    done = run(ann, *words, "--storage", storage, "--tracking-uri", server.uri, timeout_s=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return storage / "digits", done.stdout + done.stderr


@pytest.mark.usefixtures("as_ann")
def test_a_study_of_eight_trials_on_ray_is_there_as_its_events_have_it(
    server: TeamServer, swept: tuple[Path, str]
) -> None:
    folder, _ = swept
    runs = assert_delivered(server.uri, folder)
    assert sum(str(trial).startswith("search-") for trial in runs) == 8
    client = connect(server.uri)
    version = client.get_model_version_by_alias("raydml-digits", "champion")
    assert int(version.version) == 1
    assert version.run_id in {run.info.run_id for run in runs.values()}
    experiment = client.get_experiment_by_name("raydml")
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:/"), "clients would need the server's own storage"
    artifacts = {item.path for item in client.list_artifacts(runs[None].info.run_id)}
    assert any("report" in path for path in artifacts), artifacts


def test_the_registered_model_is_evaluated_from_an_empty_storage(
    server: TeamServer, ann: Login, swept: tuple[Path, str], tmp_path: Path
) -> None:
    """With the validation score that the study's own events have for it."""
    folder, _ = swept
    done = run(ann, "evaluate", "models:/raydml-digits@champion", "--on", "val", "--tracking-uri", server.uri,
               "--storage", tmp_path / "empty", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = list(events.read(events.events_path(folder)))
    (model,) = [event for event in written if event["event"] == "model"]
    trial = Path(model["checkpoint"]).parent.name
    trained = [one["metrics"]["val_map_at_r"] for one in written if one["event"] == "epoch" and one["trial"] == trial]
    assert f"{max(trained):.4f}" in done.stdout, (trained, done.stdout)


@pytest.mark.usefixtures("as_ann")
def test_no_password_is_printed_or_kept(server: TeamServer, ann: Login, swept: tuple[Path, str]) -> None:
    folder, printed = swept
    hidden = [ann.password, *server.secrets.values()]
    assert [one for one in hidden if one in printed] == []
    assert not any(one in server.log for one in hidden)
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    files += [path for path in (server.folder / "artifacts").rglob("*") if path.is_file()]
    assert {"study.json", "events.jsonl", "report.html", "MLmodel"} <= {path.name for path in files}
    assert [path for path in files if any(one.encode() in path.read_bytes() for one in hidden)] == []
    assert read_json(folder / "study.json")["tracking_uri"] == server.uri
    for one in runs_of(server.uri, folder.name).values():
        kept = json.dumps([one.data.tags, one.data.params, one.info.run_name])
        assert not any(secret in kept for secret in hidden)


@pytest.mark.usefixtures("ann")
@pytest.mark.parametrize("login", [None, Login("ann", "not-her-password"), Login("nobody", "no-password")])
def test_a_wrong_and_a_missing_password_are_refused_in_one_sentence_within_seconds(
    server: TeamServer, tmp_path: Path, login: Login | None
) -> None:
    began_s = time.monotonic()
    done = run(login, "sweep", DIGITS, "--storage", tmp_path / "studies", "--tracking-uri", server.uri, timeout_s=60)
    assert time.monotonic() - began_s < 30  # most of it are imports
    assert done.returncode == 2, done.stdout + done.stderr
    refusals = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(refusals) == 1, done.stderr
    assert "Cure: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "studies" / "digits").exists(), "a study was made"
    if login is not None:
        assert login.password not in done.stdout + done.stderr


def test_a_request_without_a_login_or_for_another_host_is_refused(server: TeamServer, ann: Login) -> None:
    path, body = "/api/2.0/mlflow/experiments/search", {"max_results": 10}
    assert server.request(path, None, body)[0] == 401
    assert server.request(path, ann._replace(password="wrong"), body)[0] == 401
    assert server.request(path, ann, body)[0] == 200
    assert server.request("/health", None)[0] == 200
    assert server.request("/", None)[0] == 401
    assert server.request(path, ann, body, {"Host": "mlflow:5000"})[0] == 200, "the name inside Kubernetes"
    assert server.request(path, ann, body, {"Host": "evil.example"})[0] == 403
    assert server.request("/api/2.0/mlflow/users/create", ann, {"username": "eve", "password": "x" * 20})[0] == 403


@pytest.mark.usefixtures("as_ann")
def test_a_server_that_is_restarted_and_upgraded_in_the_middle_of_a_study_misses_nothing(
    server: TeamServer, tmp_path: Path
) -> None:
    """Killed while a study reports, upgraded by the commands of docs/mlflow_server.md, and started again."""
    study = Written(tmp_path, "restarted")
    tracker = Tracker(study.path, server.uri, study.name)
    tracker.start()
    study.start()
    study.trial(0, num_epochs=20)
    deadline = time.monotonic() + 60
    while "search-000" not in runs_of(server.uri, study.name):
        assert time.monotonic() < deadline, tracker.hint()
        time.sleep(0.2)
    server.stop()
    study.trial(1, num_epochs=20)
    environment = server.environment
    accounts = re.findall(r"database_uri = (\S+)", (server.folder / "basic_auth.ini").read_text())
    for words in (
        ["mlflow", "db", "upgrade", environment["MLFLOW_BACKEND_STORE_URI"]],
        ["mlflow.server.auth", "db", "upgrade", "--url", accounts[0]],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *words], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    server.start()
    study.trial(2, num_epochs=20)
    study.add("study_finished")
    assert tracker.finish(90), tracker.hint()
    assert set(assert_delivered(server.uri, study.folder)) == {None, "search-000", "search-001", "search-002"}


def test_a_database_without_a_server_is_filled_and_a_wrong_password_for_it_refused_within_seconds(
    server: TeamServer, tmp_path: Path
) -> None:
    """MLflow itself tries such a database again for 100 s."""
    import psycopg

    port, password = server.database
    with psycopg.connect(f"postgresql://mlflow@127.0.0.1:{port}/mlflow", password=password, autocommit=True) as admin:
        admin.execute("create database direct")
    direct = Written(tmp_path, "direct")
    direct.start()
    direct.trial(0, num_epochs=3)
    direct.add("study_finished")
    right, wrong = (f"postgresql://mlflow:{one}@127.0.0.1:{port}/direct" for one in (password, "wrong-one"))
    assert sync(direct.path, right, direct.name)
    assert set(assert_delivered(right, direct.folder)) == {None, "search-000"}
    for uri, says in (
        (wrong, "password authentication failed.*Cure: give the whole address"),
        (right.rpartition("/")[0] + "/nothing", "database .nothing. does not exist.*Cure: correct the address"),
    ):
        began_s = time.monotonic()
        with pytest.raises(TrackingError, match=says) as refused:
            reach_store(uri, tmp_path)
        assert time.monotonic() - began_s < 5
        assert not isinstance(refused.value, StoreUnavailable), "a study would begin"
        assert not any(secret in str(refused.value) for secret in ("wrong-one", password))
    began_s = time.monotonic()
    assert "connection failed" in reach_store("postgresql://mlflow:wrong-one@127.0.0.1:1/mlflow", tmp_path)
    assert time.monotonic() - began_s < 5


def test_the_service_reads_its_passwords_from_the_environment_alone() -> None:
    settings = settings_of(FILES / "mlflow.env")
    secret = {name for name in settings if re.search("PASSWORD|SECRET|PGPASS", name)}
    assert secret == {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert {settings[name] for name in secret} == {""}
    assert settings["MLFLOW_HOST"] == "127.0.0.1"
