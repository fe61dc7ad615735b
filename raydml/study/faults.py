"""What a failing trial shows: a fault of the machine, a lack of memory, or an error of its own.

Where a disk is full or images are missing, every further trial would fail like the first one. Such a fault therefore
ends the stage and leaves its trials unended: a resume runs them as if nothing had happened. A trial without memory is
tried once more alone, and a trial that makes no progress is stuck.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ray import tune
from ray.exceptions import RayTaskError

from raydml.config.trial import Machine
from raydml.data.catalog import DataError
from raydml.ops.files import CURES_OF_DISKS
from raydml.ops.object_store import StoreError
from raydml.study.process import MachineFault
from raydml.training.rank_processes import RankError

#: Errors of the operating system that do not depend on what a trial computes, and their cures.
MACHINE_ERRORS = {
    **CURES_OF_DISKS,
    errno.ENOTCONN: "mount the network folder again",
    errno.EHOSTDOWN: "mount the network folder again",
}
#: A lack of memory in the words of PyTorch, of CUDA, and of Ray, which ends the largest task of a full node.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|OutOfMemory|ALLOC_FAILED|running low on memory", re.I)


def fault_of(error: BaseException | None) -> str | None:
    """Return in words what is wrong with the machine or its images; None for an error of a trial's own.

    An error counts by its causes, too: a library may have wrapped it.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # First of all: the error of a task is of the class of its cause, too, with a traceback as its message.
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
            error = error.cause
            continue
        if isinstance(error, (MachineFault, DataError, StoreError)):
            return str(error)
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            place = f"{error.filename}: " if error.filename else ""
            return f"{place}{error.strerror}. Cure: {MACHINE_ERRORS[error.errno]}"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def faults_named() -> Iterator[None]:
    """Raise MachineFault, on one line, in place of an error that `fault_of` finds: the driver reads it from a text."""
    try:
        yield
    except Exception as error:
        if (fault := fault_of(error)) is None:
            raise
        raise MachineFault(" ".join(fault.split())) from error


def fault_in(text: str) -> str | None:
    """Return the message of the last MachineFault in the text of an error that a worker has raised.

    Ray's own writing in a worker, such as that of a log, raises plain errors of the system.
    """
    found = re.findall(rf"^(?:\S+\.)?{MachineFault.__name__}: (.+)$", text, re.MULTILINE)
    if found:
        return str(found[-1]).strip()
    for number, message in reversed(re.findall(r"^OSError: \[Errno (\d+)\] (.+)$", text, re.MULTILINE)):
        if int(number) in MACHINE_ERRORS:
            return f"{message.strip().rstrip('.')}. Cure: {MACHINE_ERRORS[int(number)]}"
    return None


def is_without_memory(error: BaseException | str) -> bool:
    """Return whether a process ended, or a computation failed, because there was no memory for it."""
    if isinstance(error, RankError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, str)) and _NO_MEMORY.search(str(error)) is not None


def with_half_batch(machine: Machine) -> Machine:
    """Return the settings for another try after a lack of memory: half the batch of the evaluation."""
    return machine.model_copy(update={"evaluation_batch": max(1, machine.evaluation_batch // 2)})


class FaultStop(tune.Stopper):
    """Ends a Tune run, without ending its trials, once a fault of the machine or of a node has been found.

    fault: in words; empty while there is none. bad_nodes: ids of nodes, and what is wrong with each.
    """

    def __init__(self) -> None:
        self.fault = ""
        self.bad_nodes: dict[str, str] = {}

    def __call__(self, trial_id: str, result: dict[str, object]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return bool(self.fault or self.bad_nodes)
