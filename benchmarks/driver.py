"""The driver: CPU time for each event of a search, by the number of its trials. It must not grow with that number.

    uv run python benchmarks/driver.py                                  # 100, 1,000 and 10,000 trials of 10 epochs
    uv run python benchmarks/driver.py --sizes 100 1000 --before ../other   # beside another checkout

The callback and the scheduler of a search are called as Tune calls them, with plain objects as trials, 8 of which run
at once; Ray itself does not run. Each trial leaves a checkpoint of two files when it ends. Waiting for the disk is not
part of it: events are not synced. Each row is a process of its own:

- end, epoch, decision, step: milliseconds of CPU time each. An end includes the deletion of checkpoints, a decision all
  calls of the scheduler for one result, a step what the callback does after each of Tune's steps.
- start: milliseconds a trial until Tune has it, from its configuration of 100 values.
- delivery: milliseconds an event, of the updates for MLflow that are made of 50 events at a time.
- all: seconds of CPU time of all these but the delivery; "growth" is the exponent by which that has grown since the
  size before, 1 for a search whose trials cost the same in any number.
- read: seconds in which a resume reads all events. memory: peak above that of the imports.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
METRIC, MAX_EPOCHS, NUM_SLOTS, KEEP = "val_map_at_r", 10, 8, 10
METRICS = ("val_r_precision", "val_recall_at_1", "val_recall_at_2", "train_loss", "gradient_norm", "learning_rate")
HALVING = {"metric": METRIC, "max_epochs": MAX_EPOCHS, "grace_epochs": 1, "reduction_factor": 3, "history": {}}


class Stopwatch:
    """CPU seconds by what is done. Of two that are nested, only the inner one counts."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running = ["other"]
        self._since_s = time.process_time()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        self._charge()
        self._running.append(what)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now_s = time.process_time()
        self.seconds[self._running[-1]] += now_s - self._since_s
        self._since_s = now_s


class Search:
    """What Tune's controller does with a callback and a scheduler, one event at each step."""

    def __init__(self, folder: Path, callback: Any, scheduler: Any, num_trials: int) -> None:
        self.watch, self.counts = Stopwatch(), Counter[str]()
        self._folder, self._callback, self._scheduler = folder, callback, scheduler
        self._random = random.Random(0)
        self._trials = [_trial(f"search-{number:05d}") for number in range(num_trials)]
        self._pending, self._running = deque(self._trials), deque[Any]()
        with self.watch("decision"):
            for trial in self._trials:
                scheduler.on_trial_add(self, trial)

    def get_trials(self) -> list[Any]:
        return self._trials

    def stop_trial(self, trial: Any) -> None:
        place = self._folder / "search" / "run-000" / trial.config["run"]["key"] / "checkpoint_000000"
        with self.watch("other"):
            place.mkdir(parents=True)
            for name in ("state.pt", "weights.safetensors"):
                (place / name).write_bytes(b"x")
        with self.watch("decision"):
            if trial.status == "PAUSED":
                self._scheduler.on_trial_remove(self, trial)
            else:
                self._scheduler.on_trial_complete(self, trial, trial.last_result)
        with self.watch("end"):
            self._callback.on_trial_complete(0, self._trials, trial)
        self.counts["end"] += 1
        trial.status = "TERMINATED"

    def run(self, limit_s: float) -> None:
        """Run until all trials have ended, or for so many CPU seconds."""
        while self.counts["end"] < len(self._trials) and sum(self.watch.seconds.values()) < limit_s:
            with self.watch("decision"):
                chosen = self._scheduler.choose_trial_to_run(self)
            if chosen is not None and chosen.status == "PAUSED":
                chosen.status = "PENDING"
                self._pending.append(chosen)
            while self._pending and len(self._running) < NUM_SLOTS:
                self._start(self._pending.popleft())
            if self._running:
                self._report(self._running.popleft())
            with self.watch("step"):
                self._callback.on_step_end(0, self._trials)
            self.counts["step"] += 1

    def _start(self, trial: Any) -> None:
        with self.watch("other"):
            self._callback.on_trial_start(0, self._trials, trial)
        trial.status = "RUNNING"
        self._running.append(trial)

    def _report(self, trial: Any) -> None:
        epoch = trial.last_result.get("epoch", 0) + 1
        value = trial.quality + epoch / 20 + self._random.random() / 10
        record = {"epoch": epoch, METRIC: value, "epoch_s": 1.0, **dict.fromkeys(METRICS, value * 0.9)}
        result = {"epoch": epoch, METRIC: value, "record": {**record, "ended": "finished"}}
        decision = "STOP"
        if epoch < MAX_EPOCHS:
            result["record"] = record
            with self.watch("decision"):
                decision = self._scheduler.on_trial_result(self, trial, result)
        self.counts["decision"] += 1
        with self.watch("epoch"):
            self._callback.on_trial_result(0, self._trials, trial, result)
        self.counts["epoch"] += 1
        trial.last_result = result
        if decision == "STOP":
            self.stop_trial(trial)
        elif decision == "PAUSE":
            trial.status = "PAUSED"
        else:
            self._running.append(trial)


