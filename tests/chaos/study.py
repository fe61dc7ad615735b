"""One study under faults: it is run to its end, and compared with the undisturbed one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from raydml.study import events
from raydml.study.events import read_state
from tests.chaos.targets import Cluster, driver_of, kill, members, processes
from tests.study.repeatable import repeatable
from tests.study.small import leave_pictures_out

LAUNCH = Path(__file__).parents[2] / "launch.py"
NAME = "digits"
OPTIONS = ["--num-trials", "6", "--max-epochs", "6", "--scheduler", "sync", "--set", "study.confirm.seeds=1"]
OPTIONS += ["--set", "study.confirm.folds=2", "--set", "study.refit={seeds: 2}", "--set", "study.search.folds=2"]
# What is drawn depends on results from the third trial on: draws and results may be lost together.
OPTIONS += ["--set", "study.search.searcher={name: tpe, num_random: 2}", "--set", "study.search.generation=2"]
#: Faults that end the command, which is then run again; the other ones it has to survive.
ENDING = {
    "command": "kill -9 of the command",
    "INT": "Ctrl-C",
    "TERM": "a scheduler's notice",
    "HUP": "a closed terminal",
    "group": "TERM to the whole process group",
    "checkpoint": "kill -9 of the command, and its newest checkpoints damaged",
    "power": "kill -9 of the command, and the end of events.jsonl lost",
}
SURVIVED = {
    "trial": "kill -9 of a trial's process",
    "driver": "kill -9 of the driver",
    "raylet": "kill -9 of a raylet",
    "gcs": "kill -9 of Ray's GCS",
    "several": "two or three of the processes at once",
}
KINDS = (*SURVIVED, *ENDING)
#: Ends of the names of metrics that differ from one run to the next.
TIMING = ("_s", "peak_memory_bytes")


class StudyUnderFaults:
    """A study in a folder of its own. cluster: joined by its address; None is an embedded Ray. every_s: the least time
    between two checkpoints of a trial. pictures: whether it draws any."""

    def __init__(self, folder, draw, cluster=None, every_s=0, *, pictures=True):
        self._every_s = every_s
        self.storage, self.folder = folder / "studies", folder / "studies" / NAME
        self._draw, self._cluster = draw, cluster
        self._log = folder / "log.txt"
        self.faults = Counter()
        self._drivers = set()  # sessions of all drivers so far
        self.command = None
        folder.mkdir(parents=True, exist_ok=True)
        if not pictures:
            leave_pictures_out(self.folder)

    def start(self):
        """Start the command: `sweep` the first time, `resume` from then on."""
        made = (self.folder / "study.json").exists()
        space = LAUNCH.parent / "search_spaces" / "digits.yaml"
        words = (
            ["resume", str(self.folder)] if made else ["sweep", str(space), "--storage", str(self.storage), *OPTIONS]
        )
        if not made:
            words += ["--set", f"machine.checkpoint_every_s={self._every_s}"]
        if self._cluster is not None:
            self._cluster.start()
            words += ["--address", self._cluster.address]
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        with open(self._log, "ab") as log:
            self._begin = log.tell()  # of what this command prints
            self.command = subprocess.Popen(
                [sys.executable, str(LAUNCH), *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
                preexec_fn=_heed_signals,
            )

    def run(self, kinds, until, shown=print):
        """Run the study to its end, with faults of all kinds in random order, at random moments until ``until()``."""
        coming = []
        self.start()
        while True:
            is_over = until()
            # About as long as a start takes, which on a cluster includes its nodes, and some epochs.
            longest_s = 20.0 if self._cluster is None else 50.0
            code = self._wait(600.0 if is_over else self._draw.uniform(0.5, longest_s))
            if code is None and not is_over:
                self._sessions()  # takes note of the driver
                coming = coming or self._draw.sample(kinds, len(kinds))
                kind = coming.pop()
                if self._do(kind):
                    self.faults[kind] += 1
                    shown(f"  {kind} at epoch event {self._num_epochs()}")
                else:
                    coming.insert(0, kind)  # nothing of it runs now
                code = self.command.poll()
            if code == 0:
                return
            if code is not None:
                # Ended by a fault, or because Ray could not be had any more: what a user is told to do is to resume.
                if code not in (2, 130, 143, 129, -signal.SIGKILL, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP):
                    raise AssertionError(f"exit code {code}:\n{self._log.read_text()[-3000:]}")
                self._nothing_left()
                self.start()
            elif is_over:
                raise AssertionError(f"the study has not ended in 10 minutes:\n{self._log.read_text()[-3000:]}")

    def run_with(self, kind, when, longest_s=300.0):
        """Run the study to its end, with one fault that ends the command, as soon as ``when(events)``."""
        self.start()
        path, end_s = self.folder / "events.jsonl", time.monotonic() + longest_s
        while not (path.exists() and when(events.read(path))):
            assert time.monotonic() < end_s, self._log.read_text()[-3000:]
            assert self.command.poll() is None, self._log.read_text()[-3000:]
            time.sleep(0.02)
        self._sessions()
        assert self._do(kind)
        self._nothing_left()
        self.start()
        assert self._wait(longest_s) == 0, self._log.read_text()[-3000:]

    def _wait(self, seconds):
        try:
            return self.command.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _num_epochs(self):
        path = self.folder / "events.jsonl"
        return sum(event["event"] == "epoch" for event in events.read(path)) if path.exists() else 0

    def _sessions(self):
        driver = driver_of(self.command.pid)
        self._drivers |= {driver} if driver else set()
        return ({driver} if driver else set()) | (self._cluster.sessions() if self._cluster else set())

    def _do(self, kind):
        """Let a fault happen, and return whether there was something to hit."""
        if kind == "several":
            chosen = self._draw.sample(["trial", "driver", "raylet", "gcs"], self._draw.choice([2, 3]))
            hits = [self._do(one) for one in chosen]
            return any(hits)
        if kind == "driver":
            driver = driver_of(self.command.pid)
            return driver is not None and kill(driver)
        if kind in ("trial", "raylet", "gcs"):
            found = members(self._sessions(), kind)
            hit = bool(found) and kill(self._draw.choice(found))
            if hit and self._cluster is not None and kind != "trial":
                time.sleep(self._draw.uniform(0.5, 3.0))
                self._cluster.start()
            return hit
        if kind in ("INT", "TERM", "HUP", "group"):
            number = signal.SIGTERM if kind == "group" else getattr(signal, f"SIG{kind}")
            hit = kill(-self.command.pid if kind == "group" else self.command.pid, number)
            begin_s = time.monotonic()
            code = self._wait(60)
            assert code is not None, f"{kind} has not ended it in 60 s:\n{self._log.read_text()[-3000:]}"
            took_s = time.monotonic() - begin_s
            assert took_s < 20, f"{kind} took {took_s:.0f} s"  # 10 s are promised on a machine that is not full
            said = self._log.read_bytes()[self._begin :].decode("utf-8", "replace")
            # In its first tenths of a second the command has no handlers yet, and none any more when all is done and
            # said: it then ends by the signal itself.
            is_outside = "loading MLflow" not in said or read_state(self.folder).state == "finished"
            allowed = (0, 128 + number, *([-number] if is_outside else []))
            assert code in allowed, f"exit code {code} after {kind}:\n{said}"
            if code == 128 + number:
                self._has_ended_in_order(said)
            return hit
        kill(self.command.pid)
        self.command.wait(30)
        time.sleep(1.0)
        if kind == "checkpoint":
            self._damage_checkpoints()
        if kind == "power":
            self._lose_the_end_of_the_events()
        return True

    def _has_ended_in_order(self, said):
        """A signal ends in a line that says how to go on, and no run in MLflow is RUNNING.

        Before the driver is started, all that is needed is to type the same command again.
        """
        if "starting the driver" not in said:
            assert "nterrupted" in said, said
            return
        assert f"resume {self.folder}" in " ".join(said.split()), said
        if (self.storage / "mlflow.db").exists():
            running = [name for name, status in runs_of(self.storage) if status == "RUNNING"]
            assert not running, f"MLflow still shows {running} as running after a signal"

    def _damage_checkpoints(self):
        """Cut or change a file of the newest checkpoint of each trial that has not ended."""
        ended = {trial.trial for trial in read_state(self.folder).trials.values() if trial.ended}
        newest = {}
        for folder in sorted(self.folder.glob("*/run-*/*/checkpoint_*")):
            if folder.parent.name not in ended:
                newest[folder.parent.name] = folder
        for folder in newest.values():
            files = sorted(file for file in folder.iterdir() if file.is_file())
            if not files:
                continue
            file = self._draw.choice(files)
            data = bytearray(file.read_bytes())
            if self._draw.random() < 0.5 or not data:
                file.write_bytes(data[: len(data) // 2])
            else:
                data[self._draw.randrange(len(data))] ^= 1 << self._draw.randrange(8)
                file.write_bytes(data)

    def _lose_the_end_of_the_events(self):
        """Replace the last bytes of the events by zeros, as a file system may that lost its power."""
        path = self.folder / "events.jsonl"
        if not path.exists():
            return
        data = path.read_bytes()
        # Not the results of stages: they were written with fsync long before the end of the file.
        num_lost = min(self._draw.randrange(1, 4000), len(data) // 2)
        path.write_bytes(data[:-num_lost] + bytes(num_lost))

    def _nothing_left(self):
        """No process of a driver's session survives its command: the driver, an embedded Ray, the trials."""
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            left = [words for _, session, words in processes().values() if session in self._drivers]
            if not left:
                return
            time.sleep(0.2)
        raise AssertionError(f"left behind: {left}")


