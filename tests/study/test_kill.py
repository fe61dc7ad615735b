"""The driver is killed without warning, and the resumed study ends with the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydml.study import events

pytestmark = pytest.mark.xdist_group("ray")
LAUNCH = Path(__file__).parents[2] / "launch.py"
OPTIONS = ["--num-trials", "6", "--max-epochs", "6", "--scheduler", "sync", "--set", "study.confirm.seeds=1"]
OPTIONS += ["--set", "study.confirm.folds=2", "--set", "study.refit={seeds: 2}"]


def sweep(storage, log):
    space = LAUNCH.parent / "search_spaces" / "digits.yaml"
    command = [sys.executable, str(LAUNCH), "sweep", str(space), "--storage", str(storage), *OPTIONS]
    # In a session of its own: the kill then hits the driver alone, and a terminal's Ctrl-C does not.
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def resume(storage, log):
    command = [sys.executable, str(LAUNCH), "resume", "digits", "--storage", str(storage)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def results(storage):
    folder = storage / "digits"
    names = ("ranking", "confirmed", "refit", "final")
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    curves = {}
    for event in events.read(folder / "events.jsonl"):
        if event["event"] == "epoch":
            metric = "train_loss" if event["stage"] == "refit" else "val_map_at_r"
            curves.setdefault((event["stage"], event["trial"]), {})[event["epoch"]] = event["metrics"][metric]
    return read, curves


def wait_for_epochs(path, number, process, timeout_s=240, stage=None):
    """Wait for so many reported epochs, of a stage or of all."""

    def is_one(event):
        return event["event"] == "epoch" and stage in (None, event["stage"])

    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and sum(map(is_one, events.read(path))) >= number:
            return
        time.sleep(0.1)


def run_statuses(storage):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [(run.info.run_name, run.info.status) for run in client.search_runs(experiments)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_kills_at_random_moments_and_one_in_the_refit_change_no_number(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        assert sweep(tmp_path / "unbroken", log).wait(400) == 0
        expected, expected_curves = results(tmp_path / "unbroken")
        num_epochs = sum(len(curve) for curve in expected_curves.values())
        path = tmp_path / "broken" / "digits" / "events.jsonl"
        draw = random.Random(20261121)
        process = sweep(tmp_path / "broken", log)
        for part in range(3):
            # Somewhere in the part'th quarter of all epochs, and then at any phase of one.
            wait_for_epochs(path, int(num_epochs * (part + draw.random()) / 4), process)
            time.sleep(draw.random())
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
            process = resume(tmp_path / "broken", log)
        wait_for_epochs(path, 1, process, stage="refit")
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        process = resume(tmp_path / "broken", log)
        assert process.wait(400) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    found, found_curves = results(tmp_path / "broken")
    assert found_curves == expected_curves
    assert found["ranking"] == expected["ranking"]
    assert found["confirmed"] == expected["confirmed"]
    assert found["refit"] == expected["refit"]
    for part in ("metrics", "refit"):
        assert [row[part] for row in found["final"]] == [row[part] for row in expected["final"]]
    # No run twice, none left running.
    assert sorted(run_statuses(tmp_path / "broken")) == sorted(run_statuses(tmp_path / "unbroken"))
    assert {status for _, status in run_statuses(tmp_path / "broken")} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupt_stops_cleanly_and_says_how_to_go_on(tmp_path):
    with open(tmp_path / "log.txt", "w") as log:
        process = sweep(tmp_path, log)
        wait_for_epochs(tmp_path / "digits" / "events.jsonl", 3, process)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert "resume" in (tmp_path / "log.txt").read_text()
        assert "RUNNING" not in {status for _, status in run_statuses(tmp_path)}
        assert resume(tmp_path, log).wait(400) == 0
    assert {status for _, status in run_statuses(tmp_path)} == {"FINISHED"}


def test_the_kill_test_would_see_a_run_left_running(tmp_path):
    from raydml.tracking.store import default_uri, prepare_store

    prepare_store(default_uri(tmp_path), tmp_path)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(default_uri(tmp_path))
    client.create_run(client.create_experiment("x"))
    assert [status for _, status in run_statuses(tmp_path)] == ["RUNNING"]
