"""System metrics: CPU time by elapsed time, and means of a GPU's samples, read by a function given here."""

import threading

import pytest
import torch

from raydml.ops import system_use
from raydml.ops.system_use import SystemUse


def test_cpu_time_by_elapsed_time_since_the_last_call() -> None:
    elapsed, cpu = iter([10.0, 14.0, 15.0]), iter([1.0, 7.0, 7.5])
    use = SystemUse(torch.device("cpu"), clock=lambda: next(elapsed), cpu_clock=lambda: next(cpu))
    assert use.take() == {"system_cpu_percent": 150.0}
    assert use.take() == {"system_cpu_percent": 50.0}


def test_the_samples_of_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(system_use, "SAMPLE_S", 0.001)
    samples = iter([(10.0, 100.0), (50.0, 300.0), (90.0, 200.0)])
    all_read, go_on = threading.Event(), threading.Event()

    def read_gpu(_device: torch.device) -> tuple[float, float]:
        if (sample := next(samples, None)) is None:
            all_read.set()
            go_on.wait(10)
        return sample or (100.0, 400.0)

    use = SystemUse(torch.device("cuda:0"), read_gpu=read_gpu)
    assert all_read.wait(10)
    metrics = use.take()
    use.close()
    go_on.set()
    assert metrics["system_gpu_percent"] == 50.0
    assert metrics["system_gpu_memory_bytes"] == 300.0


def test_a_gpu_that_cannot_be_read_fails_at_once() -> None:
    def read_gpu(_device: torch.device) -> tuple[float, float]:
        raise ModuleNotFoundError("No module named 'pynvml'")

    with pytest.raises(ModuleNotFoundError, match="pynvml"):
        SystemUse(torch.device("cuda:0"), read_gpu=read_gpu)
