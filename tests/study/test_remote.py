"""The files of a study in an object store, as its nodes and its driver reach them."""

import json
from pathlib import Path

import pytest
import torch

from raydml.ops import object_store
from raydml.study import remote, retention
from raydml.study.faults import fault_of
from raydml.study.folder import newest_checkpoint
from raydml.study.remote import StoredFiles, StudyPlace, files_of_study, merge_reads
from raydml.study.retention import drop_checkpoints
from raydml.training import checkpoint
from tests.store_server import store_server, times


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(object_store, "_WAITS_S", (0.01, 0.02))
    with store_server(monkeypatch) as found:
        yield found


@pytest.fixture
def place(server, tmp_path):
    (tmp_path / "driver").mkdir()
    StudyPlace(str(tmp_path / "driver"), server.uri("studies/birds")).record()
    return StudyPlace.of(tmp_path / "driver")


def node(place, tmp_path, name):
    """The files as a node sees them that has nothing of the study yet."""
    return StoredFiles(place.uri, tmp_path / name)


def save(files, number, *, weight=None, weights_of=None, key="search-000", run="run-000"):
    folder = files.root / "search" / run / key / f"checkpoint_{number:06d}"
    return checkpoint.save(
        folder,
        state={"epoch": number},
        model_card={"epoch": number},
        best_weights={"w": torch.full((1000,), float(number if weight is None else weight))},
        history=[{"epoch": epoch} for epoch in range(1, number + 1)],
        weights_of=weights_of,
    )


def test_the_place_of_a_study_is_recorded_in_its_folder(place, tmp_path, server):
    assert place.uri == server.uri("studies/birds")
    (tmp_path / "other").mkdir()
    assert StudyPlace.of(tmp_path / "other") == (str(tmp_path / "other"), None, "")
    # Another study at the same address is not given what is left of this one on a node.
    StudyPlace(str(tmp_path / "other"), place.uri).record()
    other = StudyPlace.of(tmp_path / "other")
    assert other.files_of_node().root != place.files_of_node().root


def test_a_new_start_of_a_stage_has_a_number_that_no_earlier_one_has(place, tmp_path):
    """A folder that was fetched from a store has the folders of some starts only."""
    first = node(place, tmp_path, "first")
    first.push(save(first, 1, run="run-000"))
    first.push(save(first, 3, run="run-001"))
    (Path(place.folder) / "search" / "run-001").mkdir(parents=True)
    assert files_of_study(Path(place.folder)).runs("search") == ["run-000", "run-001"]
    (Path(place.folder) / "search" / "run-002").mkdir()
    assert files_of_study(Path(place.folder)).runs("search") == ["run-000", "run-001", "run-002"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"uri": 1}', '{"uri": "ftp://x"}', "[" * 100_000])
def test_a_damaged_record_of_the_place_is_an_error_with_a_cure(tmp_path, content):
    (tmp_path / "remote.json").write_text(content)
    with pytest.raises(object_store.StoreError, match="Cure: "):
        StudyPlace.of(tmp_path)


def test_a_checkpoint_goes_from_one_node_to_another(place, tmp_path):
    first, second = (node(place, tmp_path, name) for name in ("first", "second"))
    for number in (1, 2):
        first.push(save(first, number))
    found = second.newest_intact(second.root / "search/run-000/search-000", [])
    assert found == second.root / "search/run-000/search-000/checkpoint_000002"
    assert checkpoint.load_state(found)["epoch"] == 2
    assert torch.equal(checkpoint.load_weights(found)["w"], torch.full((1000,), 2.0))
    assert second.newest_intact(second.root / "search/run-000/search-001", []) is None


def test_the_newest_checkpoint_is_found_with_one_listing_of_the_store(place, tmp_path, server):
    first, second = (node(place, tmp_path, name) for name in ("first", "second"))
    for number in (1, 2):
        first.push(save(first, number))
    server.requests.clear()
    second.newest_intact(second.root / "search/run-000/search-000", [])
    assert [path.rstrip("/") for method, path in server.requests if method == "GET"].count("/bucket") == 1


def test_of_the_checkpoints_of_a_trial_that_moves_two_stay(place, tmp_path):
    first = node(place, tmp_path, "first")
    for number in (1, 2, 3, 10):
        first.push(save(first, number))
    for name in ("second", "third"):
        files = node(place, tmp_path, name)
        assert files.newest_intact(files.root / "search/run-000/search-000", []).name == "checkpoint_000010"
        assert files.store.folders("search/run-000/search-000") == ["checkpoint_000003", "checkpoint_000010"]


def test_a_checkpoint_is_there_when_its_last_file_is_its_manifest(place, tmp_path, server):
    """What a node that dies has sent of one is passed over, without a word."""
    first = node(place, tmp_path, "first")
    first.push(save(first, 1))
    server.requests.clear()
    first.push(save(first, 2))
    names = [path.rpartition("/")[2] for method, path in server.requests if method == "PUT"]
    assert names[-1] == "manifest.json"
    assert sorted(names) == ["history.json", "manifest.json", "model.json", "state.pt", "weights.safetensors"]
    first.store.delete("search/run-000/search-000/checkpoint_000002/manifest.json")
    second, damaged = node(place, tmp_path, "second"), []
    assert second.newest_intact(second.root / "search/run-000/search-000", damaged).name == "checkpoint_000001"
    assert damaged == []


