"""A study under faults of most kinds ends as the undisturbed one; and what compares them sees what it has to see."""

import json
import random

import pytest

from raydml.study import events
from raydml.study.events import read_state
from raydml.tracking.store import default_uri, prepare_store
from tests.chaos.study import (
    StudyUnderFaults,
    contradictions,
    differences,
    disturbed,
    lost_epochs,
    results_of,
    runs_of,
    undisturbed,
)

SEED = 20261129


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("faults")
@pytest.mark.timeout(900)
def test_a_study_under_faults_of_most_kinds_ends_as_the_undisturbed_one(tmp_path):
    """One of each group of kinds that end in the same way; ``python -m tests.chaos`` draws from all of them."""
    kinds = ("trial", "gcs", "INT", "group", "checkpoint", "power")
    expected = undisturbed(tmp_path / "undisturbed", pictures=False)
    lines = []
    row = disturbed(
        tmp_path / "disturbed", SEED, kinds, lambda: len(lines) >= len(kinds), expected,
        shown=lines.append, pictures=False,
    )  # fmt: skip
    print(json.dumps(row))
    assert row["wrong"] == []
    assert row["contradictions"] == [], "an epoch that is trained again has its former numbers, bit for bit"
    assert row["duplicates"] == 0
    assert row["runs as undisturbed"]
    assert row["most at once"] <= 3, "what trains, what is written, and one more where that was damaged"


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("faults")
@pytest.mark.timeout(600)
def test_a_study_that_is_killed_while_it_trains_on_further_folds_ends_as_the_undisturbed_one(tmp_path):
    whole = StudyUnderFaults(tmp_path / "whole", random.Random(0), pictures=False)
    whole.run([], lambda: True)
    further = [key for key in read_state(whole.folder).trials if "-fold-" in key]
    assert further
    trials = read_state(whole.folder).trials
    assert all(trials[key].num_epochs == 6 for key in further), "without early stopping"
    finished = [trial for key, trial in trials.items() if key.startswith("search-") and trial.ended == "finished"]
    assert all(len(trial.class_values) == 2 for trial in finished if "-fold-" not in trial.trial)
    killed = StudyUnderFaults(tmp_path / "killed", random.Random(0), pictures=False)
    killed.run_with("command", lambda seen: any(one["event"] == "epoch" and "-fold-" in one["trial"] for one in seen))
    starts = [one["event"] == "study_started" for one in events.read(killed.folder / "events.jsonl")]
    assert sum(starts) == 2
    assert differences(results_of(whole.folder), results_of(killed.folder)) == []
    assert contradictions(killed.folder) == []


def test_a_difference_in_any_result_is_found():
    expected = {"ranking": [1, 2], "search-000 epoch 1": {"val_map_at_r": 0.5}, "ended search-000": "finished"}
    assert differences(expected, dict(expected)) == []
    assert differences(expected, {**expected, "ended search-000": "crashed"}) == ["ended search-000"]
    assert differences(expected, {"ranking": [1, 2]}) == ["ended search-000", "search-000 epoch 1"]
    assert differences(expected, {**expected, "ended search-001": "finished"}) == ["ended search-001"]
    near = {"val_map_at_r": 0.5000000000000001}
    assert differences(expected, {**expected, "search-000 epoch 1": near}) == ["search-000 epoch 1"], "bit for bit"


def test_epochs_that_were_trained_again_are_counted(tmp_path):
    """(trial, epoch, seconds): an epoch with its former time is the report of a checkpoint."""
    reports = [("a", 1, 0.1), ("b", 1, 0.2), ("a", 2, 0.3), ("a", 3, 0.4), ("a", 3, 0.4), ("a", 4, 0.5)]
    reports += [("a", 2, 0.3), ("a", 3, 0.6), ("a", 4, 0.7), ("a", 5, 0.8), ("b", 1, 0.9)]
    for trial, epoch, time_s in reports:
        event = {"event": "epoch", "trial": trial, "epoch": epoch, "metrics": {"epoch_s": time_s}}
        events.append(tmp_path / "events.jsonl", event)
    assert lost_epochs(tmp_path) == (3, 2), "epochs 3 and 4 of a in a row, and epoch 1 of b"


def test_an_epoch_that_is_trained_again_with_another_number_is_found(tmp_path):
    for trial, epoch, value, time_s in (("a", 1, 0.5, 1), ("a", 2, 0.6, 1), ("a", 2, 0.6, 2), ("b", 2, 0.7, 1)):
        metrics = {"val_map_at_r": value, "epoch_s": time_s}
        events.append(tmp_path / "events.jsonl", {"event": "epoch", "trial": trial, "epoch": epoch, "metrics": metrics})
    assert contradictions(tmp_path) == []
    metrics = {"val_map_at_r": 0.6000000000000001, "epoch_s": 3}
    events.append(tmp_path / "events.jsonl", {"event": "epoch", "trial": "a", "epoch": 2, "metrics": metrics})
    assert contradictions(tmp_path) == [("a", 2)]


@pytest.mark.slow
def test_a_run_that_is_left_running_is_seen(tmp_path):
    prepare_store(default_uri(tmp_path), tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(default_uri(tmp_path))
    client.create_run(client.create_experiment("x"), run_name="left")
    assert runs_of(tmp_path) == [("left", "RUNNING")]
