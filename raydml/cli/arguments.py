"""Arguments and options that several commands share, and the models that a TARGET names."""

from __future__ import annotations

import errno
import math
import re
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.console import Console

from raydml.cli import tables
from raydml.ops.addresses import is_address, redacted
from raydml.ops.object_store import check_uri
from raydml.ops.wording import printable
from raydml.study.budget import Budget

if TYPE_CHECKING:
    from raydml.config.trial import Machine
    from raydml.tracking.models import Origin

STORAGE = Path("studies")
_ANSWER_S = 5.0  # for the head of a cluster
DELIVERY_S = 20.0  # longest wait of an evaluation for MLflow
DEFAULT_SEEDS = 3  # of a published recipe


class CommandError(ValueError):
    """An argument that a command cannot use; the message has the cure."""


class Invocation(NamedTuple):
    """How this program was started: the whole command as it was typed, and the script that ran, None for a module.

    environment: the environment variables of this process. inherited: those that it was started with, of its user.
    """

    command: str
    script: Path | None
    environment: MutableMapping[str, str]
    inherited: Mapping[str, str]


def refuse_other_encodings(argument: str, path: Path | str) -> None:
    """Raise CommandError for a path that is not UTF-8: the libraries that store models and runs cannot open it.

    Images and their folders may have such names.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise CommandError(f"{argument}: the name is not UTF-8. Cure: a folder or file with another name") from error


def refuse_addresses(argument: str, path: Path | None) -> Path | None:
    """Return the path of an argument. Raises CommandError for the address of an object store.

    It would be a folder of that name in the folder of the command.
    """
    if path is not None and is_address(path):
        typed = re.sub(r"(?<=\w):/(?=[^/])", "://", argument)  # a path has lost a slash
        cure = "mount the store (NFS, EFS, Lustre, or s3fs for s3://), and name the folder"
        if str(path).startswith("file:"):
            cure = "leave out file://"
        elif argument.startswith("--storage"):
            cure = "name the study by its address, s3://BUCKET/PREFIX/NAME; sweep takes one as --storage"
        raise CommandError(f"{typed}: is an address, and must be a folder. Cure: {cure}")
    return path


def _storage(path: Path) -> Path:
    refuse_addresses(f"--storage {path}", path)
    refuse_other_encodings(f"--storage {path}", path.resolve())
    return path


def _storage_or_uri(given: str) -> str:
    if is_address(given):
        return check_uri(given)
    _storage(Path(given))
    return given


SweepStorageOption = Annotated[
    str,
    typer.Option(
        "--storage",
        metavar="DIR|URI",
        help="Folder that holds the studies, or s3://BUCKET/PREFIX (gs://, abfs://) for their files.",
        callback=_storage_or_uri,
    ),
]


def divided_storage(given: str) -> tuple[Path, str | None]:
    """Return the folder of --storage on this machine, and the address if it is one."""
    return (STORAGE, given) if is_address(given) else (Path(given), None)


StorageOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder that holds the studies.", callback=_storage)]


def _address(address: str | None) -> str | None:
    if address is None or address == "auto":
        return address
    if address.startswith(("http://", "https://")):
        raise CommandError(
            f"--address {redacted(address)}: is a job server, and this command joins a cluster itself. Cure: submit in "
            "the place of this command, which starts a study there and goes on with it; or HOST:PORT, such as HEAD:6379"
        )
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise CommandError(
            f"--address {redacted(address)}: is not the head of a Ray cluster. Cure: HOST:PORT, such as HEAD:6379, or "
            "auto; with the address of its job server, http://HEAD:8265, use the command submit"
        )
    return address


def refuse_unanswered(address: str | None) -> None:
    """Raise CommandError, before any work is done, where nothing answers at the address of a cluster."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S):
            pass
    except OSError as error:
        raise CommandError(
            f"--address {address}: nothing answers there ({error.strerror or error}). Cure: start the cluster, or "
            "correct the address (`ray status` on its head shows it)"
        ) from error


