"""The command that looks at this machine, a cluster and the places that a study uses, without changing anything."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from raydml.cli import tables
from raydml.cli.arguments import ImagesOption, TrackingUri, new_console
from raydml.cli.loading import without_import_notices
from raydml.ops.addresses import is_address, redacted
from raydml.ops.wording import counted, printable

_LITTLE_BYTES = 10e9  # free space below which a study may not fit
_APART_S = 5.0  # clocks of this machine and of a server of files


class Finding(NamedTuple):
    """What was found about a subject. state: ``ok``, ``note``, or ``fault`` where a study would fail."""

    state: str
    subject: str
    text: str


def doctor(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDR", help="Look at each node of this Ray cluster: HOST:PORT, auto, or http://HEAD:8265."
        ),
    ] = None,
    data_root: ImagesOption = None,
    storage: Annotated[
        str | None, typer.Option(metavar="DIR|URI", help="Folder or store that holds the studies.")
    ] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Look at what a study needs: versions, GPUs, disks, images and nodes.

    Each finding has its cure. Exit code 1 where a study would fail. Nothing is changed or left behind.
    """
    invocation = context.find_root().obj
    environment: MutableMapping[str, str] = invocation.environment if invocation else {}
    findings = list[Finding]()
    with without_import_notices():
        place = None if storage is None else storage if is_address(storage) else Path(storage)
        for finding in _findings(address, data_root, place, tracking_uri, environment):
            findings.append(finding)
    console = new_console()
    console.print(_screen(findings))
    num_faults = sum(finding.state == "fault" for finding in findings)
    num_notes = sum(finding.state == "note" for finding in findings)
    console.print()
    console.print(
        f"{counted(num_faults, 'fault')}, {counted(num_notes, 'note')}" if num_faults or num_notes else "all ok"
    )
    if num_faults:
        raise typer.Exit(1)


def _screen(findings: list[Finding]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    colours = {"ok": "green", "note": "yellow", "fault": "bold red"}
    for state, subject, text in findings:
        found, cure, words = printable(text).partition(" Cure: ")
        grid.add_row(Text(state, style=colours[state]), Text(subject, style="bold"), Text(found))
        if cure:
            grid.add_row("", "", Text(f"Cure: {words}", style="cyan"))
    return grid


def _findings(
    address: str | None,
    data_root: Path | None,
    storage: Path | str | None,
    tracking_uri: str | None,
    environment: MutableMapping[str, str],
) -> Iterator[Finding]:
    yield from _versions()
    yield from _gpus(environment)
    from raydml.study.health import note_of_this_machine

    if note := note_of_this_machine():
        yield Finding("note", "/dev/shm", note)
    is_fit = True
    if storage is not None:
        found = _store(storage) if isinstance(storage, str) else _storage(storage)
        is_fit = found.state != "fault"
        yield found
    if data_root is not None:
        yield _images(data_root)
    if is_fit and (tracking_uri or isinstance(storage, Path)):
        yield _mlflow(tracking_uri, storage if isinstance(storage, Path) else None)
    if address is not None and address.startswith(("http://", "https://")):
        yield _job_server(address, environment)
    elif address is not None:
        yield from _cluster(address, storage if is_fit else None, data_root, environment)


def _versions() -> Iterator[Finding]:
    from raydml.study.package import digest_of_package
    from raydml.training.checkpoint import git_commit, short_commit, version

    yield Finding("ok", "python", platform.python_version())
    commit = f"commit {short_commit(known)}, " if (known := git_commit()) else ""
    yield Finding("ok", "raydml", f"{version()}, {commit}code {digest_of_package()}")
    for name in ("torch", "ray", "mlflow", "faiss"):
        packages = ["faiss-gpu", "faiss-cpu"] if name == "faiss" else [name]
        found = [
            f"{_version(package)}" + (f" ({package})" * (name == "faiss")) for package in packages if _version(package)
        ]
        if found:
            yield Finding("ok", name, ", ".join(found))
        else:
            yield Finding("fault", name, "is not installed. Cure: uv pip install -r requirements.lock")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus(environment: Mapping[str, str]) -> Iterator[Finding]:
    import torch

    from raydml.ops.clustering import num_gpus_of_faiss
    from raydml.study.health import num_gpus_of_ray

    of_torch = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield finding_of_gpus(
        of_torch, num_gpus_of_faiss(), num_gpus_of_ray(), torch.version.cuda, environment.get("CUDA_VISIBLE_DEVICES")
    )


def finding_of_gpus(of_torch: int, of_faiss: int, of_ray: int, cuda: str | None, visible: str | None) -> Finding:
    """Compare how many GPUs torch, faiss and Ray see. cuda: of torch's build. visible: CUDA_VISIBLE_DEVICES, if set."""
    seen = f"torch sees {of_torch}, faiss {of_faiss}, Ray {of_ray}"
    if not of_torch and not of_ray:
        return Finding("ok", "GPUs", "none: trials run on the CPU")
    if of_torch < of_ray and visible is None:
        cure = (
            "a build of torch with CUDA" if cuda is None else "a driver for CUDA " + cuda + ", which nvidia-smi shows"
        )
        return Finding("fault", "GPUs", f"{seen}: trials would get GPUs that torch cannot use. Cure: {cure}")
    if of_faiss < of_torch:
        slow = "clusters and rankings are computed on the CPU. Cure: the package faiss-gpu in the place of faiss-cpu"
        return Finding("note", "GPUs", f"{seen}: {slow}")
    return Finding("ok", "GPUs", seen + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""))


