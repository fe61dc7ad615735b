"""Failing trials: which end with which label, which run again, and what ends a stage instead."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.execution.tune_controller import TuneController
from ray.tune.result import SHOULD_CHECKPOINT

from raydml.data.catalog import DataError
from raydml.study import events
from raydml.study.events import events_path, read_state
from raydml.study.faults import FaultStop, fault_in, fault_of, faults_named, is_without_memory
from raydml.study.process import MachineFault
from raydml.study.runner import StudyEvents, _forgive, count_deaths_once
from raydml.training import checkpoint
from tests.study.small import leave_pictures_out
from tests.study.test_folder import image_folder

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).parent / "faulty"


def chained(outer, inner):
    try:
        try:
            raise inner
        except type(inner) as error:
            raise outer from error
    except type(outer) as error:
        return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "/a: No space left on device. Cure: free disk space,"),
        (OSError(errno.EFBIG, "File too large", "/a"), "/a: File too large. Cure: write to another disk"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle. Cure: mount the network folder again"),
        (DataError("2 images are missing"), "2 images are missing"),
        (chained(RuntimeError("torch"), OSError(errno.EDQUOT, "Quota", "/b")), "/b: Quota"),
        (RayTaskError("f", "traceback", DataError("gone")), "gone"),
        (RayTaskError("f", "traceback", DataError("gone")).as_instanceof_cause(), "gone"),
        (OSError(errno.ENOENT, "No such file", "/c"), None),
        (ValueError("a trial's own"), None),
    ],
)
def test_a_fault_of_the_machine_is_told_from_one_of_the_trial(error, words):
    found = fault_of(error)
    assert found is None if words is None else found.startswith(words)


def test_a_fault_is_read_from_the_text_of_a_worker():
    with pytest.raises(MachineFault) as raised, faults_named():
        raise DataError("images are\nmissing: a.png")
    text = f"ray::TrialActor.train()\n  File ...\nraydml.study.faults.MachineFault: {raised.value}\n"
    assert fault_in(text) == "images are missing: a.png"
    assert fault_in("RuntimeError: boom") is None
    # Of Ray's copy of a checkpoint to a full storage, as pyarrow words it.
    full = "Traceback:\n  File fs.py\nOSError: [Errno 28] Error writing bytes to file. Detail: [errno 28] No space left"
    found = fault_in(full)
    assert found.startswith("Error writing bytes to file. Detail: [errno 28] No space left. Cure: free disk space, or")
    assert fault_in("OSError: [Errno 13] Permission denied") is None
    with pytest.raises(ZeroDivisionError), faults_named():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_lack_of_memory_has_many_words(error, expected):
    assert is_without_memory(error) is expected


def tune_trial(key):
    """A trial as Tune gives it to its callbacks, as far as they read it."""
    run = {"key": key, "fingerprint": "f", "configuration": "f", "trial": {"data": {"split": {"fold": 0}}, "seed": 0}}
    metadata = SimpleNamespace(num_failures=0)
    return SimpleNamespace(
        config={"run": run},
        run_metadata=metadata,
        temporary_state=SimpleNamespace(ray_actor=None),
        error_file=None,
        last_result={},
        max_failures=2,
    )


def test_only_an_epoch_beyond_the_last_failure_begins_a_new_row_of_retries(tmp_path):
    callback, trial = StudyEvents(str(tmp_path), "search", None, None), tune_trial("search-000")

    def report(epoch):
        trial.last_result = {"epoch": epoch, "record": {"epoch": epoch, "val_map_at_r": 0.5, "ended": ""}}
        callback.on_trial_result(0, [], trial, trial.last_result)

    report(1)
    report(2)  # reported, and then its save fails, again and again
    for failures in (1, 2):
        trial.run_metadata.num_failures = failures
        callback.on_trial_recover(0, [], trial)
        report(2)
        assert trial.run_metadata.num_failures == failures
    report(3)
    assert trial.run_metadata.num_failures == 0


def test_tune_waits_for_the_disk_only_where_a_decision_hangs_on_it(tmp_path, monkeypatch):
    """An epoch that no trial is compared at is on the disk with the next event that is, at the latest with the end."""
    path, synced = events_path(tmp_path), []
    monkeypatch.setattr(events.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    callback, trial = StudyEvents(str(tmp_path), "search", None, None), tune_trial("search-000")

    def report(epoch, *, is_rung):
        record = {"epoch": epoch, "val_map_at_r": 0.5, "ended": ""}
        trial.last_result = {"epoch": epoch, "record": record, SHOULD_CHECKPOINT: is_rung}
        callback.on_trial_result(0, [], trial, trial.last_result)

    report(1, is_rung=False)
    assert synced == []
    report(2, is_rung=True)
    assert synced == [path.stat().st_size]
    report(3, is_rung=False)
    assert len(synced) == 1
    callback.on_trial_complete(0, [], trial)
    assert synced[1:] == [path.stat().st_size]


def test_a_trial_that_fails_before_each_checkpoint_is_not_tried_for_ever(tmp_path):
    """It comes to another epoch each time, never beyond the furthest one."""
    callback, trial = StudyEvents(str(tmp_path), "search", None, None), tune_trial("search-000")
    for furthest in (9, 7, 9, 8):
        for epoch in range(1, furthest + 1):
            trial.last_result = {"epoch": epoch, "record": {"epoch": epoch, "val_map_at_r": 0.5, "ended": ""}}
            callback.on_trial_result(0, [], trial, trial.last_result)
        trial.run_metadata.num_failures += 1
        callback.on_trial_recover(0, [], trial)
    assert trial.run_metadata.num_failures == 4


@pytest.mark.parametrize("saved", [None, 2, 3])
def test_a_trial_that_crashes_is_ranked_by_weights_that_exist(tmp_path, saved):
    """Its best epoch is the last one. Without its weights the winner could be neither tested nor exported."""
    values = {1: 0.1, 2: 0.2, 3: 0.9}
    callback, trial = StudyEvents(str(tmp_path), "search", None, None), tune_trial("search-000")
    events.append(events_path(tmp_path), {"event": "study_started", "study": "s", "config": {}})
    for epoch, value in values.items():
        trial.last_result = {"epoch": epoch, "record": {"epoch": epoch, "val_map_at_r": value, "ended": ""}}
        callback.on_trial_result(0, [], trial, trial.last_result)
    if saved is not None:
        folder = tmp_path / "search" / "run-000" / "search-000" / f"checkpoint_{saved:06d}"
        checkpoint.save(folder, state={}, model_card={"epoch": saved}, best_weights={"w": torch.zeros(1)})
    callback.on_trial_error(0, [], trial)
    state = read_state(tmp_path).trials["search-000"]
    assert state.ended == "crashed"
    assert (state.best, state.num_epochs) == {None: (None, 0), 2: (0.2, 2), 3: (0.9, 3)}[saved]
    notes = read_state(tmp_path).notes
    lost = f"search-000: its epochs after epoch {saved or 0} do not count: no checkpoint has their weights"
    assert notes == (() if saved == 3 else (lost,))
    assert len(events.read(events_path(tmp_path))) == 5 + (0 if saved == 3 else 2), "study, epochs, the end"


def failed_with(tmp_path, text):
    trial = tune_trial("search-000")
    trial.error_file = str(tmp_path / "error.txt")
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at x)\n{text}\n")
    return trial


def test_a_worker_that_ray_ends_for_its_memory_runs_again_alone(tmp_path):
    trial = failed_with(
        tmp_path, "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory"
    )
    StudyEvents(str(tmp_path), "search", None, None).on_trial_error(0, [], trial)
    state = read_state(tmp_path).trials["search-000"]
    assert (state.ended, state.retry_reasons) == ("", ("out_of_memory",))
    StudyEvents(str(tmp_path), "search", None, None, alone=True).on_trial_error(0, [], trial)
    assert read_state(tmp_path).trials["search-000"].ended == "out_of_memory"


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("The actor died because its node has died. Node Id: 1f", 0),
        ("The actor never ran - it was cancelled before it started running.", 0),
        ("The actor died because its node has died. Node Id: 1f\nThe actor never ran - it was cancelled before", 0),
        ("The actor 59 is unavailable: The actor is temporarily unavailable: RpcError: Socket closed rpc_code: 14.", 0),
        # While it is set up, Ray says both.
        ("The actor is dead because its worker process has died. Worker exit type: X\nThe actor never ran - it was", 1),
        ("RuntimeError: on order", 1),
    ],
)
def test_the_loss_of_a_node_is_no_failure_of_its_trials(text, counted):
    """Tune adds one, and then compares the failures with the tries."""
    trial = tune_trial("search-000")
    _forgive(trial, RuntimeError(text))
    assert trial.run_metadata.num_failures + 1 == counted


def test_a_trial_that_moves_has_not_failed_once():
    trial = tune_trial("search-000")
    trial.moves = True
    for counted in (0, 1):
        _forgive(trial, RuntimeError("it was killed"))
        assert trial.run_metadata.num_failures + 1 == counted
        trial.run_metadata.num_failures += 1


def test_a_death_that_ray_does_not_count_is_not_forgiven():
    trial = tune_trial("search-000")
    _forgive(trial, RayActorError(error_msg="its node has died", preempted=True))
    assert trial.run_metadata.num_failures == 0


def test_a_trial_that_ray_never_starts_stops_the_stage(tmp_path):
    """Else it would be tried for ever: the loss of a node is no failure of a trial."""
    stop = FaultStop()
    callback = StudyEvents(str(tmp_path), "search", None, None, stop=stop)
    trial = failed_with(tmp_path, "The actor never ran - it was cancelled before it started running.")
    for _ in range(9):
        callback.on_trial_recover(0, [], trial)
    callback.on_trial_result(0, [], trial, {"record": {"epoch": 1, "epoch_s": 0.1}})
    for _ in range(9):
        callback.on_trial_recover(0, [], trial)
    lost = failed_with(tmp_path, "The actor died because its node has died. Node Id: 1f\nThe actor never ran")
    callback.on_trial_recover(0, [], lost)
    assert not stop.fault, "nodes may be lost for a week"
    callback.on_trial_recover(0, [], failed_with(tmp_path, "The actor never ran - it was cancelled"))
    assert "search-000 10 times" in stop.fault
    assert "Cure: " in stop.fault
    assert not read_state(tmp_path).trials["search-000"].ended


def test_the_death_of_an_actor_with_two_calls_is_one_failure():
    count_deaths_once()
    count_deaths_once()
    seen = []
    controller = SimpleNamespace(
        _fail_fast=False, RAISE="raise", _print_trial_errors=False, _resetting_trials=MagicMock(),
        _process_trial_failure=lambda trial, exception: seen.append((trial.status, exception)),
    )  # fmt: skip
    for status in ("RUNNING", "PENDING"):
        trial = SimpleNamespace(status=status, PENDING="PENDING")
        TuneController._trial_task_failure(controller, trial, RayActorError())
    assert [status for status, _ in seen] == ["RUNNING"]


TAKES_OVER = """\
import os, signal, sys
from pathlib import Path
from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from raydml.study.cluster import connected
from raydml.study.runner import StudyEvents, count_deaths_once
from raydml.training import checkpoint
from raydml.study.scheduler import trial_key

