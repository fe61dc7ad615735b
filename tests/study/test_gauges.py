"""The metrics of a study, as a scrape of a node of Ray finds them."""

import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest

from raydml.study import gauges
from raydml.study.driver import lock_of_delivery, write_num_sent
from tests.chaos.targets import Cluster
from tests.study.test_cluster import trials_of
from tests.study.test_folder import ROOT
from tests.study.test_preemption import nodes_of, wait_for

SMALL = (
    "study.search.num_trials=2", "study.search.scheduler=none", "study.confirm=null", "study.refit=null",
    "study.finalize=null", "trial.epochs=1000",
)  # fmt: skip


def scraped(ports):
    """Metric and labels -> value, of what begins with raydml on any node."""
    pages = [urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode() for port in ports]
    return {
        (name, tuple(sorted(re.findall(r'(study|stage)="([^"]*)"', labels)))): float(value)
        for name, labels, value in re.findall(r"^ray_(raydml_\w+)\{(.*)\} (\S+)$", "\n".join(pages), re.MULTILINE)
    }


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.xdist_group("cluster")
@pytest.mark.skipif(not importlib.util.find_spec("opencensus"), reason="needs ray[default], of the extra cluster")
def test_a_node_offers_the_trials_and_their_rate_to_prometheus(tmp_path):
    cluster, folder = Cluster(tmp_path / "cluster", num_nodes=1), tmp_path / "digits"
    cluster.folder.mkdir()
    cluster.start()
    command = [sys.executable, str(ROOT / "launch.py"), "sweep", str(ROOT / "search_spaces" / "digits.yaml")]
    command += ["--storage", str(tmp_path), "--address", cluster.address, *(f"--set={setting}" for setting in SMALL)]
    try:
        ports = {row["MetricsExportPort"] for row in nodes_of(cluster)}
        with open(tmp_path / "output.txt", "w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "RAY_AUTH_MODE": "token"}
            )
        try:
            wait_for(lambda: any(len(trial.epochs) > 1 for trial in trials_of(folder)), process, tmp_path)
            study = ("study", "digits")
            rate, running = ("raydml_images_per_s", (study,)), ("raydml_trials_running", (("stage", "search"), study))
            deadline = time.monotonic() + 60
            # Nodes send their metrics every few seconds: what is read first may be from before the first trial.
            while rate not in (found := scraped(ports)) or found.get(running) != 1:
                assert time.monotonic() < deadline, found
                time.sleep(1.0)
            assert 0 < found[rate] < 1e6
            assert found["raydml_unsent_events", (study,)] >= 0
        finally:
            process.kill()
            process.wait(30)
    finally:
        cluster.stop()


def test_events_are_counted_that_mlflow_does_not_have_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(gauges, "Gauge", lambda *_, **__: None)
    found = gauges.StudyGauges(tmp_path)
    assert found.num_unsent() == 0
    with open(tmp_path / "events.jsonl", "a") as file:
        for number in range(1, 6):
            file.write('{"event": "epoch"}\n')
            file.flush()
            assert found.num_unsent() == number
        with lock_of_delivery(tmp_path) as lock:
            for sent in (3, 4):
                write_num_sent(lock, sent)
                assert found.num_unsent() == 5 - sent
        file.write('{"event": "half of a line')
        file.flush()
        assert found.num_unsent() == 1
