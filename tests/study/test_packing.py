"""How many trials share a GPU, by hand; no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch

from raydml.study import packing
from raydml.study.packing import MAX_SHARING, GpuRoom, limit_memory, memory_fraction, share_of, trials_per_gpu

ROOM = GpuRoom(num_gpus=2, cpus_per_gpu=8, memory_bytes=24_000_000_000)


@pytest.mark.parametrize(
    ("peak_gb", "num_trials", "cpus", "number"),
    [
        (20.0, 100, 1, 1),  # 0.7 + 1.25 x 20 = 25.7 of 24
        (18.6, 100, 1, 1),  # 23.95 of 24
        (9.0, 100, 1, 2),  # 11.95
        (9.1, 100, 1, 1),  # 12.08
        (5.8, 100, 1, 3),  # 7.95
        (0.5, 100, 1, MAX_SHARING),
        (0.5, 100, 4, 2),  # two of 4 CPUs for each GPU
        (0.5, 100, 16, 1),  # no node has these CPUs; Ray says so
        (0.5, 3, 1, 2),  # the third one shares; no GPU is left empty
        (0.5, 2, 1, 1),
        (0.5, 1, 1, 1),
    ],
)
def test_so_many_trials_share_a_gpu_as_fit_with_memory_cpus_and_no_empty_gpu(peak_gb, num_trials, cpus, number):
    assert trials_per_gpu(int(peak_gb * 1e9), 0.1, ROOM, cpus_per_trial=cpus, num_trials=num_trials) == number


@pytest.mark.parametrize(("busy", "number"), [(1.0, 1), (0.95, 1), (0.51, 1), (0.5, 2), (0.3, 3), (0.0, MAX_SHARING)])
def test_trials_that_keep_a_gpu_busy_do_not_share_it(busy, number):
    assert trials_per_gpu(10**9, busy, ROOM, cpus_per_trial=1, num_trials=100) == number


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 7])
def test_the_shares_of_a_gpu_are_at_most_one(number):
    assert share_of(number) * number <= 1
    assert share_of(number) * number > 0.999
    assert share_of(number) * 10_000 == pytest.approx(int(share_of(number) * 10_000 + 1e-6), abs=1e-6), "Ray's unit"


def test_what_torch_may_allocate_leaves_room_for_the_context_of_each_process():
    assert memory_fraction(0.5, 24_000_000_000) == pytest.approx(0.5 - 0.7 / 24)
    assert 2 * (memory_fraction(0.5, 24_000_000_000) * 24 + 0.7) == pytest.approx(24)
    assert memory_fraction(0.1, 4_000_000_000) > 0, "torch refuses 0"


@pytest.mark.parametrize(("gpus", "fraction"), [(1.0, 1.0), (4.0, 1.0), (0.25, 0.25 - 0.7 / 16)])
def test_a_process_may_allocate_its_share_and_all_of_a_gpu_of_its_own(monkeypatch, gpus, fraction):
    limits = []
    monkeypatch.setattr(
        packing.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16_000_000_000)
    )
    monkeypatch.setattr(
        packing.torch.cuda, "set_per_process_memory_fraction", lambda part, device: limits.append((part, device))
    )
    limit_memory(gpus, torch.device("cuda:0"))
    assert limits == [(pytest.approx(fraction), torch.device("cuda:0"))]


def test_the_memory_of_a_cpu_is_not_limited(monkeypatch):
    monkeypatch.setattr(packing.torch.cuda, "set_per_process_memory_fraction", lambda *_: pytest.fail("no GPU"))
    limit_memory(0.5, torch.device("cpu"))
