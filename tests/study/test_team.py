"""All that a team sets up at once: Ray's job server, an object store, and MLflow on PostgreSQL with its files there."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import requests

from raydml.ops.object_store import ObjectStore
from raydml.study.events import read_state
from raydml.study.folder import read_json
from raydml.study.job_server import read_token
from raydml.tracking.store import connect
from tests.chaos.targets import Cluster
from tests.store_server import CREDENTIALS, StoreServer, store_server
from tests.study import test_jobs
from tests.study.test_jobs import answers, submit, wait_for
from tests.tracking.team_server import Login, TeamServer, team_server, what_is_missing
from tests.tracking.test_team_server import assert_delivered, run

MISSING = what_is_missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "nothing is missing"),
    *(mark for mark in test_jobs.pytestmark if mark.name == "skipif"),
]
SETTINGS = [
    "study.search.num_trials=2", "study.search.scheduler=none", "study.confirm=null", "study.refit=null",
    "study.finalize={top: 1}", "trial.epochs=2", "machine.device=cpu",
]  # fmt: skip


class Team(NamedTuple):
    """ann: the user whose login this process has."""

    store: StoreServer
    mlflow: TeamServer
    cluster: Cluster
    ann: Login


@pytest.fixture
def team(tmp_path, monkeypatch):
    for name in ("server", "cluster"):
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        store = stack.enter_context(store_server(monkeypatch))
        cluster = Cluster(tmp_path / "cluster", has_jobs=True)
        stack.callback(cluster.stop)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        started = pool.submit(cluster.start)
        extra = {"MLFLOW_S3_ENDPOINT_URL": store.endpoint, "AWS_DEFAULT_REGION": CREDENTIALS["AWS_REGION"]}
        mlflow = stack.enter_context(team_server(tmp_path / "server", "s3://bucket/mlflow", extra))
        ann = mlflow.add_user("ann")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", ann.user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ann.password)
        started.result(120)
        wait_for(lambda: answers(cluster.jobs), 60)
        yield Team(store, mlflow, cluster, ann)


def test_a_study_goes_from_submit_to_its_report_and_is_found_from_an_empty_folder(team, tmp_path):
    """Nothing of it is on a disk that the machines share: files are in the bucket, runs in PostgreSQL."""
    names = [word for name in CREDENTIALS for word in ("--env", name)]
    options = ("--tracking-uri", team.mlflow.uri, *names, "--follow")
    said = submit(team.cluster, team.store.uri(), *options, settings=SETTINGS)
    assert team.ann.password not in said
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in said

    check_dashboard(team)
    empty, uri = tmp_path / "empty", team.store.uri("studies/digits")
    empty.mkdir()
    status = run(team.ann, "status", uri, cwd=empty)
    assert status.returncode == 0, status.stderr
    assert "digits is finished; nothing to do" in status.stdout
    folder = empty / "studies" / "digits"
    state, (final,) = read_state(folder), read_json(folder / "final.json")
    assert {key: trial.ended for key, trial in state.trials.items()} == {
        "search-000": "finished", "search-001": "finished",
    }  # fmt: skip
    assert all(key in status.stdout for key in state.trials)
    report = run(team.ann, "report", uri, cwd=empty)
    assert report.returncode == 0, report.stderr
    assert f"{final['metrics']['map_at_r']['mean']:.4f}" in report.stdout

    check_mlflow(team, folder, final)
    check_bucket(team, uri)


def check_dashboard(team):
    """Ray's pages of jobs and of actors say which study it is."""
    headers = {"Authorization": f"Bearer {read_token({'RAY_AUTH_MODE': 'token'})}"}
    jobs, actors = (
        requests.get(f"{team.cluster.jobs}/{page}", headers=headers, timeout=30).json()
        for page in ("api/jobs/", "logical/actors")
    )
    assert [job["metadata"]["job_name"] for job in jobs if job["submission_id"]] == ["digits"]
    assert "study digits" in {actor["reprName"] for actor in actors["data"]["actors"].values()}


def check_mlflow(team, folder, final):
    """Every epoch is there once, the study's run has the test score, and the model is the champion."""
    runs = assert_delivered(team.mlflow.uri, folder)
    assert set(runs) == {None, *read_state(folder).trials}
    score = runs[None].data.metrics["test/map_at_r"]
    assert score == pytest.approx(final["metrics"]["map_at_r"]["mean"], rel=1e-5)
    tags = runs[None].data.tags
    assert tags["mlflow.user"] == "ann"
    # The program is the one that started the command: python, or uv run.
    assert tags["mlflow.source.name"].endswith(" launch.py sweep digits.yaml")
    assert "--storage s3://bucket/studies" in tags["raydml.command"].replace("'", "")
    version = connect(team.mlflow.uri).get_model_version_by_alias("raydml-digits", "champion")
    assert (version.version, version.run_id) == ("1", runs[None].info.run_id)
    assert version.source.startswith("mlflow-artifacts:/")


def check_bucket(team, uri):
    """Report and model of MLflow lie in the bucket, byte for byte as in the study, and on no disk of the server."""
    study, artifacts = ObjectStore(uri), ObjectStore(team.store.uri("mlflow"))
    names = list(artifacts.names())
    for own, ending in (
        ("report/report.html", "/artifacts/report/report.html"),
        ("summary.json", "/artifacts/study/summary.json"),
        ("model/model.safetensors", "/model/model.safetensors"),
    ):
        [found] = [name for name in names if name.endswith(ending)]
        assert artifacts.get_bytes(found) == study.get_bytes(own)
    assert json.loads(study.get_bytes("summary.json"))["study"] == "digits"
    assert not (team.mlflow.folder / "artifacts").exists()
    assert not list(team.mlflow.folder.rglob("report.html"))
