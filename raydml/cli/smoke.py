"""`sweep SPACE --smoke`: all stages of a study in miniature, on generated images."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer
from rich.console import Console

from raydml.cli.arguments import CommandError, echo, new_console
from raydml.cli.tables import bytes_text, short_path
from raydml.ops.wording import counted

if TYPE_CHECKING:
    from raydml.search_space.space import SearchSpace


class SmokeError(CommandError):
    """Recipes of a smoke run that do not run to their end."""


class Miniature(NamedTuple):
    """A space in miniature, its file, and where its study is kept."""

    space: SearchSpace
    path: Path
    storage: Path
    tracking_uri: str | None


@contextmanager
def miniature(
    context: typer.Context, space: SearchSpace, storage: Path, tracking_uri: str | None
) -> Iterator[Miniature]:
    """Make a space small, in a temporary storage with an MLflow store of its own unless the options name others."""
    from raydml.search_space.smoke import SUFFIX, write_smoke_space
    from raydml.search_space.space import load_space

    kept = _is_typed(context, "--storage")
    if not _is_typed(context, "--tracking-uri"):
        tracking_uri = None  # MLFLOW_TRACKING_URI is where results go, and these are none
    with _folder(storage if kept else None) as folder:
        with without_notes():
            path = write_smoke_space(space, folder / f"{space.study.name}{SUFFIX}-data")
            small = Miniature(load_space(path), path, folder, tracking_uri)
        try:
            yield small
        except typer.Exit:
            if not kept:
                echo(
                    new_console(),
                    "The folder of this smoke run was temporary: run it again, or keep it with --storage.",
                )
            raise


def _is_typed(context: typer.Context, option: str) -> bool:
    """Return whether an option was given with the command, and not by its default or by the environment."""
    (name,) = (parameter.name for parameter in context.command.params if option in parameter.opts)
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextmanager
def _folder(storage: Path | None) -> Iterator[Path]:
    if storage is not None:
        yield storage.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="raydml-smoke-")).resolve()
    is_kept = False
    try:
        yield folder
    except SmokeError:  # its message names files of this folder
        is_kept = True
        echo(new_console(), f"The temporary folder of this smoke run is kept: {folder}")
        raise
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def without_notes() -> Iterator[None]:
    """Leave out that a miniature has other counts than published, and fewer epochs than the space."""
    logger = logging.getLogger("raydml")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def show_smoke_outcome(folder: Path, console: Console) -> None:
    """Print one line on whether the recipes run.

    Raises SmokeError if trials crashed, or if no trial of a stage ran to its end.
    """
    from raydml.study.smoke import smoke_outcome

    outcome = smoke_outcome(folder)
    crashed = [failure for failure in outcome.failures if ": crashed" in failure]
    failed = crashed or (outcome.failures if outcome.failed_stages else [])
    if failed:
        title = f"{len(crashed)} of {outcome.num_trials} trials crashed"
        if not crashed:
            title = f"no trial of the stage {' and '.join(outcome.failed_stages)} ran to its end"
        raise SmokeError(
            f"{title}:\n  " + "\n  ".join(failed) + "\n"
            f"Cure: change these recipes in SPACE, or with --set. All events: {short_path(folder / 'events.jsonl')}"
        )
    for failure in outcome.failures:
        echo(console, f"note: {failure}")
    memory, seconds = bytes_text(outcome.peak_memory_bytes), outcome.seconds_per_step
    trials = counted(outcome.num_trials, "trial")
    if outcome.failures:
        trials += f" ({len(outcome.failures)} ended early)"
    per_step = f"{seconds:.3g} s per step" if seconds else "unknown time per step"
    echo(console, f"recipe runs: {trials}, peak memory {memory}, {per_step}")
