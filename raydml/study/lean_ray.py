"""What an embedded Ray does without, so that the first trial of a study starts seconds earlier.

Ray has no settings for it. These are internals of the version that pyproject.toml pins; tests/study/test_lean_ray.py
fails where another one has changed them. They are imported where they are used, as Ray starts before Tune is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

#: Processes of a head that serve other machines and people: the autoscaler, the copying of logs to the driver, which is
#: off, and the server of the dashboard and of jobs. Ray starts them although the dashboard is switched off.
LEFT_OUT = ("start_monitor", "start_log_monitor", "start_api_server")


@contextmanager
def _replaced(owner: Any, **others: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in others}
    for name, other in others.items():
        setattr(owner, name, other)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def few_processes() -> AbstractContextManager[None]:
    """Let an embedded Ray that starts meanwhile leave out what a study on one machine does not use."""
    from ray._private.node import Node

    return _replaced(Node, **dict.fromkeys(LEFT_OUT, lambda _node, **_settings: None))


def shared_workers() -> AbstractContextManager[None]:
    """Let the trials that start meanwhile use the worker processes that an embedded Ray has started beforehand.

    Tune gives each actor environment variables, and so a process of its own. The workers of an embedded Ray have all
    variables of the driver in any case.
    """
    from ray.tune.execution import class_cache

    return _replaced(class_cache, DEFAULT_ENV_VARS={}, ENV_VARS_TO_PROPAGATE=set())


def uncounted_callbacks() -> AbstractContextManager[None]:
    """Let Tune not count the callbacks of the runs that start meanwhile, where Ray sends no statistics.

    To count them, it imports MLflow and the clients of other trackers, which takes 2 s.
    """
    from ray._common.usage.usage_lib import usage_stats_enabled
    from ray.air._internal import usage

    if usage_stats_enabled():
        return nullcontext()
    return _replaced(usage, tag_callbacks=lambda _callbacks: False)
