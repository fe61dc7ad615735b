"""Damaged inputs at one door of raydml, counted by what came of them: accepted, refused by an own error, or foreign."""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.fuzz.mutation import Mutator

#: Time for one input, in seconds of the processor.
MAX_INPUT_S = 5.0


@dataclass(frozen=True)
class Door:
    """A reader and what makes inputs for it. read: raises for what it refuses."""

    mutate: Mutator
    read: Callable[[bytes], object]


@dataclass
class Outcome:
    """Counts of a run. foreign: kinds of errors that are not raydml's, with an input for each."""

    num_inputs: int = 0
    num_accepted: int = 0
    num_refused: int = 0
    foreign: Counter[str] = field(default_factory=Counter)
    examples: dict[str, bytes] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_s: float = 0.0

    @property
    def num_foreign(self) -> int:
        return sum(self.foreign.values())


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder in memory where the machine has one: each input is a file."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None)


def is_own(error: BaseException) -> bool:
    """Whether an error has a class of raydml."""
    return type(error).__module__.partition(".")[0] == "raydml"


def fuzz(door: Door, num_inputs: int, seed: int) -> Outcome:
    """Try inputs; input `i` of a seed is always the same."""
    outcome = Outcome()
    logging.getLogger("raydml").setLevel(logging.CRITICAL)  # thousands of warnings of damaged files
    begin = time.process_time()
    for number in range(num_inputs):
        content = door.mutate(np.random.default_rng([seed, number]))
        started = time.process_time()
        outcome.num_inputs += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of NumPy, PIL and others, on damaged files
                door.read(content)
            outcome.num_accepted += 1
        except Exception as error:
            if is_own(error):
                outcome.num_refused += 1
            else:
                _count_foreign(outcome, error, content)
        outcome.slowest_s = max(outcome.slowest_s, time.process_time() - started)
    outcome.seconds = time.process_time() - begin
    return outcome


def _count_foreign(outcome: Outcome, error: Exception, content: bytes) -> None:
    place, traceback = "", error.__traceback__
    while traceback is not None:
        file = Path(traceback.tb_frame.f_code.co_filename)
        if "raydml" in file.parts:
            place = f"{file.name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    kind = f"{type(error).__name__} at {place}"
    outcome.foreign[kind] += 1
    outcome.examples.setdefault(kind, content)
    outcome.messages.setdefault(kind, str(error)[:120])
