"""What a study repairs by itself: lost events, damaged results, damaged test embeddings, a disk that was full."""

import errno
import json
import shutil

import pytest
import torch

from raydml.config.trial import fingerprint
from raydml.study import events, stages
from raydml.study.drawing import trials_of_search
from raydml.study.events import events_path, read_state, read_trials
from raydml.study.folder import StudyError, read_json
from raydml.study.node import needs_of
from raydml.study.process import MachineFault
from raydml.study.remote import StudyPlace
from raydml.study.results import refuse_lost_events
from raydml.study.runner import StudySession, _newest_checkpoint, _put_back_lost_epochs
from raydml.study.stages import run_study
from raydml.training import checkpoint
from tests.cli.commands import refused
from tests.study.in_process import without_ray
from tests.study.repeatable import repeatable
from tests.study.small import leave_pictures_out
from tests.study.test_folder import make

METRIC = "val_map_at_r"


def session_of(folder):
    study = read_json(folder / "study.json")
    place = StudyPlace(str(folder))
    needs = needs_of(place, None, joined=False)
    return StudySession(folder, place, study, study["machine"], METRIC, {}, needs, {}, set())


def with_lost_epochs(folder, trials):
    """The states of the searched trials after their lost epochs were put back."""
    _put_back_lost_epochs(session_of(folder), "search", trials, read_trials(folder, "search"), {})
    return read_trials(folder, "search")


def write_checkpoint(folder, key, epochs, number=0):
    path = folder / "search" / "run-000" / key / f"checkpoint_{number:06d}"
    history = [{"epoch": epoch, METRIC: value, "ended": ""} for epoch, value in epochs.items()]
    weights = {"w": torch.zeros(1)}
    return checkpoint.save(path, state={}, model_card={"epoch": max(epochs)}, best_weights=weights, history=history)


def report(folder, key, epoch, value):
    event = {"event": "epoch", "stage": "search", "trial": key, "epoch": epoch, "metrics": {METRIC: value}}
    events.append(events_path(folder), event)


def test_epochs_that_only_a_checkpoint_has_are_put_back_and_noted(tmp_path):
    folder = make(tmp_path)
    trials = trials_of_search(read_json(folder / "study.json"))
    values = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.4}
    first, second, third = trials
    report(folder, first, 1, 0.1)  # its best epoch, 2, is lost
    write_checkpoint(folder, first, values)
    for epoch in (1, 3, 4):  # a line in the middle is lost, of a trial that has ended
        report(folder, second, epoch, values[epoch])
    ended = {"event": "trial_ended", "stage": "search", "trial": second, "reason": "finished", "error": None}
    events.append(events_path(folder), ended)
    write_checkpoint(folder, second, values)
    report(folder, third, 1, 0.5)  # nothing is missing
    write_checkpoint(folder, third, {1: 0.5})
    states = with_lost_epochs(folder, trials)
    for key in (first, second):
        assert states[key].curve(METRIC) == list(values.items())
        assert (states[key].best, states[key].num_epochs) == (0.9, 4)
    assert states[second].ended == "finished"
    assert states[third].curve(METRIC) == [(1, 0.5)]
    notes = read_state(folder).notes
    assert [note.split(":")[0] for note in notes] == [first, second]
    assert "3 of its epochs were not in events.jsonl, and are taken from its checkpoint" in notes[0]
    size = events_path(folder).stat().st_size
    with_lost_epochs(folder, trials)
    assert events_path(folder).stat().st_size == size, "once is enough"


def test_an_epoch_that_a_signal_left_to_the_checkpoint_is_put_back_without_a_word(tmp_path):
    """The driver is ending, and does not take the last report; the trial is saved all the same."""
    folder = make(tmp_path)
    trials = trials_of_search(read_json(folder / "study.json"))
    key = next(iter(trials))
    report(folder, key, 1, 0.1)
    write_checkpoint(folder, key, {1: 0.1, 2: 0.2})
    assert with_lost_epochs(folder, trials)[key].curve(METRIC) == [(1, 0.1), (2, 0.2)]
    assert read_state(folder).notes == ()


def test_missing_epochs_that_no_checkpoint_has_are_noted(tmp_path):
    folder = make(tmp_path)
    trials = trials_of_search(read_json(folder / "study.json"))
    key = next(iter(trials))
    for epoch in (1, 3):
        report(folder, key, epoch, 0.1)
    with_lost_epochs(folder, trials)
    assert read_state(folder).notes == (
        f"{key}: some of its epochs are missing in events.jsonl, and no checkpoint has them",
    )


