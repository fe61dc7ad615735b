"""The command evaluate: a model, a bare backbone or saved embeddings, on its own classes or on other images."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from raydml.cli import tables
from raydml.cli.arguments import (
    STORAGE,
    CommandError,
    DataRoot,
    FoundModel,
    StorageOption,
    TrackingUri,
    deliver_test_read,
    echo,
    find_model,
    new_console,
    record_test_read,
    refuse_unwritable,
    study_above,
    study_argument,
    with_data_root,
    writing,
)
from raydml.cli.imports import FromOption, checked_release

if TYPE_CHECKING:
    from rich.console import Console

    from raydml.config.trial import Machine
    from raydml.data.catalog import Catalog
    from raydml.evaluation.embed import Evaluation, RefinedEvaluation
    from raydml.inference.evaluate import RefinementChoice

ALL = "all"
DEFAULT_RECALL_AT = (1, 2, 4, 8)

ToEvaluate = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A study (its refit, else its winner), STUDY:confirm-003, runs:/ID/..., models:/NAME/VERSION, a "
        "checkpoint, an exported model, backbone:NAME, timm:NAME, a weight file of a release, or a file of "
        "--save-embeddings.",
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
        typer.Option(
            metavar="val|test",
            help="Which classes; default val. A refit has only test. Each read of the test classes is recorded.",
        ),
    ] = None,
    release: FromOption = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Other images: a folder of class folders, a CSV list with paths relative to its folder (or to "
            "--data-root), Parquet files or tars, or the name of a data set.",
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="With --data: a second label, scored as well: a column of the CSV, or parent."
        ),
    ] = None,
    exclude_same: Annotated[
        Literal["group"] | None,
        typer.Option(
            metavar="group", help="With --group: a query does not find images of its own class and group (camera)."
        ),
    ] = None,
    image_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --data PARQUET: the column of images; in tars the end of file names."),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --data PARQUET: the column of labels; in tars a field of the .json."),
    ] = None,
    distractors: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --data: a folder of gallery images that match no query.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="GROUP,GROUP",
            help="Groups: retrieval, ranking, clustering, geometry; or all. Default: retrieval, or the release's own.",
        ),
    ] = None,
    codes: Annotated[
        str | None, typer.Option(metavar="CODE,CODE", help="float, binary (signs, Hamming), int8. Default: as trained.")
    ] = None,
    recall_at: Annotated[
        str | None, typer.Option(metavar="K,K", help="The k of Recall@k. Default: as trained.")
    ] = None,
    dims: Annotated[
        str | None,
        typer.Option(metavar="D,D", help="Also score the first D dimensions alone. Default: those of matryoshka."),
    ] = None,
    rerank: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:K=V]",
            help="Also score re-ranked neighbours: k_reciprocal (k1=20, k2=6, lambda=0.3) or query_expansion (n=10, "
            "alpha=3). NAME:k1=9,k2=3 sets them.",
        ),
    ] = None,
    whiten: Annotated[
        Literal["pca"] | None,
        typer.Option(
            metavar="pca", help="Also score whitened embeddings. Learned on training classes, or --whiten-on."
        ),
    ] = None,
    whiten_on: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --whiten: kept embeddings (.npz) of other classes by the same model."),
    ] = None,
    tta: Annotated[
        Literal["flip", "five_crop"] | None,
        typer.Option(
            metavar="KIND", help="Also score mean embeddings of several views of an image: flip or five_crop."
        ),
    ] = None,
    verification: Annotated[
        bool,
        typer.Option(
            "--verification", help="Also verify pairs: TAR@FAR, FNMR@FMR, EER, ROC AUC; and CMC of a gallery."
        ),
    ] = False,
    roc: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --verification: write the ROC curve, as .csv, .png or .svg."),
    ] = None,
    footprint: Annotated[
        bool,
        typer.Option("--footprint", help="Also measure parameters, MACs, ms and bytes an image; takes some seconds."),
    ] = False,
    untrained: Annotated[
        bool | None, typer.Option("--untrained/--no-untrained", help="Also score the untrained network; the default.")
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
    from raydml.inference.bare import PREFIXES, parse_target

    if save_embeddings is not None:
        if save_embeddings.suffix != ".npz":
            raise CommandError(f"--save-embeddings {save_embeddings}: the file is a NumPy archive. Cure: name it *.npz")
        refuse_unwritable(f"--save-embeddings {save_embeddings}", save_embeddings, "file")
        with writing(f"--save-embeddings {save_embeddings}", "file"):
            save_embeddings.parent.mkdir(parents=True, exist_ok=True)
    if roc is not None:
        _refuse_roc(roc, is_verified=verification)
    is_saved = target.endswith(".npz")
    is_file = _is_weight_file(target, release)
    options: dict[str, Any] = {"--on": on if data is None else None, "--untrained": untrained}
    if is_saved:
        options |= {"--save-embeddings": save_embeddings, "--data": data, "--from": release, "--tta": tta}
        options |= {"--footprint": footprint or None}
    given = [name for name, value in options.items() if value is not None]
    if given and (is_saved or data is not None):
        what = "saved embeddings" if is_saved else "other images"
        raise CommandError(f"{', '.join(given)}: has no effect on {what}. Cure: leave it out")
    if distractors is not None and data is None:
        raise CommandError("--distractors goes with --data. Cure: --data FOLDER with the images to be found")
    if group is not None and data is None:
        raise CommandError("--group goes with --data; a study has its own, trial.data.group. Cure: leave it out")
    if exclude_same is not None and group is None:
        raise CommandError("--exclude-same goes with --group. Cure: --group COLUMN")
    of_data: dict[str, Any] = {"group": group, "exclude_same": exclude_same or "nothing"}
    columns = {"image": image_column, "label": label_column}
    if chosen := {key: column for key, column in columns.items() if column is not None}:
        if data is None or _container_of(data) is None:
            where = "--data" if data is None else f"--data {data}"
            option = f"--{next(iter(chosen))}-column"
            raise CommandError(f"{option} goes with Parquet files and tars, and {where} has none. Cure: leave it out")
        of_data |= chosen
    is_bare = target.startswith(PREFIXES)
    if (is_bare or is_file) and data is None:
        raise CommandError(f"TARGET = {target!r} has no classes of its own. Cure: --data FOLDER, or --data cub200")
    settings = _metric_settings(metrics, codes, recall_at, dims) | {"verification": verification}
    choice = _refinement_choice(rerank, whiten, whiten_on, tta, is_own=data is None and not is_saved)
    if is_bare:
        parse_target(target)
    if is_saved:
        of_file = _of_embeddings(Path(target), settings, choice, tracking_uri)
        _write_roc(roc, of_file)
        _print(of_file, as_json, None, roc)
        return
    with tempfile.TemporaryDirectory(prefix="raydml-") as folder:
        scratch = Path(folder)
        if is_file:
            found: FoundModel | None = _imported(Path(target), release, scratch)
        else:
            found = None if is_bare else find_model(target, storage, tracking_uri, scratch)
        skips = skip_unreadable and data is not None
        source = _ModelSource(target, found, scratch, storage, data_root, skips, tracking_uri)
        if data is None:
            options = {"untrained": untrained is not False, "footprint": footprint, "save_to": save_embeddings}
            result = _on_own_classes(source, on or "val", settings, choice, options)
        else:
            machine = source.machine
            of_data["cache_dir"] = machine.cache_dir
            roots = _Roots(data_root, machine.data_root)
            catalog = _catalog(data, roots, of_data)  # before torch is imported
            result = _on_other_images(
                source, data, catalog, on, distractors, settings, choice, footprint, save_embeddings
            )
    _write_roc(roc, result)
    _print(result, as_json, save_embeddings, roc)


def _is_weight_file(target: str, release: str | None) -> bool:
    """Return whether TARGET is the weight file of a release. Raises CommandError for --from with another TARGET."""
    from raydml.models.pretrained import SUFFIXES

    checked_release(release)
    path = Path(target)
    is_file = path.suffix in SUFFIXES and path.is_file()
    if path.suffix in SUFFIXES and not path.exists() and ":" not in target:
        raise CommandError(f"TARGET = {target!r}: there is no such file. Cure: the path of a weight file")
    if path.is_file() and path.suffix not in (*SUFFIXES, ".npz"):
        raise CommandError(
            f"TARGET = {target!r} is a file that ends in {path.suffix!r}. Cure: a weight file ({', '.join(SUFFIXES)}), "
            "or saved embeddings (.npz)"
        )
    if release is not None and not is_file:
        raise CommandError(
            f"--from {release}: TARGET = {target!r} is no weight file. Cure: the path of a file that ends in "
            f"{', '.join(SUFFIXES)}"
        )
    return is_file


def _imported(file: Path, release: str | None, scratch: Path) -> FoundModel:
    """Return the model in the weight file of a release; what was imported is printed."""
    from raydml.inference.released import describe_release, import_release

    model = import_release(file, release)
    for line in describe_release(model):
        typer.echo(line, err=True)
    return FoundModel(model.save(scratch / "imported"), None, False)


def _refuse_other_part(on: str | None, data: str, catalog: Catalog) -> None:
    """Raise CommandError unless --on is left out, or is test for a data set that has test images."""
    has_test = catalog.given_split is not None
    if on is None or (on == "test" and has_test):
        return
    what = f"the test images of {data} are scored" if has_test else f"all images of {data} are scored"
    raise CommandError(f"--on {on}: with --data, {what}. Cure: leave --on out")


class _ModelSource(NamedTuple):
    """A TARGET and what is needed to open it. found: None for a bare backbone."""

    target: str
    found: FoundModel | None
    scratch: Path
    storage: Path
    data_root: Path | None
    skip_unreadable: bool
    tracking_uri: str | None

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

    def checkpoint(self) -> Path:
        """The checkpoint; an exported model is written as one without training state, so both are evaluated alike."""
        from raydml.inference.export import EmbeddingModel
        from raydml.training import checkpoint

        assert self.found is not None
        if self.found.is_checkpoint:
            return self.found.folder
        model = EmbeddingModel.load(self.found.folder)
        weights = model.network.state_dict()
        return checkpoint.save(self.scratch / "checkpoint", state={}, model_card=model.card, best_weights=weights)


def _metric_settings(metrics: str | None, codes: str | None, recall_at: str | None, dims: str | None) -> dict[str, Any]:
    """The fields of MetricSpec that the command line sets; the others come from the trial."""
    from raydml.metrics.names import CODES, METRIC_GROUPS

    settings: dict[str, Any] = {"intervals": True}
    if metrics is not None:
        groups = METRIC_GROUPS if metrics == ALL else _chosen("--metrics", metrics, (*METRIC_GROUPS, ALL))
        settings["groups"] = tuple(groups)
    if codes is not None:
        settings["codes"] = tuple(_chosen("--codes", codes, CODES))
    if recall_at is not None:
        settings["recall_at"] = _numbers("--recall-at", recall_at, "k is", "1,10,100")
    if dims is not None:
        settings["dims"] = _numbers("--dims", dims, "a number of dimensions is", "32,64,128")
    return settings


def _numbers(option: str, text: str, what: str, example: str) -> tuple[int, ...]:
    """Return the numbers of an option, rising. Raises CommandError unless they are whole and at least 1."""
    try:
        numbers = tuple(sorted({int(number) for number in text.split(",")}))
    except ValueError as error:
        raise CommandError(f"{option} {text}: whole numbers separated by commas, such as {example}") from error
    if numbers[0] < 1:
        raise CommandError(f"{option} {text}: {what} at least 1")
    return numbers


def _refinement_choice(
    rerank: str | None, whiten: str | None, whiten_on: Path | None, tta: str | None, is_own: bool
) -> RefinementChoice | None:
    """What is scored beside the plain embeddings, None for nothing. Raises CommandError, and what `check` raises."""
    if whiten_on is not None and whiten is None:
        raise CommandError(f"--whiten-on {whiten_on}: has no effect without --whiten. Cure: --whiten pca")
    if not (rerank or whiten or tta):
        return None
    from raydml.evaluation.refinements import parse_rerank
    from raydml.inference.evaluate import RefinementChoice

    choice = RefinementChoice(tta, whiten is not None, whiten_on, parse_rerank(rerank) if rerank else None)
    choice.check(is_own)
    return choice


def _chosen(option: str, text: str, choices: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in choices:
            raise CommandError(f"{option} {text}: {name!r} is not one of {', '.join(choices)}")
    return names


def _on_own_classes(
    source: _ModelSource,
    on: Literal["val", "test"],
    settings: dict[str, Any],
    choice: RefinementChoice | None,
    options: dict[str, Any],
) -> _Result:
    """Score a model on classes of its trial. options: ``untrained``, ``footprint`` and ``save_to``."""
    from raydml.config.trial import parse_trial
    from raydml.data.digests import ImageRecord
    from raydml.evaluation.embed import metric_spec_of
    from raydml.evaluation.prefixes import prefix_dims_of
    from raydml.inference.evaluate import evaluate_checkpoint, refuse_absent_part
    from raydml.inference.export import epoch_of_weights
    from raydml.metrics.names import interval_text, metric_name
    from raydml.study.results import mean_of_runs
    from raydml.training import checkpoint
    from raydml.training.trial_images import Catalogs

    found = source.found
    assert found is not None
    folder = source.checkpoint()
    card = checkpoint.load_card(folder)
    if "trial" not in card:
        raise CommandError(
            f"TARGET = {source.target!r}: the model was not trained by raydml, so it has no classes of its own. "
            "Cure: --data FOLDER, or --data cub200"
        )
    refuse_absent_part(card, on, source.name, **_run_that_validates(found))
    key = record_test_read(found, source.target, source.storage) if on == "test" else None
    trial = parse_trial(card["trial"])
    evaluated = evaluate_checkpoint(
        folder,
        on,
        source.machine,
        key=key,
        spec=metric_spec_of(trial)._replace(**{"dims": prefix_dims_of(trial), **settings}),
        catalogs=Catalogs(source.machine, record=ImageRecord.of_study(found.study) if found.study else None),
        choice=choice,
        **options,
    )
    if on == "test" and found.study is not None:
        deliver_test_read(found.study, source.tracking_uri)
    facts = {"target": source.target, "on": on, "checkpoint": source.name, "fingerprint": card.get("fingerprint")}
    facts["epoch"] = epoch_of_weights(card)
    about = f"{source.name}, epoch {epoch_of_weights(card)}"
    if found.study is not None and (mean := mean_of_runs(found.study, _trial_of(found), on)) is not None:
        facts["mean_of_runs"] = mean._asdict()
        about += (
            f"\n  {mean.trial} is one of {mean.num_runs} runs of its configuration; their mean: "
            f"{metric_name(mean.metric)} {interval_text(mean.mean, mean.half_width)}"
        )
    return _Result(evaluated, f"{on} classes", about, facts)


def _run_that_validates(found: FoundModel) -> dict[str, str]:
    """The best run of a model's study that has validation classes, as the argument ``instead`` of the refusal."""
    from raydml.study.results import best_that_validates

    key = "" if found.study is None else best_that_validates(found.study)
    return {"instead": f"{study_argument(found.study)}:{key}"} if found.study and key else {}