HOW, FOLDER = sys.argv[1], sys.argv[2]
DATA = {"data": {"split": {"fold": None}}}


class Trial(tune.Trainable):
    def setup(self, config):
        pass

    def reset_config(self, config):
        first = not (mark := Path(FOLDER) / "failed").exists()
        if config["run"]["key"] == "search-001" and (first or HOW == "raise"):
            mark.touch()
            if HOW == "raise":
                raise ValueError("the plugin refuses")
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def step(self):
        return {"epoch": 1, "record": {"epoch": 1, "epoch_s": 0.1, "ended": "finished"}, "done": True}

    def save_checkpoint(self, folder):
        return {}


runs = [
    {"key": f"search-{n:03d}", "fingerprint": "f", "configuration": "c", "gpus": 0.0, "trial": {**DATA, "seed": 0}}
    for n in range(3)
]
count_deaths_once()
with connected(None):
    Tuner(
        tune.with_resources(Trial, {"cpu": os.cpu_count()}),
        param_space={"run": tune.grid_search(runs)},
        tune_config=TuneConfig(reuse_actors=True, trial_name_creator=trial_key, trial_dirname_creator=trial_key),
        run_config=RunConfig(
            storage_path=FOLDER, name="run-000", verbose=0, failure_config=FailureConfig(max_failures=1),
            callbacks=[StudyEvents(FOLDER, "search", None, None)],
        ),
    ).fit()
