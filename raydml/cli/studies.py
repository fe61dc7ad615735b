"""Commands that train: sweep and resume run a study, trial runs one configuration."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from raydml.cli import tables
from raydml.cli.arguments import (
    DEFAULT_SEEDS,
    STORAGE,
    AddressOption,
    CommandError,
    DataRoot,
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
    SpaceArgument,
    StagesOption,
    StartFromOption,
    StorageOption,
    SweepStorageOption,
    Target,
    TimeLimitOption,
    TrackingUri,
    UntilSettledOption,
    budget_of,
    command_of,
    divided_storage,
    echo,
    new_console,
    program_of,
    recorded_trial,
    refuse_addresses,
    refuse_unanswered,
    refuse_used,
    started_again,
    store_of,
    study_argument,
    with_data_root,
    writing,
)
from raydml.cli.loading import notice, without_import_notices
from raydml.data.formats import LIST_SUFFIXES
from raydml.errors import did_you_mean
from raydml.ops.object_store import ObjectStore, joined
from raydml.study.budget import UNLIMITED, Budget
from raydml.study.events import STAGES

if TYPE_CHECKING:
    from raydml.cli.live_view import LiveStudy
    from raydml.config.trial import Machine, Trial
    from raydml.data.digests import ImageRecord
    from raydml.search_space.space import SearchSpace
    from raydml.study.mirror import Mirror
    from raydml.study.process import DriverProcess
    from raydml.tracking.delivery import Tracker

DELIVERY_S = 60.0  # longest wait for MLflow at the end of a study
INTERRUPTED_DELIVERY_S = 3.0  # the same after a signal: the machine may be about to go away


class StudyStopped(CommandError):
    """A study that has ended before its last stage; the message has the cure."""


def sweep(
    context: typer.Context,
    space: SpaceArgument,
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
    storage_or_uri: SweepStorageOption = str(STORAGE),
    tracking_uri: TrackingUri = None,
    address: AddressOption = None,
    time_limit: TimeLimitOption = None,
    device_hours: DeviceHoursOption = None,
    until_settled: UntilSettledOption = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print a forecast (images, steps, epochs, disk, weights) and start nothing."),
    ] = False,
    as_published: Annotated[
        bool, typer.Option("--as-published", help="With --dry-run: a benchmark's published counts, without its images.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="First train 10 steps of each shape of trial: forecast of memory and hours.")
    ] = False,
    smoke: SmokeOption = False,
) -> None:
    """Search a space, confirm the winners, open the test classes once.

    The same command again continues where it stopped; after resume --num-trials, use resume. --set overrides SPACE; the
    other options override --set.
    """
    budget = budget_of(time_limit, device_hours, until_settled)
    if as_published and not dry_run:
        raise CommandError("--as-published counts without images, and only --dry-run needs none. Cure: add --dry-run")
    if probe and as_published:
        raise CommandError("--probe measures for a forecast. Cure: leave out --as-published: the steps need the images")
    storage, storage_uri = divided_storage(storage_or_uri)
    others = {"--dry-run": dry_run, "--data-root": data_root is not None}
    others |= {f"--storage {storage_or_uri}": storage_uri is not None, "--probe": probe and not dry_run}
    refuse_beside_each_other(others, budget, recipe=recipe, smoke=smoke)
    measured = ["machine.probe=on"] if probe and not dry_run else []
    without_images = ["machine.data_root=."] if as_published or smoke else []  # required of a space, and not read
    driver = None
    if not dry_run and not smoke:
        refuse_unanswered(address)
        driver = context.with_resource(loading_driver(context, address))
    loaded, file = load_with_options(
        space,
        [*(settings or []), *without_images, *measured],
        num_trials=num_trials,
        max_epochs=max_epochs,
        seed=seed,
        name=name,
        scheduler=scheduler,
        stages=stages,
        data_root=data_root,
        recipe=recipe,
        seeds=seeds,
        start_from=start_from,
        storage=storage,
    )
    if dry_run:
        from raydml.study.folder import plan_study
        from raydml.study.forecast import forecast
        from raydml.study.results import is_finished
        from raydml.training.trial_images import Catalogs

        folder = storage / loaded.study.name
        if (folder / "study.json").exists() and is_finished(folder):
            typer.echo(f"{folder.name} is finished; nothing to do. Other settings need a --name of their own")
        plan = plan_study(loaded, Catalogs(loaded.machine, as_published=as_published))
        expected = forecast(plan, storage, as_published=as_published)
        if probe:
            from raydml.study.probe import probe_study

            expected = probe_study(plan, storage, expected)
        new_console().print(tables.forecast(expected))
        return
    if smoke:
        from raydml.cli.smoke import miniature, without_notes
        from raydml.study.smoke import mark_as_smoke

        with miniature(context, loaded, storage, tracking_uri) as small:
            with without_notes():
                folder = create(small.space, small.path, small.storage, small.tracking_uri, command_of(context))
            mark_as_smoke(folder)
            run_and_show(context, folder, address, tracking_uri=with_secrets(small.tracking_uri))
        return
    uri = None if storage_uri is None else joined(storage_uri, loaded.study.name)
    folder = create(loaded, file, storage, tracking_uri, command_of(context), uri)
    run_and_show(context, folder, address, budget, with_secrets(tracking_uri), driver)


def refuse_beside_each_other(others: Mapping[str, bool], budget: Budget, *, recipe: str | None, smoke: bool) -> None:
    """Refuse options that exclude each other. others: by name, whether those that a study has are given."""
    if budget.options and recipe is not None:
        limit = budget.options[0]
        cure = f"leave out {limit}"
        raise CommandError(f"{limit} ends a search early, and --recipe published has no search. Cure: {cure}")
    given = [*(name for name, is_given in others.items() if is_given), *budget.options]
    if smoke and given:
        other = given[0]
        raise CommandError(
            f"--smoke runs a miniature on generated images, and {other} is for a study. Cure: leave it out"
        )


def load_with_options(
    space: Path,
    settings: Sequence[str],
    *,
    num_trials: int | None,
    max_epochs: int | None,
    seed: int | None,
    name: str | None,
    scheduler: str | None,
    stages: str | None,
    data_root: Path | None,
    recipe: str | None = None,
    seeds: int | None = None,
    start_from: str | None = None,
    storage: Path = STORAGE,
) -> tuple[SearchSpace, Path]:
    """Return the space that SPACE names, after --set (settings) and the other options of `sweep`, and its file.

    recipe: ``published`` or None. start_from, storage: a study or a file whose points come first, and where studies
    are. Raises CommandError, ConfigError, StudyError or DataError for what `sweep` refuses before it looks at the
    images.
    """
    if seeds is not None and recipe is None:
        cure = "add --recipe published, or --set study.refit.seeds=N for the models of a search"
        raise CommandError(f"--seeds = {seeds}: is for the runs of a recipe. Cure: {cure}")
    if recipe not in (None, "published"):  # from Python
        raise CommandError(f"recipe = {recipe!r}: is not one. Cure: published, or None for the search")
    if recipe is not None:
        refuse_beside_recipe(
            settings,
            {
                "--num-trials": num_trials,
                "--scheduler": scheduler,
                "--stages": stages,
                "--start-from": start_from,
            }.items(),
        )
    file, for_folder = space_of(space, data_root)
    refuse_unusable_name(name)
    keys = {
        "study.search.num_trials": num_trials,
        "study.seed": seed,
        "study.name": name,
        "study.search.scheduler": scheduler,
        "machine.data_root": None if data_root is None else str(data_root),
    }
    options = [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]
    overrides = [*for_folder, *settings, *options, *stage_overrides(stages)]
    from raydml.search_space.space import load_space

    loaded = load_space(file, overrides, max_epochs)
    refuse_absent_stages(stages, loaded.study)
    if recipe is not None:
        from raydml.search_space.published import published_recipe

        loaded = published_recipe(loaded, seeds=seeds or DEFAULT_SEEDS, name=name)
    if start_from is not None:
        from raydml.study.warm_start import with_first_points

        loaded = with_first_points(loaded, start_from, storage)
    return loaded, file


def create(
    loaded: SearchSpace,
    space: Path,
    storage: Path,
    tracking_uri: str | None,
    command: str = "",
    stored_at: str | None = None,
) -> Path:
    """Look at the images, prepare the MLflow store, create the folder of a study, and return the folder.

    stored_at: the address of the study in an object store. One that is there already is brought into the folder.
    """
    from raydml.study.folder import create_study, plan_study

    if stored_at is not None:
        from raydml.study.mirror import fetch_study, is_stored

        with notice("looking at the store"):
            ObjectStore(stored_at).check()
            if is_stored(stored_at):
                fetch_study(stored_at, storage)
        if tracking_uri is None:
            note = "note: the runs in MLflow stay on this machine; --tracking-uri names a server for all machines"
            typer.echo(note, err=True)
    plan = plan_study(loaded)  # says how the classes are divided, before the slow imports
    from raydml.tracking.store import default_uri, login_of, study_store

    uri = study_store(None, storage, tracking_uri)
    check_store(uri, storage)
    return create_study(
        loaded,
        storage=storage,
        tracking_uri=None if uri == default_uri(storage) else uri,
        space_text=space.read_text(encoding="utf-8"),
        plan=plan,
        command=command,
        user=login_of(uri),
        stored_at=stored_at,
    )


def check_store(uri: str, storage: Path) -> None:
    """Prepare the MLflow store of a study. Prints a note if it may answer later, because nothing waits for it.

    Raises TrackingError if the address cannot be right.
    """
    from raydml.tracking.store import reach_store

    with notice("preparing the MLflow store"):
        reason = reach_store(uri, storage)
    if reason:
        typer.echo(f"note: {reason}. The study runs all the same: MLflow gets everything once it can be used", err=True)


def with_secrets(tracking_uri: str | None) -> str | None:
    """Return an address if a study's file has it without its secrets, so that they have to be handed on; else None."""
    from raydml.ops.addresses import without_secrets

    return None if tracking_uri is None or without_secrets(tracking_uri) == tracking_uri else tracking_uri