def _trial(key: str) -> Any:
    config = {"seed": 0, "epochs": MAX_EPOCHS, "loss": {"name": "margin"}, "data": {"split": {"fold": 0}}}
    return SimpleNamespace(
        trial_id=f"id-{key}",
        config={"run": {"key": key, "fingerprint": key, "configuration": key, "gpus": 0.0, "trial": config}},
        PENDING="PENDING", RUNNING="RUNNING", PAUSED="PAUSED", status="PENDING",
        quality=random.Random(key).random(), last_result={}, error_file=None,
        run_metadata=SimpleNamespace(num_failures=0), temporary_state=SimpleNamespace(ray_actor=None),
    )  # fmt: skip


def start_ms(num_trials: int, limit_s: float) -> float:
    """Return the milliseconds of CPU time in which Tune gets a trial of a run from its configuration."""
    from ray import tune
    from ray.tune.experiment import Experiment
    from ray.tune.search.basic_variant import BasicVariantGenerator

    class Trainable(tune.Trainable):
        """A trial that is never run."""

    configs = [{"key": f"{n:05d}", "trial": {f"setting_{i}": i / 7 for i in range(100)}} for n in range(num_trials)]
    options: dict[str, Any] = {"run": Trainable, "storage_path": tempfile.gettempdir()}
    try:
        from raydml.study.listed_trials import ListedTrials

        trials: Any = ListedTrials(configs)
    except ImportError:  # a checkout in which each configuration is one value of a grid
        trials = BasicVariantGenerator()
        options["config"] = {"run": tune.grid_search(configs)}
    begin_s = time.process_time()
    trials.add_configurations([Experiment("run-000", **options)])
    count = 0
    while time.process_time() - begin_s < limit_s and trials.next_trial() is not None:
        count += 1
    return 1000 * (time.process_time() - begin_s) / count


def measure(name: str, num_trials: int, limit_s: float) -> dict[str, float]:
    """Return the figures of one search."""
    from ray.tune.schedulers import FIFOScheduler

    from raydml.study import events, scheduler
    from raydml.study.events import StudyState, events_path, read_state
    from raydml.study.runner import StudyEvents
    from raydml.tracking.updates import updates_of

    os.fsync = lambda _descriptor: None
    keys = [f"search-{number:05d}" for number in range(num_trials)]
    made = {
        "none": lambda: getattr(scheduler, "InOrder", FIFOScheduler)(),
        "asha": lambda: scheduler.Asha(**HALVING),
        "sync": lambda: scheduler.SyncHalving(**HALVING, keys=keys, ended=[]),
    }[name]()
    with tempfile.TemporaryDirectory() as storage:
        folder = Path(storage)
        path = events_path(folder)
        events.append(path, {"event": "study_started", "study": "s", "config": {"select_on": METRIC}})
        events.append(path, {"event": "stage_started", "stage": "search", "num_trials": num_trials, "max_epochs": 10})
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        search = Search(folder, StudyEvents(str(folder), "search", KEEP, None), made, num_trials)
        search.run(limit_s)
        memory_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
        watch, counts = search.watch.seconds, search.counts
        begin_s = time.process_time()
        read_state(folder)
        read_s = time.process_time() - begin_s
        records, state = events.records(path)[0], StudyState()
        begin_s = time.process_time()
        for first in range(0, len(records), 50):
            state, _ = updates_of(records[first : first + 50], state, {}, folder)
        delivery_s = time.process_time() - begin_s
    figures = {what: 1000 * watch[what] / max(counts[what], 1) for what in ("end", "epoch", "decision", "step")}
    return {
        **figures,
        "start": start_ms(num_trials, limit_s),
        "all": sum(watch[what] for what in ("end", "epoch", "decision", "step")),
        "delivery": 1000 * delivery_s / len(records),
        "read": read_s,
        "memory": memory_mb,
        "share": counts["end"] / num_trials,
    }


def measured(checkout: Path, scheduler: str, num_trials: int, limit_s: float) -> dict[str, float]:
    """Run `measure` with the code of a checkout, in a process of its own."""
    command = [sys.executable, __file__, "--measure", scheduler, "--sizes", str(num_trials), "--limit", str(limit_s)]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--schedulers", nargs="+", default=["none", "asha", "sync"])
    parser.add_argument("--before", type=Path, help="another checkout, which is measured up to 1,000 trials")
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds after which a search is broken off")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.sizes[0], options.limit)))
        return
    works = ("start", "end", "epoch", "decision", "step", "delivery")
    headings = ("trials", *(f"{what} ms" for what in works), "all s", "growth", "read s", "memory MB")
    table = Table("scheduler", "code", *headings, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    codes = {"this": ROOT} | ({"before": options.before} if options.before else {})
    for scheduler, (code, checkout) in itertools.product(options.schedulers, codes.items()):
        last: tuple[int, float] | None = None
        for size in options.sizes:
            if code == "before" and size > 1000:
                continue
            row = measured(checkout, scheduler, size, options.limit)
            whole = row["share"] == 1
            growth = math.log(row["all"] / last[1]) / math.log(size / last[0]) if last and whole else None
            last = (size, row["all"])
            table.add_row(
                scheduler, code, f"{size:,}", *(f"{row[what]:.3f}" for what in works),
                f"{row['all']:.2f}" if whole else f"> {row['all']:.0f}",
                "" if growth is None else f"{growth:.2f}", f"{row['read']:.2f}", f"{row['memory']:.0f}",
            )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
