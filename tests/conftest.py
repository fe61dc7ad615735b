"""The environment the commands run in, set before any test imports Ray or MLflow; fixtures of several packages."""

import logging
import os
import signal

# Two processes test on two cores. A thread of torch that waits for another one which is not on a core waits long: the
# tests of the methods took 131 s instead of 84 s with two threads each. Before anything imports torch or numpy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from raydml.cli.main import prepare_environment
from raydml.ops.progress import StepProgress, progress_of

prepare_environment()


LOGGERS = [logging.getLogger(name) for name in ("raydml", "raydml.progress")]


@pytest.fixture(autouse=True)
def loggers_as_at_first():
    """Undo what a command that ran in this process, in a test or in a fixture, did to raydml's loggers."""
    for logger in LOGGERS:
        logger.setLevel(logging.NOTSET)
        logger.propagate, logger.handlers = True, []


@pytest.fixture(autouse=True)
def signals_are_heeded():
    """Undo what the & of a shell's script and nohup do, for a test and what it starts: INT and HUP would be ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def reported():
    """The progress of long steps that is reported while a test runs, as a list of StepProgress."""
    logger, steps = logging.getLogger("raydml.progress"), []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            step = progress_of(record)
            assert isinstance(step, StepProgress)
            steps.append(step)

    logger.addHandler(Kept())
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    return steps
