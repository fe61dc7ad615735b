"""The processes of a trial's ranks: started by the process of the trial, and ended with it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import distributed

from raydml.training.rank_group import RankGroup

_READY = "ready"
_POLL_S, _WATCH_S = 0.05, 1.0
_REPORT_S = 10.0  # in which a rank that fails has said why
_GRACE_S = 60.0  # in which the trial has to notice that a rank has died


class RankError(RuntimeError):
    """A rank of a trial has ended while the trial was training. Its own error, where it had one, is the cause."""


class RankProcesses:
    """The ranks 1, 2, ... of a trial, each in a process of its own; this process is rank 0.

    devices: the torch device of each rank. Every other rank calls ``work(group, device, *arguments)``, which pickle
    must take, and ends. With the process of the trial all of them end, however it does, and `close` ends them at once:
    they hold nothing that is not in rank 0, too.

    group: of rank 0. Raises RankError where a rank ends before all have joined.
    """

    def __init__(self, devices: Sequence[str], work: Callable[..., None], *arguments: Any) -> None:
        _prefer_loopback()
        self._folder = Path(tempfile.mkdtemp(prefix="raydml-ranks-"))
        self._is_closing, self._is_training = False, False
        file, num_ranks = str(self._folder / "store"), len(devices)
        self.group = RankGroup()
        spawn = multiprocessing.get_context("spawn")  # a fork could not use the GPU of this process
        self._processes: list[Any] = []
        self._reports: list[Connection] = []
        try:
            for rank in range(1, num_ranks):
                report, sender = spawn.Pipe(duplex=False)
                given = (rank, devices, file, sender, work, arguments)
                process = spawn.Process(target=_be_rank, args=given, name=f"rank-{rank}", daemon=True)
                process.start()
                sender.close()
                self._processes.append(process)
                self._reports.append(report)
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()
            for report in self._reports:
                # Before they all join, because a group waits for a rank that never comes.
                while not report.poll(_POLL_S):
                    self._refuse_dead()
                if (said := _received(report)) != _READY:
                    self._refuse_dead(within_s=_REPORT_S, said=said)
            with self.errors_named():
                self.group = RankGroup.join(0, num_ranks, file, _backend(devices[0]))
        except BaseException:
            self.close()
            raise

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Raise RankError in place of an error that the death of another rank has caused here."""
        self._is_training = True
        try:
            yield
        except RuntimeError as error:
            is_cut_off = isinstance(error, distributed.DistError) or "Connection" in str(error)
            self._refuse_dead(within_s=_REPORT_S if is_cut_off else 0.0)
            raise
        finally:
            self._is_training = False

    def close(self) -> None:
        """End the other ranks, if they have not ended yet, and the group."""
        self._is_closing = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self.group.leave()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _refuse_dead(self, within_s: float = 0.0, said: Exception | str | None = None) -> None:
        """Raise RankError where a rank has ended with an error, or does so within some seconds.

        said: what it has reported before.
        """
        until_s = time.monotonic() + within_s
        while True:
            for process, report in zip(self._processes, self._reports, strict=True):
                if process.exitcode:
                    said = said or (_received(report) if report.poll() else None)
                    error = said if isinstance(said, Exception) else None
                    why = f"{type(error).__name__}: {error}" if error else f"its process has ended: {process.exitcode}"
                    raise RankError(f"{process.name} of the trial has died: {why}") from error
            if time.monotonic() >= until_s:
                return
            time.sleep(_POLL_S)

    def _watch(self) -> None:
        """End this process if a rank has died and the training does not notice: a GPU may wait for it for ever."""
        while not any(process.exitcode for process in self._processes):
            if self._is_closing:
                return
            time.sleep(_WATCH_S)
        time.sleep(_GRACE_S)
        if self._is_training and not self._is_closing:
            os.write(2, b"a rank of the trial has died, and the others wait for it: the trial ends\n")
            os._exit(1)


def _prefer_loopback() -> None:
    """Let gloo connect the ranks, which are on one machine, without its network, where nobody else can join them."""
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the other ranks inherit it


def _backend(device: str) -> str:
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def _received(report: Connection) -> Exception | str | None:
    """Return the next report of a rank, its error or _READY; None where it has ended without one."""
    try:
        said: Exception | str = report.recv()
    except (EOFError, OSError):
        return None
    return said


def _be_rank(
    rank: int, devices: Sequence[str], file: str, report: Connection, work: Callable[..., None], arguments: Any
) -> None:
    watch = threading.Thread(target=_end_with_parent, args=(Path(file).parent,), name="parent", daemon=True)
    watch.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which sends it to all: the trial decides
    try:
        if devices[rank].startswith("cuda"):
            torch.cuda.set_device(devices[rank])
        report.send(_READY)
        group = RankGroup.join(rank, len(devices), file, _backend(devices[rank]))
        work(group, devices[rank], *arguments)
    except Exception as error:  # the process of the trial raises it
        with suppress(OSError):
            report.send(_portable(error))
        watch.join(_WATCH_S)  # the error may be the death of that process
        os._exit(1)  # threads of torch may wait for the other ranks
    os._exit(0)


def _end_with_parent(folder: Path) -> NoReturn:
    """End this process with that of the trial, even while it computes or waits for another rank.

    folder: of the group, which that process cannot delete any more.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """Return an error that pickle takes."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
