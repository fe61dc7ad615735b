"""The copy of a driver's folder in a store, and the folder that another machine makes from it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydml.ops import object_store
from raydml.study import events, mirror
from raydml.study.driver import StudyHeld, only_driver
from raydml.study.events import events_path
from raydml.study.folder import find_study
from raydml.study.mirror import Mirror, MirrorError, fetch_study, is_stored
from raydml.study.remote import StudyPlace
from tests.store_server import store_server


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(object_store, "_WAITS_S", (0.01,))
    monkeypatch.setattr(mirror, "EVERY_S", 0.05)
    with store_server(monkeypatch) as found:
        yield found


@pytest.fixture
def folder(server, tmp_path):
    return study_in(tmp_path / "here" / "birds", server)


def study_in(folder, server, study_id="1"):
    folder.mkdir(parents=True)
    StudyPlace(str(folder), server.uri("studies/birds")).record()
    for name, content in {
        "study.json": json.dumps({"name": "birds", "study_id": study_id}),
        "space.yaml": "a: 1",
    }.items():
        (folder / name).write_text(content)
    note(folder, "first")
    return folder


def note(folder, text):
    events.append(events_path(folder), {"event": "note", "text": text})


def texts(folder):
    return [event["text"] for event in events.read(events_path(folder))]


def wait_for(condition, within_s=10):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_copy_follows_the_folder_and_makes_the_same_one_elsewhere(folder, server, tmp_path):
    uri = server.uri("studies/birds")
    assert not is_stored(uri)
    with only_driver(folder):
        copy = Mirror(folder)
        copy.start()
        (folder / "report").mkdir()
        (folder / "report" / "report.html").write_text("<p>")
        for path in ("search/run-000/search-000/result.json", "final/confirm-000.npz", ".space.yaml.partial"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text("of a node, or of nobody")
        for number in range(5):
            note(folder, str(number))
            wait_for(lambda number=number: str(number) in texts_of_store(uri))
        (folder / "space.yaml").write_text("a: 2")
        assert copy.finish(10) == ""
    assert is_stored(uri)
    there = find_study(uri, tmp_path / "there")
    assert there == tmp_path / "there" / "birds"
    (there / "driver.lock").unlink()
    files = {path.relative_to(there).as_posix(): path.read_text() for path in there.rglob("*") if path.is_file()}
    assert files.keys() == {"study.json", "space.yaml", "report/report.html", "events.jsonl", "remote.json"}
    assert files["space.yaml"] == "a: 2"
    assert events_path(there).read_bytes() == events_path(folder).read_bytes()
    assert StudyPlace.of(there).uri == uri


def texts_of_store(uri):
    whole = mirror._stored_events(object_store.ObjectStore(uri)).decode()
    return [json.loads(line)["text"] for line in whole.splitlines()]


def test_parts_of_the_events_are_merged_and_hold_every_byte_once(folder, server, monkeypatch):
    monkeypatch.setattr(mirror, "_MERGE", 3)
    copy = Mirror(folder)
    for number in range(13):  # 14 with the first
        copy.copy()
        note(folder, str(number))
    copy.copy()
    stored = object_store.ObjectStore(server.uri("studies/birds"))
    # 14 = 9 + 3 + 2: as digits of the number in base 3
    assert len(stored.names("events")) == 4
    assert mirror._stored_events(stored) == events_path(folder).read_bytes()


def test_half_a_line_is_sent_when_it_is_whole(folder, server):
    copy = Mirror(folder)
    with open(events_path(folder), "ab") as file:
        file.write(b'{"event": "note", ')
    copy.copy()
    assert texts_of_store(server.uri("studies/birds")) == ["first"]
    with open(events_path(folder), "ab") as file:
        file.write(b'"text": "second"}\n')
    copy.copy()
    assert texts_of_store(server.uri("studies/birds")) == ["first", "second"]


def test_a_part_that_was_merged_before_its_pieces_were_deleted_counts_once(folder, server):
    copy = Mirror(folder)
    for number in range(3):
        copy.copy()
        note(folder, str(number))
    whole = events_path(folder).read_bytes()
    object_store.ObjectStore(server.uri("studies/birds")).put_bytes(whole, mirror._Part(0, len(whole)).name)
    assert texts_of_store(server.uri("studies/birds")) == ["first", "0", "1", "2"]


def test_the_newer_of_folder_and_store_counts_and_a_contradiction_is_refused(folder, server, tmp_path):
    uri = server.uri("studies/birds")
    Mirror(folder).copy()
    there = fetch_study(uri, tmp_path / "there")
    note(there, "trained elsewhere")
    assert texts(fetch_study(uri, tmp_path / "there")) == ["first", "trained elsewhere"]
    continued = Mirror(there)
    continued._parts = mirror._chain(continued.store.names())
    continued.copy()
    assert texts(fetch_study(uri, tmp_path / "here")) == ["first", "trained elsewhere"]
    object_store.ObjectStore(uri).delete_below("events")
    note(folder, "trained here")
    Mirror(folder).copy()
    note(there, "and there")
    with pytest.raises(
        MirrorError, match=r"have different events: both have gone on since.* Cure: move .*there/birds away"
    ):
        fetch_study(uri, tmp_path / "there")
    with pytest.raises(MirrorError, match="have different events"), only_driver(there):
        Mirror(there).start()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"name": "birds"}', '{"name": "../birds", "study_id": "1"}', '{"name": "", "study_id": "1"}']
)
def test_a_damaged_study_in_the_store_makes_no_folder(folder, server, tmp_path, content):
    Mirror(folder).copy()
    uri = server.uri("studies/birds")
    object_store.ObjectStore(uri).put_bytes(content.encode(), "study.json")
    with pytest.raises(MirrorError, match="Cure: put it back from a backup"):
        fetch_study(uri, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_another_study_of_the_name_is_not_replaced(folder, server, tmp_path):
    Mirror(folder).copy()
    study_in(tmp_path / "there" / "birds", server, study_id="2")
    with pytest.raises(MirrorError, match=r"there/birds is another study .* Cure: name another folder"):
        fetch_study(server.uri("studies/birds"), tmp_path / "there")
    with pytest.raises(MirrorError, match=r"no study at .*studies/cars.* Cure: sweep --storage ADDRESS"):
        fetch_study(server.uri("studies/cars"), tmp_path / "there")


@pytest.mark.parametrize(
    ("holder", "age_s", "refused"),
    [
        (
            {"host": "another", "pid": 1, "machine": "another"},
            0,
            "by pid 1 on another. Cure: wait.*It was alive .* s ago",
        ),
        ({"host": "another", "pid": 1, "machine": "another"}, 1000, None),
        ({"host": "here", "pid": os.getppid(), "machine": mirror._machine()}, 0, f"by pid {os.getppid()} on here"),
        ({"host": "here", "pid": 2**22 - 1, "machine": mirror._machine()}, 0, None),  # no process has that number
        # Two containers may have the same host name, and processes of their own.
        ({"host": mirror.socket.gethostname(), "pid": 2**22 - 1, "machine": "other boot"}, 0, "is running already"),
    ],
)
def test_a_study_that_a_driver_elsewhere_runs_is_refused(folder, server, monkeypatch, holder, age_s, refused):
    store = object_store.ObjectStore(server.uri("studies/birds"))
    store.put_bytes(json.dumps(holder).encode(), "driver.json")
    info = object_store.ObjectStore.info

    def older(store, name):
        found = info(store, name)
        return found and found._replace(time_s=found.time_s - age_s * (name == "driver.json"))

    monkeypatch.setattr(object_store.ObjectStore, "info", older)
    with only_driver(folder):
        copy = Mirror(folder)
        if refused is None:
            copy.start()
            assert copy.finish(10) == ""
            assert store.info("driver.json") is None
        else:
            with pytest.raises(StudyHeld, match=refused):
                copy.start()
            assert json.loads(store.get_bytes("driver.json")) == holder


def test_a_driver_whose_study_was_taken_over_stops_and_writes_nothing_over(folder, server, tmp_path, monkeypatch):
    """Its machine was asleep, say, for longer than another one waits."""
    monkeypatch.setattr(mirror, "_HOLD_EVERY_S", 0.1)
    lost, uri = [], server.uri("studies/birds")
    with only_driver(folder):
        first = Mirror(folder, on_lost=lambda: lost.append(1))
        first.start()
        wait_for(lambda: is_stored(uri))
        there = fetch_study(uri, tmp_path / "there")
        monkeypatch.setattr(mirror, "DEAD_AFTER_S", -1.0)
        monkeypatch.setattr(mirror, "_machine", lambda: "another")
        with only_driver(there):
            second = Mirror(there)
            second.start()
            wait_for(lambda: lost)
            note(folder, "of the first")
            note(there, "of the second")
            (folder / "space.yaml").write_text("a: first")
            wait_for(lambda: "of the second" in texts_of_store(uri))
            assert "another driver has taken the study over" in first.finish(10)
            assert object_store.ObjectStore(uri).info("driver.json") is not None
            assert second.finish(10) == ""
    assert lost == [1]
    assert texts_of_store(uri) == ["first", "of the second"]
    assert object_store.ObjectStore(uri).get_bytes("space.yaml") == b"a: 1"


def test_what_is_deleted_in_the_folder_does_not_come_back_elsewhere(folder, server, tmp_path):
    """A result is deleted where it is made anew: other weights may have other scores."""
    uri = server.uri("studies/birds")
    for name in ("final/confirm-000.json", "illustrations/a.png", "ranking.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of the old weights")
    copy = Mirror(folder)
    copy.copy()
    (folder / "ranking.json").unlink()
    copy.copy()
    (folder / "final" / "confirm-000.json").unlink()
    (folder / "illustrations" / "a.png").unlink()
    there = fetch_study(uri, tmp_path / "there")
    assert (there / "illustrations" / "a.png").exists()
    assert not (there / "ranking.json").exists()
    with only_driver(folder):
        copy = Mirror(folder)
        copy.start()
        note(folder, "once more")
        assert copy.finish(10) == ""
    fetch_study(uri, tmp_path / "there")
    assert texts(there) == ["first", "once more"]
    assert not [path for path in there.rglob("*") if path.suffix == ".png" or path.name == "confirm-000.json"]


def test_a_store_that_is_away_is_noted_once_and_gets_everything_later(folder, server):
    with only_driver(folder):
        copy = Mirror(folder)
        copy.start()
        server.faults.append(lambda method, path: "error")  # noqa: ARG005
        note(folder, "while it was away")
        wait_for(lambda: len(texts(folder)) == 3, within_s=30)
        time.sleep(0.5)
        (said,) = texts(folder)[2:]
        assert said.startswith("the copy of this study in s3://bucket/studies/birds")
        assert said.endswith("; it is tried again")
        assert "is not complete: " in copy.finish(1)
        server.faults.clear()
        assert copy.finish(30) == ""
    assert texts_of_store(server.uri("studies/birds")) == texts(folder)


HOLDER_OF_A_STUDY = """
import sys
from pathlib import Path
import typer
from raydml.cli import main
from raydml.study.driver import only_driver
from raydml.study.mirror import Mirror

