"""The runs of a study that are illustrated, from result files written by hand and checkpoints on the disk."""

from __future__ import annotations

import json

import pytest
import torch

from raydml.study.folder import StudyError
from raydml.study.results import MeanOfRuns, illustrated_runs, mean_of_runs
from raydml.training import checkpoint

METHODS = {"search-000": "plain", "search-001": "plain", "search-002": "plain", "search-003": "mic"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"name": "s", "select_on": "val_map_at_r"}))
    with open(tmp_path / "events.jsonl", "w") as file:
        for key, method in METHODS.items():
            config = {"method": {"name": method}}
            event = {"event": "trial_started", "trial": key, "stage": "search", "fingerprint": key, "config": config}
            file.write(json.dumps(event) + "\n")
    return tmp_path


def write_ranking(folder):
    rows = [{"trial": key, "fingerprint": key, "value": 0.9 - place / 10} for place, key in enumerate(METHODS)]
    rows.append({"trial": "search-004", "fingerprint": "x", "value": None})
    (folder / "ranking.json").write_text(json.dumps(rows))


def write_confirmed(folder):
    """Two folds and two seeds of each configuration; the best run of all is on fold 1."""
    rows = []
    for place, key in enumerate(METHODS):
        runs = [
            {"trial": f"confirm-{4 * place + number:03d}", "fold": number // 2, "value": 0.1 * number - 0.01 * place}
            for number in (0, 1, 3, 2)
        ]
        rows.append({"configuration": key, "from_trial": key, "runs": runs})
    (folder / "confirmed.json").write_text(json.dumps(rows))


def write_checkpoints(folder, stage, *keys):
    weights = {"weight": torch.zeros(1)}
    for key in keys:
        parent = folder / stage / "run-000" / key
        parent.mkdir(parents=True)
        checkpoint.save(parent / "checkpoint_000001", state={}, model_card={}, best_weights=weights)


def test_the_winner_the_runner_up_and_the_best_of_every_other_method_on_the_winners_fold(folder):
    write_ranking(folder)
    write_confirmed(folder)
    write_checkpoints(folder, "confirm", *(f"confirm-{number:03d}" for number in range(16)))
    # Best on fold 1: the last of each four. search-002 is neither second nor the best of its method.
    found = illustrated_runs(folder)
    assert list(found) == ["confirm-003", "confirm-007", "confirm-015"]
    for key, path in found.items():
        assert path == folder / "confirm" / "run-000" / key / "checkpoint_000001"


def test_a_run_without_a_checkpoint_gives_way_to_the_next_of_its_configuration(folder):
    write_ranking(folder)
    write_confirmed(folder)
    write_checkpoints(folder, "confirm", "confirm-003", "confirm-006", "confirm-012")
    # Of search-003 only a run on the other fold is left, which the winner cannot be compared with.
    assert list(illustrated_runs(folder)) == ["confirm-003", "confirm-006"]


def test_without_a_confirm_stage_the_searched_trials_are_illustrated(folder):
    with pytest.raises(StudyError, match="has not ended its search"):
        illustrated_runs(folder)
    write_ranking(folder)
    write_checkpoints(folder, "search", "search-000", "search-001", "search-003")
    assert list(illustrated_runs(folder)) == ["search-000", "search-001", "search-003"]


def test_a_confirmed_run_has_the_mean_of_its_configuration(tmp_path):
    def row(mean, *trials):
        return {"mean": mean, "half_width": 0.1, "runs": [{"trial": trial} for trial in trials]}

    tested = {"metrics": {"map_at_r": {"mean": 0.4, "half_width": None}}, "runs": [{"trial": "confirm-000"}]}
    summary = {"metric": "val_map_at_r", "final": [tested]}
    summary["confirm"] = [row(0.7, "confirm-000", "confirm-001"), row(0.6, "confirm-002"), row(None, "confirm-003")]
    assert mean_of_runs(tmp_path, "confirm-001", "val") is None, "the study has not ended"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert mean_of_runs(tmp_path, "confirm-001", "val") == MeanOfRuns("confirm-001", 2, "val_map_at_r", 0.7, 0.1)
    assert mean_of_runs(tmp_path, "confirm-000", "test") == MeanOfRuns("confirm-000", 1, "test_map_at_r", 0.4, None)
    for trial, on in (("confirm-001", "test"), ("confirm-003", "val"), ("search-000", "val")):
        assert mean_of_runs(tmp_path, trial, on) is None
