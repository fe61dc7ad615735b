"""The first steps of each shape of trial, on the nodes of a study, before the study starts.

They say how many trials share a GPU (see `raydml.study.packing`), and how long the study will take. What was measured
is kept in ``probe.json`` of the study: a resumed one measures only what is missing there.

{"shapes": {key of the shape: {"num_trials", "device" (``cpu``, or the name of a GPU), "device_bytes" (its memory, 0 of
            a CPU), and the fields of `raydml.training.probe.StepCost`}}}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import ray
import torch

from raydml.config.refit import trains_on_test_classes
from raydml.config.trial import Machine, StudySettings, Trial, parse_trial
from raydml.data.digests import ImageRecord
from raydml.ops.wording import counted, hours_text
from raydml.study.actor import assigned_device
from raydml.study.events import StudyState
from raydml.study.folder import StudyError, num_confirmed, num_refits, read_json, write_json
from raydml.study.forecast import num_run_to_end, stages_with_epochs
from raydml.study.node import NodeNeeds, refuse_unfit_node
from raydml.study.pace import STAGE_START_S, Pace, remaining_s
from raydml.study.packing import GpuRoom, share_of, trials_per_gpu
from raydml.study.probe import by_shape, seconds_of_epoch
from raydml.study.remote import StudyPlace
from raydml.training.probe import StepCost, probe_trial
from raydml.training.trial_images import Catalogs

PROBE_FILE = "probe.json"
MAX_SHAPES = 8  # those with the most trials; a probe of each shape of a large search would take longer than it saves
_PATIENCE_S = 1800.0  # for all shapes: a node may have to start, a process imports torch, decodes what its node lacks


class Forecast(NamedTuple):
    """What a study is expected to take before it starts.

    seconds: from its first trial to its report. device_hours: of epochs, by what each trial holds; unit: as in
    `raydml.analysis.cost.Cost`. disk_bytes: of its checkpoints, at most at a time. num_shapes: those measured, of
    num_all.
    """

    seconds: float
    device_hours: float
    unit: str
    disk_bytes: int
    num_shapes: int
    num_all: int


def is_wanted(machine: Machine, resources: Mapping[str, float]) -> bool:
    """Return whether the first steps are measured: where they decide on shares of GPUs, or where a user wants it."""
    if machine.probe != "auto":
        return machine.probe == "on"
    return machine.gpus_per_trial == "auto" and resources["gpu"] == 1


def measure_shapes(
    folder: Path,
    trials: Sequence[Trial],
    machine: Machine,
    needs: NodeNeeds,
    place: StudyPlace,
    options: Mapping[str, Any],
    nodes: Sequence[Mapping[str, Any]],
    *,
    is_stopping: Callable[[], bool],
    note: Callable[[str], None],
    patience_s: float = _PATIENCE_S,
) -> dict[str, dict[str, Any]]:
    """Measure the shapes of trials that have not been measured, each as a task of Ray, and return those that are known.

    A shape that cannot be measured is noted: its trials run as if there was no probe, and a resumed study tries it
    again. What was measured on a device that the cluster no longer has is measured again. Trials that train on the test
    classes are left out, because nothing but their training may open those.

    options: of Ray, for what a task holds and where it runs. nodes: those that may run it, as Ray describes them.
    is_stopping: whether to wait no longer.
    """
    file = folder / PROBE_FILE
    try:
        kept: dict[str, dict[str, Any]] = dict(read_json(file)["shapes"]) if file.exists() else {}
    except (StudyError, KeyError, TypeError):  # it was damaged, and can be measured again
        kept = {}
    known = {key: row for key, row in kept.items() if _is_there(row, nodes, bool(options.get("num_gpus")))}
    groups = by_shape(trial for trial in trials if not trains_on_test_classes(trial))
    largest = sorted(groups, key=lambda key: -len(groups[key]))[:MAX_SHAPES]
    missing = [key for key in largest if key not in known]
    # A process of its own for each: the peak of a process is that of all that it has done.
    task = ray.remote(max_calls=1, max_retries=0)(_first_steps).options(**options)
    plain = machine.model_dump(mode="json")
    asked = {task.remote(groups[key][0].model_dump(mode="json"), plain, needs, place): key for key in missing}
    waiting, until_s, failures = list(asked), time.monotonic() + patience_s, dict[str, str]()
    while waiting and time.monotonic() < until_s and not is_stopping():
        answered, waiting = ray.wait(waiting, timeout=1.0)
        for one in answered:
            key = asked[one]
            try:
                known[key] = {**ray.get(one), "num_trials": len(groups[key])}
            except ray.exceptions.RayError as error:  # no memory, for example: the trial itself ends with the reason
                failures[key] = _last_line(error)
    for one in waiting:
        ray.cancel(one, force=True)
        failures[asked[one]] = f"no answer within {patience_s:.0f} s"
    for key, reason in failures.items() if not is_stopping() else ():
        note(f"the first steps of {counted(len(groups[key]), 'trial')} could not be measured: {reason}")
    if known != kept:
        write_json(file, {"shapes": known})
    return known


def _is_there(row: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]], has_gpus: bool) -> bool:
    """Return whether a row is whole, and a device like the one that it was measured on is among the nodes of now."""
    if not {"device", "device_bytes", "num_trials", *StepCost._fields} <= row.keys():
        return False
    if (row["device"] != "cpu") != has_gpus:
        return False
    kinds = {node["Labels"].get("ray.io/accelerator-type") for node in nodes} - {None}
    return not has_gpus or not kinds or any(str(kind) in row["device"].replace(" ", "-") for kind in kinds)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _first_steps(trial: dict[str, Any], machine: dict[str, Any], needs: NodeNeeds, place: StudyPlace) -> dict[str, Any]:
    """Return what the first steps of a trial take on the node that this task runs on."""
    here, files = Machine.model_validate(machine), place.files_of_node()
    device = assigned_device(here)
    refuse_unfit_node(needs, has_gpu=device != "cpu")
    record = ImageRecord.of_study(files.root)
    files.share(record.folder)
    cost = probe_trial(parse_trial(trial), here, device, Catalogs(here, record=record))
    files.share(record.folder)
    name, memory_bytes = "cpu", 0
    if device != "cpu":
        facts = torch.cuda.get_device_properties(device)
        name, memory_bytes = facts.name, facts.total_memory
    return {"device": name, "device_bytes": memory_bytes, **cost._asdict()}


def shares(
    known: Mapping[str, Mapping[str, Any]], machine: Machine, num_trials: int, gpu_nodes: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return what a trial of each measured shape holds of a GPU; a shape that is not in it holds a whole one.

    num_trials: how many run at a time, at most. gpu_nodes: those that have a whole GPU, as Ray describes them.
    """
    nodes = [node["Resources"] for node in gpu_nodes]
    memory = [row["device_bytes"] for row in known.values() if row.get("device_bytes")]
    if not nodes or not memory:
        return {}
    room = GpuRoom(
        sum(node["GPU"] for node in nodes), min(node.get("CPU", 0.0) / node["GPU"] for node in nodes), min(memory)
    )
    found = {
        key: trials_per_gpu(
            row["peak_memory_bytes"], row["busy"], room, cpus_per_trial=machine.cpus_per_trial, num_trials=num_trials
        )
        for key, row in known.items()
        if row.get("device_bytes")
    }
    return {key: share_of(number) for key, number in found.items() if number > 1}


