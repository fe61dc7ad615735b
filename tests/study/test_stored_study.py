"""Studies whose files are in an object store, from the first trial to the report, also on nodes that share nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from raydml.ops.object_store import ObjectStore
from raydml.study import events
from raydml.study.events import events_path, read_state, read_trials
from raydml.study.folder import read_json
from raydml.study.mirror import _stored_events
from raydml.study.remote import StudyPlace
from raydml.training import checkpoint
from tests.chaos.targets import Cluster, driver_of, kill, members
from tests.store_server import store_server
from tests.study.in_process import finished_here
from tests.study.small import ONE_PROCESS, leave_pictures_out
from tests.study.test_cluster import trials_of
from tests.study.test_folder import ROOT
from tests.study.test_node import can_mount

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.xdist_group("faults"), pytest.mark.timeout(600)]

SMALL = (
    "study.search.num_trials=2", "study.search.scheduler=none", "study.confirm={top: 1, folds: 2, seeds: 1}",
    "study.refit=null", "study.finalize={top: 1}", "trial.epochs=6", "study.keep_checkpoints=1",
    "machine.device=cpu", "machine.checkpoint_every_s=0",
)  # fmt: skip
DIGITS = ROOT / "search_spaces" / "digits.yaml"
SWEEP = ("sweep", str(DIGITS), *(f"--set={setting}" for setting in SMALL))


@pytest.fixture
def server(monkeypatch):
    with store_server(monkeypatch) as found:
        yield found


@contextmanager
def launched(here, *arguments, **environment):
    """Run a command in a folder, and yield its process, which prints into ``output.txt`` there."""
    here.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    with open(here / "output.txt", "a") as output:
        process = subprocess.Popen(
            command, cwd=here, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait(30)


def said(here):
    return (here / "output.txt").read_text()


def wait_for(condition, process, here, within_s=150):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, said(here)
        assert process.poll() is None, said(here)
        time.sleep(0.1)


def numbers(folder):
    """What a study has found: curves, ranking, confirmation and test."""
    curves = {
        key: {epoch: metrics["val_map_at_r"] for epoch, metrics in trial.epochs.items()}
        for stage in ("search", "confirm")
        for key, trial in read_trials(folder, stage).items()
    }
    final = [row["metrics"] for row in read_json(folder / "final.json")]
    return curves, [row["trial"] for row in read_json(folder / "ranking.json")], final


def test_a_study_whose_machine_is_lost_goes_on_from_the_store_with_equal_numbers(tmp_path, server):
    """The driver is killed with all that it has started, and its disk is lost. The store fails now and then."""
    uri, undisturbed = server.uri(), finished_here(DIGITS, SMALL, tmp_path / "undisturbed")
    number = iter(range(10**9))
    server.faults.append(lambda method, path: "error" if next(number) % 17 == 0 else None)  # noqa: ARG005
    first, second = tmp_path / "first", tmp_path / "second"
    leave_pictures_out(first / "studies" / "digits")
    with launched(first, *SWEEP, *ONE_PROCESS, "--storage", uri) as process:
        folder = first / "studies" / "digits"
        wait_for(lambda: sum(len(trial.epochs) for trial in trials_of(folder)) >= 5, process, first)
        time.sleep(2.5)  # the copy is at most five seconds behind
        driver = driver_of(process.pid)
        for pid in (process.pid, driver, *members({driver}, "trial"), *members({driver}, "raylet")):
            kill(pid)
    seen = len(events.read(events_path(folder)))
    shutil.rmtree(first)
    with launched(second, "resume", f"{uri.partition('?')[0]}/digits?{uri.partition('?')[2]}") as process:
        assert process.wait(300) == 0, said(second)
    folder = second / "studies" / "digits"
    assert numbers(folder) == numbers(undisturbed)
    assert len(events.read(events_path(folder))) > seen
    retried = [event for event in events.read(events_path(folder)) if event["event"] == "trial_retried"]
    assert not retried, "\n".join(map(str, retried))
    check_store(ObjectStore(server.uri("studies/digits")), folder)


def check_store(store, folder):
    """What a finished study leaves in its store: results, events, reads, and the checkpoints that are kept."""
    names = store.names()
    kept = {name.split("/")[2] for name in names if name.startswith("search/run-")}
    assert kept == {read_json(folder / "ranking.json")[0]["trial"]}
    for name in ("final.json", "ranking.json", "report/report.html", "study.json", "final/confirm-000.npz"):
        assert store.get_bytes(name) == (folder / name).read_bytes()
    assert "driver.json" not in names
    lines = (folder / "test_reads.jsonl").read_text().splitlines()
    purposes = [json.loads(line)["purpose"] for line in lines]
    assert purposes.count("finalize") == 2
    noted = [event for event in events.read(events_path(folder)) if event["event"] == "test_read"]
    assert len(noted) == len(purposes)
    manifests = [name for name in names if name.endswith(checkpoint.MANIFEST) and "/checkpoint_" in name]
    assert manifests


@pytest.mark.skipif(not can_mount, reason="needs the right to mount folders for a process alone")
def test_nodes_without_a_shared_folder_run_a_study_of_a_store(tmp_path, server):
    """Each node has an empty folder in the place of the driver's, and its own one for temporary files."""
    here, cluster = tmp_path / "here", Cluster(tmp_path / "cluster", num_nodes=0)
    for folder in (here, here / "studies", cluster.folder):
        folder.mkdir()
    cluster.start()
    try:
        scratch = StudyPlace("/", server.uri()).files_of_node().root.parent
        scratch.mkdir(exist_ok=True)
        for number in range(2):
            mounts = [(tmp_path / f"empty-{number}", here / "studies"), (tmp_path / f"scratch-{number}", scratch)]
            for empty, _ in mounts:
                empty.mkdir()
            cluster.add_node(mounts=mounts)
        with launched(
            here, *SWEEP, "--storage", server.uri(), "--address", cluster.address, RAY_AUTH_MODE="token"
        ) as process:
            wait_for(lambda: sum(len(t.epochs) for t in trials_of(here / "studies/digits")) >= 4, process, here)
            cluster.kill_node(cluster.nodes.pop())
            assert process.wait(300) == 0, said(here)
    finally:
        cluster.stop()
    folder = here / "studies" / "digits"
    state = read_state(folder)
    assert {trial.ended for trial in state.trials.values()} <= {"finished", "stopped_early"}
    assert len({e["node"] for e in events.read(events_path(folder)) if e["event"] == "trial_started"}) == 2
    check_store(ObjectStore(server.uri("studies/digits")), folder)
    assert not list(tmp_path.glob("empty-*/digits"))
    left = [path for path in tmp_path.glob("scratch-*/*/*/run-*/*/checkpoint_*") if path.parent.name != retried(folder)]
    assert not left