def resume(
    context: typer.Context,
    study: Target,
    num_trials: Annotated[
        int | None,
        typer.Option(metavar="N", help="Give the search N trials in all; the stages after it are run again."),
    ] = None,
    retry_crashed: Annotated[
        bool,
        typer.Option(
            "--retry-crashed", help="Run trials again that crashed, hung or ran out of memory, and the later stages."
        ),
    ] = False,
    time_limit: TimeLimitOption = None,
    device_hours: DeviceHoursOption = None,
    until_settled: UntilSettledOption = False,
    data_root: DataRoot = None,
    storage: StorageOption = STORAGE,
    tracking_uri: TrackingUri = None,
    address: AddressOption = None,
) -> None:
    """Continue an interrupted study, or give a finished one more trials.

    Finished trials stay finished; the others continue from their newest complete checkpoint.
    """
    budget = budget_of(time_limit, device_hours, until_settled)
    from raydml.study.driver import only_driver
    from raydml.study.folder import find_study, move_data_root
    from raydml.study.mirror import refuse_held, up_to_date
    from raydml.study.results import is_finished, refuse_lost_events

    folder = up_to_date(find_study(study, storage))
    runs = num_trials is not None or retry_crashed or not is_finished(folder)
    # The lock is taken before anything is changed.
    refuse_unanswered(address)
    with loading_driver(context, address) if runs else nullcontext() as driver, only_driver(folder):
        refuse_held(folder)
        if runs or tracking_uri is not None:
            check_store(store_of(folder, tracking_uri), folder.parent)
        refuse_lost_events(folder)
        if data_root is not None:
            move_data_root(folder, data_root)
        if num_trials is not None:
            from raydml.study.extension import extend_search

            extend_search(folder, num_trials)
        if retry_crashed:
            from raydml.study.extension import retry_failed

            failed = retry_failed(folder)
            echo(new_console(), f"to be run again: {', '.join(failed)}" if failed else "no trial has crashed")
        run_and_show(context, folder, address, budget, tracking_uri, driver)


