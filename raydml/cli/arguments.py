"""Arguments that several commands share, and how commands name things to the user."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from raydml.cli import tables

STORAGE = Path("studies")

Storage = Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds the studies.")]
Address = Annotated[
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
    """An argument of a command that cannot be followed, with the cure."""


def program(context: typer.Context) -> str:
    """What the user typed to get here: ``uv run launch.py``."""
    return context.find_root().info_name or "raydml"


def study_argument(folder: Path) -> str:
    """How a command must name this study from here: by name if it lies in the default storage, else by its folder."""
    default = STORAGE.resolve() / folder.name
    return shlex.quote(folder.name if folder.resolve() == default else tables.short_path(folder))


def embedded_store(storage: Path) -> str:
    """The MLflow store of studies that name none."""
    from raydml.tracking.store import default_uri

    return default_uri(storage)


def read_events(folder: Path) -> list[dict[str, Any]]:
    from raydml.study import events

    return events.read(folder / "events.jsonl")


def age_of(folder: Path) -> float:
    """Seconds since the last event of a study."""
    path = folder / "events.jsonl"
    return time.time() - (path if path.exists() else folder / "study.json").stat().st_mtime


def registered_model(folder: Path) -> str | None:
    """The name under which the study's winner was registered, from its events."""
    names = [event["name"] for event in read_events(folder) if event.get("event") == "model" and event.get("name")]
    return str(names[-1]) if names else None


def new_console() -> Console:
    """Standard output; brackets in names and paths are not markup, and numbers get no colours of their own."""
    return Console(markup=False, highlight=False)


def echo(console: Console, text: str) -> None:
    """Text as it is: no markup, no colours, no line breaks of rich's own."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
