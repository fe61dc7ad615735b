"""Python's garbage collection around the import of large libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports_uncollected() -> Iterator[None]:
    """Import libraries without a collection meanwhile, which takes a fifth of the time, and leave what is alive
    afterwards out of all later collections: torch and Ray alone are 450,000 objects, which live as long as the process.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        if was_enabled:
            gc.enable()
