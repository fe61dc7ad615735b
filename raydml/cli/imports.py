"""The command import: the weights of a published system's release become an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raydml.cli.arguments import CommandError, echo, new_console, program_of, refuse_used, writing
from raydml.errors import did_you_mean
from raydml.models.pretrained import SUFFIXES
from raydml.models.releases import RELEASES

FromOption = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="RELEASE", help=f"{', '.join(RELEASES)}; without it, recognised by the names of the tensors."
    ),
]


def checked_release(name: str | None) -> str | None:
    """Return the name of a release. Raises CommandError for an unknown one."""
    if name is not None and name not in RELEASES:
        hint = did_you_mean(name, RELEASES) or "."
        raise CommandError(f"--from {name}: no such release{hint} Choices: {', '.join(RELEASES)}")
    return name


def import_(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint as the release writes it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model.")],
    release: FromOption = None,
    crop_px: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Centre crop of the images, where not the release's.")
    ] = None,
    normalize: Annotated[
        str | None, typer.Option(metavar="l2|none", help="Normalisation of embeddings, such as l2 for MDR's baseline.")
    ] = None,
    num_slices: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Learners of Divide & Conquer, if not 8; 1 for its baseline.")
    ] = None,
) -> None:
    """Turn the weights of a published system into a model folder.

    The folder can be evaluated, indexed, served and written as ONNX, like that of export."""
    checked_release(release)
    if normalize not in (None, "l2", "none"):
        raise CommandError(f"--normalize {normalize}: one of l2, none")
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "there is no such file"
        raise CommandError(f"FILE = {file}: {what}. Cure: the path of a checkpoint ({', '.join(SUFFIXES)})")
    if file.suffix not in SUFFIXES:
        cure = f"rename it, if it is a checkpoint; {', '.join(SUFFIXES)} are read"
        raise CommandError(f"FILE = {file}: it ends in {file.suffix!r}. Cure: {cure}")
    refuse_used(f"OUT = {out}", out)
    from raydml.inference.released import describe_release, import_release

    model = import_release(file, release, crop_px=crop_px, normalize=normalize, num_slices=num_slices)
    with writing(f"OUT = {out}"):
        model.save(out)
    console = new_console()
    for line in describe_release(model):
        echo(console, line)
    data = next(iter(model.card["release"]["recall_at"]))
    echo(console, f"model {out}\n{program_of(context)} evaluate {out} --data {data} --on test --data-root DIR")
