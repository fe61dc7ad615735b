"""Delivery to MLflow: the CPU time that a driver spends on it while trials report, as a share of the wall time.

    uv run python benchmarks/tracking.py                        # 8 trials that report once per second, 60 s per store
    uv run python benchmarks/tracking.py --trials 64 --seconds 300
    uv run --extra cluster python benchmarks/tracking.py --stores SQLite PostgreSQL

A report has the metrics of a search's epoch. Stores: an SQLite file, which the driver writes itself; a server of MLflow
on this machine with such a file, and the server of deploy/mlflow with PostgreSQL and logins, whose own time is not part
of the driver's. The target is below 2 %. The delay of the newest point follows from it: the delivery waits so long
between two batches that it stays below its share of the processor. The last column is another delivery: that of a study
which has ended, with all its events at once, as `launch.py sync` does it. A store takes 50 to 500 of them a second, by
the load of the machine: with 12,000 this column alone may take seven minutes for two stores.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from raydml.study import events
from raydml.tracking.delivery import Tracker, sync
from raydml.tracking.store import connect, default_uri, prepare_store

VALIDATION = ("map_at_r", "r_precision", "recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8")
TRAINING = ("train_loss", "gradient_norm", "sampler_coverage", "sampler_duplicates", "images_per_s", "learning_rate")


def report(path: Path, num_trials: int, seconds: int, every_s: float = 1.0) -> Iterator[None]:
    """Write the events of trials that report once in `every_s`; yields after each time."""
    events.append(path, {"event": "study_started", "study": "s", "study_id": os.urandom(8).hex(), "config": {}})
    keys = [f"search-{number:03d}" for number in range(num_trials)]
    config = {"seed": 0, "epochs": seconds, "loss": {"name": "margin"}, "optimizer": {"learning_rate": 1e-3}}
    for key in keys:
        events.append(path, {"event": "trial_started", "stage": "search", "trial": key, "config": config})
    begin = time.monotonic()
    for epoch in range(1, seconds + 1):
        for number, key in enumerate(keys):
            # It improves with every third epoch.
            metrics = {f"val_{name}": 0.1 + number / 100 + epoch / 1e4 - epoch % 3 / 1e3 for name in VALIDATION}
            metrics |= dict.fromkeys((*TRAINING, "peak_memory_bytes", "epoch_s"), 1 / epoch)
            epochs = {"event": "epoch", "stage": "search", "trial": key, "epoch": epoch, "metrics": metrics}
            events.append(path, epochs, durable=every_s > 0)
        time.sleep(max(begin + epoch * every_s - time.monotonic(), 0))
        yield


def measure(uri: str, storage: Path, num_trials: int, seconds: int) -> tuple[float, float, float]:
    """Return the share of the wall time from the start, the same after a third of it, and the points' largest delay."""
    prepare_store(uri, storage)
    path = storage / "s" / "events.jsonl"
    path.parent.mkdir()
    tracker = Tracker(path, uri, "s")
    tracker.start()
    clock = time.pthread_getcpuclockid(tracker._thread.ident or 0)
    begin, used, longest, third = time.monotonic(), 0.0, 0.0, (0.0, 0.0)
    last_change, last_offset = begin, 0
    for second, _ in enumerate(report(path, num_trials, seconds)):
        used = time.clock_gettime(clock)
        if second == seconds // 3:
            third = (time.monotonic(), used)
        if tracker._offset != last_offset:
            last_change, last_offset = time.monotonic(), tracker._offset
        longest = max(longest, time.monotonic() - last_change)
    end = time.monotonic()
    assert tracker.finish(120), tracker.hint()
    assert reached(uri, "s") == [seconds] * num_trials, "not all reports have arrived"
    return used / (end - begin), (used - third[1]) / (end - third[0]), longest


def reached(uri: str, study: str) -> list[float]:
    """Return the number of epochs that the store has of each trial."""
    client = connect(uri)
    (experiment,) = [one for one in client.search_experiments() if one.name == "raydml"]
    runs = client.search_runs([experiment.experiment_id], f"tags.`raydml.study` = '{study}'", max_results=1000)
    return sorted(run.data.metrics.get("train/epochs", 0) for run in runs if "raydml.trial" in run.data.tags)


def deliver_at_once(uri: str, storage: Path, num_trials: int, num_events: int) -> float:
    """Return the seconds in which all events of a study that has ended arrive."""
    path, epochs = storage / "whole" / "events.jsonl", num_events // num_trials
    path.parent.mkdir()
    for _ in report(path, num_trials, epochs, every_s=0):
        pass
    began_s = time.monotonic()
    assert sync(path, uri, "whole"), "not everything has arrived"
    taken_s = time.monotonic() - began_s
    assert reached(uri, "whole") == [epochs] * num_trials
    return taken_s


@contextlib.contextmanager
def served_by_postgresql(storage: Path) -> Iterator[str]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.tracking.team_server import team_server

    with team_server(storage) as running:
        ann = running.add_user("ann")
        login = {"MLFLOW_TRACKING_USERNAME": ann.user, "MLFLOW_TRACKING_PASSWORD": ann.password}
        os.environ.update(login)
        try:
            yield running.uri
        finally:
            for name in login:
                os.environ.pop(name)


@contextlib.contextmanager
def server(storage: Path) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", default_uri(storage), "--artifacts-destination", str(storage / "served"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(storage / "server.log", "ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--events", type=int, default=3_000, help="of the study that is delivered at once")
    parser.add_argument("--stores", nargs="+", default=["SQLite", "server"], choices=["SQLite", "server", "PostgreSQL"])
    options = parser.parse_args()
    last = f"{options.events:,} events at once"
    title = f"{options.trials} trials that report once per second for {options.seconds} s"
    table = Table("store", "CPU / wall, from the start", "after a third", "longest delay", last, title=title)
    for store in options.stores:
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            folder = Path(name)
            served = {"server": server, "PostgreSQL": served_by_postgresql}.get(store)
            uri = stack.enter_context(served(folder)) if served else default_uri(folder)
            whole, later, delay = measure(uri, folder, options.trials, options.seconds)
            taken_s = deliver_at_once(uri, folder, options.trials, options.events)
            at_once = f"{taken_s:.1f} s, {options.events / taken_s:,.0f}/s"
            table.add_row(store, f"{100 * whole:.2f} %", f"{100 * later:.2f} %", f"{delay:.0f} s", at_once)
    Console().print(table)


if __name__ == "__main__":
    main()
