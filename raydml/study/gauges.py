"""What a study is doing, as metrics of Ray, which each node of a cluster offers to Prometheus.

The driver counts trials and events; each process that trains reports its rate. All have the tag ``study``. Ray's names
for them begin with ``ray_``: ``ray_raydml_trials_running``, for example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from raydml.study.driver import read_num_sent
from raydml.study.events import events_path

_BLOCK_BYTES = 1 << 20


class StudyGauges:
    """Trials by what they are doing (how many run, wait, have ended, and have failed), and events on their way.

    folder: of the study, whose name is the tag.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._tags = folder, {"study": folder.name}
        self._unsent = Gauge("raydml_unsent_events", "Events that MLflow does not have yet", tag_keys=("study",))
        self._read_bytes, self._num_events = 0, 0
        self._gauges = {
            name: Gauge(f"raydml_trials_{name}", description, tag_keys=("study", "stage"))
            for name, description in {
                "running": "Trials that train now",
                "waiting": "Trials of the stage that have started, or may start, and do not run",
                "ended": "Trials of this start of the stage that have ended",
                "failed": "Those of the ended ones that crashed, hung, diverged or found no memory",
            }.items()
        }

    def set(self, stage: str, statuses: Iterable[str], num_failed: int) -> None:
        """Report the trials of a stage. statuses: of Tune, one for each trial."""
        counted = Counter(statuses)
        ended = counted["TERMINATED"] + counted["ERROR"]
        values = {
            "running": counted["RUNNING"],
            "waiting": sum(counted.values()) - counted["RUNNING"] - ended,
            "ended": ended,
            "failed": num_failed,
        }
        for name, value in values.items():
            self._gauges[name].set(value, tags={**self._tags, "stage": stage})
        self._unsent.set(self.num_unsent(), tags=self._tags)

    def num_unsent(self) -> int:
        """Return how many events MLflow does not have yet; what was counted before is not read again."""
        with suppress(FileNotFoundError), open(events_path(self._folder), "rb") as file:
            file.seek(self._read_bytes)
            while block := file.read(_BLOCK_BYTES):
                self._read_bytes += len(block)
                self._num_events += block.count(b"\n")
        return max(0, self._num_events - read_num_sent(self._folder))


class SlotGauges:
    """The rate and the memory of a process that trains one trial after the other. study: its name."""

    def __init__(self, study: str) -> None:
        self._tags = {"study": study}
        # Without the trial: there may be thousands, and Prometheus keeps each. Ray adds the process and the node.
        self._gauges = {
            name: Gauge(f"raydml_{metric}", description, tag_keys=("study",))
            for name, metric, description in (
                ("images_per_s", "images_per_s", "Images that this process trains in a second"),
                ("system_gpu_memory_bytes", "gpu_memory_bytes", "Largest use of its GPU's memory in the last epoch"),
            )
        }

    def set(self, record: Mapping[str, Any]) -> None:
        """Report an epoch. record: its metrics."""
        for name, gauge in self._gauges.items():
            if name in record:
                gauge.set(float(record[name]), tags=self._tags)

    def stop(self) -> None:
        """Report that this process trains nothing now."""
        for gauge in self._gauges.values():
            gauge.set(0.0, tags=self._tags)
