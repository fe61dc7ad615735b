"""What Ray would find on this machine, without starting it."""

from __future__ import annotations

import shutil
from pathlib import Path

from ray._private import accelerators, utils

_SHARED_MEMORY = Path("/dev/shm")


def num_gpus_of_ray() -> int:
    """Return how many GPUs Ray would count on this machine, without starting it."""
    manager = accelerators.get_accelerator_manager_for_resource("GPU")
    return int(manager.get_current_node_num_accelerators())


def note_of_this_machine() -> str:
    """Return a sentence where a Ray that starts on this machine would find too little shared memory; else empty."""
    store_bytes = utils.resolve_object_store_memory(utils.estimate_available_memory())
    return note_of_shared_memory(shared_memory_bytes(), store_bytes)


def note_of_shared_memory(shared_bytes: int | None, store_bytes: float) -> str:
    """Return a sentence where /dev/shm is too small for Ray's object store, which then is on a disk; else empty.

    Nothing else of a study is there: images are mapped from files of the cache.
    """
    if shared_bytes is None or shared_bytes >= store_bytes:
        return ""
    return (
        f"/dev/shm has {shared_bytes / 2**30:.1f} GiB, and Ray's object store takes {store_bytes / 2**30:.1f} GiB: Ray "
        "keeps it on the disk of /tmp, which makes the exchange between its processes slow. Cure: a larger /dev/shm "
        "(docker run --shm-size; an emptyDir of medium Memory), or a smaller store (ray start --object-store-memory)"
    )


def shared_memory_bytes() -> int | None:
    """Return the size of /dev/shm; None where there is none."""
    return shutil.disk_usage(_SHARED_MEMORY).total if _SHARED_MEMORY.is_dir() else None
