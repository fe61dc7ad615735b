"""Files in an object store: a real server of S3's protocol, also one that fails, and a folder."""

import os
import time

import boto3
import pytest

from raydml.ops import object_store
from raydml.ops.object_store import ObjectStore, StoreError, check_uri, joined
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
