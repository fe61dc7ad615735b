"""Ray's side of a trial: the actor around :class:`raydml.training.trainer.Trainer`, and the tasks of finalize."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.result import SHOULD_CHECKPOINT

from raydml.analysis.trials import OUT_OF_MEMORY
from raydml.config.refit import validates
from raydml.config.trial import Machine, Trial, parse_trial
from raydml.data.digests import ImageRecord
from raydml.evaluation.embed import metric_spec_of
from raydml.evaluation.prefixes import prefix_dims_of
from raydml.evaluation.saved_embeddings import concatenate, load_embeddings
from raydml.evaluation.scoring import MetricSpec
from raydml.inference.evaluate import (
    Evaluation,
    evaluate_checkpoint,
    evaluate_extra_test,
    evaluate_saved,
    refuse_absent_part,
)
from raydml.metrics.names import METRIC_GROUPS
from raydml.ops.progress import show_log
from raydml.ops.system_use import SystemUse
from raydml.study.faults import faults_named, is_without_memory, with_half_batch
from raydml.study.gauges import SlotGauges
from raydml.study.node import NodeNeeds, note_of_changed_code, refuse_unfit_node
from raydml.study.packing import limit_memory
from raydml.study.remote import StudyFiles, StudyPlace
from raydml.training import checkpoint
from raydml.training.checkpoint_writer import CheckpointWriter
from raydml.training.rank_group import RankGroup
from raydml.training.rank_processes import RankProcesses
from raydml.training.snapshot import Snapshots
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs

logger = logging.getLogger(__name__)
_LEAVE_S = 10.0  # for the driver to start a trial elsewhere that is saved


def assigned_device(machine: Machine) -> str:
    """Return the device that Ray has assigned to this process: a GPU only if Ray has assigned one."""
    if machine.device == "cpu":
        return "cpu"
    # Ray hides all other GPUs from the process, so the assigned one, or the share of one, has number 0.
    return "cuda:0" if ray.get_gpu_ids() else "cpu"


def name_of_device(device: torch.device) -> str:
    """Return the name of a GPU, such as ``NVIDIA H200``, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def devices_of_ranks(machine: Machine) -> list[str]:
    """Return the device of each rank that trains a trial in this process: one GPU each, or all the CPU."""
    device = assigned_device(machine)
    num_gpus = len(ray.get_gpu_ids()) if device != "cpu" else 1
    num_ranks = num_gpus if machine.ranks_per_trial == "auto" else machine.ranks_per_trial
    return [device if device == "cpu" else f"cuda:{rank}" for rank in range(num_ranks)]


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
    scheduler compares), ``by_class`` (whether the trial reports, with its last epoch, the value of its best epoch for
    each validation class), ``gpus`` (what it holds), ``needs`` (of :class:`raydml.study.node.NodeNeeds`), ``place`` (of
    :class:`raydml.study.remote.StudyPlace`), ``checkpoints``, the folder of its checkpoints in this Tune run,
    ``rungs``, the epochs at which trials are compared, and ``resume_from``, a checkpoint folder of an earlier run
    of the study or None.

    The actor writes its checkpoints itself, straight to where they stay, or sends them to the store. It begins one
    where it begins to train an epoch, so that the driver has the result of the saved epoch. Tune asks for one at a
    rung and before a trial pauses or ends, and waits for it. A trial that is started again, by Tune or by a resume,
    goes on from its newest intact checkpoint.

    Where several ranks train the trial, this process is rank 0, and the others are its children: see `_train_rank`.

    A fault of the node is raised as NodeFault, before anything else, and one of the machine as MachineFault. A trial
    that finds no memory ends with ``out_of_memory`` as its result and leaves no checkpoint of that moment, so that it
    can go on from the one before.
    """

    _leaves_by_s: float = 0.0  # until when the driver has to start it elsewhere
    _no_memory: str = ""  # the error of a trial that found no memory
    _notes: list[str]  # for the study's events, with the next result
    _trainer: Trainer | None = None
    _is_between_epochs: bool = False  # and so has a state that can be saved
    _trains: bool = False  # has begun to train the trial
    _pulled: Path | None = None  # the checkpoint of an earlier run that was fetched for the trial
    _writer: CheckpointWriter | None = None
    _snapshots: Snapshots
    _system: SystemUse | None = None
    _ranks: RankProcesses | None = None  # where several train the trial
    _files: StudyFiles
    _gauges: SlotGauges | None = None
    _catalogs: Catalogs | None = None  # the images are listed once in this process, not once for each of its trials
    _study: str = ""

    def __repr__(self) -> str:
        """Name the study, for the list of actors in Ray's dashboard; an actor trains several of its trials in turn."""
        return f"study {self._study}"

    def setup(self, config: dict[str, Any]) -> None:
        show_log()  # in Ray's log of this worker
        self._study = Path(StudyPlace(*config["run"]["place"]).folder).name
        if self.is_actor():
            # The objects of the imported libraries stay for good. To look at them all takes 0.3 s in each collection.
            gc.freeze()
            needs = NodeNeeds(*config["run"]["needs"])
            machine = Machine.model_validate(config["run"]["machine"])
            refuse_unfit_node(needs, has_gpu=assigned_device(machine) != "cpu")
        self._snapshots = Snapshots()
        self._start_named(config["run"])
        if self.is_actor() and (note := note_of_changed_code(needs)):
            self._notes.append(note)
        if self.is_actor() and needs.is_joined:
            self._gauges = SlotGauges(self._study)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start another trial in the same process, which saves the imports and the CUDA context."""
        self._start_named(new_config["run"])
        return True

    def _start_named(self, config: dict[str, Any]) -> None:
        self._no_memory, self._notes, self._leaves_by_s = "", [], 0.0
        with self._failures_named():
            self._start(config)

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Raise faults of the machine as such. Where memory is lacking, free what the trial holds and keep the reason.

        The next result then ends the trial for that reason.
        """
        with faults_named():
            try:
                with nullcontext() if self._ranks is None else self._ranks.errors_named():
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
        self._trains, self._pulled = False, None
        self._storage = None  # of Tune: it would copy what is written where it stays
        self._metric, self._rungs = str(config["metric"]), set(config["rungs"])
        machine = Machine.model_validate(config["machine"])
        trial: Trial = parse_trial(config["trial"])
        place = StudyPlace(*config["place"])
        self._files = place.files_of_node()
        record = ImageRecord.of_study(self._files.root)
        if self._catalogs is None or self._catalogs.machine != machine:
            self._files.share(record.folder)
            self._catalogs = Catalogs(machine, record=record)
        devices = devices_of_ranks(machine)
        if len(devices) == 1:
            limit_memory(config["gpus"], torch.device(devices[0]))
        if len(devices) > 1:
            self._ranks = RankProcesses(devices, _train_rank, config)
        self._writer = CheckpointWriter(
            self._files.local(config["checkpoints"], place),
            every_s=machine.checkpoint_every_s,
            snapshots=self._snapshots,
            written=self._files.push,
            dropped=self._files.drop,
        )
        self._trainer = Trainer(
            trial,
            machine,
            device=devices[0],
            catalogs=self._catalogs,
            reads=self._files.reads(),
            ranks=None if self._ranks is None else self._ranks.group,
            by_class=config["by_class"],
        )
        if not validates(trial):  # it has opened images that the driver had not
            self._files.share(record.folder)
        self._system = _system_use(machine.system_metrics, self._trainer.device)
        self._repeat: dict[str, Any] | None = None
        before = config["resume_from"]
        self._go_on(self._files.local(before, place) if before else None)
        self._epochs: Iterator[dict[str, Any]] = self._trainer.epochs()
        self._is_between_epochs = True

    def _go_on(self, resume_from: Path | None) -> None:
        """Restore the newest intact checkpoint of this Tune run, or else the one of an earlier run, if any."""
        assert self._trainer is not None
        assert self._writer is not None
        damaged: list[str] = []
        found = self._files.newest_intact(self._writer.folder, damaged)
        begins_from = found or resume_from
        if damaged:
            begin = f"it goes on from {begins_from}" if begins_from else "it starts over: no checkpoint is intact"
            self._notes += [*damaged, begin]
        if begins_from is None:
            return
        self._files.pull(begins_from)
        record = self._trainer.restore(begins_from)
        self._writer.goes_on_from(begins_from, self._trainer)
        if begins_from.parent != self._writer.folder:
            self._pulled = begins_from
        if found is None:
            # The scheduler of this run does not have the saved epoch: it decides on it now, with full rungs.
            self._repeat = record

    def _free(self) -> None:
        self._trainer, self._is_between_epochs = None, False
        self.__dict__.pop("_epochs", None)
        self._end_ranks()
        _free_memory()

    def _end_ranks(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

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
        assert self._trainer is not None
        assert self._writer is not None
        while time.monotonic() < self._leaves_by_s:
            time.sleep(0.1)
        if not self._trains:
            self._trains = True
            self._tidy_pulled()
        if self._repeat is not None:
            record, self._repeat = self._repeat, None
        else:
            self._writer.begin_if_due(self._trainer)
            self._is_between_epochs = False
            # A trial that died between its last epoch and its end reports its last epoch again.
            record = next(self._epochs, self._trainer.last_result)
            self._is_between_epochs = True
        if self._system is not None:
            record = {**record, **self._system.take()}
        if self._gauges is not None:
            self._gauges.set(record)
        return {
            "epoch": record["epoch"],
            "device": name_of_device(self._trainer.device),
            # Tune requires the metric in every result; a diverged epoch has none.
            self._metric: record.get(self._metric, math.nan),
            "record": record,
            "done": bool(record["ended"]),
            **({"class_values": self._trainer.best_class_values} if record["ended"] and self._trainer.by_class else {}),
            # Trials are compared here: one that goes on must not come back with another value.
            SHOULD_CHECKPOINT: record["epoch"] in self._rungs,
        }

    def cleanup(self) -> None:
        """End what runs beside the trial. Save one that is stopped between two epochs, by a signal for example."""
        self._end_ranks()
        if self._system is not None:
            self._system.close()
            self._system = None
        if self._gauges is not None:
            self._gauges.stop()
        if self._writer is None:
            return
        try:
            self._writer.wait()
            # Tune may prepare a trial in a second process that never trains it, while the first one uses these files.
            if not self._trains:
                return
            if self._trainer is not None and self._is_between_epochs and self._writer.is_behind(self._trainer):
                self._writer.write(self._trainer)
            self._tidy_pulled()
            self._files.tidy(self._writer.folder)
        except Exception as error:  # on a full disk, say; the trial that takes over this actor must not fail for it
            logger.warning("the last epochs of the trial are not saved: %s: %s", type(error).__name__, error)

    def _tidy_pulled(self) -> None:
        if self._pulled is not None:
            self._files.tidy(self._pulled)

    def save_between_epochs(self) -> None:
        """Write what the newest checkpoint lacks, where there is a state that can be saved: this node is going away.

        The trial then trains no further epoch for a while, which would be lost: the driver starts it elsewhere.
        """
        if self._writer is None or self._trainer is None or not self._is_between_epochs:
            return
        if self._writer.is_behind(self._trainer):
            with faults_named():
                self._writer.write(self._trainer)
        self._leaves_by_s = time.monotonic() + _LEAVE_S

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Write the checkpoint of this epoch, and return it in the form that Tune expects.

        checkpoint_dir: always None, as Tune calls it; the checkpoint goes to the folder of the trial.
        """
        assert checkpoint_dir is None
        assert self._writer is not None
        folder = self._writer.folder
        with faults_named():
            if self._trainer is None:  # it has found no memory
                self._writer.wait()
            else:
                folder = self._writer.write(self._trainer)
        return super().save(str(folder))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: `save` has written it."""

    def restore(self, checkpoint_path: Any) -> None:
        """Do nothing: the trial has gone on from its newest intact checkpoint, which Tune need not know, in `setup`."""


def _train_rank(ranks: RankGroup, device: str, config: dict[str, Any]) -> None:
    """Train a trial as one of its ranks but the first, which writes what comes of it. config: that of the actor."""
    show_log()
    place, machine = StudyPlace(*config["place"]), Machine.model_validate(config["machine"])
    files = place.files_of_node()
    catalogs = Catalogs(machine, record=ImageRecord.of_study(files.root))
    trial = parse_trial(config["trial"])
    trainer = Trainer(trial, machine, device=device, catalogs=catalogs, reads=files.reads(), ranks=ranks)
    for _ in trainer.epochs():
        pass


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
def evaluate_remotely(
    folder: str, machine: dict[str, Any], place: StudyPlace, commit: str, embeddings: str
) -> dict[str, Any]:
    """Evaluate a checkpoint's best weights and its untrained network on the validation and the test classes.

    Returns ``val`` and ``test``, all metrics by name, ``protocols``, the sentence of each test protocol and of each
    extra test that is not scored, ``num_left_out``, the number of unreadable test images, ``num_lone_queries``, that of
    test queries without an image of their class to find, ``extra_tests``, the names of the extra tests, and
    ``footprint``, what the network takes to embed an image; ``val`` is empty for a trial without validation classes.
    This process, which opens the test images, first records that. The embeddings of the test images are stored in the
    file `embeddings`.
    """
    here, files = Machine.model_validate(machine), place.files_of_node()
    device = assigned_device(here)
    local, stored = files.local(folder, place), files.local(embeddings, place)
    record = ImageRecord.of_study(files.root)
    files.pull(local)
    files.share(record.folder)
    card = checkpoint.load_card(local)
    refuse_absent_part(card, "test", folder)
    trial = parse_trial(card["trial"])
    spec = metric_spec_of(trial)._replace(groups=METRIC_GROUPS, dims=prefix_dims_of(trial))
    catalogs = Catalogs(here, record=record)
    evaluate = partial(evaluate_checkpoint, local, device=device, spec=spec, catalogs=catalogs)
    val = {}
    if validates(trial):
        val = _with_less_memory(partial(evaluate, "val"), here).metrics
    stored.parent.mkdir(parents=True, exist_ok=True)

    def test(machine: Machine) -> Evaluation:
        key = files.reads().record(purpose="finalize", checkpoint=folder, commit=commit)  # opens the images once
        return evaluate("test", machine, key=key, save_to=stored, footprint=True)

    def extra_test(name: str, machine: Machine) -> Evaluation:
        key = files.reads().record(purpose=f"finalize: extra test {name}", checkpoint=folder, commit=commit)
        return evaluate_extra_test(local, name, machine, key=key, device=device, spec=spec, catalogs=catalogs)

    tested = _with_less_memory(test, here)
    metrics, sentences = dict(tested.metrics), dict(tested.protocols)
    names = [extra.name for extra in trial.data.extra_tests]
    for name in names:
        try:
            found = _with_less_memory(partial(extra_test, name), here)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the scores of the test classes stay
            reason = str(error) or type(error).__name__
            logger.warning("warning: %s: the extra test %s is not scored: %s", folder, name, reason)
            sentences[f"{name}_not_scored"] = f"{name}: not scored for {stored.stem}, because {reason}"
            continue
        metrics |= found.metrics
        sentences |= found.protocols
    files.share(record.folder)
    files.push(stored)
    for copy in (local, stored):
        files.tidy(copy)
    counts = {"num_left_out": tested.num_left_out, "num_lone_queries": tested.num_lone_queries}
    more = {**counts, "extra_tests": names, "footprint": tested.footprint}
    return {"val": val, "test": metrics, "protocols": sentences, **more}


@ray.remote
def evaluate_ensemble_remotely(
    embeddings: list[str], machine: dict[str, Any], place: StudyPlace, commit: str
) -> dict[str, float]:
    """Return all metrics of the concatenated test embeddings of several runs, from the files of `evaluate_remotely`."""
    files = place.files_of_node()
    local = [files.local(file, place) for file in embeddings]
    for file in embeddings:
        files.reads().record(purpose="finalize: ensemble of kept embeddings", checkpoint=file, commit=commit)
    for copy in local:
        files.pull(copy)
    parts = [load_embeddings(copy) for copy in local]
    for copy in local:
        files.tidy(copy)
    codes = ("float",)  # no published system concatenates the signs of several networks
    spec = MetricSpec(tuple(parts[0].facts["recall_at"]), codes, METRIC_GROUPS)
    return evaluate_saved(concatenate(parts), spec, assigned_device(Machine.model_validate(machine))).metrics


@ray.remote
def illustrate_remotely(
    checkpoints: dict[str, str], machine: dict[str, Any], folder: str, tests: list[str], place: StudyPlace, commit: str
) -> None:
    """Draw the pictures of some runs, best first, and of stored test embeddings."""
    from raydml.report.illustrations import draw_illustrations  # imports matplotlib, which no trial needs

    here, files = Machine.model_validate(machine), place.files_of_node()
    for test in tests:
        files.reads().record(purpose="finalize: pictures of kept embeddings", checkpoint=test, commit=commit)
    chosen = {key: files.local(path, place) for key, path in checkpoints.items()}
    stored, drawn = [files.local(test, place) for test in tests], files.local(folder, place)
    for copy in (*chosen.values(), *stored):
        files.pull(copy)
    draw_illustrations(chosen, here, assigned_device(here), drawn, stored)
    files.push(drawn)
    for copy in (*chosen.values(), *stored, drawn):
        files.tidy(copy)
