"""Ray's side of a trial: the actor around :class:`raydml.training.trainer.Trainer`, and the tasks of finalize."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from raydml.config.refit import validates
from raydml.config.trial import Machine, Trial, parse_trial
from raydml.data.digests import ImageRecord
from raydml.data.seal import TestReads
from raydml.evaluation.embed import metric_spec_of
from raydml.evaluation.saved_embeddings import concatenate, load_embeddings
from raydml.evaluation.scoring import MetricSpec
from raydml.inference.evaluate import Evaluation, evaluate_checkpoint, evaluate_saved, refuse_absent_part
from raydml.metrics.names import METRIC_GROUPS
from raydml.ops.files import require_space
from raydml.ops.progress import show_log
from raydml.ops.system_use import SystemUse
from raydml.study.faults import faults_named, is_without_memory, with_half_batch
from raydml.training import checkpoint
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs

logger = logging.getLogger(__name__)
OUT_OF_MEMORY = "out_of_memory"


def assigned_device(machine: Machine) -> str:
    """Return the device that Ray has assigned to this process: a GPU only if Ray has assigned one."""
    if machine.device == "cpu":
        return "cpu"
    # Ray hides all other GPUs from the process, so the assigned one, or the share of one, has number 0.
    return "cuda:0" if ray.get_gpu_ids() else "cpu"


def _system_use(switch: str, device: torch.device) -> SystemUse | None:
    """Begin the system metrics of a trial; a GPU that cannot be read fails only where the switch is ``on``."""
    if switch == "off" or (switch == "auto" and device.type != "cuda"):
        return None
    try:
        return SystemUse(device)
    except (ImportError, RuntimeError) as error:
        if switch == "on":
            raise
        logger.warning("system metrics are left out: %s", error)
        return None


class TrialActor(tune.Trainable):
    """A trial as Tune runs it: one :meth:`step` is one epoch, and a checkpoint holds the whole state.

    ``config["run"]``: ``key`` (``search-003``), ``trial`` and ``machine`` (dictionaries), ``metric`` (what the
    scheduler compares), ``reads`` (the file in which a trial on all classes records that it opens the test classes) and
    ``resume_from``, a checkpoint folder of an earlier run of the study or None.

    A fault of the machine is raised as MachineFault. A trial that finds no memory ends with ``out_of_memory`` as its
    result and leaves no checkpoint of that moment, so that it can go on from the one before.
    """

    _begins_from: str  # in words, where the trial begins in this run
    _no_memory: str = ""  # the error of a trial that found no memory
    _notes: list[str]  # for the study's events, with the next result
    _system: SystemUse | None = None
    _catalogs: Catalogs | None = None  # the images are listed once in this process, not once for each of its trials

    def setup(self, config: dict[str, Any]) -> None:
        show_log()  # in Ray's log of this worker
        self._start_named(config["run"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial in the same process, which saves the imports and the CUDA context."""
        self._start_named(new_config["run"])
        return True

    def _start_named(self, config: dict[str, Any]) -> None:
        self._no_memory, self._notes = "", []
        with self._failures_named():
            self._start(config)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Raise faults of the machine as such. Where memory is lacking, free what the trial holds and keep the reason.

        The next result then ends the trial for that reason.
        """
        with faults_named():
            try:
                yield
            except Exception as error:
                if not is_without_memory(error):
                    raise
                self._no_memory = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
                self._free()

    def _start(self, config: dict[str, Any]) -> None:
        self.cleanup()
        # Free the old trial first: two of them may not fit into one share of a GPU.
        self._free()
        self._metric = str(config["metric"])
        machine = Machine.model_validate(config["machine"])
        trial: Trial = parse_trial(config["trial"])
        self._study = Path(config["reads"]).parent
        if self._catalogs is None or self._catalogs.machine != machine:
            self._catalogs = Catalogs(machine, record=ImageRecord.of_study(self._study))
        reads = TestReads(Path(config["reads"]))
        device = assigned_device(machine)
        self._trainer = Trainer(trial, machine, device=device, catalogs=self._catalogs, reads=reads)
        self._system = _system_use(machine.system_metrics, self._trainer.device)
        self._repeat: dict[str, Any] | None = None
        self._begins_from = "it starts over: no checkpoint is intact"
        if config["resume_from"] is not None:
            self._begins_from = f"it goes on from {config['resume_from']}"
            # The saved epoch is reported a second time: the scheduler of this run then decides on it with full rungs.
            self._repeat = self._trainer.restore(Path(config["resume_from"]))
        self._epochs: Iterator[dict[str, Any]] = self._trainer.epochs()

    def _free(self) -> None:
        for name in ("_trainer", "_epochs"):
            self.__dict__.pop(name, None)
        _free_memory()

    def step(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        with self._failures_named():
            result = {} if self._no_memory else self._step()
        if self._no_memory:
            record = {"ended": OUT_OF_MEMORY, "error": self._no_memory}
            result = {"epoch": 0, self._metric: math.nan, "record": record, "done": True}
        notes, self._notes = self._notes, []
        return {**result, "notes": notes}

    def _step(self) -> dict[str, Any]:
        if self._repeat is not None:
            record, self._repeat = self._repeat, None
        else:
            # A trial that died between its last epoch and its end reports its last epoch again.
            record = next(self._epochs, self._trainer.last_result)
        if self._system is not None:
            record = {**record, **self._system.take()}
        return {
            "epoch": record["epoch"],
            # Tune requires the metric in every result; a diverged epoch has none.
            self._metric: record.get(self._metric, math.nan),
            "record": record,
            "done": bool(record["ended"]),
        }

    def cleanup(self) -> None:
        """End what samples the GPU."""
        if self._system is not None:
            self._system.close()
            self._system = None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if not self._no_memory:
            with faults_named():
                folder = self._trainer.save(Path(checkpoint_dir))
                # Ray copies it to the disk of the study, whose lack of room would end the trial.
                require_space(self._study, sum(file.stat().st_size for file in folder.iterdir()), "a checkpoint")

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        if self._no_memory:
            return
        # Within a run the driver has the report of the saved epoch already: do not repeat it.
        self._repeat = None
        with faults_named():
            self._trainer.restore(Path(checkpoint_dir))
        self._epochs = self._trainer.epochs()

    def restore(self, checkpoint_path: Any) -> None:
        """Go on after a crash from the newest *intact* checkpoint, or from the start where there is none.

        Tune would always take the newest one, and use up every retry on a file that the crash has cut off.
        """
        newest = Path(checkpoint_path.checkpoint.path)
        if checkpoint.is_intact(newest):
            super().restore(checkpoint_path)
            return
        damaged: list[str] = []
        intact = checkpoint.newest_intact(newest.parent, damaged)
        self._notes += [*damaged, f"it goes on from {intact}" if intact else self._begins_from]
        if intact is not None:
            self.load_checkpoint(str(intact))


def _with_less_memory(evaluate: Callable[[Machine], Evaluation], machine: Machine) -> Evaluation:
    """Evaluate, and where there is no memory for it once more with half the batch."""
    try:
        return evaluate(machine)
    except (RuntimeError, MemoryError) as error:
        if not is_without_memory(error):
            raise
    _free_memory()
    return evaluate(with_half_batch(machine))


def _free_memory() -> None:
    """Return memory that nothing uses any more to the device, for other trials."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@ray.remote