def test_a_damaged_checkpoint_in_the_store_is_named_and_the_one_before_it_is_taken(place, tmp_path):
    first = node(place, tmp_path, "first")
    for number in (1, 2):
        first.push(save(first, number))
    first.store.put_bytes(b"damaged", "search/run-000/search-000/checkpoint_000002/state.pt")
    second, damaged = node(place, tmp_path, "second"), []
    assert second.newest_intact(second.root / "search/run-000/search-000", damaged).name == "checkpoint_000001"
    assert len(damaged) == 1
    assert "checkpoint_000002/state.pt is not as it was written" in damaged[0]


def test_weights_that_have_not_changed_are_not_sent_again(place, tmp_path, monkeypatch):
    sent, put = [], object_store.ObjectStore.put

    def noted(store, file, name):
        sent.append(name)
        put(store, file, name)

    monkeypatch.setattr(object_store.ObjectStore, "put", noted)
    first = node(place, tmp_path, "first")
    one = save(first, 1)
    first.push(one)
    two = save(first, 2, weight=1, weights_of=one)
    first.push(two)
    three = save(first, 3)
    first.push(three)
    assert [name.split("/")[-2] for name in sent if name.endswith("weights.safetensors")] == [
        "checkpoint_000001", "checkpoint_000003",
    ]  # fmt: skip
    second = node(place, tmp_path, "second")
    second.pull(second.root / two.relative_to(first.root))
    assert checkpoint.is_intact(second.root / two.relative_to(first.root))


def test_weights_whose_first_copy_is_gone_are_sent_again(place, tmp_path):
    first = node(place, tmp_path, "first")
    one = save(first, 1)
    first.push(one)
    first.drop(one)
    two = save(first, 2, weight=1, weights_of=one)
    first.push(two)
    second = node(place, tmp_path, "second")
    assert second.newest_intact(second.root / two.parent.relative_to(first.root), []).name == "checkpoint_000002"


def test_the_driver_reads_what_a_trial_has_reached_without_its_weights(place, tmp_path, server):
    first, folder = node(place, tmp_path, "first"), Path(place.folder)
    first.push(save(first, 1, run="run-000"))
    first.push(save(first, 3, run="run-001"))
    server.requests.clear()
    found = newest_checkpoint(folder, "search", "search-000", whole=False)
    assert found == folder / "search/run-001/search-000/checkpoint_000003"
    assert checkpoint.load_card(found)["epoch"] == 3
    assert [record["epoch"] for record in checkpoint.load_history(found)] == [1, 2, 3]
    assert not any(path.endswith(("state.pt", "weights.safetensors")) for _, path in server.requests)
    whole = newest_checkpoint(folder, "search", "search-000")
    assert whole == found
    assert checkpoint.is_intact(whole)


def test_the_checkpoints_of_a_loser_are_deleted_in_the_store_and_here(place, tmp_path):
    first, folder = node(place, tmp_path, "first"), Path(place.folder)
    for key in ("search-000", "search-001"):
        first.push(save(first, 1, key=key))
    newest_checkpoint(folder, "search", "search-000")
    drop_checkpoints(folder, "search", "search-000")
    remote_files = files_of_study(folder)
    retention._deleting.submit(lambda: None).result(30)  # after the deletion
    assert {name.split("/")[2] for name in remote_files.store.names("search")} == {"search-001"}
    assert not list(folder.glob("search/run-*/search-000/checkpoint_*"))


def test_a_read_of_test_classes_is_in_the_store_before_its_key_is_given(place, tmp_path, server):
    files = node(place, tmp_path, "first")
    key = files.reads().record(purpose="finalize", checkpoint="confirm-000", commit="abc")
    assert key is not None
    assert next(method for method, path in server.requests if "test_reads" in path) == "PUT"
    server.faults.append(times(100, "error", "PUT", "test_reads"))
    with pytest.raises(object_store.StoreError):
        files.reads().record(purpose="finalize", checkpoint="confirm-001", commit="abc")


def test_the_reads_of_all_nodes_are_among_those_of_the_study_once(place, tmp_path, monkeypatch):
    folder = Path(place.folder)
    (folder / "test_reads.jsonl").write_text('{"purpose": "evaluate"}\n')
    for host in ("gpu-1", "gpu-2"):
        monkeypatch.setattr(remote.socket, "gethostname", lambda host=host: host)
        node(place, tmp_path, host).reads().record(purpose=f"on {host}", checkpoint="x", commit="abc")
    for _ in range(2):
        merge_reads(folder)
    lines = (folder / "test_reads.jsonl").read_text().splitlines()
    assert [json.loads(line)["purpose"] for line in lines] == ["evaluate", "on gpu-1", "on gpu-2"]


def test_files_that_are_written_once_are_exchanged(place, tmp_path):
    nodes = [node(place, tmp_path, name) for name in ("first", "second", "third")]
    for number, files in enumerate(nodes[:2]):
        (files.root / "image_digests").mkdir(parents=True)
        (files.root / "image_digests" / f"{number}.npz").write_bytes(bytes([number]))
        files.share(files.root / "image_digests")
    for files in nodes:
        files.share(files.root / "image_digests")
        assert [path.read_bytes() for path in sorted((files.root / "image_digests").iterdir())] == [b"\0", b"\1"]


def test_a_store_that_is_away_stops_the_study_and_not_the_trial(place, tmp_path, server):
    server.faults.append(lambda method, path: "error")  # noqa: ARG005
    files = node(place, tmp_path, "first")
    with pytest.raises(object_store.StoreError) as away:
        files.push(save(files, 1))
    assert "Cure: check the network and the address" in fault_of(away.value)
