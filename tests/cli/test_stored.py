"""Commands about a study in an object store, on another machine than its driver's: the events stay the driver's."""

import json
from pathlib import Path

import pytest

from raydml.cli.arguments import FoundModel, deliver_test_read, record_test_read
from raydml.ops import object_store
from raydml.study import events, results
from raydml.study.events import events_path
from raydml.study.mirror import Mirror, fetch_study
from raydml.study.remote import StudyPlace
from raydml.study.results import Winner
from raydml.tracking import store
from raydml.tracking.delivery import sync
from tests.cli.commands import done, refused
from tests.inference.test_gallery import checkpoint_folder, photos  # noqa: F401 - fixtures
from tests.store_server import store_server
from tests.tracking.conftest import empty_store  # noqa: F401 - a fixture

pytestmark = [pytest.mark.usefixtures("own_folder"), pytest.mark.xdist_group("mlflow")]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(object_store, "_WAITS_S", (0.01,))
    with store_server(monkeypatch) as found:
        yield found


@pytest.fixture
def driver(tmp_path, server, empty_store):  # noqa: F811
    """The folder of a driver whose study is in the store, and in MLflow up to its last event."""
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(empty_store.read_bytes())
    folder = tmp_path / "driver" / "birds"
    folder.mkdir(parents=True)
    study = {"name": "birds", "study_id": "7" * 32, "tracking_uri": uri_of(tmp_path), "machine": {}, "trials": []}
    study |= {"storage": str(folder.parent), "study": {"name": "birds", "select_on": "val_map_at_r"}}
    (folder / "study.json").write_text(json.dumps(study))
    StudyPlace(str(folder), server.uri("studies/birds")).record()
    for event in (
        {"event": "study_started", "study": "birds", "study_id": "7" * 32, "config": {}, "commit": "c0ffee"},
        {"event": "trial_started", "trial": "search-000", "stage": "search", "config": {"epochs": 2}},
    ):
        events.append(events_path(folder), event)
    report(folder, 1)
    Mirror(folder).copy()
    assert sync(events_path(folder), uri_of(tmp_path), "birds")
    return folder


def uri_of(folder):
    return store.default_uri(folder / "mlflow")


def report(folder, epoch):
    metrics = {"val_map_at_r": epoch / 10}
    events.append(
        events_path(folder),
        {"event": "epoch", "trial": "search-000", "stage": "search", "epoch": epoch, "metrics": metrics},
    )


def run_of_study(uri):
    client = store.connect(uri)
    experiment = client.get_experiment_by_name("raydml")
    found = client.search_runs([experiment.experiment_id])
    (own,) = [run for run in found if "raydml.trial" not in run.data.tags]
    return client, own


def reads_in_mlflow(uri):
    client, run = run_of_study(uri)
    items = client.list_artifacts(run.info.run_id, "test_reads")
    return {item.path: json.loads(Path(client.download_artifacts(run.info.run_id, item.path)).read_text())
            for item in items}  # fmt: skip


def test_a_read_by_evaluate_reaches_the_run_of_the_study(driver, server, tmp_path):
    """At once, or by a later sync; a stage's reads are events, and are not sent a second time."""
    there = fetch_study(server.uri("studies/birds"), tmp_path / "studies")
    found = FoundModel(there / "search" / "checkpoint", there, True)
    record_test_read(found, "birds", there.parent)
    deliver_test_read(there, None)
    ((path, read),) = reads_in_mlflow(uri_of(tmp_path)).items()
    assert (read["stage"], read["checkpoint"]) == ("evaluate", str(found.folder))
    (row,) = [json.loads(line) for line in (there / "test_reads.jsonl").read_text().splitlines()]
    assert read["commit"] == row["commit"]
    assert run_of_study(uri_of(tmp_path))[1].data.tags["raydml.last_test_read"] == Path(path).stem
    StudyPlace.of(there).files_of_node().reads().record(purpose="finalize", checkpoint="confirm-000", commit="abc")
    record_test_read(found, "birds", there.parent)  # while MLflow is away, say
    assert len(reads_in_mlflow(uri_of(tmp_path))) == 1
    for _ in range(2):
        assert "MLflow has all of study birds" in done("sync", server.uri("studies/birds")).stdout
    assert [read["stage"] for read in reads_in_mlflow(uri_of(tmp_path)).values()] == ["evaluate"] * 2
    assert events_path(there).read_bytes() == events_path(driver).read_bytes()


@pytest.mark.usefixtures("driver")
def test_a_read_that_does_not_reach_mlflow_is_said_with_the_command_that_sends_it(server, tmp_path, capsys):
    there = fetch_study(server.uri("studies/birds"), tmp_path / "studies")
    (tmp_path / "mlflow" / "mlflow.db").rename(tmp_path / "away.db")
    record_test_read(FoundModel(there / "x", there, True), "birds", there.parent)
    deliver_test_read(there, None)
    said = capsys.readouterr().err
    assert "the read is recorded in the study and reaches MLflow later" in said
    assert "launch.py sync birds" in said
    (tmp_path / "away.db").rename(tmp_path / "mlflow" / "mlflow.db")
    done("sync", "birds")
    assert len(reads_in_mlflow(uri_of(tmp_path))) == 1


def test_a_gallery_is_stored_with_the_run_and_the_copy_of_the_events_stays_as_it_is(
    driver, server, tmp_path, monkeypatch, checkpoint_folder, photos  # noqa: F811
):  # fmt: skip
    """An event of it in the copy would contradict those that the driver writes later."""
    monkeypatch.setattr(results, "find_winner", lambda _folder: Winner("search-000", "", checkpoint_folder))
    said = done("index", server.uri("studies/birds"), photos, "fruit")
    assert "in MLflow, with the run of study 'birds': galleries/fruit" in said.stdout
    client, run = run_of_study(uri_of(tmp_path))
    stored = client.list_artifacts(run.info.run_id, "galleries/fruit")
    assert sorted(Path(item.path).name for item in stored) == ["gallery.json", "index.faiss", "model"]
    there = tmp_path / "studies" / "birds"
    assert events_path(there).read_bytes() == events_path(driver).read_bytes()
    report(driver, 2)
    Mirror(driver).copy()
    done("status", server.uri("studies/birds"))
    assert events_path(there).read_bytes() == events_path(driver).read_bytes()
    (tmp_path / "mlflow" / "mlflow.db").unlink()
    note = done("index", server.uri("studies/birds"), photos, "late").stderr
    assert "note: MLflow does not have the gallery: " in note
    assert "launch.py sync birds, and index into another folder" in note


def test_sync_does_not_take_runs_back_to_what_the_store_has_while_a_driver_elsewhere_runs(driver, server, tmp_path):
    """MLflow may have events that are not in the store yet; runs that are ahead would be made again without them."""
    report(driver, 2)
    assert sync(events_path(driver), uri_of(tmp_path), "birds")
    before = run_of_study(uri_of(tmp_path))[1].info.run_id
    holder = {"host": "elsewhere", "pid": 1, "machine": "elsewhere", "token": "1"}
    object_store.ObjectStore(server.uri("studies/birds")).put_bytes(json.dumps(holder).encode(), "driver.json")
    assert "is running already, by pid 1 on elsewhere" in refused("sync", server.uri("studies/birds"))
    assert run_of_study(uri_of(tmp_path))[1].info.run_id == before
