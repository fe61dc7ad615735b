"""The spool: whole lines in order, whatever happens to the writer."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from raydml.study import events

REPOSITORY = Path(__file__).resolve().parents[2]


def test_append_adds_one_line_with_the_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    before = time.time()
    events.append(path, {"event": "note", "text": "one\ntwo"})
    events.append(path, {"event": "note", "time": 12.5})
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert before <= json.loads(lines[0])["time"] <= time.time()
    assert json.loads(lines[0])["text"] == "one\ntwo"
    assert json.loads(lines[1])["time"] == 12.5


def test_numbers_paths_and_non_finite_values_survive(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events.append(
        path,
        {
            "event": "epoch",
            "loss": np.float32(0.5),
            "epoch": np.int64(3),
            "path": tmp_path,
            "row": np.array([1, 2]),
            "nan": math.nan,
            "inf": -math.inf,
        },
    )
    (event,) = events.read(path)
    assert event["loss"] == 0.5
    assert event["epoch"] == 3
    assert event["path"] == str(tmp_path)
    assert event["row"] == [1, 2]
    assert math.isnan(event["nan"])
    assert event["inf"] == -math.inf


def test_what_is_no_plain_value_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(TypeError, match="plain values, not object"):
        events.append(path, {"event": "x", "value": object()})
    assert not path.exists()


def test_a_missing_file_holds_no_events(tmp_path: Path) -> None:
    assert events.read(tmp_path / "none") == []
    assert events.records(tmp_path / "none", 7) == ([], 7)


def test_every_cut_of_the_file_gives_the_whole_lines_before_it(tmp_path: Path) -> None:
    path, cut = tmp_path / "events.jsonl", tmp_path / "cut.jsonl"
    for number in range(3):
        events.append(path, {"event": "e", "number": number, "text": "ü"})
    data = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        found, offset = events.records(cut)
        whole = [end for end in ends if end <= size]
        assert [record.event["number"] for record in found] == list(range(len(whole)))
        assert [record.end for record in found] == whole
        assert offset == (whole[-1] if whole else 0)


def test_reading_goes_on_where_it_stopped_and_stops_where_told(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events.append(path, {"event": "e", "number": 0})
    first, middle = events.read_from(path)
    with open(path, "ab") as file:
        file.write(b'{"event":"e","num')
    assert events.read_from(path, middle) == ([], middle)
    with open(path, "ab") as file:
        file.write(b'ber":1,"time":0}\n')
    second, end = events.read_from(path, middle)
    assert [event["number"] for event in first + second] == [0, 1]
    assert end == path.stat().st_size
    assert [event["number"] for event in events.read_from(path, until=middle)[0]] == [0]
    assert events.read_from(path, until=middle)[1] == middle


def test_a_line_cut_off_by_a_kill_never_swallows_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events.append(path, {"event": "e", "number": 0})
    with open(path, "ab") as file:
        file.write(b'{"event":"e","number":1')
    _, offset = events.read_from(path)
    events.append(path, {"event": "e", "number": 2})
    events.append(path, {"event": "e", "number": 3})
    assert [event["number"] for event in events.read(path)] == [0, 2, 3]
    assert [event["number"] for event in events.read_from(path, offset)[0]] == [2, 3]


def test_writers_in_several_processes_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = (
        "import sys; from pathlib import Path; from raydml.study import events\n"
        "for number in range(200):\n"
        "    events.append(Path(sys.argv[1]), {'event': 'e', 'writer': sys.argv[2], 'number': number, "
        "'padding': 'x' * 3000}, durable=False)\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), name], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
        )
        for name in "abc"
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    found = events.read(path)
    for name in "abc":
        assert [event["number"] for event in found if event["writer"] == name] == list(range(200))
