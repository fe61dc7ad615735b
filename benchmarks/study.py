"""A search beside plain Ray Tune: what is lost between and around the trials, which here sleep instead of training.

    uv run python benchmarks/study.py                                   # 64 trials without work, 16 that sleep 4 x 1 s
    uv run python benchmarks/study.py --turns 3 --before ../other       # beside another checkout; medians
    uv run python benchmarks/study.py --commands --before ../other      # whole commands: launch.py sweep of digits

Each row is a process of its own, on an embedded Ray with two slots, and without early stopping:

- tune: a class of two methods with reused actors, as a user would write it, which saves a small file in each epoch.
- tune + MLflow: the same with Ray's own MLflow callback and an SQLite file.
- raydml: the trials of a stage with their events, checkpoints and retention, and the delivery to an SQLite file.

With --commands each row is `launch.py sweep` with 4 trials, 8 confirmations and a final test of real training: seconds
to the start of the study, to the first trial, from the search to the first confirmation, and to the end.

- wall: seconds from the start of the process to the end of the trials. / ideal: divided by the time of the trials on
  all slots. first trial: seconds to its start, of them Ray's own start. gap: median milliseconds in a slot from the end
  of a trial to the beginning of the next one. end: seconds from the last end of a trial to the end of the stage.
  CPU: milliseconds of the driver for each epoch, its start left out.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SLOTS, METRIC = 2, "val_map_at_r"
METRICS = ("val_r_precision", "val_recall_at_1", "val_recall_at_2", "train_loss", "gradient_norm", "learning_rate")
MODES = ("tune", "tune + MLflow", "raydml")


class Mark:
    """Appends the times of a slot's process to a file: ``begin`` and ``end`` of each of its trials."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __call__(self, what: str) -> None:
        with open(self._file, "a") as out:
            out.write(f"{time.time()} {os.getpid()} {what}\n")


def start_ray() -> float:
    """Start an embedded Ray, and return the seconds that it took."""
    import ray

    begin_s = time.time()
    ray.init(address="local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False, logging_level="error",
             configure_logging=False)  # fmt: skip
    return time.time() - begin_s


def run_tune(folder: Path, num_trials: int, epochs: int, epoch_s: float, *, with_mlflow: bool) -> float:
    """Run plain Tune, and return the CPU seconds of the driver from the start of the run."""
    from ray import tune

    mark = Mark(str(folder / "marks"))

    class Sleeper(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.value, self.epoch = new_config["x"], 0
            mark("begin")
            return True

        def step(self) -> dict[str, Any]:
            time.sleep(epoch_s)
            self.epoch += 1
            if self.epoch == epochs:
                mark("end")
            return {METRIC: self.value, **dict.fromkeys(METRICS, self.value), "done": self.epoch == epochs}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            (Path(checkpoint_dir) / "state.json").write_text(json.dumps({"epoch": self.epoch}))

    callbacks: list[Any] = []
    if with_mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks.append(MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="x"))
    begin_s = time.process_time()
    tune.Tuner(
        tune.with_resources(Sleeper, {"cpu": 1}),
        param_space={"x": tune.grid_search([random.Random(n).random() for n in range(num_trials)])},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="run", storage_path=str(folder), callbacks=callbacks, verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_frequency=1),
        ),
    ).fit()  # fmt: skip
    return time.process_time() - begin_s


