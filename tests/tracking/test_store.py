"""Addresses of stores, the embedded one and what moves with it, and stores that are refused."""

import importlib.util
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

from raydml.tracking.delivery import sync
from raydml.tracking.store import (
    VIEW_TAG,
    StoreGone,
    StoreUnavailable,
    TrackingError,
    connect,
    database_path,
    default_uri,
    login_of,
    prepare_store,
    reach_store,
    runs_page,
    study_store,
)
from tests.tracking.test_delivery import free_port

pytestmark = pytest.mark.xdist_group("mlflow")


def test_the_default_store_lies_in_the_storage_folder(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new/storage").mkdir(parents=True)
    shutil.copy(empty_store, tmp_path / "new/storage/mlflow.db")
    monkeypatch.chdir(tmp_path)
    uri = default_uri(Path("new/storage"))
    assert uri == f"sqlite:///{tmp_path}/new/storage/mlflow.db"
    first = prepare_store(uri, Path("new/storage"))
    assert prepare_store(uri, Path("new/storage")) == first
    assert connect(uri).get_experiment(first).artifact_location == (tmp_path / "new/storage/mlartifacts").as_uri()
    assert [path.name for path in tmp_path.iterdir()] == ["new"], "something was written to the working directory"


def test_a_new_database_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    """MLflow makes its tables in a hundred steps, and cannot use a database with some of them."""
    uri, folder = default_uri(tmp_path), tmp_path
    program = (
        "import os, sys; from mlflow.store.db import utils; from raydml.tracking.store import prepare_store\n"
        "utils._upgrade_db = lambda _engine: os._exit(9)\n"  # the first tables are there
        "prepare_store(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, uri], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode == 9, done.stderr
    left = {path.name for path in folder.iterdir()}
    assert "mlflow.db" not in left
    assert "mlflow.db.new" in left
    connect_to = prepare_store(uri, folder)
    assert connect(uri).get_experiment(connect_to).name == "raydml"
    assert {path.name for path in folder.iterdir()} - {"mlflow.db.lock", "mlartifacts", "mlruns"} == {"mlflow.db"}


def test_a_database_that_an_older_version_left_cut_off_is_named_with_its_cure(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        database.execute("CREATE TABLE _alembic_tmp_runs (run_uuid TEXT)")
        database.commit()
    with pytest.raises(TrackingError, match=r"cut off; delete .*mlflow\.db .*launch\.py sync STUDY") as caught:
        prepare_store(uri, tmp_path)
    assert not isinstance(caught.value, StoreUnavailable)


#: With its driver, which the extra `cluster` brings, and without.
NO_POSTGRESQL = "connection failed.*Cure: correct" if importlib.util.find_spec("psycopg") else r"'psycopg\[binary\]'"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "no store of the kind ''"),
        ("./mlruns", "no store of the kind './mlruns'"),
        ("file:///tmp/mlruns", "no store of the kind 'file'"),
        ("sqlite:///mlflow.db", "relative to the working directory.*Cure: sqlite:////"),
        ("sqlite:////proc/none/mlflow.db", "there is no folder /proc/none.*Cure: correct the address"),
        ("postgresql://user:secret@127.0.0.1:1/runs", NO_POSTGRESQL),
        ("mysql://user:secret@127.0.0.1:1/runs", "pip install 'mysqlclient'"),
        ("http://user:secret@127.0.0.1:1", r"http://\*\*\*@127.0.0.1:1 cannot be used.*Cure: start the server"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_at_once(uri: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError, match=message) as caught:
        prepare_store(uri)
    assert time.monotonic() - began < 10
    assert "secret" not in str(caught.value)


def test_a_deleted_experiment_is_refused_with_its_cure(uri: str, storage: Path) -> None:
    experiment = prepare_store(uri, storage)
    connect(uri).delete_experiment(experiment)
    with pytest.raises(TrackingError, match=f"was deleted.*restore --experiment-id {experiment}"):
        prepare_store(uri, storage)


def test_the_database_of_a_server_that_holds_the_artifacts_is_refused_at_once(uri: str, storage: Path) -> None:
    """Metrics could be sent to it, and no file: a delivery would try for its ten minutes."""
    connect(uri).create_experiment("raydml", artifact_location="mlflow-artifacts:/1")
    began_s = time.monotonic()
    with pytest.raises(TrackingError, match="only the MLflow server of this database can write") as refused:
        sync(storage / "birds" / "events.jsonl", uri, "birds")
    assert time.monotonic() - began_s < 10
    assert not isinstance(refused.value, StoreUnavailable), "it would be tried again"
    said = str(refused.value)
    assert all(words in said for words in (uri, "mlflow-artifacts:/1", "Cure: --tracking-uri http://HOST:PORT"))


def test_the_page_of_runs_is_known_where_its_view_is_stored(uri: str, storage: Path) -> None:
    assert runs_page(uri) == ""
    assert connect(uri).get_experiment_by_name("raydml") is None, "to look made something"
    experiment = prepare_store(uri, storage)
    page = f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey=raydml"
    assert runs_page(uri) == page
    view = json.loads(connect(uri).get_experiment(experiment).tags[VIEW_TAG])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`best/selected`", False), (
        "the order of raydml's ranking"
    )
    assert VIEW_TAG.endswith(".raydml"), "the page names the view by its key"
    connect(uri).delete_experiment_tag(experiment, VIEW_TAG)
    assert runs_page(uri) == ""
    assert runs_page(f"http://127.0.0.1:{free_port()}") == ""


NAMES = ["my%20studies", "100%", "a#b", "what?", "%3F%zz?", "two words", "ü", "é😀", "a+b&c;d", "it's", "a[b]", "x:y@z"]


@pytest.mark.parametrize("name", NAMES)
def test_the_embedded_store_is_in_a_storage_folder_of_any_name(name: str, tmp_path: Path, empty_store: Path) -> None:
    """The database that MLflow opens is the one there, and neither MLflow nor SQLAlchemy makes a folder beside it."""
    storage = tmp_path / name
    storage.mkdir()
    shutil.copy(empty_store, storage / "mlflow.db")
    uri = default_uri(storage)
    experiment = prepare_store(uri, storage)
    client = connect(uri)
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "a text", "notes/text.txt")
    assert Path(client.download_artifacts(run.info.run_id, "notes/text.txt")).read_text() == "a text"
    with closing(sqlite3.connect(storage / "mlflow.db")) as database:
        assert database.execute("select count(*) from runs").fetchone() == (1,)
    assert len(list((storage / "mlartifacts").rglob("text.txt"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert database_path(uri) == storage / "mlflow.db"
    # The same path as somebody types it, without encoding anything.
    if "?" not in name:
        typed = study_store(None, tmp_path, f"sqlite:///{storage}/mlflow.db")
        assert connect(typed).get_run(run.info.run_id).info.run_id == run.info.run_id
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_path_that_sqlite_cannot_open_is_refused_at_once(tmp_path: Path) -> None:
    """MLflow tries for 100 s. The longest path that SQLite opens is used as it is."""
    folder = tmp_path
    while len(str(folder)) < 400:
        folder /= "d" * 50
    for num_bytes in (504, 505):
        storage = folder / ("e" * (num_bytes - len(f"{folder}//mlflow.db")))
        storage.mkdir(parents=True)
        assert len(default_uri(storage)) == len("sqlite:///") + num_bytes
        if num_bytes == 504:
            with closing(sqlite3.connect(storage / "mlflow.db")) as database:
                database.execute("create table one (a)")
            continue
        with pytest.raises(TrackingError, match=r"at most 504 bytes, and this one has 505\. Cure: a --storage with"):
            prepare_store(default_uri(storage), storage)
        with pytest.raises(sqlite3.OperationalError), closing(sqlite3.connect(storage / "mlflow.db")) as database:
            database.execute("create table one (a)")


def stored_file(uri: str, storage: Path, text: str) -> str:
    """A run of this store with one file and one model version; its id."""
    client = connect(uri)
    run = client.create_run(prepare_store(uri, storage))
    client.log_text(run.info.run_id, text, "text.txt")
    client.create_registered_model("digits")
    client.create_model_version("digits", source=f"{run.info.artifact_uri}/model", run_id=run.info.run_id)
    return str(run.info.run_id)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_apart(uri: str, run_id: str, storage: Path) -> None:
    """The store finds its file, writes a second one, and does both in its own folder."""
    _artifact_repos_cache.clear()  # within one process MLflow remembers where the files of a run are
    client = connect(uri)
    assert Path(client.download_artifacts(run_id, "text.txt")).read_text() == "first"
    client.log_text(run_id, "second", "second.txt")
    assert [path.name for path in (storage / "mlartifacts").rglob("second.txt")] == ["second.txt"]
    assert client.get_model_version("digits", "1").source.startswith((storage / "mlartifacts").as_uri() + "/")
    later = client.create_run(prepare_store(uri, storage))
    assert later.info.artifact_uri.startswith((storage / "mlartifacts").as_uri() + "/")


def test_the_artifacts_of_the_embedded_store_move_along(storage: Path) -> None:
    (home := storage / "studies").mkdir()
    shutil.move(storage / "mlflow.db", home / "mlflow.db")
    run_id = stored_file(default_uri(home), home, "first")
    # A copy, under a name that has to be encoded in an address.
    copy = storage / "copy 100%"
    shutil.copytree(home, copy)
    before = contents_of(home)
    assert_apart(default_uri(copy), run_id, copy)
    assert contents_of(home) == before, "the copy wrote into the original"
    # A move.
    moved = storage / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(home, moved)
    assert_apart(default_uri(moved), run_id, moved)
    assert not home.exists()
    # A copy of the database alone: its artifacts are missing, and new ones do not go to the original.
    alone = storage / "alone"
    alone.mkdir()
    shutil.copy(moved / "mlflow.db", alone / "mlflow.db")
    before = contents_of(moved)
    _artifact_repos_cache.clear()
    connect(default_uri(alone)).log_text(run_id, "third", "third.txt")
    assert contents_of(moved) == before
    assert len(list((alone / "mlartifacts").rglob("third.txt"))) == 1


def test_artifacts_that_have_always_been_elsewhere_stay_there(storage: Path, uri: str) -> None:
    """Older studies kept the artifacts of a shared database in their own storage, with a database of its own or not."""
    run_id = stored_file(uri, storage, "first")
    other = storage / "shared"
    other.mkdir()
    shutil.move(storage / "mlflow.db", other / "mlflow.db")
    location = (storage / "mlartifacts").as_uri()
    for _ in range(2):
        client = connect(default_uri(other))
        assert client.get_experiment_by_name("raydml").artifact_location == location
        assert Path(client.download_artifacts(run_id, "text.txt")).read_text() == "first"
        shutil.copy(other / "mlflow.db", storage / "mlflow.db")  # in the second turn there is another one
        with closing(sqlite3.connect(storage / "mlflow.db")) as database, database:
            database.execute("update experiments set creation_time = creation_time + 1")


def test_the_store_of_a_study_is_the_chosen_the_recorded_or_the_embedded_one(tmp_path: Path) -> None:
    embedded = f"sqlite:///{tmp_path}/mlflow.db"
    gone = f"sqlite:///{tmp_path}/gone/mlflow.db"
    assert study_store(None, tmp_path) == embedded
    assert study_store("http://host:5000", tmp_path) == "http://host:5000"
    assert study_store("http://host:5000", tmp_path, "http://other:5000") == "http://other:5000"
    assert study_store(gone, tmp_path, "http://other:5000") == "http://other:5000"
    with pytest.raises(StoreGone, match=r"gone/mlflow.db, which does not exist any more.*Cure.*--tracking-uri"):
        study_store(gone, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "user"),
    [
        ("http://127.0.0.1:5000", "ann"),
        ("https://b%40x:secret@mlflow.example.com", "b@x"),
        ("sqlite:////studies/mlflow.db", ""),
        ("postgresql://mlflow:secret@127.0.0.1/mlflow", ""),
    ],
)
def test_the_user_of_a_server_is_the_one_of_its_login(uri: str, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    assert login_of(uri) == user
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    assert login_of("http://127.0.0.1:5000") == ""


def test_looking_into_a_store_that_does_not_exist_makes_none(tmp_path: Path) -> None:
    uri = default_uri(tmp_path)
    with pytest.raises(StoreGone, match=r"there is no MLflow store.*Cure"):
        connect(uri)
    with pytest.raises(TrackingError, match=r"there is no folder .*typo.*mkdir -p"):
        prepare_store(f"sqlite:///{tmp_path}/typo/mlflow.db", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_host_name_is_no_missing_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of MLflow's server (3.5 and later) to a name that it was not started for."""
    body = "API request failed with error code 403 != 200. Response body: Invalid Host header - possible DNS rebinding"

    def refuse(*_: object) -> None:
        raise MlflowException(body, error_code=PERMISSION_DENIED)

    monkeypatch.setattr("raydml.tracking.store.experiment_id", refuse)
    with pytest.raises(TrackingError, match=r"--allowed-hosts mlflow\.lab:5000") as caught:
        prepare_store("http://ann:secret@mlflow.lab:5000")
    assert "PASSWORD" not in str(caught.value)
    assert "secret" not in str(caught.value)


@contextmanager
def answering(status: int, body: str, delay_s: float = 0.0) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request alike; its address, and the paths of the requests it got."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(self.path)
            time.sleep(delay_s)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", "3600")
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        server.server_close()


PAGE = "<html><body>Sign in</body></html>"


@pytest.mark.parametrize(
    ("status", "body", "cure"),
    [
        (200, PAGE, "correct the address"),
        (404, PAGE, "correct the address"),
        (401, "", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "denied", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        (500, PAGE, None),
        (502, PAGE, None),
        (503, "", None),
        (429, "", None),
    ],
)
def test_a_study_waits_for_no_server_and_starts_with_none_that_can_never_answer(
    status: int, body: str, cure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused is what waiting does not mend. The server asks for an hour of waiting, and does not get it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0.01")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    began_s = time.monotonic()
    with answering(status, body) as (uri, got):
        if cure is None:
            assert f"MLflow at {uri} cannot be used" in reach_store(uri, tmp_path)
        else:
            with pytest.raises(TrackingError, match=f"Cure: .*{cure}"):
                reach_store(uri, tmp_path)
    assert len(got) == (1 if cure else 8)
    assert time.monotonic() - began_s < 5


def test_a_study_waits_for_no_server_that_is_away_or_slow(tmp_path: Path) -> None:
    away = f"http://ann:PLANTED@127.0.0.1:{free_port()}"
    reason = reach_store(away, tmp_path)
    assert "cannot be used" in reason
    assert "PLANTED" not in reason
    began_s = time.monotonic()
    with answering(500, "", delay_s=0.5) as (uri, _got):
        assert reach_store(uri, tmp_path, 0.1) == f"MLflow at {uri} has not answered within 0.1 s"
        assert time.monotonic() - began_s < 0.4
    for wrong in ("http://127.0.0.1:99999", "http://", "https:nothing"):
        with pytest.raises(TrackingError, match="Cure"):
            reach_store(wrong, tmp_path)


def test_a_locked_database_is_not_waited_for_and_a_damaged_one_is_refused(
    storage: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydml.tracking.store.LOCK_PATIENCE_S", 0.1)
    assert reach_store(uri, storage) == ""
    with closing(sqlite3.connect(storage / "mlflow.db")) as other:
        other.execute("begin exclusive")
        began_s = time.monotonic()
        assert "is locked. Cure: end the process" in reach_store(uri, storage)
        assert time.monotonic() - began_s < 2
    assert reach_store(uri, storage) == ""
    (storage / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(TrackingError, match="repair the database"):
        reach_store(uri, storage)
