"""Peak memory against arrays of known size."""

import resource

import numpy as np
import pytest
import torch

from raydml.ops import memory
from raydml.ops.memory import peak_memory_bytes, reset_peak_memory


def test_the_peak_grows_by_what_is_held_and_stays_when_it_is_freed():
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory_bytes(device)
    held = [np.ones(2**24, dtype=np.uint8) for _ in range(32)]
    # The process may have been larger before, so only 512 MiB more than its present size must show.
    grown = peak_memory_bytes(device)
    assert grown >= 32 * 2**24
    del held
    # The kernel counts in batches of pages.
    assert peak_memory_bytes(device) >= 0.98 * grown
    assert grown >= 0.98 * before


def test_without_the_kernels_own_count_it_is_that_of_the_process(tmp_path):
    peak = memory._peak_of_process_bytes(tmp_path / "absent")
    assert peak == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.01)


@pytest.mark.gpu
def test_the_peak_of_a_gpu_begins_anew():
    device = torch.device("cuda:0")
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) >= 2**28
    del held
    reset_peak_memory(device)
    assert peak_memory_bytes(device) < 2**28
