"""The command evaluate: a model, a bare backbone or saved embeddings, on its own classes or on other images."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from raydml.cli import tables
from raydml.cli.arguments import STORAGE, CommandError, StorageOption, TrackingUri, echo, new_console
from raydml.cli.targets import (
    DataRoot,
    FoundModel,
    checkpoint_from_export,
    deliver_test_read,
    find_model,
    record_test_read,
    with_data_root,
)

if TYPE_CHECKING:
    from raydml.config.trial import Machine
    from raydml.evaluation.embed import Evaluation
    from raydml.evaluation.scoring import MetricSpec
    from raydml.inference.external import Collection

ALL = "all"
DEFAULT_RECALL_AT = (1, 2, 4, 8)

ToEvaluate = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A study (its winner), STUDY:confirm-003, runs:/ID/..., models:/NAME/VERSION, a checkpoint, an exported "
        "model, backbone:NAME, timm:NAME, or a file of --save-embeddings.",
    ),
]


class _Result(NamedTuple):
    """The metrics of one evaluation, a title and a source for the screen, and the facts for --json."""

    evaluated: Evaluation
    title: str
    source: str
    facts: dict[str, Any]


def evaluate(
    target: ToEvaluate,
    on: Annotated[
        Literal["val", "test"] | None,
        typer.Option(help="Which classes; default val. Each read of the test classes is recorded."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|NAME", help="Other images: a folder of class folders, or the name of a data set."),
    ] = None,
    distractors: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --data: a folder of gallery images that match no query.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Groups, separated by commas: retrieval, ranking, clustering, geometry; or all.")
    ] = "retrieval",
    codes: Annotated[
        str | None,
        typer.Option(help="Separated by commas: float, binary (signs, Hamming), int8. Default: as trained."),
    ] = None,
    recall_at: Annotated[
        str | None, typer.Option(metavar="K,K", help="The k of Recall@k. Default: as trained.")
    ] = None,
    untrained: Annotated[
        bool | None,
        typer.Option("--untrained/--no-untrained", help="Also score the untrained network; the default."),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="With --data: leave out files that cannot be decoded.")
    ] = False,
    save_embeddings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the embeddings (.npz); they can be scored again.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    data_root: DataRoot = None,
    storage: StorageOption = STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Score a model on val or test classes, or on other images.

    Intervals are 95 % bootstrap intervals over queries, class by class. They cover the choice of the queries, not the
    variation between training runs."""
    from raydml.inference.external import PREFIXES

    if save_embeddings is not None and save_embeddings.suffix != ".npz":
        raise CommandError(f"--save-embeddings {save_embeddings}: the file is a NumPy archive. Cure: name it *.npz")
    if save_embeddings is not None:
        try:  # fails now rather than after the work
            save_embeddings.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"--save-embeddings {save_embeddings}: {error}. Cure: a file that can be written"
            ) from error
    own = {"--on": on, "--untrained": untrained}
    given = [name for name, value in own.items() if value is not None]
    if target.endswith(".npz"):
        given += [
            name for name, value in (("--save-embeddings", save_embeddings), ("--data", data)) if value is not None
        ]
    if given and (target.endswith(".npz") or data is not None):
        what = "saved embeddings" if target.endswith(".npz") else "other images"
        raise CommandError(f"{', '.join(given)}: has no effect on {what}. Cure: leave it out")
    if distractors is not None and data is None:
        raise CommandError("--distractors goes with --data. Cure: --data FOLDER with the images to be found")
    wanted = _metric_settings(metrics, codes, recall_at)
    if target.endswith(".npz"):
        result = _of_embeddings(Path(target), wanted)
    elif data is not None:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raydml-")))
            found = None if target.startswith(PREFIXES) else find_model(target, storage, tracking_uri, scratch)
            source = _ModelSource(target, found, scratch, storage, data_root, skip_unreadable)
            result = _on_other_images(source, data, distractors, wanted, save_embeddings)
    elif target.startswith(PREFIXES):
        raise CommandError(f"TARGET = {target!r} has no classes of its own. Cure: --data FOLDER, or --data cub200")
    else:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raydml-")))
            found = find_model(target, storage, tracking_uri, scratch)
            source = _ModelSource(target, found, scratch, storage, data_root)
            result = _on_own_classes(source, on or "val", wanted, untrained is not False, save_embeddings)
    _print(result, as_json, save_embeddings)


