"""How many trials share a GPU, from what a probe measured, and how much of its memory each may take."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

#: What a process takes of a GPU beside what torch allocates: the context of CUDA, and the kernels of its libraries.
#: Some 0.5 GB on recent GPUs; not measured by this project.
CONTEXT_BYTES = 700_000_000
#: A trial may need more than the steps of its probe: another batch, a clustering, the scores.
_MARGIN = 1.25
#: More processes than this only wait for each other: a GPU runs the kernels of one process at a time.
MAX_SHARING = 4


class GpuRoom(NamedTuple):
    """The GPUs that trials are placed on. num_gpus: of all nodes. cpus_per_gpu: the fewest that a node has for each.
    memory_bytes: of the smallest."""

    num_gpus: float
    cpus_per_gpu: float
    memory_bytes: int


def trials_per_gpu(peak_bytes: int, busy: float, room: GpuRoom, *, cpus_per_trial: int, num_trials: int) -> int:
    """Return how many trials of a shape share a GPU: at least 1, at most MAX_SHARING.

    Their memory has to fit, each has to have its CPUs, no GPU is left without a trial, and together they keep it busy
    for no more time than there is: those that one trial keeps busy all the time would only slow each other.

    peak_bytes: what torch has allocated for one at a time, at most. busy: the part of the time for which one alone kept
    the GPU busy. num_trials: those that run at a time, at most.
    """
    by_time = int(1.0 / max(busy, 0.01))
    by_memory = int(room.memory_bytes // (CONTEXT_BYTES + _MARGIN * peak_bytes))
    by_cpus = int(room.cpus_per_gpu // cpus_per_trial)
    by_trials = math.ceil(num_trials / max(1.0, room.num_gpus))
    return max(1, min(by_memory, by_time, by_cpus, by_trials, MAX_SHARING))


def share_of(num_sharing: int) -> float:
    """Return the share of a GPU that a trial holds; so many of them are at most 1. Ray counts in 1/10,000."""
    return math.floor(10_000 / num_sharing) / 10_000


def memory_fraction(gpus: float, memory_bytes: int) -> float:
    """Return the part of a GPU's memory that torch may allocate for a trial that holds a share of it, below 1."""
    return max(0.05, gpus - CONTEXT_BYTES / memory_bytes)


def limit_memory(gpus: float, device: torch.device) -> None:
    """Keep what torch allocates for a trial within its share of a GPU. gpus: what it holds, a whole one is not limited.

    A trial that needs more ends with `out_of_memory`, and runs again alone on a whole GPU; its neighbours go on.
    """
    if device.type != "cuda":
        return
    memory_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gpus >= 1 else memory_fraction(gpus, memory_bytes), device)
