"""Commands that take a model away and use it: export, index, query."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydml.cli.arguments import (
    STORAGE,
    CommandError,
    ModelTarget,
    StorageOption,
    TrackingUri,
    deliver,
    echo,
    find_model,
    new_console,
    program_of,
    refuse_addresses,
    refuse_other_encodings,
    refuse_unwritable,
    refuse_used,
    store_of,
    study_argument,
    writing,
)
from raydml.ops.progress import report_progress
from raydml.ops.wording import printable

if TYPE_CHECKING:
    from raydml.inference.export import EmbeddingModel
    from raydml.inference.gallery import EmbeddedBatch

_DELIVERY_S = 300.0  # how long `index` waits for MLflow to store the gallery
_MEGABYTE = 1e6


def export(
    context: typer.Context,
    target: ModelTarget,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx beside the weights as well.")] = False,
    storage: StorageOption = STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a model as one self-contained folder.

    The folder holds weights, preprocessing, provenance and a README; --onnx adds a file for other runtimes."""
    refuse_used(f"OUT = {str(out)!r}", out)
    if onnx:
        from raydml.inference.export import ONNX, export_onnx, require_packages

        require_packages()  # before anything is written
    model, _ = load_target(target, storage, tracking_uri)
    with writing(f"OUT = {str(out)!r}"):
        model.save(out)
    if onnx:
        difference = export_onnx(model, out / ONNX)
    console = new_console()
    echo(console, f"{out}\n  from raydml.export import EmbeddingModel")
    echo(console, f"  EmbeddingModel.load({str(out)!r}).embed(['one.jpg'])")
    if onnx:
        size = (out / ONNX).stat().st_size / _MEGABYTE
        echo(console, f"{out / ONNX}  {size:,.1f} MB, checked in ONNX Runtime: within {difference:.0e} of the network")
        echo(console, f"  its input, with an example: {out / 'README.md'}")
    echo(console, f"to search images with it: {program_of(context)} index {shlex.quote(str(out))} FOLDER GALLERY")


def index(
    context: typer.Context,
    target: ModelTarget,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, flat or in folders of any depth.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the gallery and the model.")],
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out files that cannot be decoded, instead of refusing.")
    ] = False,
    log: Annotated[
        bool, typer.Option("--log/--no-log", help="Store OUT with the study's run in MLflow, if TARGET is a study's.")
    ] = True,
    storage: StorageOption = STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Embed a folder of images into a gallery for `query`.

    OUT holds the faiss index, the names and the model: 2 kB an image at 512 dimensions, 123 MB for 60,000."""
    refuse_used(f"OUT = {str(out)!r}", out)
    refuse_addresses(f"FOLDER = {str(folder)!r}", folder)
    if not folder.is_dir():
        raise CommandError(f"FOLDER = {str(folder)!r}: no such folder. Cure: a folder of images")
    from raydml.config.trial import Machine
    from raydml.evaluation.embed import device_of
    from raydml.inference.gallery import embed_images, image_names, write_gallery

    names = image_names(folder)
    machine = Machine()
    model, study = load_target(target, storage, tracking_uri, device_of(machine))
    batches, num_done = [], 0
    for batch in embed_images(model, folder, names, batch_size=machine.evaluation_batch):
        batches.append(batch)
        num_done += len(batch.names) + len(batch.unreadable)
        report_progress("indexing", num_done, len(names), "images")
    kept = _kept_names(batches, skip_unreadable=skip_unreadable)
    import numpy as np

    with writing(f"OUT = {str(out)!r}"):
        write_gallery(out, model, folder, kept, np.concatenate([batch.embeddings for batch in batches]))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / _MEGABYTE
    console = new_console()
    echo(console, f"{out}  {len(kept):,} images, {model.embedding_dim} dimensions, {size:,.1f} MB with the model")
    if log and study is not None:
        _log_gallery(study, out, tracking_uri)
    echo(console, f"{program_of(context)} query {shlex.quote(str(out))} IMAGE")


def query(
    out: Annotated[
        str, typer.Argument(metavar="GALLERY", help="A folder that `index` wrote, or runs:/ID/galleries/NAME.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files to find neighbours of.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, metavar="K", help="Neighbours for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw each image beside its neighbours.")
    ] = None,
    storage: StorageOption = STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print the gallery images that are nearest to each IMAGE.

    Distances are Euclidean; between embeddings of length 1 they range from 0 (the same) to 2 (opposite)."""
    if picture is not None:
        refuse_unwritable(f"--picture {picture}", picture, "file")
    if missing := [str(image) for image in images if not image.is_file()]:
        raise CommandError(f"no such image: {', '.join(missing)}. Cure: name image files")
    if not out.startswith("runs:/") and not Path(out).is_dir():
        raise CommandError(f"GALLERY = {out!r}: no such folder. Cure: a folder that `index TARGET FOLDER OUT` wrote")
    from raydml.inference.gallery import Gallery
    from raydml.report.retrievals import draw_neighbours

    with tempfile.TemporaryDirectory(prefix="raydml-") as scratch:
        gallery = Gallery.load(_gallery_folder(out, storage, tracking_uri, Path(scratch)))
    found = gallery.search(images, k)
    if picture is not None:
        with writing(f"--picture {picture}", "file"):
            draw_neighbours(gallery, images, found, picture)
    if as_json:
        queries = [
            {"image": str(image), "neighbours": [neighbour._asdict() for neighbour in neighbours]}
            for image, neighbours in zip(images, found, strict=True)
        ]
        typer.echo(json.dumps({"index": out, "root": str(gallery.root), "queries": queries}))
        return
    console = new_console()
    for image, neighbours in zip(images, found, strict=True):
        echo(console, str(image))
        for rank, (name, distance) in enumerate(neighbours, start=1):
            echo(console, f"  {rank:>{len(str(k))}}  {distance:.4f}  {name}")
    echo(console, f"names are relative to {gallery.root}" + ("" if picture is None else f"; picture: {picture}"))