def trial(
    context: typer.Context,
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="Search space or folder of images (trial 0), YAML or JSON file of one trial, or STUDY:search-003.",
        ),
    ],
    max_epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after N epochs; the configuration does not change.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each epoch.")] = False,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a checkpoint here at the end.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Set any key of a file; repeatable.")
    ] = None,
    data_root: DataRoot = None,
    storage: StorageOption = STORAGE,
) -> None:
    """Train one configuration in this process, without Ray; same numbers."""
    if save is not None:
        refuse_used(f"--save {save}", save)
    settings, machine = read_trial(config, storage, data_root, overrides or ())
    from raydml.config.trial import fingerprint
    from raydml.data.seal import TestReads
    from raydml.evaluation.embed import device_of
    from raydml.ops.files import require_space
    from raydml.training.trainer import Trainer
    from raydml.training.trial_images import Catalogs

    reads = TestReads(storage / "test_reads.jsonl")  # a trial without test classes opens those of other trials
    catalogs = Catalogs(machine, record=_record_of(config, storage))
    trainer = Trainer(settings, machine, device=device_of(machine), catalogs=catalogs, reads=reads)
    if save is not None:  # before hours of training: the network, its best weights and what the optimizer keeps
        num_copies = 4 if settings.optimizer.ema is None else 5
        num_bytes = num_copies * sum(tensor.nbytes for tensor in trainer.best_weights.values())
        with writing(f"--save {save}"):
            require_space(save, num_bytes, "a checkpoint")
    console = new_console()
    if not as_json:
        echo(console, f"trial {fingerprint(trainer.trial)}   {trainer.device}\n{tables.epoch_header()}")
    for result in trainer.epochs():
        echo(console, json.dumps(result) if as_json else tables.epoch_line(result))
        if result["epoch"] == max_epochs:
            break
    if save is not None:
        with writing(f"--save {save}"):
            trainer.save(save)
    if not as_json:
        if trainer.ended not in ("", "finished"):
            echo(console, f"ended: {trainer.ended.replace('_', ' ')}")
        if save is not None:
            echo(console, f"checkpoint {save}")
            for part in [part for part in ("val", "test") if getattr(trainer.split, part)][:1]:
                echo(console, f"{program_of(context)} evaluate {save} --on {part}")


