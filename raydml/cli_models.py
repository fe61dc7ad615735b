"""Commands about one configuration or one trained model: trial, evaluate, export."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from raydml import screens
from raydml.cli_arguments import STORAGE, CommandError, Storage, TrackingUri, echo, embedded_store, new_console, program

if TYPE_CHECKING:
    from raydml.config import Machine, Trial
    from raydml.tracking import Origin

DELIVERY_S = 20.0  # how long an evaluation waits for MLflow
DataRoot = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the images lie, if not where they were.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A study (its winner), runs:/ID/..., models:/NAME/VERSION, a checkpoint or an exported model.",
    ),
]


class Located(NamedTuple):
    """A trained model on this machine: a checkpoint or an exported model, the study here that it belongs to, if any,
    and the run that it was fetched from, if it was."""

    folder: Path
    study: Path | None
    is_checkpoint: bool
    origin: Origin | None = None


# --- trial ------------------------------------------------------------------------------------------------------------


def trial(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML or JSON file of one trial, or STUDY:search-003.")
    ],
    max_epochs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stop after N epochs; the configuration stays as it is.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, one line an epoch.")] = False,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a checkpoint here at the end.")] = None,
    data_root: DataRoot = None,
    storage: Storage = STORAGE,
) -> None:
    """Train one configuration here, without Ray; the same numbers."""
    settings, machine = read_trial(config, storage, data_root)
    if save is not None and save.exists() and any(save.iterdir() if save.is_dir() else [save]):
        raise CommandError(f"--save {save} exists and is not empty. Cure: name a new folder")
    from raydml.config import fingerprint
    from raydml.train import Trainer

    trainer = Trainer(settings, machine, device=device_of(machine))
    console = new_console()
    if not as_json:
        echo(console, f"trial {fingerprint(trainer.trial)}   {trainer.device}\n{screens.epoch_header()}")
    for result in trainer.epochs():
        echo(console, json.dumps(result) if as_json else screens.epoch_line(result))
        if result["epoch"] == max_epochs:
            break
    if save is not None:
        trainer.save(save)
    if not as_json:
        if trainer.ended not in ("", "finished"):
            echo(console, f"ended: {trainer.ended.replace('_', ' ')}")
        if save is not None:
            echo(console, f"checkpoint {save}\n{program(context)} evaluate {save} --on val")


def read_trial(config: str, storage: Path, data_root: Path | None) -> tuple[Trial, Machine]:
    """The configuration and the machine settings that CONFIG means. Raises ConfigError, StudyError, CommandError."""
    study, colon, key = config.rpartition(":")
    if not colon and not Path(config).is_file():
        raise CommandError(
            f"CONFIG = {config!r}: no such file. Cure: a YAML or JSON file of one trial, or STUDY:search-003"
        )
    from raydml.config import Machine, parse_machine, parse_trial
    from raydml.study import find_study, own_machine, read_study

    if Path(config).is_file():
        raw = read_plain(Path(config))
        if isinstance(raw, Mapping) and "trial" in raw:
            raise CommandError(
                f"CONFIG = {config!r} has a key trial, as search spaces have. Cure: a file of one trial holds what "
                "stands below that key (data, model, loss ...); a search space is for `sweep`"
            )
        return parse_trial(raw), own_machine(with_data_root(Machine(), data_root), storage)

    folder = find_study(study, storage)
    return parse_trial(recorded_trial(folder, key)), with_data_root(
        parse_machine(read_study(folder)["machine"]), data_root
    )


def recorded_trial(folder: Path, key: str) -> dict[str, Any]:
    """The configuration of a study's trial: planned ones of the search, and any that has started."""
    from raydml.study import read_records, read_study

    planned = {f"search-{index:03d}": trial for index, trial in enumerate(read_study(folder)["trials"])}
    started = {
        name: record.config for stage in ("search", "confirm") for name, record in read_records(folder, stage).items()
    }
    known = {**planned, **started}
    if key not in known:
        raise CommandError(f"study {folder.name!r} has no trial {key!r}. Choices: {', '.join(known)}")
    return dict(known[key])


