import copy
import json
import pickle

import pytest

from raydml.data.catalog import DataError
from raydml.data.seal import TestKey, TestReads


def test_a_record_is_on_disk_before_the_key_is_there(tmp_path):
    reads = TestReads(tmp_path / "study" / "test_reads.jsonl")
    assert reads.read() == []
    key = reads.record(purpose="finalize", checkpoint="confirm-003/best", commit="abc123")
    assert isinstance(key, TestKey)
    (line,) = (tmp_path / "study" / "test_reads.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record == key.record == reads.read()[0]
    assert set(record) == {"time", "purpose", "checkpoint", "commit", "host"}
    assert (record["purpose"], record["checkpoint"], record["commit"]) == ("finalize", "confirm-003/best", "abc123")
    assert record["time"].endswith("+00:00")


def test_records_are_appended(tmp_path):
    for index in range(3):
        TestReads(tmp_path / "reads.jsonl").record(purpose="evaluate", checkpoint=str(index), commit="")
    assert [r["checkpoint"] for r in TestReads(tmp_path / "reads.jsonl").read()] == ["0", "1", "2"]


def test_keys_cannot_be_made_copied_or_sent(tmp_path):
    with pytest.raises(DataError, match="TestReads"):
        TestKey(object(), {})
    key = TestReads(tmp_path / "reads.jsonl").record(purpose="evaluate", checkpoint="x", commit="")
    for copier in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="neither copied nor sent"):
            copier(key)


def test_a_key_opens_once(tmp_path):
    key = TestReads(tmp_path / "reads.jsonl").record(purpose="evaluate", checkpoint="x", commit="")
    key.spend()
    with pytest.raises(DataError, match="used already"):
        key.spend()


def test_no_key_without_a_record(tmp_path):
    (tmp_path / "reads.jsonl").mkdir()  # a folder cannot be written to, also not by root
    with pytest.raises(DataError, match="cannot be recorded"):
        TestReads(tmp_path / "reads.jsonl").record(purpose="evaluate", checkpoint="x", commit="")
    with pytest.raises(DataError, match="purpose"):
        TestReads(tmp_path / "other.jsonl").record(purpose=" ", checkpoint="x", commit="")
    assert not (tmp_path / "other.jsonl").exists()


def test_without_a_study_the_record_lies_beside_the_checkpoint(tmp_path):
    checkpoint = tmp_path / "models" / "best"
    checkpoint.mkdir(parents=True)
    TestReads(None).record(purpose="evaluate", checkpoint=checkpoint, commit="")
    assert TestReads(tmp_path / "models" / "test_reads.jsonl").read()[0]["checkpoint"] == str(checkpoint)
    with pytest.raises(DataError, match="no path on this machine"):
        TestReads(None).record(purpose="evaluate", checkpoint="models:/digits/1", commit="")


def test_half_a_line_is_kept_apart(tmp_path):
    file = tmp_path / "reads.jsonl"
    file.write_text('{"time": "2024')
    TestReads(file).record(purpose="evaluate", checkpoint="x", commit="")
    first, second = TestReads(file).read()
    assert first == {"damaged": '{"time": "2024'}
    assert second["checkpoint"] == "x"
