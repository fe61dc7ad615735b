"""Peak memory of the training process, or of its GPU."""

import resource
import sys
from pathlib import Path

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use at a time: on a GPU what torch has allocated there, else what this process holds.

    The peak of a GPU is since `reset_peak_memory`; that of the process is since it started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_of_process_bytes()


def reset_peak_memory(device: torch.device) -> None:
    """Begin the peak of a GPU anew; that of the process cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_of_process_bytes(status: Path = Path("/proc/self/status")) -> int:
    # ru_maxrss begins with the peak of the process that started this one; Linux also counts its own.
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