def read_plain(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of one trial as plain values. Raises ConfigError with file and line."""
    from raydml.problems import ConfigError
    from raydml.yaml_reader import Node, read_yaml

    def plain(node: Node) -> Any:
        if isinstance(node.value, dict):
            return {key: plain(item) for key, item in node.value.items()}
        return [plain(item) for item in node.value] if isinstance(node.value, list) else node.value

    root, problems = read_yaml(path.read_text(encoding="utf-8"), str(path))
    if problems or root is None:
        raise ConfigError(problems)
    value = plain(root)
    if not isinstance(value, dict):
        raise CommandError(f"{path} holds no keys. Cure: one trial, as a study's study.json lists them under trials")
    if "study" in value and "trial" in value:
        raise CommandError(
            f"{path} is a search space, not one trial. Cure: sweep {path}, or a file with its trial alone"
        )
    return value


def with_data_root(machine: Machine, data_root: Path | None) -> Machine:
    return machine if data_root is None else machine.model_copy(update={"data_root": data_root.resolve()})


def device_of(machine: Machine) -> str:
    if machine.device != "auto":
        return machine.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# --- evaluate and export ----------------------------------------------------------------------------------------------


def evaluate(
    target: Model,
    on: Annotated[Literal["val", "test"], typer.Option(help="Which classes; each read of test is recorded.")] = "val",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data_root: DataRoot = None,
    storage: Storage = STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Score a model, and its untrained self, on val or test classes."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raydml-")))
        found = locate(target, storage, tracking_uri, scratch)
        from raydml import checkpoint
        from raydml.config import Machine, parse_machine
        from raydml.evaluate import evaluate_checkpoint

        folder = found.folder if found.is_checkpoint else as_checkpoint(found.folder, scratch / "as-checkpoint")
        card = checkpoint.load_card(folder)
        machine = Machine()
        if found.study is not None:
            from raydml.study import read_study

            machine = parse_machine(read_study(found.study)["machine"])
        key = record_test_read(found, target, storage) if on == "test" else None
        scores = evaluate_checkpoint(folder, on, with_data_root(machine, data_root), key=key)
    if on == "test" and found.study is not None:
        deliver_test_read(found.study)
    trained = {name: value for name, value in scores.items() if not name.startswith("untrained_")}
    untrained = {name.removeprefix("untrained_"): scores[name] for name in scores if name.startswith("untrained_")}
    # What was fetched from MLflow is gone by now; its name there stays.
    where = target if found.folder.is_relative_to(scratch) else screens.short_path(found.folder)
    if as_json:
        facts = {"target": target, "on": on, "checkpoint": where, "fingerprint": card.get("fingerprint")}
        typer.echo(json.dumps({**facts, "epoch": card.get("best_epoch"), "metrics": trained, "untrained": untrained}))
        return
    console = new_console()
    echo(console, f"{where}, best epoch {card.get('best_epoch')}")
    console.print(screens.scores(trained, untrained, title=f"{on} classes"))


def export(
    target: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model.")],
    storage: Storage = STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a model as one folder to take away.

    It holds weights, preprocessing, provenance and how to load it."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise CommandError(f"OUT = {str(out)!r} exists and is not empty. Cure: name a new folder")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raydml-")))
        found = locate(target, storage, tracking_uri, scratch)
        if found.is_checkpoint:
            from raydml.export import export_model

            write: Callable[[], object] = partial(export_model, found.folder, out)
        else:
            write = partial(shutil.copytree, found.folder, out, dirs_exist_ok=True)
        try:
            write()
        except OSError as error:
            raise CommandError(f"OUT = {str(out)!r}: {error}. Cure: name a folder that can be written") from error
    typer.echo(
        f"{out}\n  from raydml.export import EmbeddingModel\n  EmbeddingModel.load({str(out)!r}).embed(['one.jpg'])"
    )


def locate(target: str, storage: Path, tracking_uri: str | None, scratch: Path) -> Located:
    """The model that TARGET means; what lies in MLflow is fetched into ``scratch``."""
    if target.startswith(("runs:/", "models:/")):
        from raydml.tracking import origin_of, resolve_checkpoint

        uri = tracking_uri or embedded_store(storage)
        fetched, origin = resolve_checkpoint(target, uri, scratch), origin_of(target, uri)
        return model_below(fetched, target, study_here(origin, storage))._replace(origin=origin)
    path = Path(target)
    if path.is_dir() and not (path / "study.json").exists():
        above = next((parent for parent in path.absolute().parents if (parent / "study.json").exists()), None)
        return model_below(path, target, above, deep=False)
    from raydml.results import find_winner
    from raydml.study import find_study

    study = find_study(target, storage)
    return Located(find_winner(study).checkpoint, study, True)


def study_here(origin: Origin, storage: Path) -> Path | None:
    """The folder of the study that a fetched model comes from, if this storage holds it."""
    from raydml.study import read_study

    folder = storage / origin.study
    if not origin.study_id or not (folder / "study.json").exists():
        return None
    return folder if read_study(folder)["study_id"] == origin.study_id else None  # not one of the same name only


def model_below(folder: Path, target: str, study: Path | None, *, deep: bool = True) -> Located:
    """The model in a folder: a checkpoint, the newest intact one of a trial's folder, or an exported model.

    ``deep`` looks further down, in what MLflow packed. In a folder that the user named it would find a stranger's.
    """
    from raydml import checkpoint

    inside = folder.rglob("manifest.json") if deep else folder.glob("checkpoint_*/manifest.json")
    parents = [folder, *sorted({path.parent.parent for path in inside})]
    for candidate in [folder, *(checkpoint.newest_intact(parent) for parent in parents)]:
        if candidate is not None and checkpoint.is_intact(candidate):
            return Located(candidate, study, True)
    for card in sorted(folder.rglob("model.json") if deep else folder.glob("model.json")):
        return Located(card.parent, study, False)
    raise CommandError(
        f"TARGET = {target!r}: no checkpoint and no exported model in it. "
        "Cure: a folder with manifest.json or model.json, a study, runs:/ID/checkpoint or models:/NAME/VERSION"
    )


def as_checkpoint(exported: Path, scratch: Path) -> Path:
    """An exported model in the form of a checkpoint without training state, so that one path evaluates both."""
    from raydml import checkpoint
    from raydml.export import EmbeddingModel

    model = EmbeddingModel.load(exported)
    return checkpoint.save(scratch, state={}, model_card=model.card, best_weights=model.network.state_dict())


def deliver_test_read(study: Path) -> None:
    """Tell MLflow of the read as well, unless somebody else is telling it things about this study now."""
    from raydml.study import read_study
    from raydml.tracking import TrackingError, sync

    specification = read_study(study)
    try:
        delivered = sync(study / "events.jsonl", specification["tracking_uri"], specification["name"], DELIVERY_S)
        reason = "" if delivered else "it does not answer"
    except TrackingError as error:
        reason = str(error)
    if reason:
        typer.echo(f"note: the read is recorded in the study, MLflow hears of it later: {reason}", err=True)


def record_test_read(found: Located, target: str, storage: Path) -> Any:
    """Write down that the test classes are about to be read; gives the key that opens them.

    In the study's own record and event file; for a model without a study here beside the studies, because the folder
    it was fetched into will be gone. A model from MLflow also has it written to its run, and first: if that cannot be
    done, nothing is read.
    """
    from raydml import checkpoint, events
    from raydml.data.seal import TestReads

    commit = checkpoint.git_commit() or "unknown"
    where = target if found.study is None or found.origin is not None else str(found.folder)
    read = {"time": time.time(), "event": "test_read", "stage": "evaluate", "trial": None}
    read |= {"checkpoint": where, "commit": commit}
    if found.origin is not None:
        from raydml.tracking import log_test_read

        log_test_read(found.origin, read)
    reads = TestReads((found.study or storage) / "test_reads.jsonl")
    key = reads.record(purpose="evaluate", checkpoint=where, commit=commit)
    if found.study is not None:
        events.append(found.study / "events.jsonl", read)
    return key