class _ModelSource(NamedTuple):
    """A TARGET and what is needed to open it. found: None for a bare backbone."""

    target: str
    found: FoundModel | None
    scratch: Path
    storage: Path
    data_root: Path | None
    skip_unreadable: bool = False

    @property
    def machine(self) -> Machine:
        from raydml.config.trial import Machine, parse_machine
        from raydml.study.folder import read_study

        study = self.found.study if self.found else None
        machine = Machine() if study is None else parse_machine(read_study(study)["machine"])
        if self.skip_unreadable:
            machine = machine.model_copy(update={"on_unreadable": "skip"})
        return with_data_root(machine, self.data_root)

    @property
    def name(self) -> str:
        """The model for the screen: its place in MLflow if it was downloaded, because the download is deleted."""
        if self.found is None or self.found.folder.is_relative_to(self.scratch):
            return self.target
        return tables.short_path(self.found.folder)


def _metric_settings(metrics: str, codes: str | None, recall_at: str | None) -> dict[str, Any]:
    """The metric settings that the command line gives; the others come from the trial."""
    from raydml.evaluation.scoring import CODES, METRIC_GROUPS

    groups = METRIC_GROUPS if metrics == ALL else _chosen("--metrics", metrics, (*METRIC_GROUPS, ALL))
    wanted: dict[str, Any] = {"groups": tuple(groups), "intervals": True}
    if codes is not None:
        wanted["codes"] = tuple(_chosen("--codes", codes, CODES))
    if recall_at is not None:
        try:
            wanted["recall_at"] = tuple(sorted({int(k) for k in recall_at.split(",")}))
        except ValueError as error:
            raise CommandError(
                f"--recall-at {recall_at}: whole numbers separated by commas, such as 1,10,100"
            ) from error
        if wanted["recall_at"][0] < 1:
            raise CommandError(f"--recall-at {recall_at}: k is at least 1")
    return wanted