@contextmanager
def loading_driver(context: typer.Context, address: str | None) -> Iterator[DriverProcess]:
    """Start a driver, which takes seconds to load its libraries and Ray, while the study is made; end it if unused."""
    from raydml.study.process import DriverProcess

    driver = DriverProcess(_command_of_driver(context, address))
    driver.load()
    try:
        yield driver
    finally:
        driver.end_unused()


def _command_of_driver(context: typer.Context, address: str | None) -> list[str]:
    return [*started_again(context), "drive", *([] if address else ["--embedded"])]


def run_and_show(
    context: typer.Context,
    folder: Path,
    address: str | None,
    budget: Budget = UNLIMITED,
    tracking_uri: str | None = None,
    driver: DriverProcess | None = None,
) -> None:
    """Run the rest of a study under the live table, then print its outcome; exit 128 + signal if interrupted.

    tracking_uri: another MLflow store, which the study reports to from now on. driver: a process that has begun to load
    for it. The study is held by this process, and runs in another one, so that this one can still end it in order where
    Ray fails. Events are sent to MLflow by a thread; what is left when the study ends is sent then.
    """
    from raydml.study.driver import only_driver
    from raydml.study.process import run_driver, stop_signals
    from raydml.study.remote import StudyPlace
    from raydml.study.results import is_finished, refuse_lost_events

    console, program = new_console(), program_of(context)
    if tracking_uri is None and is_finished(folder):
        _complete_copy(folder)
        show_finished(program, folder, console)
        return
    refuse_lost_events(folder)  # before anything of it reaches MLflow
    command, phase = _command_of_driver(context, address), "starting"

    def on_signal(_number: int) -> None:
        if phase != "running":  # a driver that runs is ended in order by `run_driver`
            raise KeyboardInterrupt

    outcome, tracker, mirror, missing = None, None, None, ""
    with only_driver(folder), stop_signals(on_signal) as received:
        try:
            with without_import_notices(), _live_study(program, folder, console, tracking_uri) as live:
                mirror = _start_mirror(folder, live, lambda: received.append(signal.SIGTERM))
                tracker = _start_delivery(folder, tracking_uri, live)
                live.doing("starting the driver")
                phase = "running"
                outcome = run_driver(folder, command, received, live.show, address=address, budget=budget, first=driver)
                phase = "ending"
                live.doing("sending the results to MLflow")
                tracker.finish(INTERRUPTED_DELIVERY_S if received else DELIVERY_S)
                if mirror is not None:
                    live.doing("completing the copy in the store")
                    missing = mirror.finish(INTERRUPTED_DELIVERY_S if received else DELIVERY_S)
        except KeyboardInterrupt:  # before the driver has started, or while the results are sent to MLflow
            if tracker is not None:
                tracker.finish(INTERRUPTED_DELIVERY_S)
            if mirror is not None:
                missing = mirror.finish(INTERRUPTED_DELIVERY_S)
        finally:  # while this process still holds the study
            if driver is not None:
                driver.end_unused()
        hint = "" if tracker is None else tracker.hint(f"{program} sync {study_argument(folder)}")
        if hint and (outcome is None or outcome.status != "finished"):
            echo(console, hint)
        extra = f" --address {shlex.quote(address)}" if address else ""
        again = f"{program} resume {study_argument(folder)}{extra}"
        if missing:
            typer.echo(f"note: {missing}. What is missing is sent by: {again}", err=True)
        if outcome is None or outcome.status == "interrupted":
            echo(console, f"\nInterrupted. To continue:\n  {again}")
            if (uri := StudyPlace.of(folder).uri) is not None:
                echo(console, f"On another machine:\n  {program} resume {shlex.quote(uri)}{extra}")
            raise typer.Exit(128 + ((outcome and outcome.signal) or received[0]))
        if outcome.status == "refused":
            raise StudyStopped(outcome.text)
        if outcome.status == "paused":
            raise StudyStopped(f"{outcome.text}: {again}")
        if outcome.status == "broken":
            raise StudyStopped(
                f"the study has stopped, because Ray has ended: {outcome.text}\n"
                f"Nothing that was saved is lost. Cure: {again}"
            )
        if outcome.status == "defect":
            typer.echo(f"{outcome.text}\nThe study has stopped. To continue: {again}", err=True)
            raise typer.Exit(1)
        show_outcome(program, folder, console)
        if hint:  # last, so that it is not missed
            echo(console, f"\n{hint}")
        if received:  # while the results were sent to MLflow
            raise typer.Exit(128 + received[0])


