"""How many processor cores this process may use."""

import os
from pathlib import Path


def num_usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use, at least 1: those of its affinity, at most its container's quota, rounded up.

    cgroup: the folder of the kernel; version 2 of control groups only.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no control group, or another version of them
        return num_cores
    return num_cores if quota == "max" else max(1, min(num_cores, -(-int(quota) // int(period))))
