"""The commands of ``launch.py``, the environment variables that are read and set, and the exit codes.

0: done. 2: a mistake of the user, described on stderr without a traceback. 130, 143 and 129: interrupted by Ctrl-C, by
TERM, by a closed terminal (HUP). 1: a defect of raydml, with its traceback. Heavy libraries are imported inside the
commands that need them.
"""

from __future__ import annotations

import codecs
import errno
import importlib.metadata
import io
import os
import re
import shlex
import signal
import stat
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raydml.cli import data, doctor, evaluate, export, imports, init, lists, results, studies, submit
from raydml.cli.arguments import Invocation
from raydml.cli.live_view import StepBars
from raydml.cli.loading import ImportNotices
from raydml.errors import Problem, problem_of_option
from raydml.ops.files import CURES_OF_DISKS
from raydml.ops.object_store import is_waited_for
from raydml.ops.progress import show_log, show_progress
from raydml.ops.wording import printable

RUN, LOOK, TAKE, IMAGES = "Run a study", "Look at results", "One configuration, one model", "Images"


#: What only the operating system notices, mistakes of the user and faults of disks, and their cures.
_CURES = {errno.ENAMETOOLONG: "give a shorter name or path", **CURES_OF_DISKS}


class Commands(TyperGroup):
    """Turn the exceptions of a command into the exit codes above."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(128 + (error.args[0] if error.args else signal.SIGINT)) from None
        except typer.BadParameter as error:
            if (problem := problem_of_parameter(error)) is None:
                raise
            typer.echo(f"error: {printable(str(problem))}", err=True)
            raise typer.Exit(2) from None
        except ValueError as error:
            if not is_users_mistake(error):
                raise
            typer.echo(f"error: {as_typed(str(error))}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in _CURES:
                raise
            place = error.filename or "what this command prints, or a file that it writes"
            typer.echo(f"error: {as_typed(str(place))}: {error.strerror}. Cure: {_CURES[error.errno]}", err=True)
            if error.filename is None:  # the interpreter would try once more at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Metric-learning studies on Ray: search, confirm, open the test classes once; all of it in MLflow.\n\n"
    "launch.py without a command sweeps the demo study, with the options of sweep: launch.py --num-trials 4.",
)


def as_typed(message: str) -> str:
    """Return a message in which names are shown as they were typed, also the bytes outside UTF-8 that `repr` escapes.

    Control characters are shown in letters.
    """
    typed = re.sub(r"\\udc([89a-f][0-9a-f])", lambda found: chr(0xDC00 + int(found[1], 16)), message)
    return printable(typed)


def problem_of_parameter(error: typer.BadParameter) -> Problem | None:
    """Describe a value that does not have the type of its option; None for errors that typer has put into words."""
    from pydantic import ValidationError

    if error.param is None or not isinstance(error.__cause__, ValidationError):
        return None
    is_option = error.param.param_type_name == "option"
    name = error.param.opts[0] if is_option else getattr(error.param, "metavar", None) or str(error.param.name)
    return problem_of_option(error.__cause__, name.strip("[]"))


def is_users_mistake(error: ValueError) -> bool:
    """Whether an error has a class of raydml (ConfigError, DataError, StudyError, ...).

    Decided by the module of the class, so that no module is imported only to name its error.
    """
    return type(error).__module__.partition(".")[0] == "raydml"


def _print_version(version: bool) -> None:
    if version:
        try:
            typer.echo(f"raydml {importlib.metadata.version('raydml')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("raydml (from its sources, not installed)")
        raise typer.Exit


@app.callback()
def prepare(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    prepare_environment()
    os.umask(os.umask(0) | stat.S_IWOTH)  # files and folders of a study are not writable by every user of the machine
    show_log()
    show_progress(StepBars)


app.command("sweep", rich_help_panel=RUN)(studies.sweep)
app.command("init", rich_help_panel=RUN)(init.init)
app.command("resume", rich_help_panel=RUN)(studies.resume)
app.command("submit", rich_help_panel=RUN)(submit.submit)
app.command("doctor", rich_help_panel=RUN)(doctor.doctor)
app.command("status", rich_help_panel=LOOK)(results.status)
app.command("report", rich_help_panel=LOOK)(results.report)
app.command("ui", rich_help_panel=LOOK)(results.ui)
app.command("sync", rich_help_panel=LOOK)(results.sync)
app.command("drive", hidden=True)(studies.drive)
app.command("trial", rich_help_panel=TAKE)(studies.trial)
app.command("evaluate", rich_help_panel=TAKE)(evaluate.evaluate)
app.command("export", rich_help_panel=TAKE)(export.export)
app.command("import", rich_help_panel=TAKE)(imports.import_)
app.command("index", rich_help_panel=TAKE)(export.index)
app.command("query", rich_help_panel=TAKE)(export.query)
app.add_typer(data.data, name="data", rich_help_panel=IMAGES)
app.command("list", rich_help_panel=LOOK)(lists.list_plugins)
app.command("schema", rich_help_panel=LOOK)(lists.schema)


def prepare_environment() -> None:
    """Set the environment variables that Ray and MLflow read; must run before either is imported.

    ``fixed`` always applies; a variable of ``defaults`` applies unless the user has set it.
    """
    fixed = {
        # study/stages.py handles Ctrl-C: Tune's handler returns normally and does not handle TERM.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        # The automatic CSV and TensorBoard loggers triple the cost of a result.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # It would abort a driver at TERM, below Python's handlers.
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
        # Relative paths in a configuration refer to the directory of the command, also in a worker.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # Only the old console of Tune honours verbose=0; raydml has a live table of its own.
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    defaults = {
        # Under `uv run` Ray would upload the working directory and build a new environment for every session.
        # Set it to 1 on a cluster that needs this.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Tune's snapshots of all its trials, which take longer and longer. A resumed study reads events.jsonl instead.
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
        # A line that many workers print is shown once.
        "RAY_DEDUP_LOGS": "1",
        # A trial without a GPU must not see the node's GPUs; Ray then hides them instead of leaving them visible.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        # Waiting threads that spin take the core on which the next batch is cut: with two threads on busy cores the
        # rate of a trial falls to a tenth.
        "OMP_WAIT_POLICY": "passive",
        # No usage statistics are sent.
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # `ui` only serves pages; the job runner would take a gigabyte of memory.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Each process of MLflow's server prints this warning about an import of its own.
        "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi is deprecated",
    }
    with suppress(RuntimeError, OSError):  # no home, or that of another user
        # With this file, which a study on this machine leaves, `ray start` makes clusters that demand its token. Ray
        # reads the variable when it is imported; set later, it would reach the processes of Ray and not this one.
        if "ray" not in sys.modules and (Path.home() / ".ray" / "auth_token").exists():
            defaults["RAY_AUTH_MODE"] = "token"
    os.environ.update(fixed)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that is started with further variables: other users do not see those."""
    return {**os.environ, **variables}


