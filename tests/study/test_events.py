"""The spool: whole lines in order, whatever happens to the writer."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydml.study import events
from raydml.study.events import (
    Artifact,
    ExportedModel,
    Reduction,
    StudyReader,
    letters_of,
    rank,
    read_state,
    read_trials,
    reduce_event,
    reduce_events,
)
from tests.study.study_events import ended, epoch, stage_started, started, study_started

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
            "event": "e",
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


def test_a_broken_line_is_reported_once_with_its_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"e","time":1}\n{"event":"e","num\n{"event":"e","time":2}\n[3]\n', encoding="utf-8")
    for _ in range(2):
        assert [event["time"] for event in events.read(path)] == [1, 2]
    expected = [f"{path}: the line at byte {offset} is not an event" for offset in (23, 64)]
    assert [message.partition(" (")[0] for message in caplog.messages] == expected


def test_a_poll_says_nothing_about_a_broken_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"e","time":1}\n{"event":"e","num\n', encoding="utf-8")
    assert events.read_from(path, 23) == ([], 41)
    assert not caplog.messages


@pytest.mark.parametrize(
    "line",
    [
        *(
            {},
            {"event": 3},
            {"event": "e", "time": "1"},
            {"event": "e", "time": float("nan")},
            {"event": "e", "time": -1},
        ),
        *(
            {"event": "e", "time": 1e300},
            {"event": "e", "deep": json.loads("[" * 40 + "]" * 40)},
            {"event": "e", "n": 2**64},
        ),
        *(epoch(0, 1, "0.5"), epoch(0, 1, None), epoch(0, 1, 10**400), epoch(0, -1, 0.5), epoch(0, 1.5, 0.5)),
        *(
            {**epoch(0, 1, 0.5), "trial": None},
            {**epoch(0, 1, 0.5), "metrics": [1]},
            {**epoch(0, 1, 0.5), "epoch": 1e999},
        ),
        *({"event": "epoch", "trial": "search-000"}, {"event": "trial_started"}, {**started(0), "config": [1]}),
        *({**started(0), "config": {"data": 3}}, {**started(0), "config": {"epochs": "9"}}, {"event": "stage_started"}),
        *({**stage_started(4), "num_trials": -1}, {**stage_started(4), "resources": {"cpu": 1}}, {"event": "artifact"}),
        *(
            {"event": "stage_finished", "stage": "search", "ranking": 3},
            {"event": "search_extended"},
            {"event": "model"},
        ),
        *({"event": "summary", "metrics": {"a": "b"}}, {**study_started(), "planned": [{"stage": "search"}]}),
        *({**study_started(), "config": {"search": {"reduction_factor": 1}}}, {**study_started(), "varying": "loss"}),
    ],
)
def test_a_line_without_what_its_kind_must_have_is_skipped_and_said(tmp_path, caplog, line) -> None:
    path = tmp_path / "events.jsonl"
    whole = [json.dumps(event) for event in (study_started(), stage_started(4), started(1), epoch(1, 1, 0.25))]
    path.write_text("".join(f"{one}\n" for one in (*whole[:3], json.dumps(line), whole[3])))
    assert events.read(path) == [json.loads(one) for one in whole]
    assert len(caplog.messages) == 1
    assert f"the line at byte {sum(len(one) + 1 for one in whole[:3])} is not an event" in caplog.messages[0]


def test_many_broken_lines_are_counted(tmp_path, caplog) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event":"e"}\n' + "[]\n" * 30)
    assert events.read(path) == [{"event": "e"}]
    assert len(caplog.messages) == 6
    assert "25 further lines are not events; they are skipped" in caplog.messages[-1]


def test_zeros_at_the_end_are_said_once_and_the_next_event_is_not_lost(tmp_path, caplog) -> None:
    path = tmp_path / "events.jsonl"
    for number in range(3):
        events.append(path, {"event": "e", "number": number})
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes(40))
    for _ in range(2):
        assert [event["number"] for event in events.read(path)] == [0, 1]
    (said,) = caplog.messages
    begin = whole.rindex(b"\n", 0, -1) + 1
    assert f"the last {len(whole) - begin} bytes, from byte {begin}, are zeros or part of a line" in said
    events.append(path, {"event": "e", "number": 3})
    assert [event["number"] for event in events.read(path)] == [0, 1, 3]


def test_reducing_leaves_the_state_before_as_it_was() -> None:
    before = reduce_events([study_started(), stage_started(4), started(0), epoch(0, 1, 0.2)])
    after = reduce_events([epoch(0, 2, 0.5), started(1), {"event": "stage_started", "stage": "confirm"}], before)
    assert before == reduce_events([study_started(), stage_started(4), started(0), epoch(0, 1, 0.2)])
    assert (list(before.trials), list(after.trials)) == (["search-000"], ["search-000", "search-001"])
    assert (list(before.trials["search-000"].reports), list(after.trials["search-000"].reports)) == ([1], [1, 2])


CALLS = st.one_of(
    st.builds(started, st.integers(0, 2)),
    st.builds(epoch, st.integers(0, 2), st.integers(1, 4), st.sampled_from([0.1, 0.2, math.nan])),
    st.builds(ended, st.integers(0, 2), st.sampled_from(["finished", "crashed"])),
    st.just({"event": "trial_retried", "trial": "search-001", "stage": "search", "error": "boom"}),
    st.just({"event": "interrupted", "signal": 2}),
    st.just(stage_started(3)),
    st.just({"event": "trials_reopened", "stage": "search", "trials": ["search-001"]}),
)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(CALLS, st.booleans()), max_size=30))
def test_what_a_reduction_has_returned_does_not_change_with_later_events(calls) -> None:
    reduction, copied, before, copies = Reduction(), Reduction(), [], []
    for event, is_copied in calls:
        before.append(reduction.before(event))
        reduction.add(event)
        copied.add(event)
        copies.append(copied.copy() if is_copied else None)
        assert repr(reduction.now()) == repr(copied.now())
        assert repr(reduction.now()) == repr(reduce_events([one for one, _ in calls[: len(copies)]]))
    for number, (event, _) in enumerate(calls):
        study = reduce_events([one for one, _ in calls[:number]])
        kept = {key: trial for key, trial in study.trials.items() if key == event.get("trial")}
        assert repr(before[number]) == repr(replace(study, trials=kept))
        study = reduce_event(study, event)
        assert copies[number] is None or repr(copies[number]) == repr(study)


def test_a_study_that_is_read_on_has_each_event_once_and_a_pickled_reader_begins_anew(tmp_path: Path) -> None:
    reader, written = StudyReader(tmp_path), [study_started(), started(0), epoch(0, 1, 0.2), ended(0, "finished")]
    assert reader.read_on() == []
    for event in written:
        events.append(tmp_path / "events.jsonl", event)
        assert [one["event"] for one in reader.read_on()] == [event["event"]]
    assert reader.now() == read_state(tmp_path)
    again = pickle.loads(pickle.dumps(reader))
    assert len(again.read_on()) == len(written)
    assert again.now() == reader.now()


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


def test_a_trial_from_start_to_end():
    study = reduce_events(
        [study_started(), stage_started(4), started(0), epoch(0, 1, 0.2), epoch(0, 2, 0.5), epoch(0, 3, 0.4)]
    )
    trial = study.trials["search-000"]
    assert (trial.num_epochs, trial.best, trial.epoch_of_best, trial.state) == (3, 0.5, 2, "running")
    assert (trial.recipe, trial.fold, trial.seed) == ("margin, distance_weighted", None, 0)
    after = reduce_event(study, ended(0, "stopped_early"))
    assert after.trials["search-000"].ended
    assert study.trials["search-000"].state == "running", "reduce_event must not change the state it is given"


def test_the_study_says_which_metric_counts():
    events = [
        study_started("val_recall_at_1"),
        started(0),
        epoch(0, 1, 0.9),
        epoch(0, 2, 0.3, metric="val_recall_at_1"),
    ]
    assert reduce_events(events).trials["search-000"].best == 0.3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_what_is_no_number_is_never_the_best(value):
    study = reduce_events([stage_started(2), started(0), epoch(0, 1, value), started(1), epoch(1, 1, 0.1)])
    assert study.trials["search-000"].best is None
    assert study.best_of_stage("search").trial == "search-001"


def test_of_equal_trials_the_first_is_the_best():
    study = reduce_events([started(1), started(0), epoch(1, 1, 0.5), epoch(0, 1, 0.5)])
    assert study.best_of_stage("search").trial == "search-000"


def test_a_resumed_trial_keeps_what_it_has_and_repeats_an_epoch():
    before = [
        stage_started(1),
        started(0),
        epoch(0, 1, 0.1),
        epoch(0, 2, 0.6),
        epoch(0, 3, 0.2),
        {"event": "interrupted"},
    ]
    assert reduce_events(before).state == "interrupted"
    assert reduce_events(before).trials["search-000"].state == "interrupted"
    study = reduce_events([*before, study_started(), stage_started(1), started(0), epoch(0, 2, 0.6)])
    trial = study.trials["search-000"]
    assert (trial.num_epochs, trial.best, trial.epoch_of_best, trial.state) == (2, 0.6, 2, "running")
    assert study.state == "running"


def test_a_crash_is_a_retry_and_then_an_end():
    study = reduce_events(
        [started(0), epoch(0, 1, 0.1), {"event": "trial_retried", "trial": "search-000", "error": "killed"}]
    )
    assert (study.trials["search-000"].state, study.trials["search-000"].num_retries) == ("retrying", 1)
    study = reduce_event(study, epoch(0, 2, 0.1))
    assert study.trials["search-000"].state == "running"
    assert reduce_event(study, ended(0, "crashed", error="boom")).trials["search-000"].ended


def test_events_of_other_kinds_and_of_unknown_trials_do_no_harm():
    study = reduce_events([{"event": "artifact", "path": "x"}, {"event": "from the future"}, epoch(7, 3, 0.3)])
    assert study.trials["search-007"].best == 0.3


def test_the_last_report_of_an_epoch_counts_and_what_lay_behind_it_does_not():
    lost = [epoch(0, 1, 0.1), epoch(0, 2, 0.2), epoch(0, 3, 0.9)]
    retried = {"event": "trial_retried", "trial": "search-000", "error": "killed"}
    study = reduce_events([started(0), *lost, retried, epoch(0, 2, 0.25)])
    trial = study.trials["search-000"]
    assert trial.curve("val_map_at_r") == [(1, 0.1), (2, 0.25)]
    assert (trial.num_epochs, trial.best, trial.epoch_of_best) == (2, 0.25, 2)
    again = reduce_event(study, epoch(0, 3, 0.3)).trials["search-000"]
    assert again.curve("val_map_at_r") == [(1, 0.1), (2, 0.25), (3, 0.3)]
    assert (again.best, again.epoch_of_best) == (0.3, 3)


def test_a_trial_that_is_taken_up_again_has_not_ended():
    study = reduce_events([started(0), epoch(0, 1, 0.1), ended(0, "crashed", error="boom")])
    assert (study.trials["search-000"].ended, study.trials["search-000"].error) == ("crashed", "boom")
    for event in (started(0), {"event": "trial_retried", "trial": "search-000", "error": "killed"}):
        trial = reduce_event(study, event).trials["search-000"]
        assert (trial.ended, trial.error, trial.num_epochs) == ("", None, 1)


def test_ranking_is_by_the_best_epoch_and_failures_come_last():
    curves = {0: [0.2, 0.9, 0.5], 1: [math.nan], 2: [0.9], 3: [0.95]}
    reported = [
        epoch(trial, number, value) for trial, values in curves.items() for number, value in enumerate(values, 1)
    ]
    rows = rank(reduce_events([*reported, ended(1, "non_finite_loss")]).trials.values())
    assert [row["trial"] for row in rows] == ["search-003", "search-000", "search-002", "search-001"]
    assert [row["epoch_of_best"] for row in rows] == [1, 2, 1, None]
    assert [row["epochs"] for row in rows] == [1, 3, 1, 1]
    assert [row["ended"] for row in rows] == ["", "", "", "non_finite_loss"]


def test_trials_of_a_stage_are_read_in_the_order_of_their_keys(tmp_path):
    assert read_trials(tmp_path, "search") == {}
    for event in (started(1), started(0), started(0, stage="confirm", fold=1, seed=2), epoch(1, 1, 0.5)):
        events.append(events.events_path(tmp_path), event)
    assert list(read_trials(tmp_path, "search")) == ["search-000", "search-001"]
    (trial,) = read_trials(tmp_path, "confirm").values()
    assert (trial.trial, trial.fold, trial.seed, trial.epochs) == ("confirm-000", 1, 2, {})


def test_a_finished_study_says_what_it_cost_and_what_it_left():
    study = reduce_events(
        [
            {"time": 1.0, **study_started()},
            {"time": 2.0, **stage_started(1), "resources": {"cpu": 2.0, "gpu": 0.5}},
            {"time": 3.0, "event": "stage_finished", "stage": "search", "ranking": [{"trial": "search-000"}]},
            {"time": 4.0, "event": "test_read", "stage": "finalize", "checkpoint": "/c"},
            {"time": 5.0, "event": "model", "trial": None, "name": "raydml-digits", "folder": "/m", "checkpoint": "/c"},
            {"time": 6.0, "event": "artifact", "trial": "search-000", "path": "/a", "artifact_path": "checkpoint"},
            {"time": 7.0, "event": "study_finished"},
            {"time": 8.0, "event": "test_read", "stage": "evaluate", "checkpoint": "/c"},
        ]
    )
    assert (study.state, study.changed_s, study.time_s) == ("finished", 7.0, 8.0)
    assert (study.cpus, study.gpus) == (2.0, 0.5)
    assert study.stages["search"].ranking == ({"trial": "search-000"},)
    assert len(study.test_reads) == 2
    assert study.models == (ExportedModel("raydml-digits", Path("/m"), "/c"),)
    assert study.artifacts == (Artifact(Path("/a"), "checkpoint", "search-000"),)


def test_letters_follow_the_search_and_stay_when_a_longer_search_confirms_others() -> None:
    confirm = stage_started(4, stage="confirm")
    first = [confirm | {"configurations": ["b0", "c7"]}, started(4, stage="confirm") | {"configuration": "c7"}]
    state = reduce_events(first)
    assert letters_of(state) == {"b0": "A", "c7": "B"}, "also before a trial of A has started"
    longer = reduce_events([confirm | {"configurations": ["d3", "b0"]}], state)
    assert letters_of(longer) == {"b0": "A", "c7": "B", "d3": "C"}
    many = reduce_events([confirm | {"configurations": [f"x{n}" for n in range(28)]}])
    assert [letters_of(many)[name] for name in ("x25", "x26", "x27")] == ["Z", "A2", "B2"]


def test_letters_of_events_that_do_not_list_the_configurations_are_by_key() -> None:
    keys = [started(number, stage="confirm") | {"configuration": name} for number, name in ((4, "c7"), (0, "b0"))]
    assert letters_of(reduce_events([stage_started(2, stage="confirm"), *keys])) == {"b0": "A", "c7": "B"}
