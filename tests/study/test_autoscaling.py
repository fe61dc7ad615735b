"""A cluster whose nodes start when trials wait, and end when they have nothing to do."""

import time

import pytest

from raydml.study import events
from raydml.study.events import events_path, read_state
from tests.chaos.targets import Cluster
from tests.study.test_folder import ROOT
from tests.study.test_node import sweep
from tests.study.test_preemption import TWO, nodes_of


def workers_of(cluster):
    return [row["NodeID"] for row in nodes_of(cluster) if row["Alive"] and row["Resources"].get("CPU")]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
def test_a_study_starts_the_nodes_of_a_cluster_that_has_none_and_they_end_after_it(tmp_path):
    """By Ray's autoscaler, from no node to two and back. Each has room for one of the two trials."""
    cluster, folder = Cluster(tmp_path / "cluster", num_nodes=0, max_workers=2), tmp_path / "digits"
    cluster.folder.mkdir()
    cluster.start()
    with sweep(ROOT, tmp_path, cluster, *TWO) as process:
        assert workers_of(cluster) == []
        assert process.wait(150) == 0, (tmp_path / "output.txt").read_text()
        assert len(nodes_of(cluster)) == 3  # the head as well, and those that have ended
        deadline = time.monotonic() + 60
        while left := workers_of(cluster):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
    state, found = read_state(folder), events.read(events_path(folder))
    assert [note for note in state.notes if note.startswith("No node has the 1 CPU and 0 GPU that a trial needs")]
    assert [list(trial.epochs) for trial in state.trials.values()] == [list(range(1, 31))] * 2
    kinds = ("trial_started", "trial_retried", "trial_ended")
    shown = [(event["event"], event.get("reason")) for event in found if event["event"] in kinds]
    assert shown == [("trial_started", None)] * 2 + [("trial_ended", "finished")] * 2  # at once
