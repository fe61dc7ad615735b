"""Progress bars with rates for long steps, on stderr where it is a terminal; each disappears when its step ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from raydml.ops.progress import StepProgress, progress_of

PATIENCE_S = 1.0  # a shorter step gets no bar


class StepBars(logging.Handler):
    """Shows the progress of long steps: a bar from a second after a step's first report to its last one."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(level=logging.DEBUG)
        self.clock = clock
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, tuple[float, int, TaskID | None]] = {}  # begin_s, done at the first report, bar

    def emit(self, record: logging.LogRecord) -> None:
        step = progress_of(record)
        if step is None:
            return
        now_s = self.clock()
        begin_s, at_first, bar = self._tasks.get(step.name, (now_s, step.done, None))
        waited_s = now_s - begin_s
        if bar is None and waited_s >= PATIENCE_S and not step.ended and self.console.is_terminal:
            bar = self._new_bar(step)
        self._tasks[step.name] = (begin_s, at_first, bar)
        rate = (step.done - at_first) / waited_s if waited_s > 0 else 0.0
        if bar is not None and self._bars is not None:
            self._bars.update(bar, completed=step.done, total=step.total, amounts=_amounts(step, rate))
        if step.ended:
            self._finish(step, bar)

    def _new_bar(self, step: StepProgress) -> TaskID:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[amounts]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self._bars.add_task(step.name, total=step.total, amounts="")

    def _finish(self, step: StepProgress, bar: TaskID | None) -> None:
        del self._tasks[step.name]
        if bar is not None and self._bars is not None:
            self._bars.remove_task(bar)
            if not self._bars.tasks:
                self._bars.stop()
                self._bars = None

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
        super().close()


def _amounts(step: StepProgress, rate: float) -> str:
    """``310.2 MB of 1.2 GB  8.1 MB/s`` or ``3,120 of 11,788  840 images/s``"""
    size, unit = (decimal, "") if step.unit == "bytes" else ("{:,}".format, f" {step.unit}")
    total = "" if step.total is None else f" of {size(step.total)}"
    return f"{size(step.done)}{total}  {size(round(rate))}{unit}/s"
