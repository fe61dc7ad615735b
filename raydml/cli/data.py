"""Commands for data sets: data list, data download, data check, data duplicates."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from raydml.cli.arguments import CommandError, new_console, program_of
from raydml.ops.progress import report_progress
from raydml.ops.wording import counted, printable

if TYPE_CHECKING:
    from raydml.data.catalog import Catalog

data = typer.Typer(no_args_is_help=True, help="List, download and check data sets.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="A benchmark, see: data list.")]
ROOT = Path("data")
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
    root: Root = ROOT,
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
        show = partial(report_progress, unit="bytes")
        install(
            source,
            root,
            progress=show,
            report=lambda text: typer.echo(printable(text), err=True),
            accepted_sha256=sha256,
        )
    except NotServed as error:
        files = ", ".join(archive.file_name for archive in source.archives)
        raise CommandError(
            f"{error}.\nBy hand: {source.by_hand} Put {files} into {root} and run this command again: it checks "
            "and unpacks that file"
        ) from error
    except KeyboardInterrupt:
        typer.echo("what has arrived is kept; the same command continues there", err=True)
        raise
    typer.echo(f"{benchmark.title} is in {folder_of(name, root)}; check it with: {then}")


@data.command()
def check(
    name: Name,
    root: Root = ROOT,
    quick: Annotated[bool, typer.Option("--quick", help="Compare lists and files; decode no image.")] = False,
) -> None:
    """Compare a benchmark with the published counts and decode every image; exit code 0 if all is right, else 2."""
    from raydml.data.check import check_benchmark
    from raydml.images.pixels import fault_of

    show = partial(report_progress, "checking", unit="images")
    report = check_benchmark(name, root, fault_of=None if quick else fault_of, progress=show)
    for line in report.lines:
        typer.echo(printable(line))
    if not report.ok:
        raise typer.Exit(2)


@data.command()
def duplicates(
    images: Annotated[
        str, typer.Argument(metavar="IMAGES", help="A folder of class folders, a CSV list, or the name of a benchmark.")
    ],
    root: Root = ROOT,
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="How many pairs of each kind are shown.")
    ] = 10,
) -> None:
    """Find images that are nearly the same: resized, compressed again, cropped a little.

    Pairs of two classes may lie on both sides of a split by classes, and one of the two labels may be wrong. Nothing is
    removed.
    """
    from raydml.images.near_duplicates import near_duplicates

    catalog = _catalog_of(images, root)
    found = near_duplicates(catalog, partial(report_progress, unit="images"))
    for path, reason in found.unreadable.items():
        typer.echo(printable(f"not compared: {path}: {reason}"), err=True)
    for kind, is_of_kind in found.kinds(catalog).items():
        rows = is_of_kind.nonzero()[0]
        typer.echo(f"{counted(len(rows), 'pair')} {kind}")
        for row in rows[:show].tolist():
            names = [catalog.paths[number] for number in (found.first[row], found.second[row])]
            typer.echo(printable(f"  {found.similarity[row]:.3f}  {names[0]}  {names[1]}"))
        if len(rows) > show:
            typer.echo(f"  and {len(rows) - show:,} more (--show)")
    if not found.is_complete:
        typer.echo("so many images are alike that not all were compared", err=True)


def _catalog_of(images: str, root: Path) -> Catalog:
    from raydml.data.benchmarks import BENCHMARKS
    from raydml.data.datasets import open_catalog

    if images in BENCHMARKS:
        return open_catalog(images, root)
    path = Path(images)
    if path.suffix.lower() == ".csv" and path.is_file():
        return open_catalog("image_list", path.parent, path.name)
    if not path.is_dir():
        raise CommandError(
            f"IMAGES = {images!r} is no folder, no CSV file and no benchmark. Cure: the path of one, or one of "
            f"{', '.join(BENCHMARKS)}"
        )
    return open_catalog("image_folder", path)
