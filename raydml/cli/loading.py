"""A notice on stderr while a slow library is imported: a spinner on a terminal, else one plain line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from rich.console import Console

#: The libraries whose import takes more than half a second: module -> its name in the notice.
SLOW_LIBRARIES = {"torch": "torch", "torchvision": "torchvision", "timm": "timm", "ray": "Ray", "mlflow": "MLflow"}


class ImportNotices(MetaPathFinder):
    """Shows a notice while one of SLOW_LIBRARIES is imported, wherever in the program that happens.

    Add it in front of ``sys.meta_path``. Libraries that another one imports are part of its notice.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._is_shown = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the other finders find, with a loader that shows the notice; None for other modules."""
        if fullname not in SLOW_LIBRARIES or fullname in self._seen or path is not None or target is not None:
            return None
        self._seen.add(fullname)
        spec = importlib.util.find_spec(fullname)  # asks this finder, too, which now returns None
        if spec is not None and spec.loader is not None:
            self._announce(spec, f"loading {SLOW_LIBRARIES[fullname]}")
        return spec

    def _announce(self, spec: ModuleSpec, text: str) -> None:
        assert spec.loader is not None
        run_module = spec.loader.exec_module

        def run_with_notice(module: ModuleType) -> None:
            if self._is_shown:
                return run_module(module)
            self._is_shown = True
            try:
                with notice(text):
                    return run_module(module)
            finally:
                self._is_shown = False

        spec.loader.exec_module = run_with_notice  # type: ignore[method-assign]


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Show on stderr what the program does now: a spinner with the text on a terminal, else the text as a line."""
    console = Console(stderr=True, markup=False, highlight=False)
    if console.is_terminal:
        with console.status(text):
            yield
        return
    print(text, file=sys.stderr, flush=True)
    yield


@contextmanager
def without_import_notices() -> Iterator[None]:
    """Show no notices of imports, while something else on the terminal says what is loaded."""
    removed = [finder for finder in sys.meta_path if isinstance(finder, ImportNotices)]
    for finder in removed:
        sys.meta_path.remove(finder)
    try:
        yield
    finally:
        sys.meta_path[:0] = removed