"""


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize(("how", "end"), [("raise", "crashed"), ("kill", "finished")])
def test_a_trial_that_fails_as_it_takes_over_an_actor_is_retried_or_ends(tmp_path, how, end):
    """It is in line meanwhile, and Tune waits for its actor: an error that is dropped there is waited for for ever."""
    command = [sys.executable, "-c", TAKES_OVER, how, str(tmp_path)]
    environment = {**os.environ, "RAY_AIR_NEW_OUTPUT": "0"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120, capture_output=True)
    assert {key: trial.ended for key, trial in read_state(tmp_path).trials.items()} == {
        "search-000": "finished",
        "search-001": end,
        "search-002": "finished",
    }


SPACE = """\
study:
  name: faulty
  search: {num_trials: 1, scheduler: none}
  max_retries: 1
machine: {data_root: %s, cpus_per_trial: 1, stuck_after_s: 2}
trial:
  data: {name: image_folder, resize_px: 16, crop_px: 16}
  model: {backbone: convnet, weights: none, embedding_dim: 8}
  loss: {name: contrastive}
  sampler: {name: class_balanced, classes_per_batch: 2, images_per_class: 2}
  optimizer: {name: adam, learning_rate: {grid: [0.001, 0.002, 0.003, 0.004, 0.005, 0.006]}}
  epochs: 3
