"""One configuration in one Ray actor: the rim around :class:`raydml.training.trainer.Trainer`."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from raydml.config.trial import Machine, Trial, parse_trial
from raydml.data.seal import TestReads
from raydml.evaluation.embed import MetricSpec, metric_spec_of
from raydml.evaluation.saved_embeddings import concatenate, load_embeddings
from raydml.evaluation.scoring import METRIC_GROUPS
from raydml.inference.checkpoints import evaluate_checkpoint
from raydml.inference.external import evaluate_saved
from raydml.ops.progress import show_log
from raydml.training import checkpoint
from raydml.training.trainer import Trainer


def assigned_device(machine: Machine) -> str:
    """The device Ray gave to this process: a GPU only if one was assigned, whatever else the node has."""
    if machine.device == "cpu":
        return "cpu"
    # Ray hides all other GPUs from the process, so the assigned one (or the share of one) is number 0.
    return "cuda:0" if ray.get_gpu_ids() else "cpu"


class TrialActor(tune.Trainable):
    """Tune's view of a trial: one :meth:`step` is one epoch, a checkpoint holds the whole state.

    ``config["run"]``: ``key`` (``search-003``), ``trial`` and ``machine`` (dictionaries), ``metric`` (what the
    scheduler compares) and ``resume_from``, a checkpoint folder of an earlier run of the study or None.
    """

    def setup(self, config: dict[str, Any]) -> None:
        show_log()  # into Ray's log of this worker
        self._start(config["run"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over another trial in the same process: imports and the CUDA context are the expensive part."""
        self._start(new_config["run"])
        return True

    def _start(self, config: dict[str, Any]) -> None:
        # The old trial goes before the new one comes: two of them may not fit into one share of a GPU.
        for name in ("_trainer", "_epochs"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._metric = str(config["metric"])
        machine = Machine.model_validate(config["machine"])
        trial: Trial = parse_trial(config["trial"])
        self._trainer = Trainer(trial, machine, device=assigned_device(machine))
        self._repeat: dict[str, Any] | None = None
        if config["resume_from"] is not None:
            # The saved epoch is reported once more: the new run's scheduler then decides on it with full rungs.
            self._repeat = self._trainer.restore(Path(config["resume_from"]))
        self._epochs: Iterator[dict[str, Any]] = self._trainer.epochs()

    def step(self) -> dict[str, Any]:
        if self._repeat is not None:
            record, self._repeat = self._repeat, None
        else:
            # A trial that died between its last epoch and its end has nothing left but to say so.
            record = next(self._epochs, self._trainer.last_result)
        return {
            "epoch": record["epoch"],
            # Tune insists on the metric in every result; a diverged epoch has none.
            self._metric: record.get(self._metric, math.nan),
            "record": record,
            "done": bool(record["ended"]),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        self._trainer.save(Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        # Within a run the driver knows the saved epoch already: nothing is repeated.
        self._repeat = None
        self._trainer.restore(Path(checkpoint_dir))
        self._epochs = self._trainer.epochs()

    def restore(self, checkpoint_path: Any) -> None:
        """After a crash: go on from the newest *intact* checkpoint, or from the start when there is none.

        Tune would insist on the newest one and use up every retry on a file that was cut off by the crash.
        """
        newest = Path(checkpoint_path.checkpoint.path)
        if checkpoint.is_intact(newest):
            super().restore(checkpoint_path)
            return
        intact = checkpoint.newest_intact(newest.parent)
        if intact is not None:
            self.load_checkpoint(str(intact))


@ray.remote
def evaluate_remotely(folder: str, machine: dict[str, Any], reads: str, commit: str, embeddings: str) -> dict[str, Any]:
    """{"val", "test"} -> all metrics of a checkpoint's best weights and of its untrained network, {"protocols"} -> how
    the test classes were asked; with a trial's resources. The test embeddings are kept in the file ``embeddings``.

    The read is recorded in the file ``reads`` here, by the process that opens the images, before it opens them.
    """
    here = Machine.model_validate(machine)
    device = assigned_device(here)
    wanted = metric_spec_of(parse_trial(checkpoint.load_card(Path(folder))["trial"]))._replace(groups=METRIC_GROUPS)
    val = evaluate_checkpoint(Path(folder), "val", here, device=device, spec=wanted)
    key = TestReads(Path(reads)).record(purpose="finalize", checkpoint=folder, commit=commit)
    test = evaluate_checkpoint(
        Path(folder), "test", here, key=key, device=device, spec=wanted, save_to=Path(embeddings)
    )
    return {"val": val.metrics, "test": test.metrics, "protocols": test.protocols}


@ray.remote
def evaluate_ensemble_remotely(files: list[str], machine: dict[str, Any], reads: str, commit: str) -> dict[str, float]:
    """All metrics of the concatenated test embeddings of several runs, from the files that finalize kept."""
    for file in files:
        TestReads(Path(reads)).record(purpose="finalize: ensemble of kept embeddings", checkpoint=file, commit=commit)
    parts = [load_embeddings(Path(file)) for file in files]
    codes = ("float",)  # signs of several networks side by side are no system that anybody published
    wanted = MetricSpec(tuple(parts[0].facts["recall_at"]), codes, METRIC_GROUPS)
    return evaluate_saved(concatenate(parts), wanted, assigned_device(Machine.model_validate(machine))).metrics


@ray.remote
def illustrate_remotely(
    checkpoints: dict[str, str], machine: dict[str, Any], folder: str, tests: list[str], reads: str, commit: str
) -> None:
    """The pictures of some runs, best first, and of kept test embeddings, with a trial's resources."""
    from raydml.report.illustrations import illustrate  # brings matplotlib, which no trial needs

    here = Machine.model_validate(machine)
    for test in tests:
        TestReads(Path(reads)).record(purpose="finalize: pictures of kept embeddings", checkpoint=test, commit=commit)
    chosen = {key: Path(path) for key, path in checkpoints.items()}
    illustrate(chosen, here, assigned_device(here), Path(folder), [Path(test) for test in tests])
