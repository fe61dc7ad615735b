"""The command trial, and how commands find a trained model: `locate`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from raydml.cli import tables
from raydml.cli.arguments import STORAGE, CommandError, Storage, echo, embedded_store, new_console, program

if TYPE_CHECKING:
    from raydml.config.trial import Machine, Trial
    from raydml.tracking.delivery import Origin

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
    from raydml.config.trial import fingerprint
    from raydml.evaluation.embed import device_of
    from raydml.training.trainer import Trainer

    trainer = Trainer(settings, machine, device=device_of(machine))
    console = new_console()
    if not as_json:
        echo(console, f"trial {fingerprint(trainer.trial)}   {trainer.device}\n{tables.epoch_header()}")
    for result in trainer.epochs():
        echo(console, json.dumps(result) if as_json else tables.epoch_line(result))
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
    from raydml.config.trial import Machine, parse_machine, parse_trial
    from raydml.study.folder import find_study, own_machine, read_study

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
    from raydml.study.folder import read_records, read_study

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
    from raydml.config.errors import ConfigError
    from raydml.search_space.yaml_reader import Node, read_yaml

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


# --- finding models ---------------------------------------------------------------------------------------------------


def locate(target: str, storage: Path, tracking_uri: str | None, scratch: Path) -> Located:
    """The model that TARGET means; what lies in MLflow is fetched into ``scratch``."""
    if target.startswith(("runs:/", "models:/")):
        from raydml.tracking.delivery import origin_of, resolve_checkpoint

        uri = tracking_uri or embedded_store(storage)
        fetched, origin = resolve_checkpoint(target, uri, scratch), origin_of(target, uri)
        return model_below(fetched, target, study_here(origin, storage))._replace(origin=origin)
    path = Path(target)
    if path.is_dir() and not (path / "study.json").exists():
        above = next((parent for parent in path.absolute().parents if (parent / "study.json").exists()), None)
        return model_below(path, target, above, deep=False)
    from raydml.study.folder import find_study
    from raydml.study.results import find_winner

    name, colon, key = target.rpartition(":")
    if colon and key.startswith(("search-", "confirm-")):
        study = find_study(name, storage)
        return Located(checkpoint_of(study, key), study, True)
    study = find_study(target, storage)
    return Located(find_winner(study).checkpoint, study, True)


def checkpoint_of(study: Path, key: str) -> Path:
    """The newest intact checkpoint of one trial of a study."""
    from raydml.study.folder import newest_checkpoint

    recorded_trial(study, key)  # says which trials there are
    found = newest_checkpoint(study, key.split("-")[0], key)
    if found is None:
        raise CommandError(
            f"study {study.name!r}: {key} has no intact checkpoint. Losing trials' are dropped as they lose; "
            "search.keep_checkpoints says how many are kept"
        )
    return found


def study_here(origin: Origin, storage: Path) -> Path | None:
    """The folder of the study that a fetched model comes from, if this storage holds it."""
    from raydml.study.folder import read_study

    folder = storage / origin.study
    if not origin.study_id or not (folder / "study.json").exists():
        return None
    return folder if read_study(folder)["study_id"] == origin.study_id else None  # not one of the same name only


def model_below(folder: Path, target: str, study: Path | None, *, deep: bool = True) -> Located:
    """The model in a folder: a checkpoint, the newest intact one of a trial's folder, or an exported model.

    ``deep`` looks further down, in what MLflow packed. In a folder that the user named it would find a stranger's.
    """
    from raydml.inference.export import is_exported
    from raydml.training import checkpoint

    inside = folder.rglob("manifest.json") if deep else folder.glob("checkpoint_*/manifest.json")
    parents = [folder, *sorted({path.parent.parent for path in inside})]
    for candidate in [folder, *(checkpoint.newest_intact(parent) for parent in parents)]:
        if candidate is not None and checkpoint.is_intact(candidate):
            return Located(candidate, study, True)
    below = sorted({path.parent for path in folder.rglob("*.safetensors")}) if deep else []
    for candidate in [folder, *below]:
        if is_exported(candidate):
            return Located(candidate, study, False)
    raise CommandError(
        f"TARGET = {target!r}: no checkpoint and no exported model in it. "
        "Cure: a folder with manifest.json or config.json, a study, runs:/ID/checkpoint or models:/NAME/VERSION"
    )


def as_checkpoint(exported: Path, scratch: Path) -> Path:
    """An exported model in the form of a checkpoint without training state, so that one path evaluates both."""
    from raydml.inference.export import EmbeddingModel
    from raydml.training import checkpoint

    model = EmbeddingModel.load(exported)
    return checkpoint.save(scratch, state={}, model_card=model.card, best_weights=model.network.state_dict())


def deliver(study: Path, patience_s: float) -> str:
    """Tell MLflow what it does not know of a study yet; the reason why it could not be told, empty if it was."""
    from raydml.study.folder import read_study
    from raydml.tracking.delivery import TrackingError, sync

    specification = read_study(study)
    try:
        delivered = sync(study / "events.jsonl", specification["tracking_uri"], specification["name"], patience_s)
    except TrackingError as error:
        return str(error)
    return "" if delivered else "it does not answer"


def deliver_test_read(study: Path) -> None:
    """Tell MLflow of the read as well, unless somebody else is telling it things about this study now."""
    if reason := deliver(study, DELIVERY_S):
        typer.echo(f"note: the read is recorded in the study, MLflow hears of it later: {reason}", err=True)


def record_test_read(found: Located | None, target: str, storage: Path, images: str = "") -> Any:
    """Write down that the test classes are about to be read; gives the key that opens them.

    In the study's own record and event file; without a study here (or without a trained model) beside the studies,
    because the folder it was fetched into will be gone. A model from MLflow also has it written to its run, and first:
    if that cannot be done, nothing is read. images: of which other images than its own test classes, if so.
    """
    from raydml.data.seal import TestReads
    from raydml.study import events
    from raydml.training import checkpoint

    commit = checkpoint.git_commit() or "unknown"
    study, origin = (None, None) if found is None else (found.study, found.origin)
    where = target if found is None or study is None or origin is not None else str(found.folder)
    where += f" on {images}" if images else ""
    read = {"time": time.time(), "event": "test_read", "stage": "evaluate", "trial": None}
    read |= {"checkpoint": where, "commit": commit}
    if origin is not None:
        from raydml.tracking.delivery import log_test_read

        log_test_read(origin, read)
    reads = TestReads((study or storage) / "test_reads.jsonl")
    key = reads.record(purpose="evaluate", checkpoint=where, commit=commit)
    if study is not None:
        events.append(study / "events.jsonl", read)
    return key
