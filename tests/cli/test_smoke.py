"""`sweep SPACE --smoke` on a real Ray, and its refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from mlflow import MlflowClient

from raydml.cli.arguments import new_console
from raydml.cli.main import app
from raydml.cli.smoke import SmokeError, miniature, show_smoke_outcome
from raydml.search_space.space import load_space
from raydml.study.events import read_state
from tests.cli.commands import refused
from tests.study.small import ONE_PROCESS, leave_pictures_out
from tests.study.study_events import ended, epoch, stage_started, started, study_started

SPACE = Path(__file__).parents[2] / "search_spaces" / "image_folder.yaml"


def smoke_run(*arguments):
    """Run `sweep --smoke` and return the last line that it prints.

    In a process of its own: Ray keeps the token of its first cluster for as long as a process lives.
    """
    command = [sys.executable, SPACE.parents[1] / "launch.py", "sweep", "--smoke", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_smoke_run_ends_with_one_line_and_is_marked_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing must be sent there
    last = smoke_run(SPACE, "--storage", tmp_path, "--stages", "search,confirm", "--name", "x", *ONE_PROCESS)
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


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_published_recipe_trains_refits_on_all_classes_and_tests_them_without_a_search(tmp_path):
    space = SPACE.with_name("mdr_cub200.yaml")
    tiny = ("--set", "trial.model.backbone=convnet", "--set", "trial.model.weights=none", "--set", "machine.device=cpu")
    folder = leave_pictures_out(tmp_path / "mdr_cub200-published-smoke")
    last = smoke_run(space, "--recipe", "published", "--storage", tmp_path, *tiny)
    assert last.startswith("recipe runs: 2 trials, peak memory")
    state = read_state(folder)
    assert dict.fromkeys(trial.stage for trial in state.trials.values()) == {"refit": None}
    assert {key: trial.ended for key, trial in state.trials.items()} == {
        "refit-000": "finished",
        "refit-001": "finished",
    }
    (split,) = {json.dumps(parts) for parts in json.loads((folder / "split.json").read_text()).values()}
    assert {part: len(classes) for part, classes in json.loads(split).items()} == {"train": 8, "val": 0, "test": 8}
    assert not (folder / "ranking.json").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["plan"]["stages"] == ["refit", "finalize"]
    (row,) = json.loads((folder / "final.json").read_text())
    assert (row["runs"], row["metrics"], row["from_trial"]) == ({}, {}, "search-000")
    refit = row["refit"]
    assert (list(refit["runs"]), refit["epochs"], refit["classes"]) == (["refit-000", "refit-001"], 2, "development")
    assert set(refit["metrics"]["recall_at_1"]) == {"mean", "half_width"}
    # Each model opens the test classes once; the pictures are of embeddings that were kept.
    reads = [json.loads(line) for line in (folder / "test_reads.jsonl").read_text().splitlines()]
    opened = [Path(read["checkpoint"]).parent.name for read in reads if read["purpose"] == "finalize"]
    assert sorted(opened) == ["refit-000", "refit-001"]


def test_options_that_are_for_a_study_are_refused(tmp_path):
    for option in (["--data-root", tmp_path], ["--dry-run"], ["--time", "5m"]):
        assert f"and {option[0]} is for a study" in refused("sweep", SPACE, "--smoke", *option)


def typed_options(*options):
    """Return the context of `sweep SPACE --smoke` with more options."""
    sweep = typer.main.get_command(app).commands["sweep"]
    return sweep.make_context("sweep", [str(SPACE), "--smoke", *map(str, options)])


def test_a_smoke_run_uses_a_storage_and_a_server_only_where_the_command_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    space, server = load_space(SPACE.with_name("digits.yaml")), "http://127.0.0.1:9"
    with miniature(typed_options("--storage", tmp_path), space, tmp_path, server) as small:
        assert (small.storage, small.tracking_uri) == (tmp_path, None)
    assert small.path.exists()
    with miniature(typed_options("--tracking-uri", server), space, tmp_path, server) as small:
        assert (small.storage.parent, small.tracking_uri) == (tmp_path / "temporary", server)
    assert not small.storage.exists()


def write_events(folder, *endings):
    """Write the events of a search of one trial that finished, and of a confirmation with these endings."""
    events = [study_started(), stage_started(1), started(0, epochs=1), epoch(0, 1, 0.5), ended(0, "finished")]
    events.append(stage_started(len(endings), stage="confirm"))
    for number, ending in enumerate(endings):
        events += [started(number, epochs=1, stage="confirm"), ended(number, ending, stage="confirm")]
    for event in events:
        if event["event"] == "trial_started":
            event["config"]["sampler"] = {"name": "uniform", "batch_size": 4}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": 1.0} | event) + "\n" for event in events))


def test_a_smoke_run_fails_where_no_trial_of_a_stage_runs_to_its_end(tmp_path, capsys):
    write_events(tmp_path, "collapsed", "non_finite_loss")
    with pytest.raises(SmokeError, match=r"(?s)no trial of the stage confirm ran to its end.*: collapsed.*Cure: "):
        show_smoke_outcome(tmp_path, new_console())
    write_events(tmp_path, "collapsed", "finished")
    show_smoke_outcome(tmp_path, new_console())
    assert "recipe runs: 3 trials (1 ended early), peak memory" in capsys.readouterr().out


def test_the_temporary_folder_is_kept_where_a_smoke_run_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(*endings):
        with miniature(typed_options(), load_space(SPACE.with_name("digits.yaml")), Path("studies"), None) as small:
            write_events(small.storage / "study", *endings)
            show_smoke_outcome(small.storage / "study", new_console())

    run("finished")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SmokeError, match="1 of 3 trials crashed") as failure:
        run("crashed", "finished")
    (events,) = tmp_path.glob("raydml-smoke-*/study/events.jsonl")
    assert f"All events: {events}" in str(failure.value)
    assert "The temporary folder of this smoke run is kept: " in capsys.readouterr().out
