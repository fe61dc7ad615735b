"""The cost of a study from a few real steps of each distinct shape of its trials."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from raydml.config.recipe import flatten
from raydml.config.refit import trains_on_test_classes
from raydml.config.trial import Machine, Trial, parse_machine, parse_trial
from raydml.evaluation.embed import device_of
from raydml.models.random_weights import write_random_weights
from raydml.study.folder import StudyError, StudyPlan, with_absolute_paths
from raydml.study.forecast import find_weights, steps_per_epoch
from raydml.training.probe import StepCost, probe_trial
from raydml.training.trial_images import Catalogs, open_development

#: What decides the speed and the memory of a trial; losses and miners take little of either.
_SECTIONS = [
    *("data.", "model.", "sampler.", "method.", "regularizers."),
    *("optimizer.name", "precision", "chunk_size", "channels_last", "compile"),
]
_NOT = ("data.content", "data.split", "model.weights", "model.head_init", "model.dropout")


def shape_of(trial: Trial) -> dict[str, Any]:
    """Return what decides the speed and the memory of a trial: key -> value, without numbers that have a fraction."""
    flat = flatten(trial.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if key.startswith(tuple(_SECTIONS)) and not key.startswith(_NOT)}
    averaged = {} if trial.optimizer.ema is None else {"optimizer.ema": "on"}  # one more copy of the weights
    return {**{key: value for key, value in kept.items() if not isinstance(value, float)}, **averaged}


def shape_key(trial: Trial) -> str:
    """Return the shape of a trial as a text, by which shapes are told apart."""
    return repr(sorted(shape_of(trial).items()))


def by_shape(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    """Return the trials of each shape, in the order of the first ones. The keys are those of `shape_key`."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(shape_key(trial), []).append(trial)
    return groups


def probe_study(plan: StudyPlan, storage: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return a forecast of a study (see `study/forecast.py`) with ``probe`` and ``hours`` filled in.

    expected: the forecast without them. One shape is probed after the other, each in a process of its own, so that none
    has the memory or the caches of another. Images are decoded into the cache first, where a run finds them. Weights
    that are not on this machine are replaced by random ones, which take the same time. Raises StudyError where a trial
    finds no memory, or would train on classes that are sealed otherwise.
    """
    space, trials, _, catalogs, _ = plan
    if any(map(trains_on_test_classes, trials)):
        raise StudyError(
            "--probe: its steps train on every class (trial.data.split.test_fraction = 0), and a forecast opens no "
            "image that is sealed otherwise. Cure: add --set trial.data.split.test_fraction=0.5 to this forecast; "
            "a step takes the same time and memory"
        )
    machine = with_absolute_paths(space.machine, storage)
    if machine.device == "cuda" and not torch.cuda.is_available():
        raise StudyError(
            "--probe: machine.device = cuda, and torch finds no GPU on this machine. Cure: --set machine.device=auto, "
            "or leave --dry-run out and give the --address of a cluster with GPUs"
        )
    if machine.ranks_per_trial != "auto" or machine.num_gpus(are_there=True) > 1:
        raise StudyError(
            "--probe: it measures the steps of one process, and several train each trial here (machine.gpus_per_trial, "
            "machine.ranks_per_trial). Cure: add --set machine.gpus_per_trial=auto --set machine.ranks_per_trial=auto "
            "to this forecast; several GPUs take at least their share of that time"
        )
    groups = by_shape(trials)
    differing = _differing([shape_of(group[0]) for group in groups.values()])
    rows, total_s = [], 0.0
    for group in groups.values():
        trial = group[0]
        open_development(trial, machine, augmented=False, catalogs=Catalogs(machine, on_changed="accept"))
        cost = _in_a_process(trial, machine)
        epoch_s = seconds_of_epoch(cost, trial, catalogs)
        total_s += len(group) * epoch_s
        shape = {key: value for key, value in shape_of(trial).items() if key in differing}
        rows.append({"num_trials": len(group), "shape": shape, "epoch_s": epoch_s, **cost._asdict()})
    epochs = sum(stage["epochs"] for stage in expected["stages"])
    hours = epochs * total_s / len(trials) / max(1, expected["slots"]["num_slots"]) / 3600
    return {**expected, "probe": rows, "hours": hours, "device": device_of(machine)}


def seconds_of_epoch(cost: StepCost, trial: Trial, catalogs: Catalogs) -> float:
    """Return the expected time of an epoch: its steps, the embedding for validation and the clustering."""
    steps, _ = steps_per_epoch(trial, catalogs.of(trial))
    return steps * cost.seconds_per_step + cost.validation_s + cost.clustering_s


def _differing(shapes: Sequence[dict[str, Any]]) -> set[str]:
    keys: Iterable[str] = {key for shape in shapes for key in shape}
    return {key for key in keys if len({repr(shape.get(key)) for shape in shapes}) > 1}


def _in_a_process(trial: Trial, machine: Machine) -> StepCost:
    with tempfile.TemporaryDirectory(prefix="raydml-probe-") as folder:
        if find_weights(trial)[0] is False:
            file = Path(folder) / f"{trial.model.backbone}.pth"
            write_random_weights(trial.model.backbone, file)
            trial = trial.model_copy(update={"model": trial.model.model_copy(update={"weights": str(file)})})
        plain = trial.model_dump(mode="json"), machine.model_dump(mode="json")
        # Spawned, not forked: a fork would begin with the memory of this process, and cannot use its GPU.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(_probe, *plain).result()
            except BrokenProcessPool:
                raise StudyError(_OUT_OF_MEMORY) from None


_OUT_OF_MEMORY = (
    "--probe: a trial was killed or found no memory; a run would end in the same way. Cure: smaller batches "
    "(trial.sampler), smaller images (trial.data.crop_px) or precision: bf16"
)


def _probe(trial: dict[str, Any], machine: dict[str, Any]) -> StepCost:
    here = parse_machine(machine)
    try:
        return probe_trial(parse_trial(trial), here, device_of(here))
    except torch.OutOfMemoryError:
        raise StudyError(_OUT_OF_MEMORY) from None