def _trial_of(found: FoundModel) -> str:
    """The key of the trial whose checkpoint it is: <study>/confirm/run-000/confirm-001/checkpoint_000008."""
    return found.folder.parent.name


def _on_other_images(
    source: _ModelSource,
    data: str,
    catalog: Catalog,
    on: str | None,
    distractors: Path | None,
    settings: dict[str, Any],
    choice: RefinementChoice | None,
    footprint: bool,
    save_to: Path | None,
) -> _Result:
    machine = source.machine
    _refuse_other_part(on, data, catalog)
    if distractors is None:
        _refuse_one_class(catalog)
    from raydml.evaluation.embed import device_of, metric_spec_of
    from raydml.evaluation.prefixes import prefix_dims_of
    from raydml.evaluation.refinements import Refinements
    from raydml.evaluation.saved_embeddings import save_embeddings
    from raydml.evaluation.scoring import MetricSpec
    from raydml.inference.bare import open_bare
    from raydml.inference.evaluate import (
        Collection,
        embed_with_views,
        evaluate_saved,
        refuse_training_images,
        trained_on_every_class_of,
    )

    others = None if distractors is None else _catalog_of_distractors(distractors)
    network: Any
    marks: dict[str, str] = {}
    if source.found is None:
        _, network, preprocessing = open_bare(source.target)
        spec, precision, epoch = MetricSpec(DEFAULT_RECALL_AT), "fp32", ""
    else:
        from raydml.inference.export import epoch_of_weights, load_checkpoint

        model = load_checkpoint(source.checkpoint())
        network, preprocessing, card = model.network, model.preprocessing, model.card
        if "trial" in card:
            from raydml.config.trial import parse_trial

            trial = parse_trial(card["trial"])
            opened = [catalog, *([] if others is None else [others])]
            refuse_training_images(card, opened, source.name, **_run_that_validates(source.found))
            if trained := trained_on_every_class_of(card):
                marks["every_class_of"] = trained
            spec = metric_spec_of(trial)._replace(dims=prefix_dims_of(trial))
            precision, epoch = trial.precision, f", epoch {epoch_of_weights(card)}"
        else:
            release = card.get("release") or {}
            recall_at = (release.get("recall_at") or {}).get(data) or DEFAULT_RECALL_AT
            groups = tuple(release.get("groups") or ("retrieval",))
            spec = MetricSpec(tuple(recall_at), tuple(release.get("codes") or ("float",)), groups)
            precision, epoch = "fp32", ""
    spec = spec._replace(**settings)
    images = Collection(catalog, _record_read(source, f"--data {data}"))
    gallery = None
    if others is not None:
        gallery = Collection(others, _record_read(source, f"--distractors {distractors}"))
    saved, view_rows = embed_with_views(
        network,
        preprocessing,
        images,
        machine,
        distractors=gallery,
        precision=precision,
        tta=choice.tta if choice else None,
        facts={"recall_at": list(spec.recall_at), "checkpoint": source.name, **marks},
    )
    if save_to is not None:
        save_embeddings(save_to, saved)
    if "recall_at" not in settings:  # the k of the trial were chosen for other images
        spec = spec._replace(recall_at=tuple(k for k in spec.recall_at if k < len(saved.labels)) or (1,))
    refinements = choice and Refinements(
        choice.tta, view_rows, choice.whitening_of(saved, device=device_of(machine)), choice.rerank
    )
    evaluated = evaluate_saved(saved, spec, device_of(machine), refinements)
    if footprint:
        from raydml.inference.footprint import measure_footprint

        measured = measure_footprint(
            network,
            preprocessing,
            device=device_of(machine),
            precision=precision,
            largest_batch=machine.evaluation_batch,
        )
        evaluated = evaluated._replace(footprint=measured._asdict())
    if source.found is not None and source.found.study is not None:
        deliver_test_read(source.found.study, source.tracking_uri)
    facts = {"target": source.target, "on": data, "checkpoint": source.name, **marks}
    return _Result(evaluated, data, source.name + epoch + _mark(facts), facts)