def _chosen(option: str, text: str, choices: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in choices:
            raise CommandError(f"{option} {text}: {name!r} is not one of {', '.join(choices)}")
    return names


def _on_own_classes(
    source: _ModelSource, on: Literal["val", "test"], wanted: dict[str, Any], untrained: bool, save_to: Path | None
) -> _Result:
    from raydml.config.trial import parse_trial
    from raydml.evaluation.embed import metric_spec_of
    from raydml.inference.checkpoints import evaluate_checkpoint
    from raydml.training import checkpoint

    found = source.found
    assert found is not None
    folder = (
        found.folder if found.is_checkpoint else checkpoint_from_export(found.folder, source.scratch / "checkpoint")
    )
    card = checkpoint.load_card(folder)
    key = record_test_read(found, source.target, source.storage) if on == "test" else None
    evaluated = evaluate_checkpoint(
        folder,
        on,
        source.machine,
        key=key,
        untrained=untrained,
        spec=metric_spec_of(parse_trial(card["trial"]))._replace(**wanted),
        save_to=save_to,
    )
    if on == "test" and found.study is not None:
        deliver_test_read(found.study)
    facts = {"target": source.target, "on": on, "checkpoint": source.name, "fingerprint": card.get("fingerprint")}
    facts["epoch"] = card.get("best_epoch")
    return _Result(evaluated, f"{on} classes", f"{source.name}, best epoch {card.get('best_epoch')}", facts)


def _on_other_images(
    source: _ModelSource, data: str, distractors: Path | None, wanted: dict[str, Any], save_to: Path | None
) -> _Result:
    from raydml.evaluation.embed import device_of
    from raydml.evaluation.saved_embeddings import save_embeddings
    from raydml.inference.external import embed_collection, evaluate_saved, open_bare

    recall_at: tuple[int, ...] = DEFAULT_RECALL_AT
    codes: tuple[str, ...] = ("float",)
    precision = "fp32"
    if source.found is None:
        bare = open_bare(source.target)
        network: Any = bare.network
        preprocessing = bare.preprocessing
        epoch = ""
    else:
        from raydml.config.trial import parse_trial
        from raydml.evaluation.embed import metric_spec_of
        from raydml.inference.checkpoints import load_network
        from raydml.training import checkpoint

        exported = None if source.found.is_checkpoint else source.scratch / "checkpoint"
        folder = source.found.folder if exported is None else checkpoint_from_export(source.found.folder, exported)
        network, preprocessing, _ = load_network(folder)
        card = checkpoint.load_card(folder)
        trial = parse_trial(card["trial"])
        precision = trial.precision
        recall_at, codes = metric_spec_of(trial)[:2]
        epoch = f", best epoch {card.get('best_epoch')}"
    machine = source.machine
    asked = _wanted_of({"recall_at": recall_at, "codes": codes} | wanted)
    collection = _collection(data, source, machine.data_root)
    others = None if distractors is None else _distractors(distractors, source)
    saved = embed_collection(
        network,
        preprocessing,
        collection,
        machine,
        distractors=others,
        precision=precision,
        facts={"recall_at": list(asked.recall_at), "checkpoint": source.name},
    )
    if save_to is not None:
        save_embeddings(save_to, *saved[:2], class_names=saved.class_names, paths=saved.paths, roles=saved.roles,
                        facts=saved.facts)  # fmt: skip
    if "recall_at" not in wanted:  # the k of the trial were chosen for other images
        asked = asked._replace(recall_at=tuple(k for k in asked.recall_at if k < len(saved.labels)) or (1,))
    evaluated = evaluate_saved(saved, asked, device_of(machine))
    if source.found is not None and source.found.study is not None:
        deliver_test_read(source.found.study)
    facts = {"target": source.target, "on": data, "checkpoint": source.name}
    return _Result(evaluated, data, source.name + epoch, facts)


def _wanted_of(settings: dict[str, Any]) -> MetricSpec:
    from raydml.evaluation.scoring import MetricSpec

    return MetricSpec(**settings)


def _collection(data: str, source: _ModelSource, data_root: Path | None) -> Collection:
    """Open the data set of --data with a record of the read: it may hold the test classes of a study."""
    from raydml.data.catalog import DataError
    from raydml.data.datasets import DATASETS, open_catalog
    from raydml.inference.external import Collection

    if Path(data).is_dir():
        catalog = open_catalog("image_folder", Path(data).resolve())
    elif data == "digits" or data in DATASETS:
        catalog = open_catalog(data, data_root)
    else:
        raise DataError(f"--data {data}: no such folder, and no data set of that name. Names: {', '.join(DATASETS)}")
    return Collection(catalog, _record_read(source, f"--data {data}"))


def _distractors(folder: Path, source: _ModelSource) -> Collection:
    """Open all images below a folder as one class of distractors."""
    from raydml.data.catalog import ImageFile, catalog_of
    from raydml.inference.external import Collection
    from raydml.inference.gallery import image_names

    files = [ImageFile(name, "distractor", *_size_and_time(folder / name)) for name in image_names(folder)]
    return Collection(
        catalog_of("distractors", folder.resolve(), files), _record_read(source, f"--distractors {folder}")
    )


def _size_and_time(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _record_read(source: _ModelSource, what: str) -> Any:
    return record_test_read(source.found, source.target, source.storage, what)


def _of_embeddings(path: Path, wanted: dict[str, Any]) -> _Result:
    """Score saved embeddings without the model. Embeddings that may be of test classes count as a read of them."""
    from raydml.evaluation.saved_embeddings import load_embeddings
    from raydml.inference.external import evaluate_saved

    saved = load_embeddings(path)
    if saved.facts.get("part") != "val":
        origins = [path.absolute(), Path(str(saved.facts.get("checkpoint", ""))).absolute()]
        above = (parent for origin in origins for parent in origin.parents)
        study = next((folder for folder in above if (folder / "study.json").exists()), None)
        record_test_read(FoundModel(path.absolute(), study, False), str(path.absolute()), path.absolute().parent)
        if study is not None:
            deliver_test_read(study)
    settings = {"recall_at": tuple(saved.facts.get("recall_at") or DEFAULT_RECALL_AT)} | wanted
    evaluated = evaluate_saved(saved, _wanted_of(settings))
    about = f"{saved.facts.get('dataset', 'unknown data set')}, {saved.facts.get('part', 'unknown part')}"
    facts = {"target": str(path), "on": saved.facts.get("part"), "checkpoint": saved.facts.get("checkpoint")}
    return _Result(
        evaluated, about, f"{path}: embeddings of {saved.facts.get('checkpoint', 'an unknown model')}", facts
    )


def _print(result: _Result, as_json: bool, saved_to: Path | None) -> None:
    scores = result.evaluated.metrics
    trained = {name: value for name, value in scores.items() if not name.startswith("untrained_")}
    untrained = {name.removeprefix("untrained_"): scores[name] for name in scores if name.startswith("untrained_")}
    if as_json:
        found = {"metrics": trained, "untrained": untrained, "intervals": result.evaluated.intervals}
        typer.echo(json.dumps({**result.facts, **found, "protocols": result.evaluated.protocols}))
        return
    console = new_console()
    echo(console, result.source)
    for sentence in result.evaluated.protocols.values():
        echo(console, f"  {sentence}")
    console.print(tables.scores(trained, untrained, result.evaluated.intervals, title=result.title))
    if saved_to is not None:
        echo(console, f"embeddings: {saved_to}")