def drive(context: typer.Context, embedded: Annotated[bool, typer.Option("--embedded")] = False) -> None:
    """Run a study for the process that has started this one, which describes it on standard input.

    embedded: it will run on a Ray of its own, which is started at once.
    """
    environment = context.find_root().obj.environment

    def load() -> Callable[..., Any]:
        from raydml.study.cluster import EarlyRay, address_of_job

        early_ray = None
        if embedded and address_of_job(environment) is None:
            early_ray = EarlyRay(environment)
            early_ray.start()
        from raydml.study.stages import drive_study

        return partial(drive_study, own_environment=environment, early_ray=early_ray)

    with without_import_notices():  # the starting process shows what happens
        from raydml.study.process import serve_driver

        code = serve_driver(sys.stdin, load)
    raise typer.Exit(code)


def _live_study(program: str, folder: Path, console: Console, tracking_uri: str | None) -> LiveStudy:
    """Return the live view of a study, which begins behind the events there are."""
    from raydml.cli.live_view import LiveStudy
    from raydml.study.folder import read_study

    events = folder / "events.jsonl"
    live = LiveStudy(events, from_offset=events.stat().st_size if events.exists() else 0, console=console)
    if not _is_server(tracking_uri or read_study(folder)["tracking_uri"]):
        live.browse_with(f"{program} ui {study_argument(folder)}")
    return live