def _mark(facts: Mapping[str, Any]) -> str:
    """Return the line that goes with each score of a model that was trained on every class of a data set, or ""."""
    trained = facts.get("every_class_of")
    return f"\n  this model was trained on every class of {trained}" if trained else ""


def _container_of(data: str) -> str | None:
    """Return the kind of files with images in them that a name ends like, None for any other."""
    from raydml.data.containers import CONTAINERS

    if Path(data).is_dir():
        return None
    return next((kind for kind, of in CONTAINERS.items() if data.lower().endswith(of.suffixes)), None)


#: The settings of a study that messages on images name, and what `evaluate` has in their place.
_OPTIONS = {"image": "--image-column", "label": "--label-column", "group": "--group", "path": "--data"}


class _Roots(NamedTuple):
    """given: by --data-root, for the paths in a list. of_data_sets: with that of the target's study, for data sets."""

    given: Path | None
    of_data_sets: Path | None


def _catalog(data: str, roots: _Roots, settings: Mapping[str, Any]) -> Catalog:
    """List the images of --data and log what was noticed. settings: keywords of `open_catalog`."""
    from raydml.data.catalog import DataError, log_notes

    try:
        catalog = _opened(data, roots, settings)
    except DataError as error:
        pattern = rf"(?<![\w./])data\.({'|'.join(_OPTIONS)})\b"
        raise DataError(re.sub(pattern, lambda key: _OPTIONS[key[1]], str(error))) from error
    if settings["group"] is not None and catalog.groups is None:
        raise DataError(f"--group {settings['group']}: {data} has no groups. Cure: leave it out, or --data CSV")
    log_notes(catalog.notes)
    return catalog


