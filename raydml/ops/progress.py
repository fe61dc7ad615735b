"""Messages on stderr, and the progress of long steps: reading headers, decoding, embedding, searching, clustering.

A step reports its progress as a record of the logger ``raydml.progress``, at level DEBUG. Handlers show it: bars on a
terminal (raydml/cli/live_view.py), a line every few seconds elsewhere. Code that computes depends on neither.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from raydml.ops.wording import printable

Item = TypeVar("Item")
LINE_EVERY_S = 10.0
_logger = logging.getLogger("raydml")
_progress_logger = logging.getLogger("raydml.progress")


class StepProgress(NamedTuple):
    """The name of a step ("embedding"), how many of how many units are done, and the unit ("images").

    total: None where it is not known.
    """

    name: str
    done: int
    total: int | None
    unit: str

    @property
    def ended(self) -> bool:
        return self.total is not None and self.done >= self.total


def report_progress(name: str, done: int, total: int | None, unit: str) -> None:
    """Report the progress of a step. The last one has done equal to total. Nearly free without a handler."""
    if _progress_logger.isEnabledFor(logging.DEBUG):
        progress = StepProgress(name, done, total, unit)
        _progress_logger.debug("%s: %d of %s %s", *progress, extra={"progress": progress})


def with_progress(name: str, items: Iterable[Item], total: int, unit: str) -> Iterator[Item]:
    """Pass the items on and report each one after its use."""
    for number, item in enumerate(items):
        yield item
        report_progress(name, number + 1, total, unit)


def progress_of(record: logging.LogRecord) -> StepProgress | None:
    """The progress that a record of the logger carries, if any."""
    progress: Any = getattr(record, "progress", None)
    return progress if isinstance(progress, StepProgress) else None


class ProgressLines(logging.Handler):
    """Logs a line about a long step every LINE_EVERY_S seconds, where stderr is not a terminal."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(level=logging.DEBUG)
        self._clock = clock
        self._times: dict[str, tuple[float, float]] = {}  # step -> seconds at its first report, at its last line

    def emit(self, record: logging.LogRecord) -> None:
        progress = progress_of(record)
        if progress is None or sys.stderr.isatty():
            return
        now_s = self._clock()
        begin_s, line_s = self._times.pop(progress.name, (now_s, now_s))
        if progress.ended:
            return
        if now_s - line_s >= LINE_EVERY_S:
            line_s = now_s
            name, done, total, unit = progress
            rate = done / (now_s - begin_s)
            whole = "" if total is None else f" of {total:,}"
            _logger.info("%s: %s%s %s (%s/s)", name, f"{done:,}", whole, unit, f"{rate:,.0f}")
        self._times[progress.name] = begin_s, line_s


class _Stderr(logging.Handler):
    """Writes to the current ``sys.stderr``, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(printable(self.format(record)), file=sys.stderr, flush=True)


def show_log() -> None:
    """Show raydml's messages of level INFO and above and the progress of long steps; a second call changes nothing."""
    _logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Stderr) for handler in _logger.handlers):
        _logger.addHandler(_Stderr())
    show_progress(ProgressLines)


def show_progress(kind: Callable[[], logging.Handler]) -> None:
    """Add a handler of this class to the progress of long steps; a second call changes nothing."""
    _progress_logger.setLevel(logging.DEBUG)
    _progress_logger.propagate = False  # raydml's messages are shown without them
    if not any(type(handler) is kind for handler in _progress_logger.handlers):
        _progress_logger.addHandler(kind())