def _complete_copy(folder: Path) -> None:
    """Send the store of a finished study, if it has one, what it does not have yet."""
    from raydml.study.driver import only_driver
    from raydml.study.mirror import Mirror
    from raydml.study.remote import StudyPlace

    if StudyPlace.of(folder).uri is None:
        return
    with notice("completing the copy in the store"), only_driver(folder):
        mirror = Mirror(folder)
        mirror.start()
        missing = mirror.finish(DELIVERY_S)
    if missing:
        raise CommandError(f"{missing}. Then the same command again")


def _start_mirror(folder: Path, live: LiveStudy, on_lost: Callable[[], None]) -> Mirror | None:
    """Begin to copy a study into its store, if it has one. Raises StudyHeld while a driver elsewhere runs it.

    on_lost: ends the study where another driver has taken it over.
    """
    from raydml.study.mirror import Mirror
    from raydml.study.remote import StudyPlace

    if StudyPlace.of(folder).uri is None:
        return None
    live.doing("looking at the store")
    mirror = Mirror(folder, on_lost)
    mirror.start()
    return mirror


def _start_delivery(folder: Path, tracking_uri: str | None, live: LiveStudy) -> Tracker:
    """Start to send the events of a study to MLflow."""
    live.doing("loading MLflow")
    from raydml.ops.addresses import redacted
    from raydml.study.folder import read_study, report_to
    from raydml.tracking.delivery import Tracker
    from raydml.tracking.store import create_missing

    uri = store_of(folder, tracking_uri)
    create_missing(uri, folder.parent)
    if _is_server(uri):
        live.browse_with(redacted(uri))
    tracker = Tracker(folder / "events.jsonl", uri, read_study(folder)["name"])
    tracker.start()
    if tracking_uri is not None:
        report_to(folder, uri)
    return tracker


def _is_server(uri: str | None) -> bool:
    return (uri or "").startswith(("http://", "https://"))


def show_finished(program: str, folder: Path, console: Console) -> None:
    """Print that nothing is left to do in a study, and what can be done with it."""
    from raydml.config.refit import has_search
    from raydml.study.folder import read_study

    can_extend = has_search(read_study(folder)["trials"])
    target = study_argument(folder)
    echo(console, f"{folder.name} is finished; nothing to do")
    commands = [
        (f"{program} status {target}", "its results"),
        *([(f"{program} resume {target} --num-trials N", "more trials")] if can_extend else []),
        (f"{program} sync {target}", "send MLflow what it missed"),
    ]
    console.print(tables.commands(commands), soft_wrap=True)


