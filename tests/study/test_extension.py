"""More trials for a search: the first stay the same, results are kept aside, and what cannot be extended is refused."""

import json

import filelock
import pytest

from raydml.search_space.space import load_space
from raydml.study import events
from raydml.study.driver import LOCK, StudyHeld
from raydml.study.events import events_path, read_state
from raydml.study.extension import extend_search
from raydml.study.folder import StudyError, create_study
from tests.study.study_events import ended, epoch, stage_started, started, study_started
from tests.study.test_folder import SPACE

TEXT = SPACE % "digits"


def make(folder, *overrides, text=TEXT, name="mini"):
    """A study of 3 trials as `sweep --set` makes it."""
    path = folder / f"{name}.yaml"
    path.write_text(text)
    space = load_space(path, [f"study.name={name}", *overrides])
    return create_study(space, storage=folder / "studies", tracking_uri="sqlite:///x.db", space_text=text)


def specification(folder):
    return json.loads((folder / "study.json").read_text())


def record(folder, *recorded):
    for event in recorded:
        events.append(events_path(folder), event)


def test_a_longer_search_is_the_one_of_a_study_with_this_number_from_the_start(tmp_path):
    options = [
        "trial.loss={choice: [{name: contrastive}, {name: margin}]}",
        "trial.seed={randint: [0, 9]}",
        "study.seed=5",
    ]
    folder = make(tmp_path, *options)
    before = specification(folder)
    extend_search(folder, 7)
    after = specification(folder)
    assert after["trials"][:3] == before["trials"], "options of the command count as well"
    whole = specification(make(tmp_path / "studies", *options, "study.search.num_trials=7"))
    assert [after[key] for key in ("trials", "study", "specification")] == [
        whole[key] for key in ("trials", "study", "specification")
    ]
    assert {**after, "trials": 0, "study": 0, "specification": 0} == {
        **before,
        "trials": 0,
        "study": 0,
        "specification": 0,
    }


def test_a_grid_gets_whole_rounds(tmp_path):
    options = ["trial.model.embedding_dim={grid: [4, 8]}"]
    folder = make(tmp_path, *options)
    before = specification(folder)["trials"]
    extend_search(folder, 5)
    after = specification(folder)["trials"]
    assert (len(before), len(after), after[:6] == before) == (6, 10, True)
    assert [trial["model"]["embedding_dim"] for trial in after] == [4, 8] * 5


@pytest.mark.parametrize("num_trials", [3, 2])
def test_the_same_number_changes_nothing_and_a_smaller_one_is_refused(tmp_path, num_trials):
    folder = make(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()} | {"driver.lock": b""}
    if num_trials == 2:
        with pytest.raises(StudyError, match=r"--num-trials = 2: study 'mini' has 3 trials already"):
            extend_search(folder, num_trials)
    else:
        extend_search(folder, num_trials)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_older_study_is_extended_from_its_space_unless_that_gives_other_trials(tmp_path):
    folder = make(tmp_path)
    (folder / "resolved_space.json").unlink()
    before = specification(folder)["trials"]
    extend_search(folder, 4)
    assert specification(folder)["trials"][:3] == before
    other = make(tmp_path, "trial.loss={name: margin}", name="other")
    (other / "resolved_space.json").unlink()  # an older study did not record that option
    with pytest.raises(
        StudyError, match=r"with 4 trials its space would give other trials than the 3.*Cure: a new study"
    ):
        extend_search(other, 4)
    assert len(specification(other)["trials"]) == 3


def test_a_space_with_too_few_configurations_and_a_running_study_are_refused(tmp_path):
    few = make(tmp_path, "trial.optimizer.learning_rate={choice: [0.1, 0.2, 0.3]}", name="few")
    with pytest.raises(StudyError, match=r"'few' cannot have 4 trials: (.|\n)*only 3 distinct configuration"):
        extend_search(few, 4)
    with filelock.FileLock(few / LOCK), pytest.raises(StudyHeld, match="is running already, by another process"):
        extend_search(few, 4)


def test_results_are_kept_aside_and_the_later_stages_have_not_begun(tmp_path):
    folder = make(tmp_path)
    searched = [event for n in range(3) for event in (started(n), epoch(n, 1, 0.5), ended(n, "finished"))]
    confirmed = [
        stage_started(1, stage="confirm") | {"configurations": ["a1"]},
        started(0, stage="confirm") | {"configuration": "a1"},
        epoch(0, 1, 0.7, stage="confirm"),
        ended(0, "finished", stage="confirm"),
        {"event": "test_read", "stage": "finalize", "trial": "confirm-000"},
        {"event": "study_finished"},
    ]
    record(folder, study_started(), stage_started(3), *searched, *confirmed)
    for name in ("ranking.json", "confirmed.json", "refit.json", "final.json"):
        (folder / name).write_text("[]")
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("old")
    extend_search(folder, 5)
    kept = folder / "earlier" / "3-trials"
    names = ["confirmed.json", "final.json", "ranking.json", "refit.json", "report"]
    assert sorted(path.name for path in kept.iterdir()) == names
    assert not (folder / "ranking.json").exists()
    state = read_state(folder)
    assert (state.state, list(state.stages), state.num_tested, len(state.test_reads)) == (
        "interrupted",
        ["search"],
        0,
        1,
    )
    assert [len(state.of_stage(stage)) for stage in ("search", "confirm")] == [3, 0]
    # The confirmation begins again: the run that it repeats counts once more, and its configuration keeps its letter.
    record(folder, stage_started(2, stage="confirm") | {"configurations": ["b2", "a1"], "reused": ["confirm-000"]})
    state = read_state(folder)
    assert [trial.trial for trial in state.of_stage("confirm")] == ["confirm-000"]
    assert state.configurations == ("a1", "b2")


def test_trials_that_a_time_limit_cut_or_kept_from_starting_run_with_the_same_number(tmp_path):
    folder = make(tmp_path)
    record(folder, study_started(), stage_started(3), started(0), epoch(0, 1, 0.5), ended(0, "finished"))
    record(folder, started(1), ended(1, "time"), {"event": "study_finished"})
    (folder / "ranking.json").write_text("[]")
    extend_search(folder, 3)
    state = read_state(folder)
    assert [trial.ended for trial in state.of_stage("search")] == ["finished", ""]
    assert (folder / "earlier" / "2-trials" / "ranking.json").exists()
    assert len(specification(folder)["trials"]) == 3


def test_a_trial_that_trains_on_is_tested_again_and_earlier_results_are_never_replaced(tmp_path):
    folder = make(tmp_path)
    (folder / "final").mkdir()
    record(folder, study_started(), stage_started(3), started(0), epoch(0, 1, 0.5), ended(0, "finished"))
    for name in ("first", "second"):
        record(folder, started(1), ended(1, "time"), {"event": "study_finished"})
        for file in ("ranking.json", "final/search-000.json", "final/search-001.json", "final/search-001.npz"):
            (folder / file).write_text(f'"{name}"')
        extend_search(folder, 3)
        assert sorted(path.name for path in (folder / "final").iterdir()) == ["search-000.json"], "its weights stay"
    for kept, name in (("2-trials", "first"), ("2-trials-2", "second")):
        for file in ("ranking.json", "final/search-001.json", "final/search-001.npz"):
            assert (folder / "earlier" / kept / file).read_text() == f'"{name}"'
