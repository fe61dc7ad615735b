"""A study on a Ray cluster of this machine: how long until a trial trains, at the start and when nodes come and go.

    uv run python benchmarks/cluster.py              # two to four minutes
    uv run python benchmarks/cluster.py --turns 3    # medians

One cluster of raylets with token authentication, and one study on it by the command. Its trials hold a CPU each, their
epochs take some tenths of a second, and they write a checkpoint after each. All nodes share the cores of this machine,
which should have nothing else to do.

- start: from the first process of the cluster, a head and one node, to the first epoch of the first trial.
- node joins: from the first process of a second node to the first epoch of the trial that waits for it.
- node killed: from kill -9 of all its processes to the first new epoch of its trial on a third node, which is idle.
- node cut off: the same for a node whose processes stop and keep their connections. Ray has no answer of it then, and
  by default waits for about a minute; see RAY_health_check_* of Ray.

Each part is in seconds: ready: the head and the node, or the node; noticed: by the study. started: the trial, from then
on. epoch: its first (new) epoch, from then on.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the cluster of the tests

from raydml.study import events  # noqa: E402
from raydml.study.events import events_path  # noqa: E402
from tests.chaos.targets import Cluster  # noqa: E402

SETTINGS = (
    "study.search={num_trials: 2, scheduler: none}", "study.confirm=null", "study.refit=null", "study.finalize=null",
    "trial.epochs=100000", "machine.device=cpu", "machine.checkpoint_every_s=0",
)  # fmt: skip
PATIENCE_S = 120.0


class StudyOnCluster:
    """A study that runs on a cluster: its process, and its events by kind."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, output: Path) -> None:
        self.process, self._folder, self._output = process, folder, output

    def events(self, kind: str, since_s: float) -> list[dict[str, Any]]:
        """Return the events of a kind since a time."""
        path = events_path(self._folder)
        found = events.read(path) if path.exists() else []
        return [event for event in found if event["event"] == kind and event["time"] >= since_s]

    def wait(self, kind: str, since_s: float, of: Callable[[dict[str, Any]], bool] = lambda _event: True) -> Any:
        """Return the first event of a kind since a time, once there is one. of: which ones count."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            found = [event for event in self.events(kind, since_s) if of(event)]
            if found:
                return found[0]
            if time.monotonic() > deadline_s or self.process.poll() is not None:
                raise SystemExit(f"no event {kind} after {PATIENCE_S:g} s:\n{self._output.read_text()[-3000:]}")
            time.sleep(0.05)

    def first_epoch(self, trial: str, since_s: float) -> float:
        """Return the time of the first epoch that a trial trains after a time, and had not reported before."""
        before = [e["epoch"] for e in self.events("epoch", 0.0) if e["trial"] == trial and e["time"] < since_s]
        newest = max(before, default=0)
        return float(self.wait("epoch", since_s, lambda e: e["trial"] == trial and e["epoch"] > newest)["time"])


@contextmanager
def study_on(cluster: Cluster, storage: Path) -> Iterator[StudyOnCluster]:
    """Run the study on a cluster by the command."""
    command = [sys.executable, str(ROOT / "launch.py"), "sweep", str(ROOT / "search_spaces" / "digits.yaml")]
    command += ["--storage", str(storage), "--address", cluster.address, *(f"--set={one}" for one in SETTINGS)]
    with open(storage / "output.txt", "wb") as output:
        process = subprocess.Popen(
            command, env=cluster.environment(), cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield StudyOnCluster(process, storage / "digits", storage / "output.txt")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def measure() -> dict[str, tuple[float, float, float]]:
    """Return the three parts of each row, in seconds."""
    found: dict[str, tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        cluster = Cluster(storage, num_nodes=1)
        try:
            begin_s = time.time()
            cluster.start()
            ready_s = time.time()
            with study_on(cluster, storage) as study:
                first = study.wait("trial_started", begin_s)
                epoch_s = study.first_epoch(first["trial"], first["time"])
                found["start"] = (ready_s - begin_s, first["time"] - ready_s, epoch_s - first["time"])

                begin_s = time.time()
                cluster.add_node()
                ready_s = time.time()
                second = study.wait("trial_started", begin_s)
                epoch_s = study.first_epoch(second["trial"], second["time"])
                found["node joins"] = (ready_s - begin_s, second["time"] - ready_s, epoch_s - second["time"])

                # The node that has joined has the second trial; it is lost, and later the one that has taken its place.
                for row, number in (("node killed", signal.SIGKILL), ("node cut off", signal.SIGSTOP)):
                    lost = cluster.nodes[-1]
                    cluster.add_node()
                    time.sleep(3.0)  # until it is idle
                    begin_s = time.time()
                    cluster.signal_node(lost, number)
                    noticed_s = study.wait("trial_retried", begin_s)["time"]
                    again = study.wait("trial_started", begin_s)
                    epoch_s = study.first_epoch(again["trial"], again["time"])
                    found[row] = (noticed_s - begin_s, again["time"] - noticed_s, epoch_s - again["time"])
        finally:
            cluster.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    turns = [measure() for _ in range(options.turns)]
    table = Table("", "ready / noticed s", "started s", "epoch s", "in all s", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in turns[0]:
        parts = [statistics.median(turn[row][part] for turn in turns) for part in range(3)]
        in_all = statistics.median(sum(turn[row]) for turn in turns)
        table.add_row(row, *(f"{part:.1f}" for part in parts), f"{in_all:.1f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{os.cpu_count()} cores; load average before it {load:.1f}")


if __name__ == "__main__":
    main()