@main.app.command("hold")
def hold():
    folder = Path(sys.argv[2])
    with only_driver(folder):
        copy = Mirror(folder)
        copy.start()
        print("started", flush=True)
        sys.stdin.readline()
        print(copy.finish(1.0))
    raise typer.Exit(3)

main.with_default_command = lambda *_: ["hold"]
main.main()
"""


def test_a_store_that_stalls_holds_up_neither_the_end_of_a_study_nor_that_of_its_process(folder, server, tmp_path):
    """A request has 20 s, twice; where it is under way, the process would wait for it when it ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER_OF_A_STUDY, "hold", str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "started\n"
        wait_for(lambda: is_stored(server.uri("studies/birds")))
        server.faults.append(lambda method, path: 60.0)  # noqa: ARG005
        number = len(server.requests)
        note(folder, "while it stalls")
        wait_for(lambda: len(server.requests) > number)
        began_s = time.monotonic()
        said, _ = process.communicate("\n", timeout=100)
        assert time.monotonic() - began_s < 8
    finally:
        process.kill()
        process.wait(30)
    assert (process.returncode, said.count("is not complete: it does not answer")) == (3, 1)


def test_a_study_without_a_store_has_no_copy(tmp_path):
    assert mirror.up_to_date(tmp_path) == tmp_path
    with pytest.raises(AssertionError):
        Mirror(Path(tmp_path))
