"""How far a long step is: decoding, embedding, searching, clustering.

A step tells it as a record of the logger `raydml.steps`, below the level that anybody sees by default; whoever draws
bars (raydml/cli/bars.py) listens there. What computes knows nothing of screens.
"""

import logging
from typing import Any, NamedTuple

_logger = logging.getLogger("raydml.steps")


class Step(NamedTuple):
    """What is done ("embedding"), how much of how much, and of what ("images")."""

    name: str
    done: int
    total: int
    unit: str


def tell(name: str, done: int, total: int, unit: str) -> None:
    """Say how far a step is. Nearly free while nobody listens; the last call has done equal to total."""
    if _logger.isEnabledFor(logging.DEBUG):
        _logger.debug("%s: %d of %d %s", name, done, total, unit, extra={"step": Step(name, done, total, unit)})


def step_of(record: logging.LogRecord) -> Step | None:
    """The step that a record of the logger tells of."""
    step: Any = getattr(record, "step", None)
    return step if isinstance(step, Step) else None
