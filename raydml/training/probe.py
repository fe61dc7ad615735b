"""A few real steps of a trial: what they take in time and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch

from raydml.config.trial import Machine, Trial
from raydml.evaluation.embed import embed
from raydml.ops.memory import peak_memory_bytes
from raydml.ops.system_use import gpu_use
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs

NUM_STEPS = 10
_NUM_WARM_UP = 2  # steps in which memory is allocated and kernels are chosen


class StepCost(NamedTuple):
    """peak_memory_bytes: of the process, or of what torch allocated on the GPU. seconds_per_step: the median.
    validation_s: embedding the validation images, without scores; 0 where no class validates. clustering_s: the mean
    over the epochs, most of which may have none. checkpoint_bytes: of the state after these steps. busy: the part of
    the time for which the steps kept a GPU busy, by its driver; 1 where that cannot be read, and on a CPU."""

    peak_memory_bytes: int
    seconds_per_step: float
    validation_s: float
    clustering_s: float
    checkpoint_bytes: int
    busy: float


def probe_trial(trial: Trial, machine: Machine, device: str, catalogs: Catalogs | None = None) -> StepCost:
    """Train NUM_STEPS steps of a trial after two for warming up, and embed some validation images.

    Steps are timed one by one, the device having finished each. The peak of a CPU is that of the process so far, so
    this function belongs into a process of its own. Raises what the constructor of the trainer raises.

    catalogs: of the images; None lists them.

    The backbone trains from the first step: where a trial warms its head up first, the later epochs count.
    """
    schedule = trial.schedule.model_copy(update={"new_layer_warmup_epochs": 0})
    trial = trial.model_copy(update={"schedule": schedule})
    trainer = Trainer(trial, machine, device=device, catalogs=catalogs)
    seconds: list[float] = []
    firsts: list[float] = []  # of an epoch, with its plan and its clustering
    clustering_s, is_first, busy = 0.0, True, list[float]()
    begin = time.perf_counter()
    for result in trainer.steps():
        _finish(trainer.device)
        took = time.perf_counter() - begin
        if result is not None:
            is_first = True
        elif is_first:
            assert trainer.epoch_state is not None
            clustered_s = float(trainer.epoch_state.clustering.get("clustering_s", 0.0))
            clustering_s = max(clustering_s, clustered_s)
            firsts.append(took - clustered_s)
            is_first = False
        else:
            seconds.append(took)
            busy += _busy(trainer.device)
        if NUM_STEPS + _NUM_WARM_UP in (len(seconds), len(firsts)):
            break
        begin = time.perf_counter()
    timed = seconds or firsts  # an epoch may have a single step
    reclusterings = [trainer.method.time_to_recluster(epoch) for epoch in range(trial.epochs)]
    return StepCost(
        seconds_per_step=median(timed[_NUM_WARM_UP:] or timed),
        validation_s=_validation_s(trainer, machine),
        clustering_s=clustering_s * sum(reclusterings) / trial.epochs,
        peak_memory_bytes=peak_memory_bytes(trainer.device),
        checkpoint_bytes=_checkpoint_bytes(trainer),
        busy=fmean(busy[_NUM_WARM_UP:] or [1.0]),
    )


def _validation_s(trainer: Trainer, machine: Machine) -> float:
    """Return the time for embedding all validation images, from two batches of them."""
    num_images = len(trainer.val_images.labels)
    if not num_images:
        return 0.0
    some = np.arange(min(num_images, 2 * machine.evaluation_batch))
    begin = time.perf_counter()
    embed(
        trainer.method,
        trainer.val_inputs.select(some),
        trainer.preprocessing,
        device=trainer.device,
        batch_size=machine.evaluation_batch,
        precision=trainer.trial.precision,
    )
    _finish(trainer.device)
    return (time.perf_counter() - begin) * num_images / len(some)


def _busy(device: torch.device) -> list[float]:
    """Return the part of the last moments (up to a second) for which a GPU was busy; nothing where that is unknown."""
    if device.type != "cuda":
        return []
    try:
        return [gpu_use(device)[0] / 100]
    except (ImportError, RuntimeError):  # no library, or no permission: the trial then holds a whole GPU
        return []


def _checkpoint_bytes(trainer: Trainer) -> int:
    """Return the size of a checkpoint; before the end of an epoch the best weights are still missing."""
    state = trainer.state_dict()
    return _num_bytes(state) + (0 if state["best_weights"] else _num_bytes(state["method"]))


def _num_bytes(value: Any) -> int:
    """Return the bytes of the tensors inside dictionaries, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_bytes, items))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