def _heed_signals():
    """Undo what nohup and the & of a shell's script do: INT and HUP would be ignored, as they have to be there."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def results_of(folder):
    """What must not change: the results of all stages, every epoch of every trial, how each trial ended."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("ranking", "confirmed", "refit")}
    for row in json.loads((folder / "final.json").read_text()):
        parts = {part: row[part] for part in ("metrics", "untrained", "refit", "ensemble")}
        read[f"final {row['from_trial']}"] = repeatable(parts)
    for key, trial in read_state(folder).trials.items():
        read[f"ended {key}"] = trial.ended
        for epoch, metrics in trial.epochs.items():
            read[f"{key} epoch {epoch}"] = {name: x for name, x in metrics.items() if not name.endswith(TIMING)}
    return read


def differences(expected, found):
    """The names of results that differ, are missing, or are too many."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def lost_epochs(folder):
    """How many epochs were trained again in all, and at most in a row by one trial.

    An epoch that is only reported again, from a checkpoint, has the same time to the last digit; one that was trained
    again has not.
    """
    seconds, in_row, total, most = {}, Counter(), 0, 0
    for event in events.read(folder / "events.jsonl"):
        if event["event"] != "epoch":
            continue
        trial, epoch, time_s = event["trial"], event["epoch"], event["metrics"].get("epoch_s")
        before = seconds.get((trial, epoch))
        if before is None:
            in_row[trial] = 0
        elif before != time_s:
            in_row[trial] += 1
            total, most = total + 1, max(most, in_row[trial])
        seconds[trial, epoch] = time_s
    return total, most


def contradictions(folder):
    """(trial, epoch) of the reports that differ from an earlier report of the same epoch."""
    first, found = {}, set()
    for event in events.read(folder / "events.jsonl"):
        if event["event"] == "epoch":
            metrics = {name: x for name, x in event["metrics"].items() if not name.endswith(TIMING)}
            key = event["trial"], event["epoch"]
            if first.setdefault(key, metrics) != metrics:
                found.add(key)
    return sorted(found)


def runs_of(storage):
    """(name, status) of every run in MLflow."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    return sorted((run.info.run_name, run.info.status) for run in client.search_runs(experiments, max_results=5000))


