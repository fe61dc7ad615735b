"""Arguments that several commands share, and the names of studies and paths in messages."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from raydml.cli import tables

STORAGE = Path("studies")

StorageOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds the studies.")]
AddressOption = Annotated[
    str | None, typer.Option(metavar="ADDR", help="Join this Ray cluster, for example 'auto' or HOST:PORT.")
]
Target = Annotated[str, typer.Argument(metavar="STUDY", help="Name or folder of a study.")]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        metavar="URI", envvar="MLFLOW_TRACKING_URI", help="MLflow store; without one, DIR/mlflow.db.", show_envvar=True
    ),
]


class CommandError(ValueError):
    """An argument that a command cannot use; the message has the cure."""


def program_of(context: typer.Context) -> str:
    """The words that started this program, such as ``uv run launch.py``."""
    return context.find_root().info_name or "raydml"


def study_argument(folder: Path) -> str:
    """The study as an argument of a command: its name if it is in the default storage, else its folder."""
    default = STORAGE.resolve() / folder.name
    return shlex.quote(folder.name if folder.resolve() == default else tables.short_path(folder))


def embedded_store(storage: Path) -> str:
    """The MLflow store of a study without a tracking URI."""
    from raydml.tracking.store import default_uri

    return default_uri(storage)


def age_of(folder: Path) -> float:
    """Seconds since the last event of a study."""
    path = folder / "events.jsonl"
    return time.time() - (path if path.exists() else folder / "study.json").stat().st_mtime


def registered_model(folder: Path) -> str | None:
    """Return the name under which the study's winner was registered, from its events."""
    from raydml.study.events import read_state

    models = read_state(folder).models
    return models[-1].name if models else None


def new_console() -> Console:
    """A console on standard output that prints brackets as they are and does not colour numbers."""
    return Console(markup=False, highlight=False)


def echo(console: Console, text: str) -> None:
    """Print text unchanged: no markup, no colours, no line breaks by rich."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