def show_outcome(program: str, folder: Path, console: Console) -> None:
    """Print the winner, the test numbers, the places of the results, and the next commands."""
    from raydml.ops.addresses import redacted
    from raydml.report.text import more_trials
    from raydml.study.events import read_state
    from raydml.study.folder import read_json, read_study
    from raydml.study.remote import StudyPlace
    from raydml.tracking.models import NEWEST

    study, state = read_study(folder), read_state(folder)
    models = state.models
    if study.get("smoke"):
        from raydml.cli.smoke import show_smoke_outcome

        show_smoke_outcome(folder, console)
        return
    results = read_json(folder / "summary.json")
    target, name = study_argument(folder), study["name"]
    console.print()
    console.print(tables.summary(results))
    where = [("study", tables.short_path(folder)), ("MLflow", redacted(store_of(folder, None)))]
    if (uri := StudyPlace.of(folder).uri) is not None:
        where.insert(1, ("store", uri))
    if models:
        where.append(("model", f"models:/{models[-1].name}@{NEWEST} in MLflow; {tables.short_path(folder / 'model')}"))
    where.append(("report", tables.short_path(folder / "report" / "report.html")))
    console.print()
    console.print(tables.locations(where))
    console.print()
    more = f"{program} resume {target} --num-trials {more_trials(results)}"
    console.print(
        tables.commands(
            [
                (f"{program} ui {target}", "browse every run in the MLflow UI"),
                *_evaluation_again(program, target, folder, str(state.summary.tags.get("winner", ""))),
                (
                    f"{program} export {target} {shlex.quote(name + '-model')}",
                    "write the model as a folder to take away",
                ),
                *([(more, "give the search more trials")] if results["search"] else []),
            ]
        ),
        soft_wrap=True,
    )


def _evaluation_again(program: str, target: str, folder: Path, winner: str) -> list[tuple[str, str]]:
    """The command that scores the best run with validation classes; none where no run has any."""
    from raydml.study.results import best_that_validates

    best = best_that_validates(folder)
    if not winner.startswith("refit-"):
        return [(f"{program} evaluate {target} --on val", "score the winner again")]
    return [(f"{program} evaluate {target}:{best} --on val", "score the best run that validates again")] if best else []


def space_of(argument: Path, data_root: Path | None) -> tuple[Path, list[str]]:
    """Return the file that SPACE names and its overrides; for a folder or a list those of the space `image_folder`."""
    refuse_addresses(f"SPACE = {str(argument)!r}", argument)
    if argument.is_dir() or (argument.is_file() and argument.suffix.lower() in LIST_SUFFIXES):
        if data_root is not None:
            kind = "a folder of images" if argument.is_dir() else "a list of images, in their folder"
            raise CommandError(
                f"SPACE = {str(argument)!r} is {kind}, and --data-root names another. Cure: leave out one"
            )
        from raydml.search_space.shipped import overrides_for_folder, spaces_folder

        return spaces_folder() / "image_folder.yaml", overrides_for_folder(argument)
    if argument.is_file():
        return argument, []
    from raydml.search_space.shipped import find_space, shipped_spaces

    if (found := find_space(argument)) is not None:
        return found, []
    known = [path.stem for path in shipped_spaces()]
    raise CommandError(
        f"SPACE = {str(argument)!r}: no such file or folder{did_you_mean(argument.stem, known) or '.'} "
        "Cure: a YAML file of a search space, a folder or CSV list of images, or a space of raydml's own (list spaces)"
    )


def refuse_unusable_name(name: str | None) -> None:
    """Raise CommandError where the name of a study is no name of a folder."""
    from raydml.config.trial import parse_study
    from raydml.errors import ConfigError

    if name is None:
        return
    try:
        parse_study({"name": name})
    except ConfigError as error:
        raise CommandError(str(error.problems[0]._replace(path="--name"))) from None


def stage_overrides(stages: str | None) -> list[str]:
    """Overrides that remove the stages that ``--stages`` does not name. Raises CommandError."""
    if stages is None:
        return []
    chosen = [stage.strip() for stage in stages.split(",")]
    unknown = [stage for stage in chosen if stage not in STAGES]
    if unknown or "search" not in chosen or len(set(chosen)) < len(chosen):
        raise CommandError(
            f"--stages = {stages!r}: must name search and may name confirm, refit and finalize, each once. "
            "Cure: search, or search,confirm, or search,confirm,refit,finalize"
        )
    return [f"study.{stage}=null" for stage in STAGES[1:] if stage not in chosen]


