"""A node that is cut off for a while, and a head that is lost and started again, in the middle of a study."""

import signal
import time

import pytest

from raydml.study import events
from raydml.study.events import events_path, read_state
from tests.chaos.study import contradictions, lost_epochs, runs_of
from tests.chaos.targets import Cluster
from tests.study.test_cluster import trials_of
from tests.study.test_folder import ROOT
from tests.study.test_node import sweep
from tests.study.test_preemption import TWO, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.xdist_group("cluster")]
OFTEN = (*TWO, "machine.checkpoint_every_s=0", "trial.epochs=15")
#: Ray gives up a node that has not answered for some 6 s; by default it takes 15 to 60 s.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "2",
}


def of_kind(folder, kind):
    return [event for event in events.read(events_path(folder)) if event["event"] == kind]


def test_a_node_that_is_cut_off_and_comes_back_changes_nothing_but_where_its_trial_runs(tmp_path):
    """Its processes stand still until the trial trains elsewhere, and then go on as if nothing had happened.

    The trials have no second try: a crash would end one.
    """
    cluster, folder = Cluster(tmp_path / "cluster", variables=IMPATIENT), tmp_path / "digits"
    cluster.folder.mkdir()
    cluster.start()
    with sweep(ROOT, tmp_path, cluster, *OFTEN) as process:
        wait_for(lambda: sorted(len(t.epochs) > 2 for t in trials_of(folder)) == [True, True], process, tmp_path)
        node = cluster.nodes[0]
        cluster.signal_node(node, signal.SIGSTOP)
        wait_for(lambda: len(of_kind(folder, "trial_started")) == 3, process, tmp_path, within_s=60)
        cluster.signal_node(node, signal.SIGCONT)
        assert process.wait(100) == 0, (tmp_path / "output.txt").read_text()
        node.wait(30)  # Ray ends a node that it has given up
    (moved,) = of_kind(folder, "trial_retried")
    assert moved["reason"] == "lost_node"
    state = read_state(folder)
    assert {trial.trial: trial.ended for trial in state.trials.values()} == {
        "search-000": "finished", "search-001": "finished"
    }  # fmt: skip
    assert {trial.num_moves for trial in state.trials.values() if trial.trial == moved["trial"]} == {1}
    assert sum(trial.num_moves for trial in state.trials.values()) == 1
    assert sum(trial.num_retries for trial in state.trials.values()) == 0
    assert [list(trial.epochs) for trial in state.trials.values()] == [list(range(1, 16))] * 2
    assert contradictions(folder) == []
    assert sorted(event["trial"] for event in of_kind(folder, "trial_ended")) == ["search-000", "search-001"]
    assert len(runs_of(tmp_path)) == 3  # of the study and of two trials
    assert {status for _, status in runs_of(tmp_path)} == {"FINISHED"}


def test_a_study_whose_head_is_lost_says_how_to_go_on_and_the_same_command_does(tmp_path, monkeypatch):
    # How long Ray waits for a head that is gone; 60 s by default.
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    cluster, folder = Cluster(tmp_path / "cluster", num_nodes=1), tmp_path / "digits"
    cluster.folder.mkdir()
    cluster.start()
    with sweep(ROOT, tmp_path, cluster, *OFTEN, "study.search.num_trials=1") as process:
        wait_for(lambda: any(len(trial.epochs) > 4 for trial in trials_of(folder)), process, tmp_path)
        cluster.kill_node(cluster.head)
        lost_s = time.monotonic()
        assert process.wait(100) == 2, (tmp_path / "output.txt").read_text()
        took_s = time.monotonic() - lost_s
    said = " ".join((tmp_path / "output.txt").read_text().split())
    assert f"study 'digits' has stopped, and no trial is lost: --address {cluster.address}: no Ray cluster" in said
    # `python` or `uv run`, as the command was started.
    assert "Then resume the study: " in said
    assert f" {ROOT}/launch.py resume {folder} --address {cluster.address}" in said
    assert took_s < 60  # 15 s on a machine with nothing else to do
    (before,) = trials_of(folder)
    assert (before.ended, read_state(folder).state) == ("", "interrupted")
    cluster.start()
    with sweep(ROOT, tmp_path, cluster, *OFTEN, "study.search.num_trials=1") as process:
        assert process.wait(100) == 0, (tmp_path / "output.txt").read_text()
    (after,) = trials_of(folder)
    assert (after.ended, list(after.epochs)) == ("finished", list(range(1, 16)))
    assert contradictions(folder) == []
    assert lost_epochs(folder)[0] <= 2  # what trained, and what was written
    assert len(of_kind(folder, "trial_ended")) == 1
    assert [status for _, status in runs_of(tmp_path)] == ["FINISHED"] * 2  # of the study and of the trial
