"""Which checkpoints are kept; and that the ranking that is kept decides as one of all trials at each end does."""

import math
import pickle
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydml.study import events
from raydml.study.events import events_path, rank, read_trials
from raydml.study.retention import Retention
from raydml.study.runner import StudyEvents
from tests.study.study_events import ended, epoch, stage_started, started, study_started


def retention_study(folder, values, bytes_each=1000):
    """Trials with two checkpoints each; those with a value below 1 have ended."""
    path = events.events_path(folder)
    for index, value in enumerate(values):
        for number in (1, 2):
            place = folder / "search" / "run-000" / f"search-{index:03d}" / f"checkpoint_{number:06d}"
            place.mkdir(parents=True)
            (place / "state.pt").write_bytes(b"x" * bytes_each)
        for event in [epoch(index, 1, value), *([ended(index, "finished")] if value < 1 else [])]:
            events.append(path, event)
    return lambda: sorted(p.name for p in (folder / "search" / "run-000").glob("*") if any(p.glob("checkpoint_*")))


def test_retention_keeps_the_best_ended_trials_and_every_running_one(tmp_path):
    left = retention_study(tmp_path, [0.1, 0.8, 0.5, 0.9, 2.0])  # the last has not ended
    Retention(tmp_path, "search", keep=2, max_bytes=None).drop_losers()
    assert left() == ["search-001", "search-003", "search-004"]


def test_what_ran_to_its_end_can_be_kept_whatever_its_value(tmp_path):
    left = retention_study(tmp_path, [0.1, 2.0, 2.1, 2.2])
    for number, value in ((1, 0.2), (2, 0.3), (3, 0.4)):
        events.append(events_path(tmp_path), epoch(number, 1, value))
        events.append(events_path(tmp_path), ended(number, "stopped_early"))
    kept = Retention(tmp_path, "search", keep=2, max_bytes=None, all_finished=True)
    pickle.loads(pickle.dumps(kept)).drop_losers()
    assert left() == ["search-000", "search-002", "search-003"], "and of the others the best two"
    Retention(tmp_path, "search", keep=2, max_bytes=None).drop_losers()
    assert left() == ["search-002", "search-003"]


def test_retention_by_bytes_never_drops_the_best(tmp_path):
    left = retention_study(tmp_path, [0.1, 0.8, 0.5])
    Retention(tmp_path, "search", keep=3, max_bytes=4500).drop_losers()  # 2000 bytes a trial: the best two fit
    assert left() == ["search-001", "search-002"]
    Retention(tmp_path, "search", keep=3, max_bytes=10).drop_losers()
    assert left() == ["search-001"]


def test_a_file_that_two_checkpoints_share_counts_once(tmp_path):
    left = retention_study(tmp_path, [0.1, 0.8])  # 2000 bytes each
    for key in ("search-000", "search-001"):
        first, second = checkpoints(tmp_path, key)
        (second / "state.pt").unlink()
        (second / "state.pt").hardlink_to(first / "state.pt")
    Retention(tmp_path, "search", keep=2, max_bytes=2000).drop_losers()
    assert left() == ["search-000", "search-001"]


def test_what_a_fault_has_left_unfinished_is_deleted_with_a_loser(tmp_path):
    retention_study(tmp_path, [0.1, 0.8])
    unfinished = tmp_path / "search" / "run-000" / "search-000" / ".checkpoint_000003.0123.partial"
    unfinished.mkdir()
    Retention(tmp_path, "search", keep=1, max_bytes=None).drop_losers()
    assert not unfinished.exists()


def test_the_events_of_a_run_drop_the_checkpoints_of_losers_even_after_tune_has_pickled_them(tmp_path):
    left = retention_study(tmp_path, [0.1, 0.8, 2.0])  # the last has not ended
    written = StudyEvents(str(tmp_path), "search", keep=1, max_bytes=None)
    for index in (0, 1):
        written._end(SimpleNamespace(config={"run": {"key": f"search-{index:03d}"}}), "finished", None)
        assert left() == ["search-001", "search-002"]
        written = pickle.loads(pickle.dumps(written))
    written._end(SimpleNamespace(config={"run": {"key": "search-002"}}), "finished", None)
    assert left() == ["search-002"]


def checkpoints(folder, key):
    return sorted((folder / "search").glob(f"run-*/{key}/checkpoint_*"))


def retain_by_definition(folder, keep, max_bytes):
    """Rank all trials and measure all checkpoints each time."""
    used = 0
    for place, row in enumerate(rank(trial for trial in read_trials(folder, "search").values() if trial.ended)):
        used += sum(file.stat().st_size for path in checkpoints(folder, row["trial"]) for file in path.iterdir())
        if place and (place >= keep or (max_bytes is not None and used > max_bytes)):
            for path in checkpoints(folder, row["trial"]):
                try:
                    shutil.rmtree(path)
                except OSError as error:
                    events.append(events_path(folder), {"event": "note", "text": f"cannot delete {path}: {error}"})