def load_target(
    target: str, storage: Path, tracking_uri: str | None, device: str = "cpu"
) -> tuple[EmbeddingModel, Path | None]:
    """Return the model that TARGET names and the folder of its study, None outside a study."""
    with tempfile.TemporaryDirectory(prefix="raydml-") as scratch:
        found = find_model(target, storage, tracking_uri, Path(scratch))  # before torch is imported
        from raydml.inference.export import EmbeddingModel, load_checkpoint

        load = load_checkpoint if found.is_checkpoint else EmbeddingModel.load
        return load(found.folder, device), found.study


def _kept_names(batches: Sequence[EmbeddedBatch], *, skip_unreadable: bool) -> list[str]:
    """Return the names of the embedded images; print the unreadable ones to stderr, or refuse them."""
    unreadable = [str(reason) for batch in batches for reason in batch.unreadable]
    kept = [name for batch in batches for name in batch.names]
    if not unreadable:
        return kept
    reasons = "\n".join(f"  {reason}" for reason in unreadable)
    files = "1 file" if len(unreadable) == 1 else f"{len(unreadable)} files"
    if not kept or not skip_unreadable:
        cure = "repair or remove them" + (", or add --skip-unreadable" if kept else "")
        raise CommandError(f"{files} cannot be decoded:\n{reasons}\nNothing was written. Cure: {cure}")
    typer.echo(printable(f"left out, {files} cannot be decoded:\n{reasons}"), err=True)
    return kept


def _log_gallery(study: Path, out: Path, tracking_uri: str | None) -> None:
    """Store a gallery with the study's own run in MLflow, or print that it is delivered later."""
    from raydml.study import events
    from raydml.study.folder import read_study
    from raydml.study.remote import StudyPlace

    where = f"galleries/{out.resolve().name}"
    if StudyPlace.of(study).uri is not None:
        _attach_gallery(study, out, where, tracking_uri)
        return
    event = {"time": time.time(), "event": "artifact", "trial": None, "path": str(out.resolve())}
    events.append(study / "events.jsonl", {**event, "artifact_path": where})
    if reason := deliver(study, tracking_uri, _DELIVERY_S):
        typer.echo(f"note: MLflow gets the gallery later, with the study's next events: {reason}", err=True)
    else:
        typer.echo(f"in MLflow, with the run of study {read_study(study)['name']!r}: {where}")


def _attach_gallery(study: Path, out: Path, where: str, tracking_uri: str | None) -> None:
    """Store a gallery with the run of a study in an object store, whose events are its driver's; or print a note."""
    from raydml.study.folder import read_study
    from raydml.tracking.attachments import log_folder
    from raydml.tracking.store import TrackingError

    recorded = read_study(study)
    try:
        log_folder(store_of(study, tracking_uri), recorded, out, where)
    except TrackingError as error:
        again = f"launch.py sync {study_argument(study)}, and index into another folder"
        typer.echo(f"note: MLflow does not have the gallery: {error}. Then: {again}", err=True)
    else:
        typer.echo(f"in MLflow, with the run of study {recorded['name']!r}: {where}")


def _gallery_folder(out: str, storage: Path, tracking_uri: str | None, scratch: Path) -> Path:
    """Return the folder of a gallery; one in MLflow is fetched into ``scratch``."""
    if not out.startswith("runs:/"):
        refuse_other_encodings(f"GALLERY = {out}", out)
        return Path(out)
    from raydml.tracking.models import resolve_checkpoint
    from raydml.tracking.store import study_store

    return resolve_checkpoint(out, study_store(None, storage, tracking_uri), scratch)