def _opened(data: str, roots: _Roots, settings: Mapping[str, Any]) -> Catalog:
    from raydml.data.catalog import DataError
    from raydml.data.datasets import DATASETS, open_catalog
    from raydml.data.formats import LIST_SUFFIXES

    path = Path(data)
    if path.is_dir():
        return open_catalog("image_folder", path.resolve(), **settings)
    if path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        # Not the folder of the target's own images: files of the same names there would be scored in silence.
        root = roots.given or path.resolve().parent
        return open_catalog("image_list", root, str(path.resolve()), **settings)
    if (kind := _container_of(data)) is not None:
        return open_catalog(kind, roots.given or path.resolve().parent, path=str(path.absolute()), **settings)
    if data in DATASETS:
        return open_catalog(data, roots.of_data_sets, **settings)
    raise DataError(f"--data {data}: no such folder, and no data set of that name. Names: {', '.join(DATASETS)}")


def _refuse_one_class(catalog: Catalog) -> None:
    """Raise DataError for images of one class alone: every neighbour is right then, and every score is 1."""
    from raydml.data.catalog import DataError

    if len(catalog.class_names) < 2:
        name = catalog.class_names[0] if catalog.class_names else "none"
        raise DataError(
            f"{catalog.root or catalog.name}: all images are of one class, {name!r}: every neighbour is right, "
            "and every score 1. Cure: images of two classes at least, in a folder for each, or --distractors FOLDER"
        )


