"""Large batches in bounded memory, each measured in a process of its own."""

import subprocess
import sys

import pytest

# The peak of a step at B = 2048 above that of one at B = 64, by when all libraries have loaded. As Linux counts it for
# the process itself: ru_maxrss begins with the peak of the process that started it.
STEP = """
import torch
from raydml import registry
torch.set_num_threads(1)
loss = registry.build("losses", {loss!r}, num_classes=512, embedding_dim=128)
miner = {miner!r} and registry.build("miners", {miner!r})
def step(size):
    points = torch.nn.functional.normalize(torch.randn(size, 128)).requires_grad_()
    labels = torch.arange(size) // 4
    tuples = miner(points.detach(), labels) if miner else None
    loss(points, labels, tuples).backward()
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = step(64)
print((step(2048) - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "miner", "limit_mib"),
    [
        # A list of the semi-hard triplets of this batch would take over 100 MiB, their embeddings many GiB.
        ("triplet", "semi_hard", 1024),
        ("triplet", None, 1024),
        ("lifted_structure", None, 1024),
        ("fast_ap", None, 1024),
    ],
)
def test_a_batch_of_2048_fits(loss: str, miner: str | None, limit_mib: int) -> None:
    code = STEP.format(loss=loss, miner=miner)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    peak_mib = float(run.stdout)
    assert 2048 * 2048 * 4 / 2**20 < peak_mib < limit_mib  # at least the (B, B) distances, or it was not measured