class SleepingTrainer:
    """Stands in for raydml's trainer in the actor: it sleeps, and its checkpoints have one small tensor."""

    epoch_s, mark = 0.0, Mark(os.devnull)

    def __init__(self, trial: Any, _machine: Any, **_others: Any) -> None:
        import torch

        type(self).mark("begin")
        self.device = torch.device("cpu")
        self.num_epochs, self.epoch, self.best_epoch, self.ended = trial.epochs, 0, 0, ""
        self.value = random.Random(trial.model_dump_json()).random()
        self.last_result: dict[str, Any] = {}
        self.best_weights = {"w": torch.zeros(4)}

    def epochs(self) -> Any:
        """Yield a result after each epoch."""
        while not self.ended:
            time.sleep(self.epoch_s)
            self.epoch += 1
            self.ended = "finished" if self.epoch == self.num_epochs else ""
            if self.ended:
                type(self).mark("end")
            metrics = {METRIC: self.value, **dict.fromkeys(METRICS, self.value)}
            self.last_result = {"epoch": self.epoch, **metrics, "epoch_s": self.epoch_s, "ended": self.ended}
            yield dict(self.last_result)

    def contents(self, _snapshots: Any) -> dict[str, Any]:
        """Return the arguments of `checkpoint.save`."""
        return {"state": {"epoch": self.epoch}, "model_card": {}, "best_weights": self.best_weights, "history": []}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint as the trainer of an older checkout does."""
        from raydml.training import checkpoint

        return checkpoint.save(folder, **self.contents(None))


def _of_nodes(study: Path) -> dict[str, Any]:
    """Return what a session says about the place of the study and about nodes; an older checkout has less of it."""
    try:
        from raydml.study.node import needs_of
    except ImportError:
        return {}
    found: dict[str, Any] = {"bad_nodes": {}, "seen_nodes": set()}
    try:
        from raydml.study.remote import StudyPlace
    except ImportError:
        return {**found, "needs": needs_of(study, None, joined=False)}  # type: ignore[arg-type]
    place = StudyPlace.of(study)
    return {**found, "place": place, "needs": needs_of(place, None, joined=False)}


def run_raydml(folder: Path, num_trials: int, epochs: int, epoch_s: float) -> float:
    """Run a stage of a study, and return the CPU seconds of the driver from the start of the stage."""
    from raydml.config.trial import fingerprint
    from raydml.search_space.space import load_space, sample_trials
    from raydml.study import runner
    from raydml.study.actor import TrialActor
    from raydml.study.events import events_path
    from raydml.study.runner import StudySession
    from raydml.tracking.delivery import Tracker
    from raydml.tracking.store import default_uri, prepare_store

    mark = Mark(str(folder / "marks"))

    class SleepingActor(TrialActor):
        def _start(self, config: dict[str, Any]) -> None:
            from raydml.study import actor

            SleepingTrainer.epoch_s, SleepingTrainer.mark = epoch_s, mark
            actor.Trainer = SleepingTrainer
            super()._start(config)

    runner.TrialActor = SleepingActor
    search = f"{{num_trials: {num_trials}, scheduler: none, max_concurrent: {SLOTS}}}"
    settings = [f"study.search={search}", f"trial.epochs={epochs}", "study.name=s"]
    space = load_space(ROOT / "search_spaces" / "digits.yaml", [*settings, f"machine.cache_dir={folder}/cache"])
    trials = {f"search-{number:03d}": trial for number, trial in enumerate(sample_trials(space))}
    study = folder / "s"
    study.mkdir()
    (study / "study.json").write_text("{}")  # what a node is looked at for
    session = StudySession(
        folder=study, study=space.study, machine=space.machine, metric=METRIC, resources={"cpu": 1.0, "gpu": 0.0},
        **_of_nodes(study),
    )  # fmt: skip
    session.record("study_started", study="s", study_id=os.urandom(8).hex(), config={"select_on": METRIC})
    uri = default_uri(folder)
    prepare_store(uri, folder)
    tracker = Tracker(events_path(study), uri, "s")
    tracker.start()
    begin_s = time.process_time()
    runner.run_trials(session, "search", trials, {key: fingerprint(trial) for key, trial in trials.items()}, "none")
    driver_s = time.process_time() - begin_s
    (folder / "ended").write_text(str(time.time()))
    session.record("study_finished")
    assert tracker.finish(120), tracker.hint()
    return driver_s


def measure(mode: str, num_trials: int, epochs: int, epoch_s: float, begun_s: float) -> dict[str, float]:
    """Return the figures of one row. begun_s: when the process was started."""
    from raydml.cli.main import prepare_environment

    prepare_environment()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        if mode == "raydml":
            from raydml.study.cluster import connected

            start_s = time.time()
            stack.enter_context(connected(None, os.environ))
            ray_s = time.time() - start_s
            driver_s = run_raydml(folder, num_trials, epochs, epoch_s)
            ended_s = float((folder / "ended").read_text())
        else:
            ray_s = start_ray()
            driver_s = run_tune(folder, num_trials, epochs, epoch_s, with_mlflow="MLflow" in mode)
            ended_s = time.time()
        lines = (folder / "marks").read_text().splitlines()
        marks = [(float(time_s), pid, what) for time_s, pid, what in map(str.split, lines)]
    begins = sorted(time_s for time_s, _, what in marks if what == "begin")
    ends = sorted(time_s for time_s, _, what in marks if what == "end")
    assert len(ends) == num_trials, f"{len(ends)} of {num_trials} trials have ended"
    slots: dict[str, list[tuple[float, str]]] = {}
    for time_s, pid, what in marks:
        slots.setdefault(pid, []).append((time_s, what))
    gaps = [
        after[0] - before[0]
        for slot in slots.values()
        for before, after in itertools.pairwise(sorted(slot))
        if (before[1], after[1]) == ("end", "begin")
    ]
    return {
        "wall": ended_s - begun_s,
        "first": begins[0] - begun_s,
        "ray": ray_s,
        "gap": 1000 * statistics.median(gaps),
        "end": ended_s - ends[-1],
        "cpu": 1000 * driver_s / (num_trials * epochs),
    }


def measured(checkout: Path, mode: str, sizes: tuple[int, int, float]) -> dict[str, float]:
    """Run `measure` with the code of a checkout, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", mode, *map(str, sizes), str(time.time())]
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    # Ray's workers look for modules in the working directory of the driver first.
    done = subprocess.run(
        command, env=environment, cwd=checkout, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def time_command(checkout: Path) -> dict[str, float]:
    """Run ``launch.py sweep`` of a checkout, and return the seconds of the columns of `show_commands`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "launch.py",
            "sweep",
            "digits",
            "--num-trials",
            "4",
            "--name",
            "s",
            "--storage",
            folder,
        ]
        begun_s = time.time()
        subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=600, check=True)
        ended_s = time.time()
        lines = (Path(folder) / "s" / "events.jsonl").read_text().splitlines()
    times: dict[tuple[str, str], float] = {}
    for event in map(json.loads, lines):
        times.setdefault((event["event"], event.get("stage", "")), event["time"])
    return {
        "study s": times["study_started", ""] - begun_s,
        "first trial s": times["trial_started", "search"] - begun_s,
        "to confirmation s": times["trial_started", "confirm"] - times["stage_finished", "search"],
        "all s": ended_s - begun_s,
    }


def show_commands(checkouts: dict[str, Path], turns: int) -> None:
    """Print a table of whole commands, in turns."""
    from rich.console import Console
    from rich.table import Table

    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(turns):
        for name, checkout in checkouts.items():
            found[name].append(time_command(checkout))
    table = Table("launch.py sweep", *next(iter(found.values()))[0], box=None, pad_edge=False)
    for name, rows in found.items():
        table.add_row(name, *(f"{statistics.median(row[column] for row in rows):.1f}" for column in rows[0]))
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--commands", action="store_true", help="time whole commands instead")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        mode, num_trials, epochs, epoch_s, begun_s = options.measure
        print(json.dumps(measure(mode, int(num_trials), int(epochs), float(epoch_s), float(begun_s))))
        return
    if options.commands:
        show_commands({"now": ROOT, **({"before": options.before} if options.before else {})}, options.turns)
        return
    from rich.console import Console
    from rich.table import Table

    rows = [(mode, ROOT) for mode in MODES] + ([("raydml", options.before)] if options.before else [])
    table = Table("trials", "run by", "wall s", "/ ideal", "/ tune", "first trial s", "of it Ray", "gap ms", "end s",
                  "CPU ms", box=None, pad_edge=False)  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for name, sizes in {"64 x no work": (64, 1, 0.0), "16 x 4 x 1 s": (16, 4, 1.0)}.items():
        found: dict[tuple[str, Path], list[dict[str, float]]] = {row: [] for row in rows}
        for _ in range(options.turns):
            for row in rows:
                found[row].append(measured(row[1], row[0], sizes))
        plain_s = 0.0
        ideal_s = sizes[0] * sizes[1] * sizes[2] / SLOTS
        for (mode, checkout), turns in found.items():
            of = {figure: statistics.median(turn[figure] for turn in turns) for figure in turns[0]}
            plain_s = plain_s or of["wall"]
            table.add_row(
                name, mode if checkout == ROOT else f"{mode}, before", f"{of['wall']:.1f}",
                f"{of['wall'] / ideal_s:.2f}" if ideal_s else "", f"{of['wall'] / plain_s:.2f}", f"{of['first']:.1f}",
                f"{of['ray']:.1f}", f"{of['gap']:.0f}", f"{of['end']:.1f}", f"{of['cpu']:.1f}",
            )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
