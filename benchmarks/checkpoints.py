"""Checkpoints of a ResNet-50 with AdamW: for how long training waits, and how much slower it is meanwhile.

    uv run python benchmarks/checkpoints.py                   # on a CPU; --device cuda for a GPU
    uv run python benchmarks/checkpoints.py --epoch 4 --epochs 40

An epoch here is a loop of matrix products that takes a fixed number of seconds when nothing else runs, about as long as
one of CUB on a GPU; on a CPU it has all cores but one, as the main thread of a trial whose GPU does the work. Rows:

- no checkpoint.
- copied: the state is copied, written to a temporary folder, hashed, and copied to the storage, after each epoch.
- background, 0 s: a thread writes it while the next epoch trains, after each epoch.
- background, 60 s: the same, at most once a minute (the default).

waits: milliseconds for which training stands still, a checkpoint. share: what checkpoints cost, of the time: the waits,
and the time by which epochs beside a write are longer than the median of the others of the same run; where fewer than
five are beside no write, the time in addition to the row without checkpoints, which differs by some 4 % between two
runs of one row. memory: peak of the process. The weights are the best so far in every second epoch.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROWS = ("no checkpoint", "copied", "background, 0 s", "background, 60 s")


class Trained:
    """A ResNet-50 and its optimiser, as a trainer hands them to a checkpoint."""

    def __init__(self, device: str) -> None:
        from torchvision.models import resnet50

        from raydml.training.snapshot import copy_of

        self._copy_of = copy_of
        torch.manual_seed(0)
        self.network = resnet50()
        self.network.fc = torch.nn.Linear(2048, 512)
        self.network.to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        for parameter in self.network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.epoch = self.best_epoch = 0
        self.best_weights: dict[str, Any] = {}
        self.end_epoch()

    def end_epoch(self) -> None:
        """Count an epoch; every second one is the best so far."""
        self.epoch += 1
        if self.epoch % 2:
            self.best_epoch, self.best_weights = self.epoch, {}
            self.best_weights = self._copy_of(self.network.state_dict())

    def contents(self, snapshots: Any) -> dict[str, Any]:
        """Return the arguments of `checkpoint.save`."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        card = {"epoch": self.epoch}
        return {"state": snapshots.take(state), "model_card": card, "best_weights": self.best_weights, "history": []}


class Work:
    """Products of matrices on a device, as many as take an epoch."""

    def __init__(self, device: str, epoch_s: float) -> None:
        self._matrix = torch.rand(1024, 1024, device=device) / 1024
        self._num = 8
        while (took_s := self._take()) < 0.5:
            self._num *= 2
        self._num = max(1, round(self._num * epoch_s / min(took_s, *(self._take() for _ in range(3)))))

    def _take(self) -> float:
        begin_s = time.perf_counter()
        for _ in range(self._num):
            self._matrix = self._matrix @ self._matrix.T
            self._matrix /= self._matrix.norm()
        if self._matrix.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin_s

    def __call__(self) -> None:
        self._take()


def measure(row: str, device: str, epoch_s: float, num_epochs: int) -> dict[str, float]:
    """Return the figures of one row."""
    from raydml.training import checkpoint
    from raydml.training.checkpoint_writer import CheckpointWriter
    from raydml.training.snapshot import Snapshots

    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    trained, work, waits = Trained(device), Work(device, epoch_s), []
    beside_a_write, others = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as storage, tempfile.TemporaryDirectory() as temporary:
        every_s = float(row.split()[1]) if row.startswith("background") else float("inf")
        writer = CheckpointWriter(Path(storage) / "trial", every_s=every_s)
        begin_s = time.perf_counter()
        for _ in range(num_epochs):
            start_s, is_written = time.perf_counter(), row == "copied"
            if row == "copied":
                name = f"checkpoint_{trained.epoch}"
                folder = checkpoint.save(Path(temporary) / name, **trained.contents(Snapshots()))
                shutil.copytree(folder, Path(storage) / name)
            elif row != "no checkpoint":
                is_written = writer.begin_if_due(trained)
            if is_written:
                waits.append(time.perf_counter() - start_s)
            start_s = time.perf_counter()
            work()
            (beside_a_write if is_written and row != "copied" else others).append(time.perf_counter() - start_s)
            trained.end_epoch()
        writer.wait()
        wall_s = time.perf_counter() - begin_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    mean_s = statistics.mean(waits) if waits else 0.0
    figures = {"wall": wall_s, "waits": 1000 * mean_s, "number": len(waits), "memory": peak_mb}
    if beside_a_write and len(others) >= 5:
        usual_s = statistics.median(others)
        figures["share"] = (sum(waits) + sum(took - usual_s for took in beside_a_write)) / wall_s
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epoch", type=float, default=4.0, help="seconds")
    parser.add_argument("--epochs", type=int, default=35)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.device, options.epoch, options.epochs)))
        return
    from rich.console import Console
    from rich.table import Table

    words = ["--device", options.device, "--epoch", str(options.epoch), "--epochs", str(options.epochs)]
    found: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    for _ in range(options.turns):
        for row in ROWS:
            command = [sys.executable, __file__, "--measure", row, *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[row].append(json.loads(done.stdout.splitlines()[-1]))
    table = Table("checkpoints", "number", "waits ms", "share %", "wall s", "memory MB", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    least_s = statistics.median(turn["wall"] for turn in found[ROWS[0]])
    for row, turns in found.items():
        of = {figure: statistics.median(turn[figure] for turn in turns) for figure in turns[0]}
        share = 100 * of.get("share", of["wall"] / least_s - 1)
        table.add_row(row, f"{of['number']:.0f}", f"{of['waits']:.0f}", f"{share:.1f}", f"{of['wall']:.1f}",
                      f"{of['memory']:.0f}")  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