"""


def launch(folder, *arguments, plan=(), timeout_s=280):
    leave_pictures_out(folder / "studies" / "faulty")
    (folder / "plan.json").write_text(json.dumps(plan))
    path = os.pathsep.join([str(FAULTY), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "FAULT_PLAN": str(folder / "plan.json")}
    return subprocess.run(
        [sys.executable, "launch.py", *map(str, arguments), "--storage", str(folder / "studies")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


@pytest.fixture
def space(tmp_path):
    image_folder(tmp_path / "images")
    (tmp_path / "space.yaml").write_text(SPACE % (tmp_path / "images"))
    return tmp_path / "space.yaml"


def ended(folder):
    return {trial.trial: trial.ended for trial in read_state(folder / "studies" / "faulty").of_stage("search")}


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_each_trial_that_fails_gets_its_label_and_its_second_try(tmp_path, space):
    plan = [
        {"learning_rate": 0.001, "epoch": 2, "what": "hang", "times": 1},
        {"learning_rate": 0.002, "epoch": 2, "what": "hang"},
        {"learning_rate": 0.003, "epoch": 2, "what": "no memory", "times": 1},
        {"learning_rate": 0.004, "epoch": 2, "what": "no memory"},
        {"learning_rate": 0.005, "epoch": 2, "what": "raise"},
        *({"learning_rate": 0.006, "epoch": epoch, "what": "die", "times": 1} for epoch in (1, 2, 3)),
    ]
    done = launch(tmp_path, "sweep", space, plan=plan)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ended(tmp_path) == {
        "search-000": "finished",
        "search-001": "stuck",
        "search-002": "finished",
        "search-003": "out_of_memory",
        "search-004": "crashed",
        "search-005": "finished",  # three deaths, but an epoch between each two
    }
    folder = tmp_path / "studies" / "faulty"
    states = read_state(folder).trials
    assert states["search-001"].error.startswith("no epoch for ")
    assert "none left" in states["search-003"].error
    assert states["search-004"].error == "RuntimeError: on order"
    reasons = {key: state.retry_reasons for key, state in states.items()}
    assert reasons["search-000"] == reasons["search-001"] == ("stuck",)
    assert reasons["search-002"] == reasons["search-003"] == ("out_of_memory",)
    assert "stuck" in done.stdout
    runs = [json.loads(file.read_text()) for file in folder.glob("search/run-001/*/params.json")]
    assert {run["run"]["key"]: run["run"]["machine"]["evaluation_batch"] for run in runs} == {
        "search-002": 128,
        "search-003": 128,
    }, "alone, with half the batch of the evaluation"
    # Nothing fails any more: those without a result of their own run again.
    done = launch(tmp_path, "resume", "faulty", "--retry-crashed")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "to be run again: search-001, search-003, search-004" in done.stdout
    assert set(ended(tmp_path).values()) == {"finished"}
    assert {row["trial"]: row["epochs"] for row in json.loads((folder / "ranking.json").read_text())} == dict.fromkeys(
        states, 3
    )
    assert (folder / "earlier" / "retry" / "ranking.json").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_full_disk_and_a_missing_image_stop_the_study_and_end_no_trial(tmp_path, space):
    folder = tmp_path / "studies" / "faulty"
    options = ["--set", "trial.optimizer.learning_rate={grid: [0.001, 0.002]}", "--set", "machine.checkpoint_every_s=0"]
    # The save of epoch 2 is left out where that of epoch 1 still runs.
    full = [{"place": "save", "epoch": epoch, "what": "no space"} for epoch in (2, 3)]
    done = launch(tmp_path, "sweep", space, *options, plan=full)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "/full/disk: No space left on device. Cure: free disk space, or write to another disk. Then resume" in said
    assert "Traceback" not in done.stderr + done.stdout
    assert set(ended(tmp_path).values()) == {""}
    assert read_state(folder).state == "interrupted"
    image = sorted((tmp_path / "images").rglob("*.png"))[0]
    content = image.read_bytes()
    image.unlink()
    done = launch(tmp_path, "resume", "faulty")
    assert done.returncode == 2
    assert image.name in done.stderr or "images" in done.stderr
    assert set(ended(tmp_path).values()) == {""}
    image.write_bytes(content)
    done = launch(tmp_path, "resume", "faulty")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(ended(tmp_path).values()) == {"finished"}
    epochs = [event["epoch"] for event in events.read(events_path(folder)) if event["event"] == "epoch"]
    assert len(epochs) <= 2 * 3 + 2 * 3, "each trial has gone on from epoch 1 at the earliest, which it reports again"
