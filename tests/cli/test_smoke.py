"""`sweep SPACE --smoke` on a real Ray, and its refusals."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.cli.commands import done, refused

SPACE = Path(__file__).parents[2] / "search_spaces" / "image_folder.yaml"


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_smoke_run_ends_with_one_line_and_is_marked_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing must be sent there
    result = done("sweep", SPACE, "--smoke", "--storage", tmp_path, "--stages", "search,confirm", "--name", "x")
    last = result.output.splitlines()[-1]
    assert last.startswith("recipe runs: ")
    assert "peak memory" in last
    assert last.endswith("s per step")
    study = json.loads((tmp_path / "x-smoke" / "study.json").read_text())
    assert study["smoke"] is True
    assert "none of its numbers is a result" in (tmp_path / "x-smoke" / "summary.md").read_text()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.tags["raydml.smoke"] == "true"
    assert [model.name for model in client.search_registered_models()] == ["raydml-x-smoke"]


def test_options_that_are_for_a_study_are_refused(tmp_path):
    for option in (["--data-root", tmp_path], ["--dry-run"], ["--time", "5m"]):
        assert f"and {option[0]} is for a study" in refused("sweep", SPACE, "--smoke", *option)
