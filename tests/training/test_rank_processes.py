"""The processes of a trial's ranks: how they end, and what a trial says when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from raydml.training import rank_processes
from raydml.training.rank_group import RankGroup
from raydml.training.rank_processes import RankError, RankProcesses

pytestmark = pytest.mark.xdist_group("ranks")
ROOT = Path(__file__).parents[2]
ROW = np.ones((1, 2), dtype=np.float32)


class OwnError(Exception):
    """An error that pickle cannot restore."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def add_for_ever(ranks: RankGroup, _device: str, folder: str) -> None:
    Path(folder, f"rank-{ranks.rank}").write_text(str(os.getpid()))
    while True:
        ranks.joined(ROW, ranks.num_ranks)


def fail(ranks: RankGroup, _device: str, error: Exception) -> None:
    ranks.joined(ROW, ranks.num_ranks)
    raise error


def fail_in_its_own_way(ranks: RankGroup, _device: str) -> None:
    raise OwnError(ranks.rank, "more")


def add(processes: RankProcesses, number: int, kill: int | None = None) -> None:
    """Take part in a number of sums, and kill a process in between."""
    with processes.errors_named():
        for done in range(number):
            processes.group.joined(ROW, processes.group.num_ranks)
            if kill is not None and done == 10:
                os.kill(kill, signal.SIGKILL)


class EndsAtOnce:
    """What ends a process that takes it out of a pickle."""

    def __reduce__(self):
        return os._exit, (3,)


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(is_so, within_s=60):
    until_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.05)


def pids_in(folder: Path, number: int) -> list[int]:
    wait_until(lambda: len([file for file in folder.glob("rank-*") if file.read_text()]) == number)
    return [int(file.read_text()) for file in sorted(folder.glob("rank-*"))]


def test_a_rank_that_is_killed_is_named_and_leaves_no_other(tmp_path):
    processes = RankProcesses(["cpu"] * 3, add_for_ever, str(tmp_path))
    try:
        first, second = pids_in(tmp_path, 2)
        with pytest.raises(RankError, match="rank-1 of the trial has died: its process has ended: -9"):
            add(processes, 10_000_000, kill=first)
    finally:
        processes.close()
    assert not is_alive(first)
    assert not is_alive(second)
    assert not processes._folder.exists()


@pytest.mark.parametrize(
    ("work", "arguments", "cause", "words"),
    [
        (fail, [MemoryError("no room")], MemoryError, "MemoryError: no room"),
        pytest.param(
            *(fail_in_its_own_way, [], RuntimeError, "RuntimeError: OwnError: 1 and more"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_error_of_a_rank_is_that_of_the_trial(work, arguments, cause, words):
    processes = RankProcesses(["cpu"] * 2, work, *arguments)
    try:
        with pytest.raises(RankError, match=f"rank-1 of the trial has died: {words}") as raised:
            add(processes, 3)
        assert type(raised.value.__cause__) is cause
    finally:
        processes.close()


def test_a_rank_that_dies_before_it_joins_is_not_waited_for():
    with pytest.raises(RankError, match="rank-1 of the trial has died: its process has ended: 3"):
        RankProcesses(["cpu"] * 2, add_for_ever, EndsAtOnce())


@pytest.mark.slow
def test_an_error_of_the_first_rank_stays_what_it_is(tmp_path):
    processes = RankProcesses(["cpu"] * 2, add_for_ever, str(tmp_path))
    try:
        with pytest.raises(RuntimeError, match="its own"), processes.errors_named():
            raise RuntimeError("its own")
    finally:
        processes.close()


TRIAL = """
import sys
from tests.training.test_rank_processes import ROW, add_for_ever
from raydml.training.rank_processes import RankProcesses

if __name__ == "__main__":
    processes = RankProcesses(["cpu"] * 2, add_for_ever, sys.argv[1])
    open(sys.argv[1] + "/folder", "w").write(str(processes._folder))
    {do}
"""


@pytest.mark.parametrize(
    "do",
    [
        "add_for_ever(processes.group, 'cpu', sys.argv[1])",
        pytest.param("import time; time.sleep(600)", marks=pytest.mark.slow),
    ],
)
def test_ranks_end_with_a_trial_that_is_killed(tmp_path, do):
    """While they wait for it in a sum, too."""
    script = tmp_path / "trial.py"
    script.write_text(TRIAL.format(do=do))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    trial = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        ranks = pids_in(tmp_path, 2 if "add" in do else 1)[-1:]
        wait_until(lambda: (tmp_path / "folder").exists() and (tmp_path / "folder").read_text())
        assert all(map(is_alive, ranks))
    finally:
        trial.send_signal(signal.SIGKILL)
        trial.wait(30)
    wait_until(lambda: not any(map(is_alive, ranks)), within_s=20)
    assert not Path((tmp_path / "folder").read_text()).exists()


@pytest.mark.slow
def test_a_trial_that_waits_for_a_dead_rank_ends(tmp_path, monkeypatch):
    """On a GPU a sum may wait for ever; here the first rank just sleeps."""
    ended = []
    monkeypatch.setattr(rank_processes, "_GRACE_S", 0.5)
    monkeypatch.setattr(rank_processes.os, "_exit", ended.append)
    processes = RankProcesses(["cpu"] * 2, add_for_ever, str(tmp_path))
    try:
        (pid,) = pids_in(tmp_path, 1)
        with processes.errors_named():
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: ended == [1])
    finally:
        processes.close()
