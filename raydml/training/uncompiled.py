"""Optimizers without torch's compiler, which they import in their first step and do not use.

The import takes 2 s of processor time and 170 MB of memory in each process that trains. A trial with `compile` has
imported it before its optimizer is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

_NAME = "torch._dynamo"


def _disable(function: Callable[..., Any], *_how: Any, **_more: Any) -> Callable[..., Any]:
    return function


def _graph_break(*_why: Any) -> None:
    pass


_STAND_IN = ModuleType(_NAME)
_STAND_IN.__dict__.update(disable=_disable, graph_break=_graph_break)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch's compiler from being imported by the optimizer that is made or used meanwhile.

    Optimizers call two of its functions, which have no effect outside of compiled code. It stays as it is where it has
    been imported. No thread may import a part of it meanwhile. What torch wraps for it meanwhile stays unwrapped.
    """
    if _NAME in sys.modules:
        yield
        return
    sys.modules[_NAME] = torch._dynamo = _STAND_IN
    try:
        yield
    finally:
        if sys.modules.get(_NAME) is _STAND_IN:
            del sys.modules[_NAME], torch._dynamo
