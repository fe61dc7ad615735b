"""The commands of ``launch.py``, what is read from the environment and set in it, and the exit codes.

0: done. 2: a mistake of the user, told in full on stderr without a traceback. 130 and 143: interrupted (Ctrl-C, TERM).
1: a mistake of ours, with its traceback. Heavy libraries are imported inside the commands that need them.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from raydml.cli import data, evaluate, export, lists, models, results, studies
from raydml.cli.bars import show_steps
from raydml.ops.logs import show_log

RUN, LOOK, TAKE, IMAGES = "Run a study", "Look at results", "One configuration, one model", "Images"


class Front(TyperGroup):
    """Turns what a command raises into the exit codes above."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except ValueError as error:
            if not is_users_mistake(error):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Front,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Metric-learning studies on Ray: search, confirm, open the test classes once; all of it in MLflow.",
)


def is_users_mistake(error: ValueError) -> bool:
    """Whether an error is one of ours (ConfigError, DataError, StudyError, ...) and not of a library or a plain bug.

    Told by where its class is defined, so that no module need be imported only to name its error.
    """
    return type(error).__module__.partition(".")[0] == "raydml"


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"raydml {importlib.metadata.version('raydml')}")
        except importlib.metadata.PackageNotFoundError:
            typer.echo("raydml (from its sources, not installed)")
        raise typer.Exit


@app.callback()
def front(
    version: Annotated[  # noqa: ARG001
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    prepare_environment()
    show_log()
    show_steps()


app.command("sweep", rich_help_panel=RUN)(studies.sweep)
app.command("resume", rich_help_panel=RUN)(studies.resume)
app.command("status", rich_help_panel=LOOK)(results.status)
app.command("report", rich_help_panel=LOOK)(results.report)
app.command("ui", rich_help_panel=LOOK)(results.ui)
app.command("sync", rich_help_panel=LOOK)(results.sync)
app.command("trial", rich_help_panel=TAKE)(models.trial)
app.command("evaluate", rich_help_panel=TAKE)(evaluate.evaluate)
app.command("export", rich_help_panel=TAKE)(export.export)
app.command("index", rich_help_panel=TAKE)(export.index)
app.command("search", rich_help_panel=TAKE)(export.search)
app.add_typer(data.data, name="data", rich_help_panel=IMAGES)
app.command("list", rich_help_panel=LOOK)(lists.list_plugins)
app.command("schema", rich_help_panel=LOOK)(lists.schema)


def prepare_environment() -> None:
    """Settings that Ray and MLflow read from the environment, made before either is imported.

    ``fixed`` ones are facts about this program; ``defaults`` give way to what the user has set.
    """
    fixed = {
        # Ctrl-C is handled by raydml.sweep: Tune's handler returns normally and knows nothing of TERM.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        # We add the one logger we need; the automatic CSV and TensorBoard ones triple the cost of a result.
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        # Paths of a configuration mean the directory in which the command was typed, also in a worker.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # The other console of Tune honours verbose=0; the live table is ours.
        "RAY_AIR_NEW_OUTPUT": "0",
    }
    defaults = {
        # Under `uv run` Ray would upload the working directory and build a new environment for every session.
        # On a cluster that can be wanted: set it to 1 there.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Tune's own snapshots, for people who open them with Tune: a resumed study reads events.jsonl instead.
        "TUNE_GLOBAL_CHECKPOINT_S": "3",
        # Snapshots this frequent are meant; the warning about them is not news.
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        # The same line from sixteen workers is printed once.
        "RAY_DEDUP_LOGS": "1",
        # A trial without a GPU must not see the node's GPUs; Ray then hides them instead of leaving them visible.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
        # Threads that spin while they wait for each other take the core that the next batch is cut on: with two threads
        # a trial on busy cores otherwise falls to a tenth of its rate.
        "OMP_WAIT_POLICY": "passive",
        # No reports of usage to the outside.
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # `ui` serves pages; the job runner behind it would cost a gigabyte.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    os.environ.update(fixed)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def program_name(argv0: str) -> str:
    """How the user calls this program, so that the commands we print can be copied."""
    script = Path(argv0)
    if script.suffix != ".py":
        return script.name
    return f"uv run {argv0}" if "UV_RUN_RECURSION_DEPTH" in os.environ else f"python {argv0}"


def with_default_command(arguments: Sequence[str], default_space: Path | None) -> list[str]:
    """``launch.py`` and ``launch.py --num-trials 4`` mean the default study."""
    asks_about_the_program = {"-h", "--help", "--version"} & set(arguments)
    if default_space is None or asks_about_the_program or (arguments and not arguments[0].startswith("-")):
        return list(arguments)
    here = Path.cwd()
    shown = default_space.relative_to(here) if default_space.is_relative_to(here) else default_space
    return ["sweep", str(shown), *arguments]


def main(default_space: Path | None = None) -> None:
    """Run the command in ``sys.argv``; ``default_space`` is what ``launch.py`` without a command sweeps."""
    app(args=with_default_command(sys.argv[1:], default_space), prog_name=program_name(sys.argv[0]))