def _catalog_of_distractors(folder: Path) -> Catalog:
    """List all images below a folder as one class of distractors."""
    from raydml.data.catalog import ImageEntry, catalog_of, find_files
    from raydml.inference.gallery import image_names

    files, _ = find_files(folder, [ImageEntry(name, "distractor") for name in image_names(folder)])
    return catalog_of("distractors", folder.resolve(), files)


def _record_read(source: _ModelSource, what: str) -> Any:
    return record_test_read(source.found, source.target, source.storage, what)


def _of_embeddings(
    path: Path, settings: dict[str, Any], choice: RefinementChoice | None, tracking_uri: str | None
) -> _Result:
    """Score saved embeddings without the model. Embeddings that may be of test classes count as a read of them."""
    from raydml.evaluation.refinements import Refinements
    from raydml.evaluation.saved_embeddings import load_embeddings
    from raydml.evaluation.scoring import MetricSpec
    from raydml.inference.evaluate import evaluate_saved

    saved = load_embeddings(path)
    refinements = choice and Refinements(whitening=choice.whitening_of(saved), rerank=choice.rerank)
    if saved.facts.get("part") != "val":
        study = study_above(path) or study_above(Path(str(saved.facts.get("checkpoint", ""))))
        record_test_read(FoundModel(path.absolute(), study, False), str(path.absolute()), path.absolute().parent)
        if study is not None:
            deliver_test_read(study, tracking_uri)
    spec = MetricSpec(tuple(saved.facts.get("recall_at") or DEFAULT_RECALL_AT))._replace(**settings)
    evaluated = evaluate_saved(saved, spec, refinements=refinements)
    about = f"{saved.facts.get('dataset', 'unknown data set')}, {saved.facts.get('part', 'unknown part')}"
    facts = {"target": str(path), "on": saved.facts.get("part"), "checkpoint": saved.facts.get("checkpoint")}
    if "every_class_of" in saved.facts:
        facts["every_class_of"] = saved.facts["every_class_of"]
    origin = f"{path}: embeddings of {saved.facts.get('checkpoint', 'an unknown model')}"
    return _Result(evaluated, about, origin + _mark(facts), facts)