def evaluate_remotely(folder: str, machine: dict[str, Any], reads: str, commit: str, embeddings: str) -> dict[str, Any]:
    """Evaluate a checkpoint's best weights and its untrained network on the validation and the test classes.

    Returns ``val`` and ``test``, all metrics by name, ``protocols``, the sentence of each test protocol, and
    ``num_left_out``, the number of unreadable test images; ``val`` is empty for a trial without validation classes.
    This process, which opens the test images, first records that in the file `reads`. The embeddings of the test images
    are stored in the file `embeddings`.
    """
    here = Machine.model_validate(machine)
    device = assigned_device(here)
    card = checkpoint.load_card(Path(folder))
    refuse_absent_part(card, "test", folder)
    trial = parse_trial(card["trial"])
    spec = metric_spec_of(trial)._replace(groups=METRIC_GROUPS)
    catalogs = Catalogs(here, record=ImageRecord.of_study(Path(reads).parent))
    evaluate = partial(evaluate_checkpoint, Path(folder), device=device, spec=spec, catalogs=catalogs)
    val = {}
    if validates(trial):
        val = _with_less_memory(partial(evaluate, "val"), here).metrics
    key = TestReads(Path(reads)).record(purpose="finalize", checkpoint=folder, commit=commit)
    test = _with_less_memory(partial(evaluate, "test", key=key, save_to=Path(embeddings)), here)
    return {"val": val, "test": test.metrics, "protocols": test.protocols, "num_left_out": test.num_left_out}


@ray.remote
def evaluate_ensemble_remotely(files: list[str], machine: dict[str, Any], reads: str, commit: str) -> dict[str, float]:
    """Return all metrics of the concatenated test embeddings of several runs, from the files of `evaluate_remotely`."""
    for file in files:
        TestReads(Path(reads)).record(purpose="finalize: ensemble of kept embeddings", checkpoint=file, commit=commit)
    parts = [load_embeddings(Path(file)) for file in files]
    codes = ("float",)  # no published system concatenates the signs of several networks
    spec = MetricSpec(tuple(parts[0].facts["recall_at"]), codes, METRIC_GROUPS)
    return evaluate_saved(concatenate(parts), spec, assigned_device(Machine.model_validate(machine))).metrics


@ray.remote
def illustrate_remotely(
    checkpoints: dict[str, str], machine: dict[str, Any], folder: str, tests: list[str], reads: str, commit: str
) -> None:
    """Draw the pictures of some runs, best first, and of stored test embeddings."""
    from raydml.report.illustrations import draw_illustrations  # imports matplotlib, which no trial needs

    here = Machine.model_validate(machine)
    for test in tests:
        TestReads(Path(reads)).record(purpose="finalize: pictures of kept embeddings", checkpoint=test, commit=commit)
    chosen = {key: Path(path) for key, path in checkpoints.items()}
    draw_illustrations(chosen, here, assigned_device(here), Path(folder), [Path(test) for test in tests])