def refuse_beside_recipe(settings: Sequence[str], options: Iterable[tuple[str, object]]) -> None:
    """Refuse what a published recipe decides itself. options: names and values; None where not given."""
    from raydml.search_space.published import DECIDED_KEYS

    reason = "--recipe published trains trial 0 on all training classes with --seeds seeds and tests it; nothing is"
    reason += " searched or confirmed"
    for option, value in options:
        if value is not None:
            raise CommandError(f"{option} = {value}: {reason}. Cure: leave out {option} or --recipe")
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if any(key == decided or key.startswith(f"{decided}.") for decided in DECIDED_KEYS):
            raise CommandError(f"--set {setting}: {reason}. Cure: leave out this --set or --recipe")


def refuse_absent_stages(stages: str | None, study: Any) -> None:
    """Refuse a stage that the space does not describe: the number of folds and seeds has no default."""
    chosen = [stage.strip() for stage in (stages or "").split(",")]
    absent = [
        stage
        for stage, block in (("confirm", study.confirm), ("refit", study.refit), ("finalize", study.finalize))
        if stage in chosen and block is None
    ]
    if absent:
        raise CommandError(
            f"--stages names {', '.join(absent)}, but SPACE has no study.{absent[0]}. "
            f"Cure: add it there, or --set 'study.{absent[0]}={{top: 1}}'"
        )


def _record_of(config: str, storage: Path) -> ImageRecord | None:
    """The record of the images of the study that CONFIG names a trial of; None for a file or folder."""
    from raydml.data.digests import ImageRecord
    from raydml.study.folder import find_study

    study, colon, _ = config.rpartition(":")
    return ImageRecord.of_study(find_study(study, storage)) if colon and not Path(config).exists() else None


def read_trial(
    config: str, storage: Path, data_root: Path | None, overrides: Sequence[str] = ()
) -> tuple[Trial, Machine]:
    """Return the configuration and the machine settings of CONFIG; of a search space those of its trial 0.

    Raises ConfigError, StudyError, CommandError.
    """
    study, colon, key = config.rpartition(":")
    if not colon and not Path(config).exists():
        from raydml.search_space.shipped import find_space

        if find_space(Path(config)) is None:
            raise CommandError(
                f"CONFIG = {config!r}: no such file. Cure: a search space, a folder of images, a YAML or JSON file of "
                "one trial, or STUDY:search-003"
            )
    from raydml.study.folder import find_study, read_study, with_absolute_paths

    if not colon or Path(config).is_file():
        from raydml.search_space.space import load_space

        file, for_folder = space_of(Path(config), data_root)
        options = [] if data_root is None else [f"machine.data_root={json.dumps(str(data_root))}"]
        space = load_space(file, [*for_folder, *overrides, *options], bare_trial=True)
        from raydml.study.draws import TrialDraws
        from raydml.study.limits import trials_within_limits
        from raydml.training.trial_images import Catalogs

        folds = 0 if space.study.confirm is None else space.study.confirm.folds
        drawn = TrialDraws(space).draw(0)
        assert drawn is not None
        (first,) = trials_within_limits([drawn.trial], Catalogs(space.machine), folds, space.study.search.folds)
        return first, with_absolute_paths(space.machine, storage)
    if overrides:
        raise CommandError(
            f"--set {overrides[0]} is for a file, and {config} is a trial of a study. Cure: leave it out, or "
            "change a file of the trial (study.json lists the trials of the search)"
        )
    from raydml.config.trial import parse_machine, parse_trial

    folder = find_study(study, storage)
    return parse_trial(recorded_trial(folder, key)), with_data_root(
        parse_machine(read_study(folder)["machine"]), data_root
    )