def test_damaged_checkpoints_are_named_and_a_start_over_too(tmp_path):
    folder = make(tmp_path)
    old = write_checkpoint(folder, "search-000", {1: 0.1}, number=0)
    new = write_checkpoint(folder, "search-000", {1: 0.1, 2: 0.2}, number=1)
    (new / "state.pt").write_bytes(b"cut")
    state = with_lost_epochs(folder, {"search-000": None})["search-000"]
    assert _newest_checkpoint(session_of(folder), "search", "search-000", state) == old
    assert read_state(folder).notes[-2].startswith(f"search-000: {new / 'state.pt'} is not as it was written")
    assert read_state(folder).notes[-1] == f"search-000: it goes on from {old}"
    (old / "manifest.json").unlink()
    assert _newest_checkpoint(session_of(folder), "search", "search-000", state) is None
    assert read_state(folder).notes[-1] == "search-000: it starts over: no checkpoint is intact"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that has run in this process from its first trial to its report."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        folder = make(
            tmp_path_factory.mktemp("finished"),
            overrides=[
                "study.search={num_trials: 2, scheduler: none}", "study.confirm={top: 1, folds: 2, seeds: 1}",
                "study.finalize={top: 1}", "trial.epochs=1", "machine.device=cpu",
            ],
        )  # fmt: skip
        assert run_study(folder).status == "finished"
    return folder


@pytest.mark.slow
def test_damaged_results_and_embeddings_are_made_anew_with_the_same_numbers(finished, monkeypatch):
    without_ray(monkeypatch)
    names = ("ranking.json", "confirmed.json", "final.json")
    before = {name: read_json(finished / name) for name in names}
    num_reads = len((finished / "test_reads.jsonl").read_text().splitlines())
    tested = sorted((finished / "final").glob("*.npz"))
    assert len(tested) == 2
    tested[0].write_bytes(tested[0].read_bytes()[:100])
    for name in names[1:]:
        (finished / name).write_text((finished / name).read_text()[:-20])
    (finished / "ranking.json").write_bytes(b"\xff" * 100)
    (finished / "summary.json").unlink()
    assert run_study(finished).status == "finished"
    assert repeatable({name: read_json(finished / name) for name in names}) == repeatable(before)
    notes = " ".join(read_state(finished).notes)
    for name in (*names, tested[0].name):
        assert f"{name} is damaged" in notes
    assert f"{tested[0].stem} is tested once more" in notes
    assert len((finished / "test_reads.jsonl").read_text().splitlines()) > num_reads
    assert "illustrations.json" not in notes, "whole pictures are not drawn again"