def shares_in_words(shares_of: Mapping[str, float], known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each number of trials that share a GPU."""
    by_share: dict[float, list[Mapping[str, Any]]] = {}
    for key, share in shares_of.items():
        by_share.setdefault(share, []).append(known[key])
    sentences = []
    for share, rows in sorted(by_share.items()):
        number, peak_bytes = int(1 / share), max(row["peak_memory_bytes"] for row in rows)
        trials = counted(sum(row["num_trials"] for row in rows), "trial")
        sentences.append(
            f"{number} trials share a GPU: the first steps of one took at most {peak_bytes / 2**30:.2g} GiB of "
            f"{rows[0]['device']}, which has {rows[0]['device_bytes'] / 2**30:.0f} GiB, and kept it busy for at most "
            f"{max(row['busy'] for row in rows):.0%} of the time ({trials}; machine.gpus_per_trial=1 gives each a "
            "whole one)"
        )
    return sentences


def forecast_in_words(found: Forecast) -> str:
    """Return a forecast in a sentence."""
    shapes = counted(found.num_shapes, "shape")
    some = f"{shapes} of {found.num_all}" if found.num_shapes < found.num_all else shapes
    return (
        f"forecast from the first steps of {some} of trial: {hours_text(found.seconds / 3600)}, "
        f"{found.device_hours:.3g} {found.unit} of training, checkpoints of at most {found.disk_bytes / 1e9:.2g} GB"
    )


def forecast_of(
    known: Mapping[str, Mapping[str, Any]],
    study: StudySettings,
    state: StudyState,
    trials: Sequence[Trial],
    catalogs: Catalogs,
    *,
    held: Callable[[Trial], tuple[str, float]],
    num_slots: int,
) -> Forecast | None:
    """Return what the study will take, from what was measured; None where nothing was.

    A shape that was not measured counts as the mean of the others. held: the unit of the cost, and how many devices of
    that kind a trial holds. num_slots: trials at a time.
    """
    groups = by_shape(trials)
    epochs_s = {
        key: seconds_of_epoch(StepCost(**{name: row[name] for name in StepCost._fields}), groups[key][0], catalogs)
        for key, row in known.items()
        if key in groups
    }
    if not epochs_s:
        return None
    mean_s = fmean(epochs_s[key] for key, group in groups.items() if key in epochs_s for _ in group)
    checkpoint_bytes = max(known[key]["checkpoint_bytes"] for key in epochs_s)
    seconds = remaining_s(state, pace=Pace(mean_s, mean_s, STAGE_START_S), num_slots=num_slots)
    assert seconds is not None
    num_epochs = sum(stage["epochs"] for stage in stages_with_epochs(study, trials))
    unit, amount = held(trials[0])[0], fmean(held(trial)[1] for trial in trials)
    return Forecast(
        seconds=seconds,
        device_hours=num_epochs * mean_s * amount / 3600,
        unit=unit,
        disk_bytes=checkpoint_bytes * _num_checkpoints(study, trials, num_slots),
        num_shapes=len(epochs_s),
        num_all=len(groups),
    )


def _num_checkpoints(study: StudySettings, trials: Sequence[Trial], num_slots: int) -> int:
    """Return how many checkpoints are on the disk at a time, at most: those kept, and two of each trial that runs."""
    searched = min(study.keep_checkpoints, len(trials))
    if study.search.folds > 1:  # all of these stay until the search has ended
        searched += num_run_to_end(study, trials) * study.search.folds
    confirmed = num_confirmed(study, len(trials)) if study.confirm else 0
    refits = num_refits(study, trials) if study.refit else 0
    return searched + confirmed + refits + 2 * num_slots
