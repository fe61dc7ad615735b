"""The command that runs a study on a cluster as a job of Ray."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from raydml.cli import tables
from raydml.cli.arguments import (
    CommandError,
    DeviceHoursOption,
    ImagesOption,
    MaxEpochs,
    NameOption,
    NumTrials,
    RecipeOption,
    SchedulerOption,
    SeedOption,
    SeedsOption,
    Settings,
    SmokeOption,
    StagesOption,
    StartFromOption,
    TimeLimitOption,
    TrackingUri,
    UntilSettledOption,
    budget_of,
    command_of,
    echo,
    new_console,
    program_of,
    refuse_addresses,
    refuse_other_encodings,
)
from raydml.cli.studies import load_with_options, refuse_beside_each_other
from raydml.data.formats import LIST_SUFFIXES
from raydml.ops.addresses import is_address, redacted
from raydml.ops.object_store import check_uri
from raydml.ops.wording import counted, printable

if TYPE_CHECKING:
    from raydml.search_space.space import SearchSpace
    from raydml.study.job_files import JobFiles
    from raydml.study.job_server import Job, JobServer

STOP_WAIT_S = 30  # for a stopped job to save its trials; Ray itself waits for 3 s
_START_S, _LOOK_EVERY_S = 5.0, 0.5  # to see whether the command of a job starts
_POLL_S, _LOG_BYTES_PER_S = 2.0, 50_000  # each look at a log fetches all of it
_AWAY_S = 60.0  # longest time without an answer while a job is followed
#: In the metadata of a job. Ray's dashboard shows the last one as its name.
_STUDY, _STORAGE, _NAME = "raydml_study", "raydml_storage", "job_name"


def submit(
    context: typer.Context,
    space: Annotated[
        Path, typer.Argument(metavar="SPACE", help="YAML file of the search space, here; or a space of raydml's own.")
    ],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Ray's job server, for example http://HEAD:8265.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URI", help="Absolute path of the folder of the studies, as the nodes see it, or s3://..."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show what the job prints until it ends; also of one that runs already.")
    ] = False,
    num_trials: NumTrials = None,
    max_epochs: MaxEpochs = None,
    seed: SeedOption = None,
    name: NameOption = None,
    settings: Settings = None,
    scheduler: SchedulerOption = None,
    stages: StagesOption = None,
    start_from: StartFromOption = None,
    recipe: RecipeOption = None,
    seeds: SeedsOption = None,
    data_root: ImagesOption = None,
    tracking_uri: TrackingUri = None,
    time_limit: TimeLimitOption = None,
    device_hours: DeviceHoursOption = None,
    until_settled: UntilSettledOption = False,
    smoke: SmokeOption = False,
    variables: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="Send this variable of your environment as well; repeatable."),
    ] = None,
    python: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Python on the head, with raydml's libraries; default: python.", show_default=False
        ),
    ] = "python",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and start nothing.")] = False,
) -> None:
    """Run a study on a cluster as a job of Ray.

    Nothing has to be open or running here meanwhile. raydml's code, SPACE and your MLFLOW_* variables are sent; images,
    studies and results are not. The same command again goes on with the study.
    """
    budget = budget_of(time_limit, device_hours, until_settled)
    refuse_beside_each_other({"--data-root": data_root is not None}, budget, recipe=recipe, smoke=smoke)
    invocation = context.find_root().obj
    inherited: Mapping[str, str] = invocation.inherited if invocation else {}
    address, storage = _job_address(address), _shared_storage(storage)
    if is_address(storage) and tracking_uri is None:
        raise CommandError(
            f"--tracking-uri is missing: with --storage {storage} MLflow's file would be in the folder of the job, and "
            "go when the job ends. Cure: the address of an MLflow server"
        )
    _refuse_images(space)
    note_of_store = _check_store(tracking_uri)
    sent = _variables(inherited, tracking_uri, variables or [])
    from raydml.study.job_server import JobServer, read_token

    server = JobServer(address, read_token(invocation.environment if invocation else {}))
    version = None if dry_run else server.check()
    # A study is looked for by the job, in the storage that it sees.
    points = Path(start_from) if start_from and Path(start_from).suffix in (".yaml", ".yml") else None
    loaded, file = load_with_options(
        space, [*(settings or []), *(["machine.data_root=."] if smoke else [])],
        num_trials=num_trials, max_epochs=max_epochs, seed=seed, name=name, scheduler=scheduler, stages=stages,
        data_root=data_root, recipe=recipe, seeds=seeds, start_from=str(points) if points else None,
    )  # fmt: skip
    if not smoke:
        _refuse_relative(loaded)
    from raydml.study.job_files import archive_of, files_of_job

    files = files_of_job(file, points)
    options = {
        "--num-trials": num_trials, "--max-epochs": max_epochs, "--seed": seed, "--name": name, "--stages": stages,
        "--scheduler": scheduler, "--recipe": recipe, "--seeds": seeds, "--data-root": data_root, "--time": time_limit,
        "--max-gpu-hours": device_hours, "--start-from": files.points or start_from, "--storage": storage,
    }  # fmt: skip
    command = shlex.join([python, *_words_of_sweep(files, settings or [], options), *_flags(smoke, until_settled)])
    package, archive = archive_of(files.contents)
    console, study = new_console(), loaded.study.name + ("-smoke" if smoke else "")
    rows = _what_is_sent(files, len(archive), sent, tracking_uri, command)
    if note_of_store:
        echo(console, note_of_store)
    if dry_run:
        console.print(tables.locations([*rows, ("files", ", ".join(_tops(files)))]))
        return
    _note_of_versions(console, version)
    job = _that_runs(server, study, storage)
    if job is not None and job.command != command:
        raise CommandError(
            f"study {study!r} runs already as job {job.id}, with other options: {job.command}. Cure: another --name, "
            f"or stop it: {_stop(context, server, job.id)}"
        )
    if job is None:
        job_id = f"{study}-{uuid.uuid4().hex[:8]}"
        if not server.has_package(package):
            server.send_package(package, archive)
        server.submit(job_id, command, package, sent, {_STUDY: study, _STORAGE: storage, _NAME: study})
        echo(console, f"{study} is job {job_id} on {redacted(server.address)}")
        console.print(tables.locations(rows))
        if files.left_out:
            echo(console, f"note: not sent, too large for code that git does not know: {', '.join(files.left_out)}")
    else:
        job_id = job.id
        changed = ", with the code of its start: the files here have changed since" if job.package != package else ""
        echo(console, f"{study} runs already as job {job_id} on {redacted(server.address)}{changed}")
    typed = redacted(shlex.join(word for word in shlex.split(command_of(context)) if word != "--follow"))
    if follow:
        _follow(console, server, job_id, typed, _stop(context, server, job_id))
        return
    if job is None:
        _refuse_failed_start(server, job_id, python)
    steps = [
        (f"{typed} --follow", "follow it"),
        (_stop(context, server, job_id), "stop it; its trials are saved first"),
        (typed, "go on with the study when the job has ended: the same command again"),
    ]
    console.print()
    console.print(tables.commands(steps), soft_wrap=True)


def _job_address(address: str | None) -> str:
    from raydml.study.job_server import is_job_address

    if address is None:
        raise CommandError("--address is missing. Cure: Ray's job server, such as --address http://HEAD:8265")
    if not is_job_address(address):
        hint = "; to join a cluster from one of its machines, use sweep" if re.fullmatch(r"[^/]+:\d+", address) else ""
        raise CommandError(
            f"--address {redacted(address)}: is no job server. Cure: http://HEAD:8265, with the port of Ray's "
            f"dashboard{hint}"
        )
    return address


def _shared_storage(storage: str | None) -> str:
    cure = "the folder that all nodes share, as they see it, such as --storage /mnt/shared/studies, or s3://BUCKET/x"
    if storage is None:
        raise CommandError(f"--storage is missing: the folder of a job goes when the job ends. Cure: {cure}")
    if is_address(storage):
        return check_uri(storage)
    refuse_other_encodings(f"--storage {storage}", storage)
    if not Path(storage).is_absolute():
        raise CommandError(
            f"--storage {storage}: is relative to the folder of the job, and would go when the job ends. Cure: {cure}"
        )
    return storage


def _refuse_images(space: Path) -> None:
    """Refuse a folder or list of images as SPACE: images are not sent."""
    refuse_addresses(f"SPACE = {str(space)!r}", space)
    if space.is_dir() or (space.is_file() and space.suffix.lower() in LIST_SUFFIXES):
        raise CommandError(
            f"SPACE = {str(space)!r} holds images, and images are not sent. Cure: put them where all nodes see them, "
            "and submit image_folder --name NAME --data-root /mnt/shared/images"
        )
    refuse_other_encodings(f"SPACE = {str(space)!r}", space)


def _refuse_relative(loaded: SearchSpace) -> None:
    """Refuse folders that would be looked for in the folder of the job."""
    for key, path in (("data_root", loaded.machine.data_root), ("cache_dir", loaded.machine.cache_dir)):
        if path is not None and not path.is_absolute():
            option = "--data-root" if key == "data_root" else f"--set machine.{key}="
            raise CommandError(
                f"machine.{key} = {path}: is relative to the folder of the job, where it is not. Cure: the absolute "
                f"path, as all nodes see it, such as {option}{' ' if key == 'data_root' else ''}/mnt/shared/{key}"
            )


def _check_store(tracking_uri: str | None) -> str:
    """Return a note on an MLflow store that is another one for the job; refuse a file that only this machine has."""
    if tracking_uri is None:
        return ""
    if tracking_uri.startswith("sqlite:") and not re.match(r"sqlite[+\w]*:////", tracking_uri):
        raise CommandError(
            f"--tracking-uri {redacted(tracking_uri)}: is relative to the folder of the job. Cure: an absolute path on "
            "the shared storage, sqlite:////mnt/shared/mlflow.db, or leave it out for mlflow.db in --storage"
        )
    if re.match(r"https?://([^/@]*@)?(localhost|127\.|\[::1\])", tracking_uri):
        return f"note: for the job, {redacted(tracking_uri)} is a server on the head of the cluster"
    return ""


def _variables(inherited: Mapping[str, str], tracking_uri: str | None, names: Sequence[str]) -> dict[str, str]:
    """Return the environment variables of a job: MLFLOW_* of the user, and those with a name in names."""
    for variable in names:
        if variable not in inherited:
            raise CommandError(f"--env {variable}: there is no variable of this name. Cure: export it, or leave it out")
    sent = {key: value for key, value in inherited.items() if key.startswith("MLFLOW_") or key in names}
    sent.pop("MLFLOW_TRACKING_URI", None)
    if tracking_uri:  # not in the command: it may hold a password, and everybody sees the commands of a machine
        sent["MLFLOW_TRACKING_URI"] = tracking_uri
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **sent}


def _flags(smoke: bool, until_settled: bool) -> list[str]:
    return [*(["--smoke"] if smoke else []), *(["--until-settled"] if until_settled else [])]


def _words_of_sweep(files: JobFiles, settings: Sequence[str], options: Mapping[str, object]) -> list[str]:
    """Return what follows the Python in the command of the job. options: by name; None where not given."""
    words = [*(["launch.py"] if files.has_launch else ["-m", "raydml"]), "sweep", files.space]
    words += [word for setting in settings for word in ("--set", setting)]
    return words + [word for option, value in options.items() if value is not None for word in (option, str(value))]


def _what_is_sent(
    files: JobFiles, num_bytes: int, sent: Mapping[str, str], tracking_uri: str | None, command: str
) -> list[tuple[str, str]]:
    from raydml.training.checkpoint import git_commit, short_commit

    names = [name for name in sent if name != "RAY_JOB_STOP_WAIT_TIME_S"]
    commit = short_commit(git_commit() or "unknown")
    code = f"{counted(len(files.contents), 'file')}, {tables.bytes_text(num_bytes)}, commit {commit}"
    return [
        ("sent", code),
        ("variables", f"{', '.join(names)} (values are not shown)" if names else "none"),
        ("MLflow", redacted(tracking_uri) if tracking_uri else "mlflow.db in the storage"),
        ("command", command),
    ]


def _tops(files: JobFiles) -> list[str]:
    """Return the files of a job in a short form: folders with the number of their files."""
    tops: dict[str, int] = {}
    for name in files.contents:
        top, slash, _ = name.partition("/")
        tops[top + slash] = tops.get(top + slash, 0) + 1
    return [f"{top} ({number})" if top.endswith("/") else top for top, number in tops.items()]


def _note_of_versions(console: Console, version: str | None) -> None:
    here = importlib.metadata.version("ray")
    if version and version.split(".")[:2] != here.split(".")[:2]:
        echo(console, f"note: the cluster runs Ray {version}, and this raydml is for {here}: requirements.lock has it")


def _that_runs(server: JobServer, study: str, storage: str) -> Job | None:
    """Return the job that runs this study, or waits for it; None where there is none."""
    wanted = {_STUDY: study, _STORAGE: storage}
    return next((job for job in server.jobs() if wanted.items() <= job.metadata.items() and not job.has_ended), None)


def _stop(context: typer.Context, server: JobServer, job_id: str) -> str:
    """Return the command that stops a job."""
    ray = "uv run ray" if program_of(context).startswith("uv run") else "ray"
    token = "RAY_AUTH_MODE=token " if server.has_token else ""
    return f"{token}{ray} job stop --address {shlex.quote(redacted(server.address))} {job_id}"


def _refuse_failed_start(server: JobServer, job_id: str, python: str) -> None:
    """Wait until the command of a job has begun. Raises CommandError where it ends at once."""
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        job = server.job(job_id)
        if job.has_ended and job.status != "SUCCEEDED":
            raise CommandError(_failure(server, job, python))
        if job.has_ended:
            return
        time.sleep(_LOOK_EVERY_S)


def _failure(server: JobServer, job: Job, python: str) -> str:
    lines = [line for line in (server.log(job.id) or job.message).strip().splitlines() if line.strip()]
    said = printable("\n".join(lines[-5:]))
    cure = f"look into its log: ray job logs --address {redacted(server.address)} {job.id}"
    if re.search(r"not found|No such file|No module named", said):
        cure = f"--python with the path of a Python on the head that has raydml's libraries, instead of {python}"
    return f"the job has failed:\n{said}\nCure: {cure}"


def _follow(console: Console, server: JobServer, job_id: str, again: str, stop: str) -> None:
    """Print what a job prints until it ends; then exit with its code."""
    from raydml.study.job_server import JobServerAway

    num_shown, seen_s = 0, time.monotonic()
    try:
        while True:
            try:
                job, log = server.job(job_id), server.log(job_id)  # in this order: the log of an ended job is whole
            except JobServerAway:
                if time.monotonic() - seen_s > _AWAY_S:
                    raise
                time.sleep(_POLL_S)
                continue
            seen_s = time.monotonic()
            typer.echo(printable(log[num_shown:]), nl=False)
            num_shown = len(log)
            if job.has_ended:
                break
            time.sleep(_POLL_S + len(log) / _LOG_BYTES_PER_S)
    except KeyboardInterrupt:
        echo(console, f"\nThe job goes on. To follow it again:\n  {again} --follow\nTo stop it:\n  {stop}")
        raise
    if job.status == "SUCCEEDED":
        return
    echo(console, f"\nThe job has {'been stopped' if job.status == 'STOPPED' else 'failed'}. To go on:\n  {again}")
    code: Any = job.exit_code
    raise typer.Exit(code if isinstance(code, int) and 0 < code < 256 else 143 if job.status == "STOPPED" else 1)