def _print(result: _Result, as_json: bool, saved_to: Path | None, roc: Path | None) -> None:
    scores = result.evaluated.metrics
    trained = {name: value for name, value in scores.items() if not name.startswith("untrained_")}
    untrained = {name.removeprefix("untrained_"): scores[name] for name in scores if name.startswith("untrained_")}
    if as_json:
        found = {"metrics": trained, "untrained": untrained, "intervals": result.evaluated.intervals}
        found |= {"protocols": result.evaluated.protocols, "num_lone_queries": result.evaluated.num_lone_queries}
        if result.evaluated.footprint is not None:
            found["footprint"] = result.evaluated.footprint
        if result.evaluated.verification is not None:
            verified = result.evaluated.verification
            rates = {**_cmc(result.evaluated), **verified.metrics}
            found["verification"] = {"metrics": rates, "pairs": verified.sentence, "notes": verified.notes}
        if result.evaluated.refined:
            found["refined"] = {one.name: _refined_json(one) for one in result.evaluated.refined}
        typer.echo(json.dumps({**result.facts, **found}))
        return
    console = new_console()
    echo(console, result.source)
    for sentence in result.evaluated.protocols.values():
        echo(console, f"  {sentence}")
    console.print(tables.scores(trained, untrained, result.evaluated.intervals, title=result.title))
    if result.evaluated.footprint is not None:
        from raydml.inference.footprint import footprint_text

        echo(console, f"footprint: {footprint_text(result.evaluated.footprint)}")
    if result.evaluated.verification is not None:
        _print_verification(console, result.evaluated)
    for one in result.evaluated.refined:
        echo(console, f"\n{one.name}: another protocol; its scores do not compare with plain ones")
        for sentence in one.evaluation.protocols.values():
            echo(console, f"  {sentence}")
        console.print(tables.scores(one.evaluation.metrics, {}, one.evaluation.intervals, title=one.name))
    if roc is not None:
        echo(console, f"ROC curve: {roc}")
    if saved_to is not None:
        plain = " (without test-time augmentation, whitening and re-ranking)" if result.evaluated.refined else ""
        echo(console, f"embeddings: {saved_to}{plain}")


