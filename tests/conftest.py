"""The environment the commands run in, set before any test imports Ray or MLflow; fixtures of several packages."""

import logging

import pytest

from raydml.cli.main import prepare_environment
from raydml.ops.progress import StepProgress, progress_of

prepare_environment()


@pytest.fixture
def reported():
    """The progress of long steps that is reported while a test runs, as a list of StepProgress."""
    logger, steps = logging.getLogger("raydml.progress"), []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            step = progress_of(record)
            assert isinstance(step, StepProgress)
            steps.append(step)

    kept, before = Kept(), (logger.level, logger.propagate)
    logger.addHandler(kept)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield steps
    logger.removeHandler(kept)
    logger.setLevel(before[0])
    logger.propagate = before[1]
