"""Commands for benchmark data sets: data list, data download, data check."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raydml.cli.arguments import CommandError, new_console, program_of

data = typer.Typer(no_args_is_help=True, help="List, download and check benchmark data sets.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A benchmark, see: data list.")]
Root = Annotated[
    Path, typer.Option("--root", metavar="DIR", help="The folder of the data set, or the one that holds it.")
]


@data.command("list")
def list_benchmarks() -> None:
    """List the benchmarks: images of classes by part, archive size, and which ones can be downloaded."""
    from raydml.data.benchmarks import BENCHMARKS
    from raydml.data.download import SOURCES

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "data set", "images of classes", "archive"):
        table.add_column(heading, no_wrap=heading == "name")
    for name, benchmark in BENCHMARKS.items():
        parts = (f"{part} {count.num_images:,} of {count.num_classes:,}" for part, count in benchmark.counts.items())
        archives = SOURCES[name].archives
        sizes = ("size unknown" if one.num_bytes is None else decimal(one.num_bytes) for one in archives)
        table.add_row(name, benchmark.title, "\n".join(parts), "\n".join(sizes) or "by hand")
    new_console().print(table)


@data.command()
def download(
    context: typer.Context,
    name: Name,
    root: Root,
    sha256: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Accept the archive with this sha256 instead of the one on record."),
    ] = None,
) -> None:
    """Fetch, check and unpack a benchmark; an interrupted download continues where it stopped."""
    from raydml.data.benchmarks import benchmark_named, folder_of
    from raydml.data.catalog import DataError
    from raydml.data.download import SOURCES, NotServed, install

    benchmark = benchmark_named(name)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise CommandError(f"--sha256 {sha256!r} is no sha256. Give 64 hexadecimal digits, as sha256sum prints them")
    source = SOURCES[name]
    then = f"{program_of(context)} data check {name} --root {shlex.quote(str(root))}"
    try:
        typer.echo(f"{benchmark.title} is in {folder_of(name, root)} already; check it with: {then}")
        return
    except DataError:
        pass  # not downloaded yet
    if not source.archives:
        raise CommandError(
            f"{benchmark.title} cannot be downloaded by a program.\n{source.by_hand}\n"
            f"Make the folder {root / name} and put there: {benchmark.layout}.\nThen: {then}"
        )
    try:
        with _bar(_Rate(lambda number: decimal(int(number)), "/s")) as show:
            install(source, root, progress=show, report=_report, accepted_sha256=sha256)
    except NotServed as error:
        files = ", ".join(archive.file_name for archive in source.archives)
        raise CommandError(
            f"{error}.\nBy hand: {source.by_hand} Put {files} into {root} and run this command again: it checks "
            "and unpacks that file"
        ) from error
    except KeyboardInterrupt:
        _report("what has arrived is kept; the same command continues there")
        raise
    typer.echo(f"{benchmark.title} is in {folder_of(name, root)}; check it with: {then}")


@data.command()
def check(
    name: Name,
    root: Root,
    quick: Annotated[bool, typer.Option("--quick", help="Compare lists and files; decode no image.")] = False,
) -> None:
    """Compare a benchmark with the published counts and decode every image; exit code 0 if all is right, else 2."""
    from raydml.data.check import check_benchmark
    from raydml.images.decoding import fault_of

    with _bar(_Rate("{:,.0f}".format, " images/s")) as show:
        report = check_benchmark(
            name, root, fault_of=None if quick else fault_of, progress=lambda done, total: show("checking", done, total)
        )
    for line in report.lines:
        typer.echo(line)
    if not report.ok:
        raise typer.Exit(2)


def _report(text: str) -> None:
    typer.echo(text, err=True)


class _Rate(ProgressColumn):
    """``310.2 MB of 1.2 GB  8.1 MB/s`` or ``3,120 of 11,788  840 images/s``"""

    def __init__(self, text_of: Callable[[float], str], unit: str) -> None:
        super().__init__()
        self._text_of = text_of
        self._unit = unit

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f" of {self._text_of(task.total)}"
        rate = "" if task.speed is None else f"  {self._text_of(task.speed)}{self._unit}"
        return Text(f"{self._text_of(task.completed)}{total}{rate}")


@contextmanager
def _bar(rate: ProgressColumn) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function of (stage, done, total) that shows a bar for each stage, if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), rate, TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total)

        yield show
