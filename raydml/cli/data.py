"""Commands that look after benchmark data sets: data list, data download, data check."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raydml.cli.arguments import CommandError, new_console, program_of
from raydml.errors import did_you_mean

if TYPE_CHECKING:
    from raydml.data.benchmarks import Benchmark

data = typer.Typer(no_args_is_help=True, help="Benchmark data sets: what there is, download it, check what is there.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A benchmark, see: data list.")]
Root = Annotated[
    Path, typer.Option("--root", metavar="DIR", help="The folder of the data set, or the one that holds it.")
]


@data.command("list")
def list_benchmarks() -> None:
    """The benchmarks: images of classes by part, the archive's size, and whether it can be downloaded."""
    from raydml.data.benchmarks import BENCHMARKS
    from raydml.data.sources import SOURCES

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "data set", "images of classes", "archive"):
        table.add_column(heading, no_wrap=heading == "name")
    for name, benchmark in BENCHMARKS.items():
        archives = SOURCES[name].archives
        known = "\n".join("size unknown" if one.num_bytes is None else decimal(one.num_bytes) for one in archives)
        table.add_row(name, benchmark.title, _parts_text(benchmark), known or "by hand")
    new_console().print(table)


def _parts_text(benchmark: Benchmark) -> str:
    return "\n".join(
        f"{part} {count.num_images:,} of {count.num_classes:,}" for part, count in benchmark.counts.items()
    )


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
    """Fetch, check and unpack a benchmark; a broken download goes on where it stopped."""
    from raydml.data.benchmarks import BENCHMARKS, folder_of
    from raydml.data.catalog import DataError
    from raydml.data.download import NotServed, install
    from raydml.data.sources import SOURCES

    _refuse_unknown(name)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise CommandError(f"--sha256 {sha256!r} is no sha256: 64 hexadecimal digits are wanted, as sha256sum prints")
    source, benchmark = SOURCES[name], BENCHMARKS[name]
    then = f"{program_of(context)} data check {name} --root {shlex.quote(str(root))}"
    try:
        typer.echo(f"{benchmark.title} is in {folder_of(name, root)} already; whether it is whole tells: {then}")
        return
    except DataError:
        pass  # nothing there yet: what this command is for
    if not source.archives:
        raise CommandError(
            f"{benchmark.title} cannot be downloaded by a program.\n{source.by_hand}\n"
            f"Make the folder {root / name} and put there: {benchmark.layout}.\nThen: {then}"
        )
    try:
        with _bar(_ByteRate()) as show:
            install(source, root, progress=show, report=_report, accepted_sha256=sha256)
    except NotServed as error:
        files = ", ".join(archive.file_name for archive in source.archives)
        raise CommandError(
            f"{error}.\nBy hand: {source.by_hand} Put {files} into {root} and give this command again: it checks and "
            "unpacks what is there"
        ) from error
    except KeyboardInterrupt:
        _report("what has arrived is kept; the same command continues there")
        raise
    typer.echo(f"{benchmark.title} is in {folder_of(name, root)}; look at it with: {then}")


@data.command()
def check(
    name: Name,
    root: Root,
    quick: Annotated[bool, typer.Option("--quick", help="Compare lists and files; decode no image.")] = False,
) -> None:
    """Count, compare with what was published, and decode every image; exit code 0 if all is well, else 2."""
    from raydml.data.check import check as check_benchmark
    from raydml.images.decoding import fault_of

    _refuse_unknown(name)
    with _bar(_ImageRate()) as show:
        report = check_benchmark(
            name, root, fault_of=None if quick else fault_of, progress=lambda done, total: show("checking", done, total)
        )
    for line in report.lines:
        typer.echo(line)
    if not report.ok:
        raise typer.Exit(2)


def _refuse_unknown(name: str) -> None:
    from raydml.data.benchmarks import BENCHMARKS

    if name not in BENCHMARKS:
        hint = did_you_mean(name, BENCHMARKS)
        raise CommandError(f"{name!r} is no benchmark; choices: {', '.join(BENCHMARKS)}{hint}")


def _report(text: str) -> None:
    typer.echo(text, err=True)


class _ByteRate(ProgressColumn):
    """``310.2 MB of 1.2 GB  8.1 MB/s``"""

    def render(self, task: Task) -> Text:
        whole = "" if task.total is None else f" of {decimal(int(task.total))}"
        rate = "" if task.speed is None else f"  {decimal(int(task.speed))}/s"
        return Text(f"{decimal(int(task.completed))}{whole}{rate}")


class _ImageRate(ProgressColumn):
    """``3,120 of 11,788  840 images/s``"""

    def render(self, task: Task) -> Text:
        whole = "" if task.total is None else f" of {int(task.total):,}"
        rate = "" if task.speed is None else f"  {task.speed:,.0f} images/s"
        return Text(f"{int(task.completed):,}{whole}{rate}")


@contextmanager
def _bar(rate: ProgressColumn) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr for each stage, if stderr is a terminal; what it yields takes stage, done and total."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), rate, TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage)
            bar.update(tasks[stage], completed=done, total=total)

        yield show
