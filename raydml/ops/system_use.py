"""How busy a process and its GPU are: means between two moments, for the system metrics of a trial."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)
SAMPLE_S = 1.0  # the driver itself averages a GPU's use over up to a second


def gpu_use(device: torch.device) -> tuple[float, float]:
    """Return the use of a GPU in percent and its memory in use in bytes, of all processes on it, from its driver.

    Raises ImportError without nvidia-ml-py, and RuntimeError where the driver does not have the numbers.
    """
    import pynvml  # type: ignore[import-untyped,unused-ignore]  # only where there is a GPU

    try:
        return float(torch.cuda.utilization(device)), float(torch.cuda.device_memory_used(device))
    except pynvml.NVMLError as error:
        raise RuntimeError(f"the use of {device} cannot be read from its driver: {error}") from error


class SystemUse:
    """Measures how busy this process and its GPU are between two calls of `take`.

    The first interval begins when the object is made. A thread samples the GPU once per second until `close`; on a CPU
    there is none. device: the trial's. Raises ImportError and RuntimeError, as `gpu_use` does, when it is made.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        read_gpu: Callable[[torch.device], tuple[float, float]] = gpu_use,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._device, self._read_gpu = device, read_gpu
        self._clock, self._cpu_clock = clock, cpu_clock
        self._began_s, self._began_cpu_s = clock(), cpu_clock()
        self._samples: list[tuple[float, float]] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        if device.type == "cuda":
            self._samples.append(read_gpu(device))  # what cannot be read fails here and not in the thread
            threading.Thread(target=self._follow, name="system-use", daemon=True).start()

    def _follow(self) -> None:
        while not self._closed.wait(SAMPLE_S):
            try:
                sample = self._read_gpu(self._device)
            except RuntimeError as error:  # a driver that was restarted, say; training goes on
                logger.warning("the use of the GPU is not measured any more: %s", error)
                return
            with self._lock:
                self._samples.append(sample)

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call, by name.

        ``system_cpu_percent``: CPU time of this process by elapsed time, 100 for each busy core. With a GPU also
        ``system_gpu_percent``, the mean of the samples, and ``system_gpu_memory_bytes``, the largest.
        """
        now_s, now_cpu_s = self._clock(), self._cpu_clock()
        elapsed_s = max(now_s - self._began_s, 1e-9)
        metrics = {"system_cpu_percent": 100 * (now_cpu_s - self._began_cpu_s) / elapsed_s}
        self._began_s, self._began_cpu_s = now_s, now_cpu_s
        if self._device.type == "cuda":
            with self._lock:
                samples, self._samples = self._samples, []
            if samples:  # none in an epoch shorter than SAMPLE_S
                metrics["system_gpu_percent"] = sum(percent for percent, _ in samples) / len(samples)
                metrics["system_gpu_memory_bytes"] = max(used for _, used in samples)
        return metrics

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
