"""Delivery to MLflow: the CPU time that a driver spends on it while trials report, as a share of the wall time.

    uv run python benchmarks/tracking.py                        # 8 trials that report once per second, 60 s per store
    uv run python benchmarks/tracking.py --trials 64 --seconds 300

A report has the metrics of a search's epoch. Stores: an SQLite file, which the driver writes itself, and a server of
MLflow on this machine, whose own time is not part of the driver's. The target is below 2 %. The delay of the newest
point follows from it: the delivery waits so long between two batches that it stays below its share of the processor.
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
from raydml.tracking.delivery import Tracker
from raydml.tracking.store import connect, default_uri, prepare_store

VALIDATION = ("map_at_r", "r_precision", "recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8")
TRAINING = ("train_loss", "gradient_norm", "sampler_coverage", "sampler_duplicates", "images_per_s", "learning_rate")


def report(path: Path, num_trials: int, seconds: int) -> Iterator[None]:
    """Write the events of trials that report once per second; yields after each second."""
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
            events.append(path, {"event": "epoch", "stage": "search", "trial": key, "epoch": epoch, "metrics": metrics})
        time.sleep(max(begin + epoch - time.monotonic(), 0))
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
    client = connect(uri)
    (experiment,) = [one for one in client.search_experiments() if one.name == "raydml"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    reached = sorted(run.data.metrics.get("train/epochs", 0) for run in runs if "raydml.trial" in run.data.tags)
    assert reached == [seconds] * num_trials, "not all reports have arrived"
    return used / (end - begin), (used - third[1]) / (end - third[0]), longest


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
    options = parser.parse_args()
    table = Table("store", "CPU / wall, from the start", "after a third", "longest delay")
    for store in ("SQLite", "server"):
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            uri = stack.enter_context(server(Path(folder))) if store == "server" else default_uri(Path(folder))
            whole, later, delay = measure(uri, Path(folder), options.trials, options.seconds)
            table.add_row(store, f"{100 * whole:.2f} %", f"{100 * later:.2f} %", f"{delay:.0f} s")
    Console().print(table)


if __name__ == "__main__":
    main()
