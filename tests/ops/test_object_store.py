"""Files in an object store: a real server of S3's protocol, also one that fails, and a folder."""

import os
import threading
import time
from types import SimpleNamespace

import boto3
import pytest

from raydml.ops import object_store
from raydml.ops.object_store import ObjectStore, StoreError, check_uri, is_waited_for, joined
from tests.store_server import store_server, times


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(object_store, "_WAITS_S", (0.01, 0.02))
    with store_server(monkeypatch) as found:
        yield found


@pytest.fixture(params=["s3", "file"])
def store(request, tmp_path, server):
    return ObjectStore(server.uri() if request.param == "s3" else f"file://{tmp_path / 'a folder'}")


def test_what_is_stored_is_found_again(store, tmp_path):
    content = os.urandom(20_000_000)  # more than one part of an upload
    (tmp_path / "file").write_bytes(content)
    store.put(tmp_path / "file", "search/run-000/weights")
    store.put_bytes(b"small", "search/run-001/x")
    store.copy("search/run-001/x", "search/run-002/y")
    assert {name: file.size for name, file in store.names().items()} == {
        "search/run-000/weights": 20_000_000, "search/run-001/x": 5, "search/run-002/y": 5,
    }  # fmt: skip
    assert list(store.names("search/run-001")) == ["search/run-001/x"]
    assert store.folders("search") == ["run-000", "run-001", "run-002"]
    assert abs(store.info("search/run-001/x").time_s - time.time()) < 60
    store.get("search/run-000/weights", tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_bytes() == content
    assert store.get_bytes("search/run-002/y") == b"small"


def test_what_is_deleted_is_gone_and_may_be_deleted_again(store):
    store.put_bytes(b"1", "a/b")
    store.put_bytes(b"2", "a/c/d")
    store.put_bytes(b"3", "e")
    for _ in range(2):
        store.delete("e")
        store.delete_below("a/c")
        assert list(store.names()) == ["a/b"]
    assert store.info("e") is None
    assert (store.names("nothing"), store.folders("nothing")) == ({}, [])
    with pytest.raises(FileNotFoundError):
        store.get_bytes("e")


def test_names_that_lead_out_of_the_place_are_passed_over(server):
    store = ObjectStore(server.uri())
    store.put_bytes(b"x", "a")
    client = boto3.client("s3", endpoint_url=server.endpoint)
    client.put_object(Bucket="bucket", Key="studies/../../b", Body=b"x")
    assert len(client.list_objects_v2(Bucket="bucket")["Contents"]) == 2
    assert list(store.names()) == ["a"]


@pytest.mark.parametrize("effect", ["error", "cut"])
def test_a_call_that_fails_is_tried_again(server, tmp_path, effect):
    """pyarrow itself has tried twice by then."""
    store, content = ObjectStore(server.uri()), os.urandom(100_000)
    (tmp_path / "file").write_bytes(content)
    if effect == "error":
        server.faults.append(times(3, "error", "PUT", "/studies/x"))
    store.put(tmp_path / "file", "x")
    server.faults.append(times(3, effect, "GET", "/studies/x"))
    assert store.get_bytes("x") == content
    server.faults.append(times(3, effect, "GET", "/studies/x"))
    store.get("x", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content


class CutOff:
    """A file whose disk fails, or that is shortened while it is read, behind its first bytes."""

    def __init__(self, file, num_left, fault):
        self._file, self._num_left, self._fault = file, num_left, fault

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def fileno(self):
        return self._file.fileno()

    def read(self, size=-1):
        block = self._file.read(self._num_left if size < 0 else min(size, self._num_left))
        self._num_left -= len(block)
        if not block and self._fault is not None:
            raise self._fault
        return block


@pytest.mark.parametrize("fault", [None, OSError(5, "Input/output error")], ids=["shortened", "failing"])
@pytest.mark.parametrize("size", [100_000, 20_000_000])
def test_a_file_that_is_cut_off_while_it_is_read_is_not_there(store, tmp_path, monkeypatch, size, fault):
    """Before the next try as after the last one."""
    content, seen = os.urandom(size), []
    (tmp_path / "file").write_bytes(content)
    with monkeypatch.context() as patched:
        cut_off = lambda *names: CutOff(open(*names), size // 2, fault)  # noqa: E731, SIM115 - closed by its reader
        patched.setattr(object_store, "open", cut_off, raising=False)
        waiting = SimpleNamespace(sleep=lambda _s: seen.append(store.info("search/weights")))
        patched.setattr(object_store, "time", waiting)
        with pytest.raises(StoreError, match=r"cut off|Input/output error"):
            store.put(tmp_path / "file", "search/weights")
    assert seen == [None, None]
    assert store.names() == {}
    store.put(tmp_path / "file", "search/weights")
    assert store.names()["search/weights"].size == size


def test_a_folder_never_has_half_a_file_under_its_name(tmp_path, monkeypatch):
    """A process that dies while it writes leaves a hidden file."""
    store = ObjectStore(f"file://{tmp_path}/there")
    store.put_bytes(b"the whole content", "x")
    monkeypatch.setattr(object_store.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for write in (lambda: store.put_bytes(b"new", "x"), lambda: store.copy("x", "y")):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert store.get_bytes("x") == b"the whole content"
    assert list(store.names()) == ["x"]


@pytest.mark.parametrize("daemon", [True, False])
def test_a_process_may_end_before_the_calls_of_daemon_threads_alone(server, daemon):
    """The deletions of a driver are made by a thread that is no daemon, and are completed."""
    store = ObjectStore(server.uri())
    store.put_bytes(b"x", "x")
    server.faults.append(times(1, 1.0, "GET", "/studies/x"))
    server.requests.clear()
    thread = threading.Thread(target=store.get_bytes, args=("x",), daemon=daemon)
    thread.start()
    while not server.requests:
        time.sleep(0.01)
    assert is_waited_for() == daemon
    thread.join(20)
    assert not is_waited_for()


def test_a_server_that_stalls_is_given_up_in_time(server, monkeypatch):
    monkeypatch.setattr(object_store, "_REQUEST_S", 0.5)
    object_store._opened.cache_clear()
    store = ObjectStore(server.uri())
    store.put_bytes(b"x", "x")
    server.faults.append(times(1, 5.0, "GET", "/studies/x"))
    begin = time.monotonic()
    assert store.get_bytes("x") == b"x"
    assert time.monotonic() - begin < 4
    object_store._opened.cache_clear()


def test_a_server_that_always_fails_is_named_with_the_reason_and_the_cure(server):
    server.faults.append(lambda method, path: "error")  # noqa: ARG005
    with pytest.raises(StoreError, match=r"s3://bucket/studies.* cannot be used: .*500.* Cure: check the network"):
        ObjectStore(server.uri()).get_bytes("x")


def test_what_no_further_try_mends_is_said_at_once(server):
    uri = server.uri().replace("s3://bucket", "s3://other")
    with pytest.raises(StoreError, match="Cure: make the bucket, or correct its name"):
        ObjectStore(uri).put_bytes(b"", "x")
    assert len([path for _, path in server.requests if "other" in path]) <= 2


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hdfs://namenode/x", "is not the address of a store. Cure: a folder, or one of s3, gs"),
        ("s3://key:secret@bucket/x", "has credentials, which would be recorded. Cure: set them in the environment"),
        ("abfs://container:key@account.dfs.core.windows.net/x", "has credentials, which would be recorded"),
        ("s3:///x", "names no bucket. Cure: s3://BUCKET/PREFIX"),
        ("file://x", "is no folder. Cure: file:///FOLDER"),
        ("s3://bucket/x?secret_key=1", "has the option secret_key, and not one of: region, endpoint_override, scheme"),
    ],
)
def test_addresses_that_cannot_be_are_refused_with_a_cure(uri, words):
    with pytest.raises(StoreError, match="Cure: ") as refused:
        check_uri(uri)
    assert words in str(refused.value)
    assert "secret@" not in str(refused.value)


def test_options_of_an_address_stay_at_its_end():
    assert joined("s3://bucket/a/?region=eu-west-1", "b") == "s3://bucket/a/b?region=eu-west-1"
    assert joined("s3://bucket", "b") == "s3://bucket/b"
