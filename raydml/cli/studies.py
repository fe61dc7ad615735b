"""Commands that run a study: sweep and resume."""

from __future__ import annotations

import difflib
import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from raydml.cli import tables
from raydml.cli.arguments import (
    STORAGE,
    Address,
    CommandError,
    Storage,
    Target,
    TrackingUri,
    echo,
    embedded_store,
    new_console,
    program,
    registered_model,
    study_argument,
)

STAGES = ("search", "confirm", "finalize")
DELIVERY_S = 60.0  # how long the end of a study waits for MLflow


def sweep(
    context: typer.Context,
    space: Annotated[Path, typer.Argument(metavar="SPACE", help="YAML file of the search space.")],
    num_trials: Annotated[int | None, typer.Option(metavar="N", help="Trials of the search.")] = None,
    max_epochs: Annotated[int | None, typer.Option(metavar="N", help="Epochs of a trial at most.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of the study.")] = None,
    name: Annotated[str | None, typer.Option(metavar="S", help="Name of the study.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set any key of SPACE; repeatable.")
    ] = None,
    scheduler: Annotated[
        Literal["asha", "sync", "none"] | None,
        typer.Option(help="Early stopping. sync repeats exactly for the same seed."),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(metavar="LIST", help="search, or search,confirm, or search,confirm,finalize.")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the images lie.")] = None,
    storage: Storage = STORAGE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved study and start nothing.")] = False,
) -> None:
    """Search a space, confirm the winners, open the test classes once.

    The same command again goes on where it stopped. --set wins over SPACE, the other options win over --set.
    """
    refuse_missing_space(space)
    overrides = list(settings or [])
    overrides += [
        f"{key}={json.dumps(value)}"
        for key, value in (
            ("study.search.num_trials", num_trials),
            ("trial.epochs", max_epochs),
            ("study.seed", seed),
            ("study.name", name),
            ("study.search.scheduler", scheduler),
            ("machine.data_root", None if data_root is None else str(data_root)),
        )
        if value is not None
    ]
    overrides += stage_overrides(stages)
    from raydml.search_space.space import load_space

    loaded = load_space(space, overrides)
    refuse_absent_stages(stages, loaded.study)
    if dry_run:
        from raydml.study.folder import dry_run as resolve

        new_console().print(tables.dry_run(resolve(loaded)))
        return
    from raydml.study.folder import create_study
    from raydml.tracking.delivery import preflight

    uri = tracking_uri or embedded_store(storage)
    preflight(uri, storage)
    folder = create_study(loaded, storage=storage, tracking_uri=uri, space_text=space.read_text(encoding="utf-8"))
    run_and_show(program(context), folder, address)


def resume(
    context: typer.Context,
    study: Target,
    data_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the images lie now, if they were moved.")
    ] = None,
    storage: Storage = STORAGE,
    address: Address = None,
) -> None:
    """Go on with a study that was interrupted or killed.

    Finished trials stay finished, the others continue from their newest complete checkpoint.
    """
    from raydml.study.folder import find_study, move_data_root

    folder = find_study(study, storage)
    if data_root is not None:
        move_data_root(folder, data_root)
    run_and_show(program(context), folder, address)


def run_and_show(program: str, folder: Path, address: str | None) -> None:
    """Run what is left of a study under the live picture, then show its end; exit 128 + signal if interrupted.

    MLflow hears of it on a thread of its own, and what it has not heard when the study ends is sent then.
    """
    from raydml.cli.live_view import LiveStudy
    from raydml.study.folder import read_study
    from raydml.study.stages import run_study
    from raydml.tracking.delivery import Tracker

    console = new_console()
    events, study = folder / "events.jsonl", read_study(folder)
    tracker = Tracker(events, study["tracking_uri"], study["name"])
    tracker.start()
    try:
        with LiveStudy(events, from_offset=events.stat().st_size if events.exists() else 0, console=console):
            outcome = run_study(folder, address=address)
    finally:
        if not tracker.finish(DELIVERY_S):
            echo(console, tracker.hint())
    if outcome.status == "interrupted":
        extra = f" --address {shlex.quote(address)}" if address else ""
        echo(console, f"\nInterrupted. To go on:\n  {program} resume {study_argument(folder)}{extra}")
        raise typer.Exit(128 + (outcome.signal or 2))
    show_end(program, folder, console)


def show_end(program: str, folder: Path, console: Console) -> None:
    """The winner, the test numbers, where everything lies and what to type next."""
    from raydml.tracking.models import ALIAS
    from raydml.tracking.store import redacted

    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    target, name = study_argument(folder), study["name"]
    console.print()
    console.print(tables.summary(results))
    where = [("study", tables.short_path(folder)), ("MLflow", redacted(study["tracking_uri"]))]
    registered = registered_model(folder)
    if registered:
        where.append(("model", f"models:/{registered}@{ALIAS} in MLflow; {tables.short_path(folder / 'model')}"))
    where.append(("report", tables.short_path(folder / "report" / "report.html")))
    console.print()
    console.print(tables.places(where))
    console.print()
    console.print(
        tables.commands(
            [
                (f"{program} ui {target}", "browse every run in the MLflow UI"),
                (f"{program} evaluate {target} --on val", "score the winner again"),
                (f"{program} export {target} {shlex.quote(name + '-model')}", "take the winner away"),
                (f"{program} resume {target}", "after an interruption; does nothing to a finished study"),
            ]
        ),
        soft_wrap=True,
    )


def refuse_missing_space(path: Path) -> None:
    if path.is_file():
        return
    known = sorted(tables.short_path(file) for file in Path("search_spaces").glob("*.yaml"))
    nearest = difflib.get_close_matches(path.stem, [Path(file).stem for file in known], n=1)
    hint = f"; did you mean search_spaces/{nearest[0]}.yaml?" if nearest else ""
    listed = f" There are: {', '.join(known)}." if known else ""
    raise CommandError(f"SPACE = {str(path)!r}: no such file{hint}{listed} Cure: name a YAML file of a search space")


def stage_overrides(stages: str | None) -> list[str]:
    """``--stages search,confirm`` as settings: the stages that are not named are taken out."""
    if stages is None:
        return []
    wanted = [stage.strip() for stage in stages.split(",")]
    unknown = [stage for stage in wanted if stage not in STAGES]
    if unknown or "search" not in wanted or len(set(wanted)) < len(wanted):
        raise CommandError(
            f"--stages = {stages!r}: must name search and may name confirm and finalize, each once. "
            "Cure: search, or search,confirm, or search,confirm,finalize"
        )
    return [f"study.{stage}=null" for stage in STAGES[1:] if stage not in wanted]


def refuse_absent_stages(stages: str | None, study: Any) -> None:
    """A stage that is asked for must be described in the space: how many folds and seeds is nobody's default."""
    wanted = [stage.strip() for stage in (stages or "").split(",")]
    absent = [
        stage
        for stage, block in (("confirm", study.confirm), ("finalize", study.finalize))
        if stage in wanted and block is None
    ]
    if absent:
        raise CommandError(
            f"--stages names {', '.join(absent)}, but SPACE has no study.{absent[0]}. "
            f"Cure: add it there, or --set 'study.{absent[0]}={{top: 1}}'"
        )