def _storage(storage: Path) -> Finding:
    above = next(path for path in (storage.absolute(), *storage.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=above) as file:
            apart_s = abs(Path(file.name).stat().st_mtime - time.time())
        free_bytes = shutil.disk_usage(above).free
    except OSError as error:
        cure = "a folder that this user can write, or mount it for writing"
        return Finding("fault", "storage", f"{storage}: cannot be written ({error.strerror}). Cure: {cure}")
    free = f"{storage}: {tables.bytes_text(free_bytes)} free for studies, checkpoints and decoded images"
    if free_bytes < _LITTLE_BYTES:
        return Finding("note", "storage", f"{free}. Cure: `sweep SPACE --dry-run` says what a study needs; free some")
    if apart_s > _APART_S:
        cure = "synchronise the clocks of both (chrony, NTP)"
        return Finding(
            "note", "storage", f"{free}; its server's clock is {apart_s:.0f} s from this one's. Cure: {cure}"
        )
    return Finding("ok", "storage", free + ("" if storage.exists() else "; the folder will be made"))


def _store(uri: str) -> Finding:
    from raydml.ops.object_store import ObjectStore, StoreError

    begin_s = time.monotonic()
    try:
        ObjectStore(uri).check()
    except StoreError as error:
        return Finding("fault", "storage", str(error))
    return Finding("ok", "storage", f"{uri}: a file was written and deleted in {time.monotonic() - begin_s:.1f} s")


def _images(data_root: Path) -> Finding:
    try:
        num_entries = sum(1 for _ in data_root.iterdir())
    except OSError as error:
        cure = "mount or copy the images there, or another --data-root"
        return Finding("fault", "images", f"{data_root}: cannot be read ({error.strerror}). Cure: {cure}")
    if not num_entries:
        return Finding("fault", "images", f"{data_root}: is empty. Cure: mount or copy the images there")
    return Finding("ok", "images", f"{data_root}: {counted(num_entries, 'entry', 'entries')}")


def _mlflow(tracking_uri: str | None, storage: Path | None) -> Finding:
    from raydml.tracking.store import StoreUnavailable, TrackingError, database_path, look_at_store, study_store

    try:
        uri = study_store(None, storage or Path("studies"), tracking_uri)
        path = database_path(uri)
        if path is not None and not path.exists():
            return Finding("ok", "MLflow", f"{path}: will be made by the first study")
        look_at_store(uri)
    except StoreUnavailable as error:  # a study does not wait for it
        return Finding("note", "MLflow", str(error))
    except TrackingError as error:
        return Finding("fault", "MLflow", str(error))
    return Finding("ok", "MLflow", redacted(uri))


def _job_server(address: str, environment: Mapping[str, str]) -> Finding:
    from raydml.study.job_server import JobServer, JobServerError, read_token

    try:
        server = JobServer(address, read_token(environment))
        version, num_running = server.check(), sum(not job.has_ended for job in server.jobs())
    except JobServerError as error:
        return Finding("fault", "job server", str(error))
    here = _version("ray")
    text = f"{redacted(address)}: Ray {version}, {counted(num_running, 'job')} running"
    if version != here:
        return Finding("note", "job server", f"{text}; here is Ray {here}. Cure: requirements.lock on the cluster")
    return Finding("ok", "job server", text)


def _cluster(
    address: str, storage: Path | str | None, data_root: Path | None, environment: MutableMapping[str, str]
) -> Iterator[Finding]:
    from raydml.cli.arguments import CommandError, refuse_unanswered
    from raydml.study.cluster_health import look_at_cluster
    from raydml.study.folder import StudyError
    from raydml.study.process import RayEnded

    place = storage
    if isinstance(storage, Path):
        place = storage.resolve() if storage.is_dir() else None
    try:
        refuse_unanswered(address)
        nodes, notes = look_at_cluster(address, place, data_root and data_root.resolve(), environment)
    except (StudyError, CommandError, RayEnded) as error:
        yield Finding("fault", "cluster", str(error))
        return
    yield Finding("ok", "cluster", f"{address}: {counted(len(nodes), 'node')}")
    for node in nodes:
        has = f"{node.name}: {node.num_cpus:g} CPU, {node.num_gpus:g} GPU"
        yield Finding("fault", "node", node.fault) if node.fault else Finding("ok", "node", has)
    for note in notes:
        yield Finding("note", "node", note)
