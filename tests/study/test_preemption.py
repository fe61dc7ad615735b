"""Nodes that are about to be taken away: their trials are saved in time, go on elsewhere, and no try is counted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from raydml.study import events, preemption
from raydml.study.events import Reduction, events_path, read_state
from raydml.study.preemption import PreemptionWatch
from raydml.training import checkpoint
from tests.chaos.targets import Cluster
from tests.study.test_cluster import trials_of
from tests.study.test_folder import ROOT
from tests.study.test_node import sweep


class Actor:
    """An actor that notes when it is asked to save; its call is ready when ``is_saved``."""

    def __init__(self, node):
        self.node, self.num_saves, self.is_saved = node, 0, False
        self.save_between_epochs = SimpleNamespace(remote=self._save)

    def _save(self):
        self.num_saves += 1
        return self


@pytest.fixture
def notices(monkeypatch):
    given = {}
    monkeypatch.setattr(preemption, "notices_of_nodes", lambda: given)
    monkeypatch.setattr(preemption, "node_of_actor", lambda actor: (f"host {actor.node}", actor.node))
    monkeypatch.setattr(
        preemption.ray, "wait", lambda calls, timeout: ([call for call in calls if call.is_saved and timeout == 0], [])
    )
    return given


def test_a_trial_is_saved_once_and_moves_when_it_is_saved(notices):
    watch, here, there = PreemptionWatch(), Actor("a"), Actor("b")
    running = {"search-000": here, "search-001": there}
    assert watch.look(running) == ([], [])
    notices["a"] = time.time() + 30
    (note,) = watch.look(running).notes
    assert note.startswith("search-000: host a is about to be taken away, in ")
    assert watch.look(running) == ([], [])
    here.is_saved = True
    assert watch.look(running) == ([], ["search-000"])
    assert (here.num_saves, there.num_saves) == (1, 0)


def test_a_trial_that_starts_on_the_node_after_the_notice_moves_at_once(notices):
    """Such as the next trial of a process that was there before."""
    watch, process = PreemptionWatch(), Actor("a")
    notices["a"] = 0.0
    watch.look({"search-000": process})
    assert watch.look({"search-001": process}) == ([], ["search-001"])
    assert process.num_saves == 1


def test_a_trial_that_has_gone_on_elsewhere_is_left_alone(notices):
    watch, old, new = PreemptionWatch(), Actor("a"), Actor("b")
    notices["a"] = 0.0
    watch.look({"search-000": old})
    old.is_saved = True
    assert watch.look({"search-000": new}) == ([], [])
    notices["b"] = 0.0
    (note,) = watch.look({"search-000": new}).notes
    assert "host b" in note
    assert new.num_saves == 1


def test_moves_are_no_retries():
    reduction = Reduction()
    start = {"event": "trial_started", "trial": "search-000", "stage": "search"}
    for reason in ("preempted", "lost_node", None, "stuck"):
        retried = {"event": "trial_retried", "trial": "search-000", "stage": "search", "error": "x", "reason": reason}
        for event in (start, retried):
            reduction.add({"v": 1, "time": 0.0, **event})
    trial = reduction.trials["search-000"]
    assert (trial.num_moves, trial.num_retries) == (2, 2)


def wait_for(condition, process, storage, within_s=150):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, (storage / "output.txt").read_text()
        assert process.poll() is None, (storage / "output.txt").read_text()
        time.sleep(0.1)


TWO = (
    "study.search.num_trials=2", "study.search.scheduler=none", "study.confirm=null", "study.refit=null",
    "study.finalize=null", "study.max_retries=0", "trial.epochs=30", "machine.checkpoint_every_s=3600",
)  # fmt: skip


def nodes_of(cluster):
    """The nodes of a cluster, as Ray lists them."""
    options = "logging_level='error', log_to_driver=False"
    command = f"import ray, json; ray.init(address=%r, {options}); print(json.dumps(ray.nodes()))"
    done = subprocess.run(
        [sys.executable, "-c", command % cluster.address], capture_output=True, text=True, check=True,
        env=cluster.environment(), timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def process_of(cluster, row):
    """The process of a node, which has a folder for temporary files of its own."""
    (found,) = [node for node in cluster.nodes if any(row["RayletSocketName"].startswith(word) for word in node.args
                if word.startswith("/") and word != node.args[0])]  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
@pytest.mark.timeout(400)
def test_a_trial_leaves_its_node_within_the_notice_and_trains_no_reported_epoch_twice(tmp_path):
    """Ray gives the notice to a node by its autoscaler, and by itself where TERM ends it, as Kubernetes does.

    Each of two trials gets one of these. They have no second try, and write no checkpoint unless they must: what is not
    saved would be trained again. One of them moves to a node that is free, the other one waits for it.
    """
    cluster, folder = Cluster(tmp_path / "cluster", num_nodes=3), tmp_path / "digits"
    cluster.folder.mkdir()
    cluster.start()
    rows = {row["NodeID"]: row for row in nodes_of(cluster)}

    def row_of(trial):
        (started,) = [
            e for e in events.read(events_path(folder)) if e["event"] == "trial_started" and e["trial"] == trial
        ]
        (node_id,) = [node_id for node_id in rows if node_id.startswith(started["node"][-7:-1])]
        return rows[node_id]

    with sweep(ROOT, tmp_path, cluster, *TWO) as process:
        wait_for(lambda: sorted(len(t.epochs) > 2 for t in trials_of(folder)) == [True, True], process, tmp_path)
        process_of(cluster, row_of("search-000")).send_signal(signal.SIGTERM)
        subprocess.run(
            [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", cluster.address, "--node-id",
             row_of("search-001")["NodeID"], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
             "--deadline-remaining-seconds", "60"],
            check=True, capture_output=True, env=cluster.environment(),
        )  # fmt: skip
        assert process.wait(200) == 0, (tmp_path / "output.txt").read_text()
    found, state = events.read(events_path(folder)), read_state(folder)
    said = " ".join((tmp_path / "output.txt").read_text().split())
    moved = {event["trial"]: event for event in found if event["event"] == "trial_retried"}
    assert sorted(event["trial"] for event in found if event["event"] == "trial_retried") == [
        "search-000",
        "search-001",
    ]
    for key, event in moved.items():
        assert event["reason"] == "preempted"
        trial = state.trials[key]
        assert (trial.ended, trial.num_moves, trial.num_retries) == ("finished", 1, 0)
        assert [e["epoch"] for e in found if e["event"] == "epoch" and e["trial"] == key] == list(range(1, 31))
        assert len({e["node"] for e in found if e["event"] == "trial_started" and e["trial"] == key}) == 2
        (newest, *_) = checkpoint.newest_first(next((folder / "search").glob(f"run-*/{key}")))
        assert checkpoint.load_card(newest)["epoch"] == 30
        assert f"{key}: {event['node']} is about to be taken away" in said