AddressOption = Annotated[
    str | None,
    typer.Option(metavar="ADDR", help="Join this Ray cluster, for example 'auto' or HOST:PORT.", callback=_address),
]
Target = Annotated[str, typer.Argument(metavar="STUDY", help="Name, folder or address of a study.")]
TrackingUri = Annotated[
    str | None,
    typer.Option(
        metavar="URI", envvar="MLFLOW_TRACKING_URI", help="MLflow store; without one, DIR/mlflow.db.", show_envvar=True
    ),
]
TimeLimitOption = Annotated[
    str | None,
    typer.Option("--time", metavar="T", help="End the search early enough to finish within T, such as 15m or 1h30m."),
]
StartFromOption = Annotated[
    str | None,
    typer.Option(
        "--start-from", metavar="STUDY", help="Begin with the best trials of STUDY, or with the points of a YAML file."
    ),
]
DeviceHoursOption = Annotated[
    float | None,
    typer.Option(
        "--max-gpu-hours",
        metavar="H",
        help="End the search early, so that the whole study takes about H GPU-hours (CPU-hours without a GPU).",
    ),
]
UntilSettledOption = Annotated[
    bool, typer.Option("--until-settled", help="End the search once the ranking of its recipes has settled.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of the images, if they were moved.",
        callback=lambda path: refuse_addresses(f"--data-root {path}", path),
    ),
]
#: What `sweep` and `submit` take.
SpaceArgument = Annotated[
    Path, typer.Argument(metavar="SPACE", help="YAML file of the search space, or a folder or CSV list of images.")
]
NumTrials = Annotated[int | None, typer.Option(min=1, metavar="N", help="Trials of the search.")]
MaxEpochs = Annotated[int | None, typer.Option(min=1, metavar="N", help="Largest number of epochs of a trial.")]
SeedOption = Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of the study.")]
NameOption = Annotated[str | None, typer.Option(metavar="S", help="Name of the study.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set any key of SPACE; repeatable.")]
SchedulerOption = Annotated[
    Literal["asha", "promotion", "pasha", "sync", "none"] | None,
    typer.Option(
        metavar="NAME",
        help="Early stopping: asha, promotion, pasha, sync, none. With sync, the same seed repeats the study exactly.",
    ),
]
StagesOption = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="search alone, or search,STAGE,... with any of confirm, refit, finalize."),
]
RecipeOption = Annotated[
    Literal["published"] | None,
    typer.Option(
        metavar="published",
        help="Trial 0 of SPACE as its authors trained it: on all training classes, for all epochs; then the test.",
    ),
]
SeedsOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help=f"With --recipe: training runs. [{DEFAULT_SEEDS}]")
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of the images.", callback=lambda path: refuse_addresses(f"--data-root {path}", path)
    ),
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="Run all stages in miniature on generated images, in one to three minutes.")
]
ModelTarget = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A study (its refit, else its winner), runs:/ID/..., models:/NAME/VERSION, a checkpoint or an exported "
        "model.",
    ),
]