@pytest.mark.slow
def test_a_full_disk_at_any_write_of_the_driver_stops_the_study_with_one_message(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    folder = make(
        tmp_path,
        overrides=["study.search={num_trials: 2, scheduler: none}", "study.confirm=null", "machine.device=cpu"],
    )
    leave_pictures_out(folder)
    append, written = events.append, []

    def full_at(number):
        def append_or_fail(path, event, **options):
            written.append(event)
            if len(written) > number:  # and no further event either
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            append(path, event, **options)

        return append_or_fail

    for number in (2, 6, 9):
        written.clear()
        monkeypatch.setattr(events, "append", full_at(number))
        with pytest.raises(MachineFault, match=r"events\.jsonl: No space left.*Cure: free disk.* resume the study"):
            run_study(folder)
    monkeypatch.setattr(events, "append", append)
    assert run_study(folder).status == "finished"
    assert {trial.ended for trial in read_trials(folder, "search").values()} == {"finished"}


@pytest.mark.slow
def test_a_report_that_finds_no_room_is_written_by_the_next_resume(finished, monkeypatch):
    without_ray(monkeypatch)
    (finished / "final.json").unlink()

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr(stages, "write_results", full)
    with pytest.raises(MachineFault, match=r"report\.html: No space left on device"):
        run_study(finished)
    monkeypatch.undo()
    without_ray(monkeypatch)
    assert run_study(finished).status == "finished"
    assert json.loads((finished / "summary.json").read_text())
    assert (finished / "report" / "report.html").exists()


def test_a_mistake_of_the_user_is_no_fault_of_the_machine(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    folder = make(tmp_path, overrides=["study.search.num_trials=1", "study.confirm=null", "machine.device=cpu"])

    def mistake(*_arguments):
        raise StudyError("nothing can be ranked")

    monkeypatch.setitem(stages._STAGES, "search", mistake)
    with pytest.raises(StudyError, match=r"^nothing can be ranked$"):
        run_study(folder)


def test_a_study_that_has_lost_its_events_is_refused_before_anything_changes(tmp_path):
    folder = make(tmp_path)
    row = {
        "trial": "search-000",
        "fingerprint": "f",
        "value": 0.5,
        "epoch_of_best": 1,
        "epochs": 1,
        "ended": "finished",
    }
    (folder / "ranking.json").write_text(json.dumps([row]))
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(StudyError, match=r"events\.jsonl has no trial of the stage search.*Cure: put it back"):
        run_study(folder)
    assert {path.name for path in folder.iterdir()} - {"driver.lock"} == before - {"driver.lock"}
    report(folder, "search-000", 1, 0.5)
    refuse_lost_events(folder)


def test_more_trials_are_refused_as_well_where_the_events_are_lost(tmp_path):
    folder = make(tmp_path)
    (folder / "ranking.json").write_text(json.dumps([{"trial": "search-000"}]))
    before = (folder / "study.json").read_bytes()
    said = refused("resume", folder, "--num-trials", "9", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert "events.jsonl has no trial of the stage search" in said
    assert (folder / "study.json").read_bytes() == before
    assert (folder / "ranking.json").exists()


def test_a_stage_that_has_lost_some_of_its_events_is_run_again(tmp_path):
    """The end of events.jsonl is lost, and ranking.json is there: it was written after all that was lost."""
    folder = make(tmp_path)
    rows = [{"trial": key, "fingerprint": key, "value": 0.5} for key in ("search-000", "search-001")]

    def is_run_again(lost):
        (folder / "ranking.json").write_text(json.dumps(rows))
        found = stages._has_lost_events(session_of(folder), "search")
        assert (folder / "ranking.json").exists() is not found
        if lost:
            assert f"has lost {lost}; the result of the stage search is made anew" in read_state(folder).notes[-1]
        return found

    def end(key):
        event = {"event": "trial_ended", "stage": "search", "trial": key, "reason": "finished"}
        events.append(events_path(folder), event)

    report(folder, "search-000", 1, 0.5)
    end("search-000")
    assert is_run_again("search-001, its end")
    report(folder, "search-001", 1, 0.5)
    assert is_run_again("search-001, its end"), "it has not ended"
    end("search-001")
    assert is_run_again("its end")
    events.append(events_path(folder), {"event": "stage_finished", "stage": "search", "ranking": rows})
    assert not is_run_again("")


def test_a_search_whose_stage_lines_are_lost_counts_when_a_later_stage_is_opened_again(tmp_path):
    folder = make(tmp_path)
    report(folder, "search-000", 1, 0.5)
    event = {"stage": "confirm", "trial": "confirm-000"}
    events.append(events_path(folder), {"event": "trial_ended", "reason": "crashed", **event})
    reopened = {"event": "trials_reopened", "stage": "confirm", "trials": ["confirm-000"], "was_over": True}
    events.append(events_path(folder), reopened)
    state = read_state(folder)
    assert [trial.trial for trial in state.of_stage("search")] == ["search-000"]
    assert [trial.trial for trial in state.of_stage("confirm")] == ["confirm-000"]
    reopened = {"event": "trials_reopened", "stage": "search", "trials": ["search-000"], "was_over": True}
    events.append(events_path(folder), reopened)
    assert read_state(folder).of_stage("confirm") == []


def test_a_run_whose_start_was_lost_keeps_its_key(tmp_path):
    """Epochs that were put back from a checkpoint do not say which configuration a run has; the checkpoint does."""
    folder = make(tmp_path)
    trials = list(trials_of_search(read_json(folder / "study.json")).values())
    rows = [{"trial": trial} for trial in trials]

    def epoch_of(key, fingerprint_):
        event = {"event": "epoch", "stage": "confirm", "trial": key, "epoch": 1, "metrics": {METRIC: 0.1}}
        events.append(events_path(folder), event)
        if fingerprint_:
            path = folder / "confirm" / "run-000" / key / "checkpoint_000000"
            card = {"epoch": 1, "fingerprint": fingerprint_}
            checkpoint.save(path, state={}, model_card=card, best_weights={"w": torch.zeros(1)})

    epoch_of("confirm-000", fingerprint(trials[0]))
    epoch_of("confirm-001", "")  # neither a start nor a checkpoint: it has not begun
    by_key = stages.keys_of_runs(folder, "confirm", rows)
    assert [row["trial"] for row in by_key.values()] == trials
    assert list(by_key) == ["confirm-000", "confirm-001", "confirm-002"]
    shutil.rmtree(folder / "confirm")
    epoch_of("confirm-002", fingerprint(trials[0]))  # not in the order of the keys
    assert next(iter(stages.keys_of_runs(folder, "confirm", rows))) == "confirm-002"
