"""A search that begins with good points of an earlier one, or of a file."""

import pytest

from raydml.search_space.space import SpaceError, load_space
from raydml.study import events
from raydml.study.draws import TrialDraws
from raydml.study.events import events_path
from raydml.study.folder import StudyError, create_study
from raydml.study.warm_start import with_first_points
from tests.searchers.spaces import space_at
from tests.study.study_events import epoch
from tests.study.test_folder import ROOT


def earlier(folder, values):
    """A study of as many trials as there are values; None is one that has found nothing."""
    space = space_at(folder, "study.name=earlier", f"study.search.num_trials={len(values)}")
    made = create_study(space, storage=folder / "studies", tracking_uri="sqlite:///x.db", space_text="text")
    trials = [TrialDraws(space).draw(index).trial for index in range(len(values))]
    for number, (trial, value) in enumerate(zip(trials, values, strict=True)):
        events.append(
            events_path(made),
            {"event": "trial_started", "trial": f"search-{number:03d}", "stage": "search", "fingerprint": str(number),
             "configuration": "", "config": trial.model_dump(mode="json"), "gpus": 0.0},
        )  # fmt: skip
        if value is not None:
            events.append(events_path(made), epoch(number, 1, value))
    return trials


def test_the_best_trials_of_a_study_come_first_and_best_first(tmp_path):
    trials = earlier(tmp_path, [0.1, 0.9, None, 0.5, 0.7, 0.8, 0.2, 0.6])
    space = with_first_points(space_at(tmp_path, "study.seed=5"), "earlier", tmp_path / "studies")
    begun = [TrialDraws(space).draw(index).trial for index in range(5)]
    expected = [trials[number] for number in (1, 5, 4, 7, 3)]
    assert [trial.loss for trial in begun] == [trial.loss for trial in expected]
    assert [trial.optimizer for trial in begun] == [trial.optimizer for trial in expected]
    assert [trial.miner for trial in begun] == [trial.miner for trial in expected]
    assert {trial.seed for trial in begun} == {5}, "what this space fixes stays as it is"


def test_points_outside_are_named_and_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "raydml")
    trials = earlier(tmp_path, [0.9, 0.8, 0.7])
    narrow = space_at(tmp_path, "trial.optimizer.learning_rate={loguniform: [1.0e-9, 1.0e-6]}")
    with pytest.raises(StudyError, match=r"holds none of its 3 points\. Cure: widen"):
        with_first_points(narrow, "earlier", tmp_path / "studies")
    assert f"search-000 (trial.optimizer.learning_rate = {trials[0].optimizer.learning_rate} is not in" in caplog.text
    caplog.clear()
    only = space_at(tmp_path, f"trial.model.embedding_dim={{choice: [{trials[1].model.embedding_dim}, 8]}}")
    space = with_first_points(only, "earlier", tmp_path / "studies")
    fits = [trial for trial in trials if trial.model.embedding_dim == trials[1].model.embedding_dim]
    assert len(space.study.search.first) == len(fits) < 3
    assert "left out, because the space does not hold it: search-" in caplog.text


def test_a_file_of_points_comes_before_those_of_the_space(tmp_path):
    file = tmp_path / "points.yaml"
    file.write_text("first:\n  - loss: {name: triplet, margin: 0.4}\n  - optimizer: {learning_rate: 2e-3}\n")
    own = "study.search.first=[{model: {embedding_dim: 64}}]"
    space = with_first_points(space_at(tmp_path, own), str(file), tmp_path)
    first, second, third = (TrialDraws(space).draw(index).trial for index in range(3))
    assert first.loss.settings["margin"] == 0.4
    assert second.optimizer.learning_rate == 0.002
    assert third.model.embedding_dim == 64


@pytest.mark.parametrize("text", ["first: {loss: {name: triplet}}", "3", "first: [3]"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "points.yaml"
    file.write_text(text)
    with pytest.raises(SpaceError, match="is no list of configurations"):
        with_first_points(space_at(tmp_path), str(file), tmp_path)


def test_a_study_without_a_value_and_one_that_is_not_there_are_refused(tmp_path):
    earlier(tmp_path, [None])
    with pytest.raises(StudyError, match="no trial of its search has a value of val_map_at_r"):
        with_first_points(space_at(tmp_path), "earlier", tmp_path / "studies")
    with pytest.raises(StudyError, match="no study 'earlyer'"):
        with_first_points(space_at(tmp_path), "earlyer", tmp_path / "studies")


#: What the spaces do not hold of the published points: see the notes that `--start-from` prints.
OUTSIDE = {"cub200": {"soft_triple": "gamma"}, "cars196": {}, "sop": {"nt_xent": "temperature"}}


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_points_of_the_reality_check_are_in_its_spaces(tmp_path, caplog, name):
    caplog.set_level("INFO", "raydml")
    spaces = ROOT / "search_spaces"
    space = load_space(spaces / f"reality_check_{name}.yaml", [f"machine.data_root={tmp_path}"])
    file = spaces / "first" / f"reality_check_{name}.yaml"
    found = with_first_points(space, str(file), tmp_path)
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(left_out) == len(OUTSIDE[name])
    for (loss, key), text in zip(OUTSIDE[name].items(), left_out, strict=True):
        assert f"trial.loss.{key} = " in text, loss
    losses = {(point["loss"]["name"], point["loss"].get("class_beta"), "epsilon" in str(point.get("miner")))
              for point in found.study.search.first}  # fmt: skip
    assert len(losses) == 14 - len(left_out), "each loss of the paper once: two of margin and of multi-similarity"
    # Each is the first trial of its recipe, the grid of which the trials go through in turn.
    draws = TrialDraws(found)
    begun = [draws.draw(index).trial for index in range(draws.num_trials // space.study.search.num_trials)]
    temperatures = [trial.loss.settings["temperature"] for trial in begun if trial.loss.name == "normalized_softmax"]
    assert temperatures == [{"cub200": 0.1087, "cars196": 0.0886, "sop": 0.063}[name]]
