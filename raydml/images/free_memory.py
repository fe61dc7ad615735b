"""How much memory a process may still take: of the machine, and of the container it runs in."""

import os
from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Bytes: what Linux calls available (elsewhere: free pages), and no more than the container's limit leaves.

    proc, cgroup: where the kernel says so; version 2 of control groups only.
    """
    free_bytes = [_available_bytes(proc)]
    limit, used = (_read(cgroup / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():  # "max" stands for no limit
        free_bytes.append(max(0, int(limit) - int(used)))
    return min(free_bytes)


def _available_bytes(proc: Path) -> int:
    for line in _read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError:
        return ""
