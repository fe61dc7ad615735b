"""The environment the commands run in, set before any test imports Ray or MLflow; fixtures of several packages."""

import logging

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