def retried(folder):
    """The trial that was on the node that was lost; there nothing could be tidied."""
    found = [event["trial"] for event in events.read(events_path(folder)) if event["event"] == "trial_retried"]
    return found[0] if found else ""


def test_a_store_that_cannot_be_used_is_refused_before_any_work(tmp_path, server):
    for uri, words in (
        (server.uri().replace("s3://bucket", "s3://nobody"), "Cure: make the bucket, or correct its name"),
        ("s3://key:secret@bucket/x", "has credentials, which would be recorded. Cure: set them in the environment"),
    ):
        with launched(tmp_path / "here", *SWEEP, "--storage", uri) as process:
            assert process.wait(60) == 2, said(tmp_path / "here")
        assert words in " ".join(said(tmp_path / "here").split())
        assert "Traceback" not in said(tmp_path / "here")
        assert not (tmp_path / "here" / "studies" / "digits" / "study.json").exists()


def test_ctrl_c_leaves_a_whole_copy(tmp_path, server):
    here = tmp_path / "here"
    with launched(here, *SWEEP, *ONE_PROCESS, "--storage", server.uri()) as process:
        folder = here / "studies" / "digits"
        wait_for(lambda: sum(len(trial.epochs) for trial in trials_of(folder)) >= 2, process, here)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, said(here)
    assert "note:" not in said(here).partition("Interrupted")[2]
    assert _stored_events(ObjectStore(server.uri("studies/digits"))) == events_path(folder).read_bytes()
