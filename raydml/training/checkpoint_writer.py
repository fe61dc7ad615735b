"""Writes the checkpoints of a trial while it trains on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydml.training import checkpoint
from raydml.training.snapshot import Snapshots

if TYPE_CHECKING:
    from raydml.training.trainer import Trainer


class CheckpointWriter:
    """Writes checkpoints of one trial into a folder, ``checkpoint_<epoch>``, at most one at a time.

    A thread writes the copy of a state while the trial trains its next epoch. The newest two checkpoints stay, and
    share the file of the best weights as long as those have not changed. What cannot be written is raised by the next
    call.

    written, dropped: are called with each checkpoint that has been written, and with each that has been deleted.
    every_s: the least time from the beginning of one checkpoint to that of the next one; 0 begins one after each epoch.
    snapshots: memory for the copies, which a process can use for one trial after the other.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_s: float,
        snapshots: Snapshots | None = None,
        written: Callable[[Path], None] = lambda _path: None,
        dropped: Callable[[Path], None] = lambda _path: None,
    ) -> None:
        self.folder = folder
        self._written, self._dropped = written, dropped
        self._every_s = every_s
        self._snapshots = snapshots or Snapshots()
        self._begun_s = time.monotonic()
        self._epoch, self._best_epoch = 0, -1  # of the newest checkpoint
        self._newest: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._has_begun = False

    def goes_on_from(self, found: Path, trainer: Trainer) -> None:
        """Take note of the checkpoint that a trainer has been restored from.

        The state is written to this folder again if that checkpoint is in another one.
        """
        self._newest, self._best_epoch = found, trainer.best_epoch
        self._epoch = trainer.epoch if found.parent == self.folder else -1

    def is_behind(self, trainer: Trainer) -> bool:
        """Return whether a trainer has ended an epoch that the newest checkpoint does not have."""
        return trainer.epoch != self._epoch

    def begin_if_due(self, trainer: Trainer) -> bool:
        """Begin to write the state of a trainer between two epochs unless it is too early; return whether it does."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        is_due = self.is_behind(trainer) and time.monotonic() - self._begun_s >= self._every_s
        if begins := is_due and self._thread is None:
            arguments = self._begin(trainer)
            self._thread = threading.Thread(target=self._try_to_write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        return begins

    def write(self, trainer: Trainer) -> Path:
        """Return the checkpoint of a trainer's state between two epochs; write it first if there is none."""
        self.wait()
        if self.is_behind(trainer):
            self._write(*self._begin(trainer))
        assert self._newest is not None
        return self._newest

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. Raises what prevented it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _begin(self, trainer: Trainer) -> tuple[dict[str, Any], int, int]:
        self._begun_s = time.monotonic()
        if not self._has_begun:
            # Those of processes that have died. Tune may prepare a trial in a second process that never trains it, and
            # which must not remove what the first one writes.
            self._has_begun = True
            for unfinished in self.folder.glob(".checkpoint_*.partial"):
                shutil.rmtree(unfinished, ignore_errors=True)
        return trainer.contents(self._snapshots), trainer.epoch, trainer.best_epoch

    def _try_to_write(self, contents: dict[str, Any], epoch: int, best_epoch: int) -> None:
        try:
            self._write(contents, epoch, best_epoch)
        except Exception as error:  # the thread of the trial raises it
            self._error = error

    def _write(self, contents: dict[str, Any], epoch: int, best_epoch: int) -> None:
        path = self.folder / f"checkpoint_{epoch:06d}"
        same = self._newest if best_epoch == self._best_epoch and self._newest != path else None
        checkpoint.save(path, **contents, weights_of=same)
        self._written(path)
        self._newest, self._epoch, self._best_epoch = path, epoch, best_epoch
        found = checkpoint.newest_first(self.folder)
        # Those before it in the order are damaged: the trial has gone on from an older one.
        later, kept = found[: found.index(path)], found[found.index(path) :]
        for old in [*later, *kept[checkpoint.NUM_KEPT :]]:
            shutil.rmtree(old, ignore_errors=True)
            self._dropped(old)
