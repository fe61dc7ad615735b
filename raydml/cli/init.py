"""The command that writes a search space for a folder of images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from raydml.cli.arguments import CommandError, echo, new_console, program_of, refuse_addresses, writing
from raydml.ops.files import write_whole


def init(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of images: class folders, or a CSV list.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The file to write; default: NAME.yaml.")
    ] = None,
) -> None:
    """Write a commented search space for a folder of images.

    Image sizes, batches and the network follow from the images and from whether there is a GPU.
    """
    refuse_addresses(f"FOLDER = {str(folder)!r}", folder)
    if not folder.is_dir():
        raise CommandError(f"FOLDER = {str(folder)!r}: no such folder. Cure: name the folder of the images")
    from raydml.search_space.space import study_name_from

    file = output or Path(f"{study_name_from(folder.resolve().name)}.yaml")
    if file.exists():
        raise CommandError(f"{file} exists and is not overwritten. Cure: --output with another name, or remove it")
    from raydml.search_space.folder_space import look_at_folder, space_text

    facts = look_at_folder(folder)
    console = new_console()
    train, val, test = facts.parts
    echo(console, f"{facts.description}: {train:,} train / {val:,} validate / {test:,} test, sealed")
    import torch  # slow: after what can be refused

    text = space_text(facts, has_gpu=torch.cuda.is_available())
    with writing(f"--output {file}", "file"):
        write_whole(file, text)
    program, name = program_of(context), shlex.quote(str(file))
    echo(
        console, f"wrote {file}\n\n{program} sweep {name} --dry-run    a forecast\n{program} sweep {name}    the study"
    )