def seconds_of(text: str | None) -> float | None:
    """The seconds of ``--time``, such as ``90s``, ``15m``, ``2h`` or ``1h30m``. Raises CommandError."""
    if text is None:
        return None
    found = re.fullmatch(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?", text.strip())
    amounts = zip(found.groups(), (3600, 60, 1), strict=True) if found else ()
    seconds = sum(int(number or 0) * unit_s for number, unit_s in amounts)
    if not seconds:
        raise CommandError(f"--time = {text!r}: is not a duration. Cure: write 90s, 15m, 2h or 1h30m")
    return float(seconds)


def budget_of(time_limit: str | None, device_hours: float | None, until_settled: bool) -> Budget:
    """The limits that the options of a study name. Raises CommandError."""
    if device_hours is not None and not (0 < device_hours < math.inf):
        raise CommandError(f"--max-gpu-hours = {device_hours:g}: is not above 0. Cure: write 0.5, 8 or 40")
    return Budget(seconds_of(time_limit), device_hours, until_settled)


def program_of(context: typer.Context) -> str:
    """The words that started this program, such as ``uv run launch.py``."""
    return context.find_root().info_name or "raydml"


def command_of(context: typer.Context) -> str:
    """The whole command as it was typed; its name where it did not come from a command line."""
    invocation = context.find_root().obj
    return invocation.command if invocation else f"{program_of(context)} {context.info_name}"


def started_again(context: typer.Context) -> list[str]:
    """Return the words with which this program starts itself again, in another process."""
    invocation = context.find_root().obj
    return [sys.executable, *([str(invocation.script)] if invocation and invocation.script else ["-m", "raydml"])]


def study_argument(folder: Path) -> str:
    """The study as an argument of a command: its name if it is in the default storage, else its folder."""
    default = STORAGE.resolve() / folder.name
    return shlex.quote(folder.name if folder.resolve() == default else tables.short_path(folder))


def new_console() -> Console:
    """A console on standard output that prints brackets as they are and does not colour numbers."""
    return Console(markup=False, highlight=False)


def echo(console: Console, text: str) -> None:
    """Print text without markup, colours and line breaks by rich; control characters are shown in letters."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def refuse_used(argument: str, folder: Path) -> None:
    """Raise CommandError unless a folder is new or empty and can be written."""
    refuse_unwritable(argument, folder)
    if folder.exists() and any(folder.iterdir()):
        raise CommandError(f"{argument} exists and is not empty. Cure: name a new folder")


def refuse_unwritable(argument: str, path: Path, kind: Literal["folder", "file"] = "folder") -> None:
    """Raise CommandError, before any work is done, where a folder or file cannot be written; nothing is left behind."""
    refuse_other_encodings(argument, path)
    refuse_addresses(argument, path)
    with writing(argument, kind):
        with suppress(FileNotFoundError):
            path.stat()  # refuses a path below a file and names that are too long
        if kind == "file" and path.exists():
            with open(path, "ab"):
                return
        above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=above):
            pass


@contextmanager
def writing(argument: str, kind: str = "folder") -> Iterator[None]:
    """Turn an OSError about the folder or file of an argument into a CommandError."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        cure = f"a {kind} that can be written"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = f"free disk space, or a {kind} on another disk"
        raise CommandError(f"{argument}: {error.strerror or error}{place}. Cure: {cure}") from error


class FoundModel(NamedTuple):
    """A trained model on this machine.

    folder: a checkpoint or an exported model. study: the study in this storage that it belongs to, or None. origin:
    the MLflow run that it was fetched from, or None.
    """

    folder: Path
    study: Path | None
    is_checkpoint: bool
    origin: Origin | None = None


def find_model(target: str, storage: Path, tracking_uri: str | None, scratch: Path) -> FoundModel:
    """Find the model that TARGET names; a model in MLflow is downloaded into ``scratch``. Raises CommandError."""
    if target.startswith(("runs:/", "models:/")):
        from raydml.tracking.models import origin_of, resolve_checkpoint
        from raydml.tracking.store import study_store

        uri = study_store(None, storage, tracking_uri)
        fetched, origin = resolve_checkpoint(target, uri, scratch), origin_of(target, uri)
        return model_below(fetched, target, study_here(origin, storage))._replace(origin=origin)
    refuse_other_encodings(f"TARGET = {target}", target)
    path = Path(target)
    if path.is_dir() and not (path / "study.json").exists() and not (path / "events.jsonl").exists():
        return model_below(path, target, study_above(path), deep=False)
    from raydml.study.folder import find_study
    from raydml.study.results import find_winner

    name, colon, key = target.rpartition(":")
    if colon and key.startswith(("search-", "confirm-", "refit-")):
        study = find_study(name, storage)
        return FoundModel(checkpoint_of(study, key), study, True)
    study = find_study(target, storage)
    return FoundModel(find_winner(study).checkpoint, study, True)


def study_above(path: Path) -> Path | None:
    """The folder of the study that a path is inside of, or None."""
    return next((parent for parent in path.absolute().parents if (parent / "study.json").exists()), None)


def checkpoint_of(study: Path, key: str) -> Path:
    """The newest intact checkpoint of one trial of a study. Raises CommandError if there is none."""
    from raydml.study.folder import newest_checkpoint

    recorded_trial(study, key)  # refuses an unknown trial
    found = newest_checkpoint(study, key.split("-")[0], key)
    if found is None:
        raise CommandError(
            f"study {study.name!r}: {key} has no intact checkpoint. Checkpoints of losing trials are deleted; "
            "study.keep_checkpoints is the number of trials that keep theirs"
        )
    return found


def study_here(origin: Origin, storage: Path) -> Path | None:
    """The folder of the study that a downloaded model comes from, or None if it is not in this storage."""
    from raydml.study.folder import read_study

    folder = storage / origin.study
    if not origin.study_id or not (folder / "study.json").exists():
        return None
    return folder if read_study(folder)["study_id"] == origin.study_id else None  # the same name alone is not enough


def model_below(folder: Path, target: str, study: Path | None, *, deep: bool = True) -> FoundModel:
    """Find the model in a folder: a checkpoint, the newest intact checkpoint of a trial, or an exported model.

    ``deep``: also search the folders below, as in an artifact of MLflow. A folder that the user named is not searched
    deeply: it could hold models of other studies. Raises CommandError if there is none.
    """
    from raydml.inference.export import is_exported
    from raydml.training import checkpoint

    inside = folder.rglob("manifest.json") if deep else folder.glob("checkpoint_*/manifest.json")
    parents = [folder, *sorted({path.parent.parent for path in inside})]
    for candidate in [folder, *(checkpoint.newest_intact(parent) for parent in parents)]:
        if candidate is not None and checkpoint.is_intact(candidate):
            return FoundModel(candidate, study, True)
    below = sorted({path.parent for path in folder.rglob("*.safetensors")}) if deep else []
    for candidate in [folder, *below]:
        if is_exported(candidate):
            return FoundModel(candidate, study, False)
    raise CommandError(
        f"TARGET = {target!r}: no checkpoint and no exported model in it. "
        "Cure: a folder with manifest.json or config.json, a study, runs:/ID/checkpoint or models:/NAME/VERSION"
    )


def store_of(study: Path, tracking_uri: str | None) -> str:
    """The MLflow store of a study: the one of --tracking-uri or MLFLOW_TRACKING_URI, else the study's own.

    Raises TrackingError if that does not exist any more."""
    from raydml.study.folder import read_study
    from raydml.tracking.store import study_store

    return study_store(read_study(study)["tracking_uri"], study.resolve().parent, tracking_uri)


def deliver(study: Path, tracking_uri: str | None, patience_s: float) -> str:
    """Send the undelivered events of a study to MLflow. Returns "" on success, else why not and the cure."""
    from raydml.study.folder import read_study
    from raydml.tracking.delivery import sync
    from raydml.tracking.store import StoreUnavailable, TrackingError, require_store

    again = f"launch.py sync {study_argument(study)}"
    try:
        uri = store_of(study, tracking_uri)
        require_store(uri, f"{again} makes it anew")
        delivered = sync(study / "events.jsonl", uri, read_study(study)["name"], patience_s, command=again)
    except StoreUnavailable as error:
        return f"{error}. Then: {again}"
    except TrackingError as error:
        return str(error)
    return "" if delivered else "the line above says why"


def send_reads(study: Path, tracking_uri: str | None) -> str:
    """Send the reads of a study in an object store that MLflow does not have; they are no events.

    Returns "" on success, else why not and the cure."""
    from raydml.data.seal import TestReads
    from raydml.study.folder import read_study
    from raydml.study.remote import READS
    from raydml.tracking.attachments import log_reads
    from raydml.tracking.store import TrackingError

    again = f"launch.py sync {study_argument(study)}"
    try:
        log_reads(store_of(study, tracking_uri), read_study(study), TestReads(study / READS).read())
    except TrackingError as error:
        return f"{error}. What is missing is sent by: {again}"
    return ""


def deliver_test_read(study: Path, tracking_uri: str | None) -> None:
    """Send the record of a test read to MLflow; print a note if that has to wait."""
    from raydml.study.remote import StudyPlace

    is_stored = StudyPlace.of(study).uri is not None
    if reason := send_reads(study, tracking_uri) if is_stored else deliver(study, tracking_uri, DELIVERY_S):
        typer.echo(f"note: the read is recorded in the study and reaches MLflow later: {reason}", err=True)


def record_test_read(found: FoundModel | None, target: str, storage: Path, images: str = "") -> Any:
    """Record that test classes are about to be read, and return the key that opens them.

    The record goes to the study of the model, or, where the study is not in this storage, to test_reads.jsonl beside
    the studies. For a model from MLflow it goes to its run first; if that fails, nothing is read. images: a description
    of other images than the model's own test classes, or "".
    """
    from raydml.data.seal import TestReads
    from raydml.study import events
    from raydml.study.remote import StudyPlace, merge_reads
    from raydml.training import checkpoint

    commit = checkpoint.git_commit() or "unknown"
    study, origin = (None, None) if found is None else (found.study, found.origin)
    where = target if found is None or study is None or origin is not None else str(found.folder)
    where += f" on {images}" if images else ""
    read = {"time": time.time(), "event": "test_read", "stage": "evaluate", "trial": None}
    read |= {"checkpoint": where, "commit": commit}
    if origin is not None:
        from raydml.tracking.models import log_test_read

        log_test_read(origin, read)
    if study is not None and (place := StudyPlace.of(study)).uri is not None:
        # The events of a study in a store are its driver's, which may run on another machine.
        key = place.files_of_node().reads().record(purpose="evaluate", checkpoint=where, commit=commit)
        merge_reads(study)
        return key
    reads = TestReads((study or storage) / "test_reads.jsonl")
    key = reads.record(purpose="evaluate", checkpoint=where, commit=commit)
    if study is not None:
        events.append(study / "events.jsonl", read)
    return key


def recorded_trial(folder: Path, key: str) -> dict[str, Any]:
    """The configuration of a planned trial of the search, or of any trial that has started. Raises CommandError."""
    from raydml.study.events import read_state
    from raydml.study.folder import planned_search, read_study

    planned = planned_search(read_study(folder))
    started = {trial.trial: trial.config for trial in read_state(folder).trials.values() if trial.config}
    known = {**planned, **started}
    if key not in known:
        raise CommandError(f"study {folder.name!r} has no trial {key!r}. Choices: {', '.join(known)}")
    return dict(known[key])


def with_data_root(machine: Machine, data_root: Path | None) -> Machine:
    return machine if data_root is None else machine.model_copy(update={"data_root": data_root.resolve()})