def undisturbed(folder, *, pictures=True):
    """Run the study once without a fault, and return its results and its runs."""
    study = StudyUnderFaults(folder, random.Random(0), pictures=pictures)
    study.run([], lambda: True)
    return results_of(study.folder), runs_of(study.storage)


def disturbed(folder, seed, kinds, until, expected, *, on_cluster=False, every_s=0, shown=print, pictures=True):
    """Run the study under faults, and return a row of what happened. Raises AssertionError where a promise broke."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cluster = Cluster(folder) if on_cluster else None
    study = StudyUnderFaults(folder, random.Random(seed), cluster, every_s, pictures=pictures)
    try:
        study.run(kinds, until, shown)
    finally:
        if study.command is not None and study.command.poll() is None:
            kill(study.command.pid)
            study.command.wait(30)
        if cluster is not None:
            cluster.stop()
    results, runs = expected
    num_lost, most_lost = lost_epochs(study.folder)
    found_runs = runs_of(study.storage)
    return {
        "seed": seed,
        "faults": dict(study.faults),
        "trials": sum(name.startswith("ended ") for name in results),
        "checkpoint every s": every_s,
        "wrong": differences(results, results_of(study.folder)),
        "contradictions": contradictions(study.folder),
        "duplicates": len(found_runs) - len(set(found_runs)),
        "runs as undisturbed": found_runs == runs,
        "epochs lost": num_lost,
        "most at once": most_lost,
    }
