"""Signals that end a study: INT and TERM stop the running trials in order, a second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(Exception):
    """INT or TERM arrived, and Tune has stopped its actors. number: which signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect the INT and TERM signals that arrive; the second one raises KeyboardInterrupt.

    Tune ends its loop in order on USR1, so each signal that arrives is passed on to Tune as USR1.
    """
    received: list[int] = []
    over = threading.Event()

    def ignore(_number: int, _frame: Any) -> None:
        """Do nothing: between two Tune runs USR1 has no handler, and its default action would kill the driver."""

    def pass_on() -> None:
        # A Tune run that is just starting has not installed its handler yet: send USR1 once to each new handler.
        signalled: Any = ignore
        while not over.wait(0.1):
            handler = signal.getsignal(signal.SIGUSR1)
            if handler is not signalled:
                signalled = handler
                os.kill(os.getpid(), signal.SIGUSR1)

    def on_signal(number: int, _frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        threading.Thread(target=pass_on, name="interrupt", daemon=True).start()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, ignore)
    try:
        yield received
    finally:
        over.set()
        for number, handler in previous.items():
            signal.signal(number, handler)