def program_name(argv0: str) -> str:
    """The words that start this program on the command line, for printed commands that can be copied."""
    script = Path(argv0)
    if script.name == "__main__.py":
        module = f"-m {script.parent.name}"
        return f"uv run python {module}" if "UV_RUN_RECURSION_DEPTH" in os.environ else f"python {module}"
    if script.suffix != ".py":
        return script.name
    return f"uv run {argv0}" if "UV_RUN_RECURSION_DEPTH" in os.environ else f"python {argv0}"


def with_default_command(arguments: Sequence[str], default_space: Path | None) -> list[str]:
    """Insert the default study where ``launch.py`` gets no command, as in ``launch.py --num-trials 4``."""
    help_or_version = {"-h", "--help", "--version"} & set(arguments)
    if default_space is None or help_or_version or (arguments and not arguments[0].startswith("-")):
        return list(arguments)
    here = Path.cwd()
    shown = default_space.relative_to(here) if default_space.is_relative_to(here) else default_space
    return ["sweep", str(shown), *arguments]


def with_home_folders(arguments: Sequence[str]) -> list[str]:
    """Expand ~ where a shell leaves it: in --option=~/folder, and in quotes."""

    def expanded(argument: str) -> str:
        option, equals, value = argument.partition("=")
        if equals and option.startswith("--"):
            return f"{option}={os.path.expanduser(value)}"
        return os.path.expanduser(argument)

    return [expanded(argument) for argument in arguments]


def show_every_name() -> None:
    """Let standard output and error take every file name: bytes outside UTF-8 as they are, other letters escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


def interrupt(number: int, _frame: Any) -> None:
    """Handle TERM and HUP as Ctrl-C is handled, so that a command ends what it has started."""
    raise KeyboardInterrupt(number)


def main(default_space: Path | None = None) -> None:
    """Run the command in ``sys.argv``; without a command, ``launch.py`` sweeps ``default_space``."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as HUP is under nohup
            signal.signal(number, interrupt)
    sys.meta_path.insert(0, ImportNotices())
    show_every_name()
    arguments = with_home_folders(sys.argv[1:])
    # MLflow records the command line, and only as UTF-8.
    sys.argv[1:] = [argument.encode("utf-8", "backslashreplace").decode() for argument in sys.argv[1:]]
    program, typed = program_name(sys.argv[0]), with_default_command(sys.argv[1:], default_space)
    script = Path(sys.argv[0])
    script_of_launch = script.resolve() if script.name == "launch.py" else None
    invocation = Invocation(f"{program} {shlex.join(typed)}", script_of_launch, os.environ, dict(os.environ))
    try:
        app(args=with_default_command(arguments, default_space), prog_name=program, obj=invocation)
    except SystemExit as ended:
        if not is_waited_for():
            raise
        # A store that stalls has had its time. The interpreter would wait for its answer, which may take a minute.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
