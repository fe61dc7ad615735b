"""Studies and models from Python: start a study, wait for it, read its results as data frames, load its model.

    from raydml import Study, load_model

    study = Study.start("path/to/photos", num_trials=16).wait()
    print(study.test)
    embeddings = load_model(study).embed(["photo.jpg"])

The functions of the commands do the work. A study runs in a process of its own, as Ray needs one, so a notebook stays
usable meanwhile. Heavy libraries are imported at the first use.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from raydml.inference.export import EmbeddingModel

LOG = "output.log"  # what the process of a study prints, in the study's folder
_POLL_S = 0.2
_STOP_S = 60.0  # longest wait for the end of a study that is stopped


class StudyFailed(ValueError):
    """The process of a study ended before the study did; the message ends with its last lines."""


class Study:
    """A study in its folder: running, interrupted or finished. Make one with `start` or `open`."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes] | None = None) -> None:
        self.folder = folder
        self._process = process
        self._tracking_uri: str | None = None  # where it has a password, which is not in study.json

    @classmethod
    def start(
        cls,
        space: str | Path,
        *,
        name: str | None = None,
        num_trials: int | None = None,
        max_epochs: int | None = None,
        seed: int | None = None,
        scheduler: str | None = None,
        stages: str | None = None,
        start_from: str | Path | None = None,
        recipe: str | None = None,
        seeds: int | None = None,
        settings: Sequence[str] = (),
        data_root: str | Path | None = None,
        storage: str | Path = "studies",
        tracking_uri: str | None = None,
        time_limit: str | None = None,
        max_gpu_hours: float | None = None,
        until_settled: bool = False,
        address: str | None = None,
    ) -> Study:
        """Start a study in a process of its own and return at once; a finished one is returned as it is.

        space: a folder of images, or the YAML file of a search space. settings: as ``--set``, such as
        ``["trial.sampler.images_per_class=4"]``. time_limit: as ``--time``, such as ``"2h"``. The other arguments are
        the options of `sweep` of the same names. The same call continues an interrupted study.

        Raises ConfigError, StudyError, DataError or CommandError for what `sweep` refuses.
        """
        from raydml.cli.arguments import budget_of, divided_storage
        from raydml.cli.main import prepare_environment
        from raydml.cli.studies import create, load_with_options, with_secrets
        from raydml.ops.object_store import check_uri, joined

        prepare_environment()
        budget_of(time_limit, max_gpu_hours, until_settled)  # refused here rather than in the process of the study
        here, storage_uri = divided_storage(str(storage))
        loaded, file = load_with_options(
            Path(space),
            settings,
            num_trials=num_trials,
            max_epochs=max_epochs,
            seed=seed,
            name=name,
            scheduler=scheduler,
            stages=stages,
            recipe=recipe,
            seeds=seeds,
            data_root=None if data_root is None else Path(data_root),
            start_from=None if start_from is None else str(start_from),
            storage=here,
        )
        uri = None if storage_uri is None else joined(check_uri(storage_uri), loaded.study.name)
        folder = create(loaded, file, here, tracking_uri, f"Study.start({str(space)!r})", uri)
        study = cls.open(folder)
        study._tracking_uri = with_secrets(tracking_uri)
        return study.resume(
            time_limit=time_limit, max_gpu_hours=max_gpu_hours, until_settled=until_settled, address=address
        )

    @classmethod
    def open(cls, study: str | Path, *, storage: str | Path = "studies") -> Study:
        """Open a study by its name or folder. Raises StudyError if there is none."""
        from raydml.study.folder import find_study

        return cls(find_study(str(study), Path(storage)))

    def resume(
        self,
        *,
        num_trials: int | None = None,
        time_limit: str | None = None,
        max_gpu_hours: float | None = None,
        until_settled: bool = False,
        address: str | None = None,
    ) -> Study:
        """Continue the study in a process of its own, and return this object; a running one is left as it is.

        num_trials: how many trials the search has in all from now on; a finished study continues with the new ones.
        """
        if self._is_running() or (self.state == "finished" and num_trials is None):
            return self
        command = [sys.executable, "-m", "raydml", "resume", str(self.folder)]
        options = {"--num-trials": num_trials, "--time": time_limit, "--max-gpu-hours": max_gpu_hours}
        options |= {"--address": address}
        command += [text for name, value in options.items() if value is not None for text in (name, str(value))]
        command += ["--until-settled"] if until_settled else []
        from raydml.cli.main import environment_with

        addressed = {} if self._tracking_uri is None else {"MLFLOW_TRACKING_URI": self._tracking_uri}
        with (self.folder / LOG).open("ab") as log:
            # A session of its own: the study outlives this terminal or notebook, and Ctrl-C reaches it through `wait`.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment_with(addressed),
            )
        return self

    def wait(self, timeout_s: float | None = None) -> Study:
        """Show the study until it has finished, and return this object.

        Raises StudyFailed if its process ends before, and TimeoutError after ``timeout_s`` seconds; the study then
        continues. Ctrl-C stops the study, as in the terminal; `resume` continues it.
        """
        from raydml.cli.live_view import LiveStudy
        from raydml.study.events import events_path

        if self._process is None:
            self.resume()
        until = None if timeout_s is None else time.monotonic() + timeout_s
        events = events_path(self.folder)
        if self._process is None and not self._is_running():  # it was finished before
            return self
        with LiveStudy(events, from_offset=events.stat().st_size if events.exists() else 0):
            try:
                while self._is_running():
                    if until is not None and time.monotonic() > until:
                        raise TimeoutError(f"study {self.name!r} has not finished after {timeout_s:g} s; it continues")
                    time.sleep(_POLL_S)
            except KeyboardInterrupt:
                self.stop()
                raise
        code = None if self._process is None else self._process.returncode
        if code or self.state != "finished":
            log = self.folder / LOG
            last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:] if log.exists() else []
            raise StudyFailed(
                f"study {self.name!r} is {self.state}, and its process has ended (code {code}). "
                f"Cure: Study.open({str(self.folder)!r}).wait() continues it. {log} ends with:\n" + "\n".join(last)
            )
        return self

    def stop(self) -> None:
        """End the process that this object started as Ctrl-C does; `wait` or `resume` continues the study later.

        A study that another process runs is left alone. Raises TimeoutError if the process has not ended in a minute.
        """
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"study {self.name!r} has not stopped after {_STOP_S:g} s. "
                f"Cure: wait, or end process {self._process.pid}"
            ) from None

    def _is_running(self) -> bool:
        from raydml.study.driver import is_running

        if self._process is not None and self._process.poll() is None:
            return True
        return bool(is_running(self.folder))  # by another process of this machine, such as a terminal

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> str:
        """``waiting``, ``running``, ``interrupted`` or ``finished``, by its events."""
        from raydml.study.events import read_state

        return read_state(self.folder).state

    @property
    def report(self) -> Path:
        """The HTML report of a finished study."""
        return self.folder / "report" / "report.html"

    @property
    def summary(self) -> dict[str, Any]:
        """Plan, results and cost as one dictionary (raydml/study/summary.py), for an unfinished study so far."""
        from raydml.study.summary import summarise

        return summarise(self.folder)

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial: how it ended, the metrics of its best epoch (``best.``), test metrics, all parameters."""
        from raydml.report.tables import trial_rows
        from raydml.study.summary import histories

        return _frame(trial_rows(histories(self.folder), self.summary))

    @property
    def epochs(self) -> pd.DataFrame:
        """One row per trial and epoch with every metric that it reported."""
        from raydml.report.tables import epoch_rows
        from raydml.study.summary import histories

        return _frame(epoch_rows(histories(self.folder)))

    @property
    def confirmed(self) -> pd.DataFrame:
        """One row per confirmed configuration, best first: mean and 95 % half width on validation classes."""
        names = ("letter", "recipe", "from_trial", "mean", "half_width", "num_runs", "configuration")
        return _frame([{name: row[name] for name in names} for row in self.summary["confirm"]])

    @property
    def test(self) -> pd.DataFrame:
        """Scores on the held-out test classes: one row per configuration and metric.

        The columns ``refit`` and ``refit_half_width`` are of the refits, ``mean`` and ``half_width`` of the models that
        left classes out for validation, ``untrained`` of the same networks before training, ``ensemble`` of the
        concatenated embeddings of the fold models. None where a study has no such models. Empty before finalize.
        """
        rows = []
        for row in self.summary["final"]:
            refit = row["refit"] or {"metrics": {}, "untrained": {}}
            columns = {
                "refit": (refit["metrics"], "mean"),
                "refit_half_width": (refit["metrics"], "half_width"),
                "mean": (row["metrics"], "mean"),
                "half_width": (row["metrics"], "half_width"),
                "untrained": (row["untrained"] or refit["untrained"], "mean"),
                "ensemble": (row["ensemble"], "mean"),
            }
            for metric in dict.fromkeys([*refit["metrics"], *row["metrics"]]):
                scores = {name: (means.get(metric) or {}).get(part) for name, (means, part) in columns.items()}
                rows.append({"letter": row["letter"], "recipe": row["recipe"], "metric": metric, **scores})
        return _frame(rows)

    def __repr__(self) -> str:
        return f"<Study {self.name}: {self.state}, {self.folder}>"


def load_model(target: str | Path | Study, *, storage: str | Path = "studies", tracking_uri: str | None = None,
               device: str = "cpu") -> EmbeddingModel:  # fmt: skip
    """Load a trained model: ``load_model("mine").embed(["photo.jpg"])`` is (1, D) float32.

    target: a study (its refit, else its winner), one trial as ``"mine:confirm-003"``, a checkpoint, an exported folder,
    ``"runs:/ID/..."`` or ``"models:/NAME/VERSION"``. Raises StudyError, CommandError or ExportError if there is none.
    """
    from raydml.cli.export import load_target
    from raydml.cli.main import prepare_environment

    prepare_environment()
    named = str(target.folder) if isinstance(target, Study) else str(target)
    return load_target(named, Path(storage), tracking_uri, device)[0]


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)