def _refuse_roc(file: Path, *, is_verified: bool) -> None:
    """Raise CommandError, before any work is done, for a file that the ROC curve cannot be written to."""
    if not is_verified:
        raise CommandError(f"--roc {file} goes with --verification. Cure: add --verification")
    if file.suffix not in (".csv", ".png", ".svg"):
        raise CommandError(f"--roc {file}: is no table and no picture. Cure: name it *.csv, *.png or *.svg")
    refuse_unwritable(f"--roc {file}", file, "file")


def _write_roc(file: Path | None, result: _Result) -> None:
    if file is None:
        return
    from raydml.report.roc import write_roc

    assert result.evaluated.verification is not None
    with writing(f"--roc {file}", "file"):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_roc(file, result.evaluated.verification.roc, result.title)


def _print_verification(console: Console, evaluated: Evaluation) -> None:
    verified, ranks = evaluated.verification, _cmc(evaluated)
    assert verified is not None
    echo(console, "")
    for line in (verified.sentence, *verified.notes):
        echo(console, f"  {line}")
    if ranks:
        echo(
            console, "  CMC rank-k: share of queries that are identified among the k nearest; the same as Recall@k here"
        )
    console.print(tables.scores({**ranks, **verified.metrics}, {}, {}, title="pairs"))


def _cmc(evaluated: Evaluation) -> dict[str, float]:
    """The identification rate at each rank, where queries search a gallery of other images; else nothing.

    It is Recall@k of the first protocol by another name. A query without an image of its class to find is left out, as
    in the protocol of Market-1501 and in closed-set identification, where each query has one; in a benchmark it is a
    miss, as in Recall@k. Source: Phillips et al. 2000, "The FERET evaluation methodology for face-recognition
    algorithms", PAMI 22.
    """
    if next(iter(evaluated.protocols)).removesuffix("_across_groups") not in ("query_gallery", "one_gallery_image"):
        return {}
    prefix = "recall_at_"
    return {
        f"cmc_rank_{name.removeprefix(prefix)}": value
        for name, value in evaluated.metrics.items()
        if name.startswith(prefix)
    }


def _refined_json(one: RefinedEvaluation) -> dict[str, Any]:
    """A refinement for --json: its settings and numbers, apart from the plain ones."""
    found = one.evaluation
    return {
        "settings": one.settings,
        "metrics": found.metrics,
        "intervals": found.intervals,
        "protocols": found.protocols,
    }
