"""Commands that show studies: status, report, ui, sync."""

from __future__ import annotations

import shlex
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from raydml.cli import tables
from raydml.cli.arguments import (
    STORAGE,
    CommandError,
    StorageOption,
    Target,
    TrackingUri,
    echo,
    new_console,
    program_of,
    refuse_unwritable,
    send_reads,
    store_of,
    study_argument,
    writing,
)


class ReportFormat(str, Enum):
    """Formats of `report`; an Enum, because typer does not accept a list of Literals."""

    HTML = "html"
    MD = "md"
    LATEX = "latex"
    CSV = "csv"


def status(
    context: typer.Context,
    study: Annotated[
        str | None, typer.Argument(metavar="[STUDY]", help="Name or folder; default: all studies.")
    ] = None,
    storage: StorageOption = STORAGE,
) -> None:
    """List the studies, or show one study's trials."""
    console = new_console()
    if study is None:
        folders = sorted(path.parent for path in storage.glob("*/study.json"))
        lost = sorted({path.parent for path in storage.glob("*/events.jsonl")} - set(folders))
        if lost:
            from raydml.study.folder import lost_specification

            for folder in lost:
                echo(console, lost_specification(folder.resolve()))
        if not folders:
            if not lost:
                echo(console, f"no studies in {storage.resolve()}")
            return
    else:
        from raydml.study.folder import find_study

        folders = [find_study(study, storage)]
    rows = [row_of(path) for path in folders]
    console.print(tables.studies(rows, width=console.width))
    if study is not None:
        show_trials(folders[0], rows[0], console)
    for folder, row in zip(folders, rows, strict=True):
        if row.is_running is False and row.study.state != "finished":
            command = f"{program_of(context)} resume {study_argument(folder)}"
            echo(console, f"\nTo continue {row.name}:\n  {command}")


def show_trials(folder: Path, row: tables.StudyRow, console: Console) -> None:
    """Print what a study does now if it runs, its trials, and its results once it has some."""
    from raydml.cli.live_view import rough_time, step_text
    from raydml.study.folder import read_json
    from raydml.study.pace import remaining_s
    from raydml.study.results import is_finished

    if row.is_running:
        left_s = remaining_s(row.study)
        left = "" if left_s is None else f"{rough_time(max(left_s - row.age_s, 0.0))} left"
        now = ", ".join(filter(None, [row.study.stage, step_text(row.study), left]))
        echo(console, f"\n{now or 'starting'}")
    console.print()
    console.print(tables.trials(row.study, width=console.width))
    if (folder / "summary.json").exists():
        console.print()
        console.print(tables.summary(read_json(folder / "summary.json")))
    if is_finished(folder):
        echo(console, f"\n{folder.name} is finished; nothing to do")


def report(
    study: Target,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write to; default: STUDY/report.")] = None,
    formats: Annotated[
        list[ReportFormat] | None,
        typer.Option("--format", metavar="html|md|latex|csv", help="Format to write; repeatable. Default: all four."),
    ] = None,
    storage: StorageOption = STORAGE,
) -> None:
    """Write a study's report: HTML, Markdown, a LaTeX table, CSV files.

    Prints the Markdown. For an unfinished study the report covers the results so far.
    """
    from raydml.report.page import read_illustrations, write_report
    from raydml.report.text import summary_markdown
    from raydml.study.folder import find_study, write_json
    from raydml.study.results import is_finished
    from raydml.study.summary import histories, summarise

    folder = find_study(study, storage)
    out = out or folder / "report"
    refuse_unwritable(f"--out {out}", out)
    # Not from summary.json: an unfinished study has no such file.
    trials = histories(folder)
    summary = summarise(folder)
    chosen = [one.value for one in formats or ReportFormat]
    with writing(f"--out {out}"):
        written = write_report(out, summary, trials, read_illustrations(folder), chosen)
        if is_finished(folder) and not (folder / "summary.json").exists():  # it was damaged and deleted
            write_json(folder / "summary.json", summary)
    typer.echo(summary_markdown(summary))
    typer.echo(f"Report in {tables.short_path(out)}: {', '.join(path.name for path in written)}")