class Driver:
    """Trials that save, end and go on. by_definition: whether all are ranked at each end."""

    def __init__(self, folder, keep, max_bytes, *, by_definition):
        self.folder, self._keep, self._max_bytes, self._by_definition = folder, keep, max_bytes, by_definition
        self._run, self._cannot_delete, self._remove = -1, set(), shutil.rmtree
        self.resume([], False)

    def write(self, event):
        events.append(events_path(self.folder), event)

    def resume(self, reopened, is_superseded):
        """Begin a new run. reopened: trials that have failed and are tried again."""
        self._run += 1
        self._callback = StudyEvents(str(self.folder), "search", self._keep, self._max_bytes)
        self.write({"event": "interrupted", "signal": 2})
        if is_superseded:
            self.write({"event": "trials_reopened", "stage": "confirm", "trials": [], "was_over": True})
        self.reopen(reopened)
        self.write(study_started())
        self.write({**stage_started(12), "reused": [f"search-{number:03d}" for number in range(1, 6)]})

    def reopen(self, numbers):
        keys = [f"search-{number:03d}" for number in numbers]
        self.write({"event": "trials_reopened", "stage": "search", "trials": keys})

    def pickle(self):
        self._callback = pickle.loads(pickle.dumps(self._callback))

    def step(self):
        self._callback._checked_s = -math.inf
        self._callback._watch = mock.MagicMock()
        self._callback.on_step_end(0, [])

    def start(self, number):
        self.write(started(number))

    def report(self, number, at, value):
        self.write(epoch(number, at, value))

    def save(self, number, size):
        trials = read_trials(self.folder, "search")
        if (key := f"search-{number:03d}") in trials and trials[key].ended:
            return  # a trial that has ended saves nothing more
        trial = self.folder / "search" / f"run-{self._run:03d}" / key
        place = trial / f"checkpoint_{len(list(trial.glob('*'))):06d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / "state.pt").write_bytes(b"x" * size)

    def hold(self, number):
        self._cannot_delete ^= {f"search-{number:03d}"}

    def end(self, number, reason):
        with mock.patch("shutil.rmtree", self._delete):
            if self._by_definition:
                self.write(ended(number, reason))
                retain_by_definition(self.folder, self._keep, self._max_bytes)
            else:
                run = {"run": {"key": f"search-{number:03d}"}}
                self._callback._end(SimpleNamespace(config=run), reason, None)

    def _delete(self, path):
        if path.parent.name in self._cannot_delete:
            raise OSError(f"{path.name} is held")
        self._remove(path)

    def left(self):
        """The checkpoints and the notes that are there now."""
        files = {str(path.relative_to(self.folder)): path.stat().st_size for path in self.folder.rglob("state.pt")}
        notes = [event["text"] for event in events.read(events_path(self.folder)) if event["event"] == "note"]
        return files, [note.replace(str(self.folder), "") for note in notes]


NUMBERS = st.integers(0, 7)
CALLS = st.one_of(
    st.tuples(st.just("start"), NUMBERS),
    st.tuples(st.just("report"), NUMBERS, st.integers(1, 4), st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, math.nan])),
    st.tuples(st.just("save"), NUMBERS, st.sampled_from([0, 10, 20, 50])),
    *(st.tuples(st.just("end"), NUMBERS, st.sampled_from(["finished", "stopped_early", "crashed"])) for _ in range(2)),
    st.tuples(st.just("hold"), NUMBERS),
    st.tuples(st.just("reopen"), st.lists(NUMBERS, max_size=3)),
    st.tuples(st.just("resume"), st.lists(NUMBERS, max_size=2, unique=True), st.booleans()),
    st.sampled_from([("pickle",), ("step",)]),
)


def run_both(keep, max_bytes, calls):
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.fsync"):
        drivers = []
        for name in ("by_definition", "kept"):
            (Path(folder) / name).mkdir()
            drivers.append(Driver(Path(folder) / name, keep, max_bytes, by_definition=name == "by_definition"))
        for name, *arguments in calls:
            for driver in drivers:
                getattr(driver, name)(*arguments)
            expected, found = (driver.left() for driver in drivers)
            assert found == expected, (name, arguments)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.sampled_from([None, 0, 30, 60, 100]), st.lists(CALLS, max_size=50))
def test_the_kept_ranking_decides_as_one_of_all_trials(keep, max_bytes, calls):
    run_both(keep, max_bytes, calls)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.integers(1, 10), st.sampled_from([None, 22, 62, 102]), st.permutations(range(8)),
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=8, max_size=8),
    st.lists(st.sampled_from([10, 20, 50]), min_size=8, max_size=8), st.sets(NUMBERS, max_size=2),
)  # fmt: skip
def test_trials_that_end_in_any_order_leave_what_a_ranking_of_all_leaves(keep, max_bytes, order, values, sizes, held):
    calls = [("hold", number) for number in held]
    for number in order:
        calls += life(number, values[number], sizes[number])
    run_both(keep, max_bytes, calls)


def life(number, value, size):
    """The calls of a trial from its start to its end."""
    saved = [("save", number, size), ("save", number, 1)]
    return [("start", number), ("report", number, 1, value), *saved, ("end", number, "finished")]


@pytest.mark.parametrize(
    "between", [("reopen", [0]), ("resume", [0], False), ("resume", [], True), ("start", 0), ("report", 0, 2, 0.9)]
)
def test_a_trial_that_goes_on_after_its_end_has_another_place(between):
    run_both(1, None, [*life(0, 0.5, 10), between, *life(1, 0.6, 10), *life(2, 0.4, 10)])


def test_a_deletion_that_broke_off_is_made_up_for_at_the_next_end(tmp_path):
    left = retention_study(tmp_path, [0.1, 0.8, 2.0, 3.0])  # the last two have not ended
    retention = Retention(tmp_path, "search", keep=1, max_bytes=None)
    retention.drop_losers()
    events.append(events_path(tmp_path), ended(2, "finished"))
    with mock.patch("shutil.rmtree", side_effect=RuntimeError), pytest.raises(RuntimeError):
        retention.drop_losers()
    assert left() == ["search-001", "search-002", "search-003"]
    events.append(events_path(tmp_path), ended(3, "finished"))
    retention.drop_losers()
    assert left() == ["search-003"]
