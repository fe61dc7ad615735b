"""The environment the commands run in, set before any test imports Ray or MLflow; fixtures of several packages."""

import logging

import pytest

from raydml.cli.main import prepare_environment
from raydml.ops.progress import StepProgress, progress_of

prepare_environment()


@pytest.fixture(autouse=True)
def loggers_as_before():
    """Undo what a command that runs in the test's process does to raydml's loggers."""
    loggers = [logging.getLogger(name) for name in ("raydml", "raydml.progress")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


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