def ui(
    study: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Study whose MLflow store is opened.")] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help="Default: the first free port from 5000.")] = None,
    storage: StorageOption = STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Open the MLflow UI on 127.0.0.1 until Ctrl-C."""
    from raydml.cli.server import free_port, is_free, serve_ui

    if study is not None:
        from raydml.study.folder import find_study

        folder = find_study(study, storage)  # before MLflow is imported
    from raydml.ops.addresses import redacted
    from raydml.tracking.store import require_store, runs_page, study_store

    if study is not None:
        uri = store_of(folder, tracking_uri)
        cure = f"launch.py sync {study_argument(folder)} makes it and fills it with the study's events"
    else:
        uri = study_store(None, storage, tracking_uri)
        cure = "run a study first, or name the right --storage or --tracking-uri"
    require_store(uri, cure)  # the server would create an empty one
    if uri.startswith(("http://", "https://")):
        typer.echo(f"this MLflow store is a server: {redacted(uri).rstrip('/')}{runs_page(uri)}")
        return
    port = free_port() if port is None else port
    if not is_free(port):
        raise CommandError(f"--port {port} is taken. Cure: another port, or no --port for the first free one")
    page = f"http://127.0.0.1:{port}{runs_page(uri)}"
    typer.echo("starting the MLflow server", err=True)
    store = f"(store {redacted(uri)}; Ctrl-C ends it)"
    raise typer.Exit(serve_ui(uri, port, on_answer=lambda: typer.echo(f"MLflow UI: {page}   {store}")))


def sync(
    context: typer.Context, study: Target, storage: StorageOption = STORAGE, tracking_uri: TrackingUri = None
) -> None:
    """Send the undelivered events of a study to MLflow.

    To its own store, which is created where it is missing, or to the one of --tracking-uri."""
    from raydml.study.folder import find_study, read_study
    from raydml.study.mirror import refuse_held, up_to_date
    from raydml.study.remote import StudyPlace, merge_reads
    from raydml.study.results import refuse_lost_events

    folder = up_to_date(find_study(study, storage))  # before MLflow is imported
    # Of a study in a store, MLflow may have events by its driver elsewhere that the store does not have yet. They would
    # look like those of another file, and the runs be made again without them.
    refuse_held(folder)
    refuse_lost_events(folder)
    from raydml.ops.addresses import without_secrets
    from raydml.tracking.delivery import sync as deliver
    from raydml.tracking.store import StoreUnavailable

    name, uri = read_study(folder)["name"], store_of(folder, tracking_uri)
    again = f"{program_of(context)} sync {study_argument(folder)}"
    if tracking_uri is not None and without_secrets(tracking_uri) == tracking_uri:
        again += f" --tracking-uri {shlex.quote(tracking_uri)}"
    try:
        has_all = deliver(folder / "events.jsonl", uri, name, complete=True, command=again)
    except StoreUnavailable as error:
        raise CommandError(f"nothing of study {name} was sent: {error}. Then: {again}") from None
    if not has_all:
        raise CommandError(
            f"MLflow does not have all of study {name}: the line above says what and why. Nothing is lost. "
            f"Cure: mend that, then {again}"
        )
    if StudyPlace.of(folder).uri is not None:
        merge_reads(folder)
        if reason := send_reads(folder, tracking_uri):
            raise CommandError(f"MLflow does not have the reads of `evaluate`: {reason}")
    typer.echo(f"MLflow has all of study {name}")


def row_of(folder: Path) -> tables.StudyRow:
    """Return what the list of studies shows of the one in a folder."""
    from raydml.study.driver import is_running
    from raydml.study.events import read_state

    state = read_state(folder)
    return tables.StudyRow(folder.name, state, is_running(folder), max(time.time() - state.time_s, 0.0))
