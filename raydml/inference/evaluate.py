"""Evaluation of anything: a checkpoint on its trial's classes, other images, saved embeddings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.refit import trains_on_test_classes, validates
from raydml.config.sections import ExtraTest
from raydml.config.trial import Machine, Trial, parse_trial
from raydml.data.benchmarks import BENCHMARK_OF
from raydml.data.catalog import WITHOUT_FILES, Catalog, DataError, Groups, digests_of_files, listed
from raydml.data.seal import TestKey
from raydml.data.splits import Split
from raydml.evaluation.embed import (
    Evaluation,
    RefinedEvaluation,
    device_of,
    embed,
    evaluate_embeddings,
    lone_queries_miss,
    metric_spec_of,
)
from raydml.evaluation.prefixes import score_prefixes
from raydml.evaluation.protocols import DISTRACTOR, ProtocolError, num_lone_queries, protocols_of, retrieval_tasks
from raydml.evaluation.refinements import Refinements, evaluate_refinements
from raydml.evaluation.reranking import Rerank
from raydml.evaluation.saved_embeddings import SavedEmbeddings, load_embeddings, save_embeddings
from raydml.evaluation.scoring import MetricSpec
from raydml.evaluation.verification import verify
from raydml.evaluation.views import with_views
from raydml.evaluation.whitening import Whitening, learn_on_kept, learn_whitening, refuse_test_classes
from raydml.images.cache import Images, load_test
from raydml.images.pixels import Pixels
from raydml.images.preprocessing import Preprocessing
from raydml.inference.export import load_checkpoint
from raydml.inference.footprint import measure_footprint
from raydml.models.network import build_network
from raydml.ops.wording import counted
from raydml.training.parts import plain_network_arguments
from raydml.training.randomness import seed_for
from raydml.training.trial_images import Catalogs, open_development, open_test, split_for, storage_for


class RefinementChoice(NamedTuple):
    """What to score beside the plain embeddings.

    tta: "flip", "five_crop" or None. whiten: with PCA, learned on the embeddings in whiten_on or, without such a file,
    on the images that the model was trained on. rerank: settings or None.
    """

    tta: str | None = None
    whiten: bool = False
    whiten_on: Path | None = None
    rerank: Rerank | None = None

    def check(self, is_own: bool) -> None:
        """Raise DataError where whitening has nothing to learn on, RetrievalError for a file that cannot serve.

        is_own: the model is scored on its own validation or test classes, so that its training images are known.
        """
        if self.whiten_on is not None:
            refuse_test_classes(load_embeddings(self.whiten_on), self.whiten_on)
        elif self.whiten and not is_own:
            raise DataError(
                "--whiten pca: there are no images to learn it on, and it is never learned on the images that are "
                "scored. Cure: --whiten-on FILE with embeddings of other classes by the same model (evaluate ... "
                "--save-embeddings FILE, with --on val or --data FOLDER)"
            )

    def whitening_of(
        self, scored: SavedEmbeddings, learn: Callable[[], Whitening] | None = None, device: str = "cpu"
    ) -> Whitening | None:
        """Return the whitening, None where none is wanted. learn: learns it where there is no file. device: where the
        embeddings in a file are compared with those that are scored."""
        if not self.whiten:
            return None
        if self.whiten_on is not None:
            return learn_on_kept(load_embeddings(self.whiten_on), scored, self.whiten_on, device)
        assert learn is not None
        return learn()


def embed_as_trained(
    trial: Trial,
    machine: Machine,
    device: str,
    preprocessing: Preprocessing,
    pixels: Pixels,
    network: nn.Module,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """Embed images (N, D) with the precision and memory layout of a trial; see `evaluation/embed.py`."""
    if trial.channels_last:  # another layout sums in another order
        network.to(memory_format=torch.channels_last)
    return embed(
        network.to(device),
        pixels,
        preprocessing,
        device=device,
        batch_size=machine.evaluation_batch,
        precision=trial.precision,
        forward=forward,
    )


def digest_of_weights(network: nn.Module) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over the names and bytes of a network's weights: which model it is,
    under any path."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate_checkpoint(
    checkpoint_folder: Path,
    part: Literal["val", "test"],
    machine: Machine,
    *,
    key: TestKey | None = None,
    device: str | None = None,
    untrained: bool = True,
    spec: MetricSpec | None = None,
    save_to: Path | None = None,
    catalogs: Catalogs | None = None,
    choice: RefinementChoice | None = None,
    footprint: bool = False,
) -> Evaluation:
    """Score a checkpoint's best weights on the validation or the test classes of its own trial.

    Args:
        checkpoint_folder: a checkpoint, see checkpoint.py.
        part: "val", or "test" with a key from `TestReads.record`.
        machine: the folder of the images and the batch size.
        device: the device; None takes `machine.device` ("auto": a GPU where torch sees one).
        untrained: also score the network as the trial started from it (same seed, same pretrained weights if any),
            under the same names with the prefix `untrained_`.
        spec: the metrics to compute; None: those of the trial.
        save_to: a file for the embeddings (saved_embeddings.py), written before they are scored.
        catalogs: of this machine, with the record of the study's images where there is one.
        choice: what to score beside the plain embeddings. Whitening is learned on the training images of the trial and,
            for the test part, on its validation images as well.
        footprint: also measure what the network takes to embed an image.

    Raises DataError for the test part without a key, for a part that the trial trained on (see `refuse_absent_part`),
    and for images other than those of the trial.
    """
    if part == "test" and key is None:
        raise DataError("part: test; the test classes are sealed. Pass the key that TestReads(...).record(...) returns")
    model = load_checkpoint(checkpoint_folder)
    refuse_absent_part(model.card, part, str(checkpoint_folder))
    trial = parse_trial(model.card["trial"])
    images, class_names, scored_by = _open_part(trial, part, machine, key, catalogs)
    run_on = device or device_of(machine)
    spec = spec or metric_spec_of(trial)

    embed_part = partial(embed_as_trained, trial, machine, run_on, model.preprocessing, images.pixels)
    facts = {
        "dataset": trial.data.name,
        "part": part,
        **scored_by,
        "recall_at": list(spec.recall_at),
        "fingerprint": model.card.get("fingerprint"),
        "seed": trial.seed,
        "checkpoint": str(checkpoint_folder),
        "weights": digest_of_weights(model.network),
    }
    names = tuple(class_names)
    rows = embed_part(model.network)
    saved = SavedEmbeddings(rows, images.labels, names, images.paths, images.roles, facts, images.groups)
    if save_to is not None:
        save_embeddings(save_to, saved)
    choice = choice or RefinementChoice()

    def learn() -> Whitening:
        opened = open_development(trial, machine, augmented=False, catalogs=catalogs)
        parts = [opened.train, *([opened.val] if part == "test" and len(opened.val.labels) else [])]
        words = "training and validation" if len(parts) > 1 else "training"
        rows = [
            embed_as_trained(trial, machine, run_on, model.preprocessing, one.pixels, model.network) for one in parts
        ]
        return learn_whitening(np.concatenate(rows), f"the {words} images of its trial")

    refinements = Refinements(choice.tta, whitening=choice.whitening_of(saved, learn, run_on), rerank=choice.rerank)
    if choice.tta is not None:
        embed_views = partial(embed_as_trained, trial, machine, run_on, model.preprocessing, network=model.network)
        rows = with_views(saved.embeddings, images.pixels, model.preprocessing, choice.tta, embed_views)
        refinements = refinements._replace(view_rows=rows)
    found = evaluate_saved(saved, spec, run_on, refinements)
    if footprint:
        measured = measure_footprint(
            model.network, model.preprocessing, device=run_on, precision=trial.precision,
            channels_last=trial.channels_last, largest_batch=machine.evaluation_batch,
        )  # fmt: skip
        found = found._replace(footprint=measured._asdict())
    if untrained:
        beginning = build_network(
            **plain_network_arguments(trial), weights=trial.model.weights, seed=seed_for(trial.seed, "network_init")
        )
        at_start = saved._replace(embeddings=embed_part(beginning))
        start = evaluate_saved(at_start, spec._replace(intervals=False, verification=False, dims=()), run_on)
        found.metrics.update({f"untrained_{name}": value for name, value in start.metrics.items()})
    return found._replace(num_left_out=len(images.skipped))


def evaluate_extra_test(
    checkpoint_folder: Path,
    name: str,
    machine: Machine,
    *,
    key: TestKey,
    device: str | None = None,
    untrained: bool = True,
    spec: MetricSpec | None = None,
    catalogs: Catalogs | None = None,
) -> Evaluation:
    """Score a checkpoint's best weights on the extra test of its trial with this name, with which all names begin.

    The k of Recall@k that a query has no images for are left out, and Recall@1 stays. Copies of development images are
    counted in a sentence of the protocols. The rest as in `evaluate_checkpoint`.

    Raises DataError: see `check_extra_test`; the images may have changed since the study began.
    """
    model = load_checkpoint(checkpoint_folder)
    trial = parse_trial(model.card["trial"])
    (extra,) = [one for one in trial.data.extra_tests if one.name == name]
    catalogs = catalogs or Catalogs(machine)
    spec = spec or metric_spec_of(trial)
    networks = {"": model.network}
    if untrained:
        seed = seed_for(trial.seed, "network_init")
        networks["untrained_"] = build_network(**plain_network_arguments(trial), weights=trial.model.weights, seed=seed)
    catalog = catalogs.extra(extra)
    storage = replace(storage_for(model.preprocessing, machine), record=catalogs.record)
    images = load_test(catalog, Split((), (), _classes_of(catalog)), storage, key=key)
    num_found = _checked_num_found(extra, images.labels, images.roles, images.groups, catalog.protocols)
    names = tuple(catalog.class_names[number] for number in _classes_of(catalog))
    facts = {"dataset": catalog.name, "part": "test", **_scored_by(catalog, images.roles, images.groups)}
    spec = spec._replace(recall_at=tuple(k for k in spec.recall_at if k <= num_found) or (1,))
    whole = Evaluation({}, {}, {}, num_left_out=len(images.skipped))
    run_on = device or device_of(machine)
    for prefix, network in networks.items():
        rows = embed_as_trained(trial, machine, run_on, model.preprocessing, images.pixels, network)
        saved = SavedEmbeddings(rows, images.labels, names, images.paths, images.roles, facts, images.groups)
        scored = evaluate_saved(saved, spec._replace(intervals=spec.intervals and not prefix), run_on)
        whole.metrics.update({f"{prefix}{name}_{metric}": value for metric, value in scored.metrics.items()})
        whole.intervals.update({f"{name}_{metric}": bounds for metric, bounds in scored.intervals.items()})
        if not prefix:
            sentences = {f"{name}_{key}": f"{name}: {text}" for key, text in scored.protocols.items()}
            whole = whole._replace(protocols=sentences, num_lone_queries=scored.num_lone_queries)
    if num_shared := _num_in_development(images, trial, machine, catalogs):
        whole.protocols[f"{name}_shared"] = (
            f"{name}: {num_shared:,} of {counted(len(images.paths), 'image')} are byte for byte among the development "
            "images of the trial, so these scores are not those of unseen images alone"
        )
    return whole


def _num_in_development(images: Images, trial: Trial, machine: Machine, catalogs: Catalogs) -> int:
    """Count the images whose bytes are those of an image that trained or validated in the trial."""
    if images.digests is None:
        return 0
    opened = open_development(trial, machine, augmented=False, catalogs=catalogs)
    known = {row.tobytes() for part in (opened.train, opened.val) if part.digests is not None for row in part.digests}
    return sum(row.tobytes() in known for row in images.digests if row.any())  # zeros: not read


def check_extra_test(extra: ExtraTest, catalog: Catalog, own: Catalog, split: Split) -> None:
    """Raise DataError for an extra test that cannot be scored: the catalogs are enough, no image is opened.

    Such are images of fewer than two classes, roles that fit no protocol, images or groups among which no query has
    another one to find, and files that train or validate. own, split: of the trial, and its parts.
    """
    rows = np.flatnonzero(np.isin(catalog.labels, _classes_of(catalog)))
    development = np.flatnonzero(np.isin(own.labels, [*split.train, *split.val]))
    if shared := _real_paths(catalog, rows) & _real_paths(own, development):
        raise DataError(
            f"data.extra_tests: {extra.name}: {len(shared):,} of its {counted(len(rows), 'image')} train or validate "
            f"in the trial: {listed(sorted(shared), 3)}. Cure: other images in root = {extra.root!r}, such as those of "
            "classes that do not train"
        )
    roles = None if catalog.roles is None else [catalog.roles[row] for row in rows]
    groups = None if catalog.groups is None else catalog.groups.select(rows)
    _checked_num_found(extra, catalog.labels[rows], roles, groups, catalog.protocols)


def _real_paths(catalog: Catalog, rows: NDArray[np.int64]) -> set[str]:
    """Return the real path of each image with these numbers; links of folders are followed. None without files."""
    if catalog.root is None:
        return set()
    root = catalog.root
    paths = [os.path.split(catalog.paths[row]) for row in rows.tolist()]
    folders = {folder: os.path.realpath(root / folder) for folder in {folder for folder, _ in paths}}
    return {os.path.join(folders[folder], name) for folder, name in paths}


def _checked_num_found(
    extra: ExtraTest,
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    groups: Groups | None,
    declared: Sequence[str],
) -> int:
    """Return how many images every query finds under every protocol. Raises DataError as `check_extra_test` does."""

    def refuse(reason: str, cure: str) -> NoReturn:
        raise DataError(f"data.extra_tests: {extra.name}: {reason}. Cure: {cure}, or leave this extra test out")

    where = f"the images in root = {extra.root!r}"
    if (num_classes := len(np.unique(labels))) < 2:
        refuse(f"{where} are of {counted(num_classes, 'class', 'classes')}", "images of two classes at least")
    num_found = []
    for protocol in protocols_of(roles, declared, groups):
        try:
            tasks = retrieval_tasks(protocol, labels, roles, groups)
        except ProtocolError as error:
            refuse(f"{where}: {error}", "give each image a role in the column role, or none")
        num_found += [task.num_found for task in tasks]
        if num_lone_queries(protocol, labels, roles, groups) == len(tasks[0].queries):
            among = " in another group" if groups is not None and groups.are_excluded else ""
            cure = "classes with two images at least" + (", or exclude_same: nothing" if among else "")
            refuse(f"{where}: no query has another image of its class{among} to find", cure)
    if min(num_found) < 1:
        refuse(
            f"{where}: a query has no image to search, because all of the gallery are of its class and group "
            f"(exclude_same: {extra.exclude_same})",
            "a gallery of several groups, or exclude_same: nothing",
        )
    if groups is not None and not groups.are_excluded and len(set(groups.names)) > 1:
        of_group = np.unique(np.array(groups.names, dtype=np.str_), return_inverse=True)[1].astype(np.int64)
        for protocol in protocols_of(roles, declared):
            num_queries = len(retrieval_tasks(protocol, of_group, roles)[0].queries)
            if num_lone_queries(protocol, of_group, roles) == num_queries:
                refuse(
                    f"group = {extra.group!r}: no query has another image of its group to find, in {where}",
                    "another group, or group: null",
                )
    return min(num_found)


def refuse_absent_part(
    card: Mapping[str, Any], part: Literal["val", "test"], what: str, instead: str = "STUDY:confirm-000"
) -> None:
    """Raise DataError where a model was trained on the classes of a part: its score would not be of unseen classes.

    card: the model card, with its ``trial``. what: the model, for the message. instead: a run of its study that
    has validation classes. Call it before the read of the test classes is recorded.
    """
    trial = card.get("trial") or {}
    if part == "test" and trains_on_test_classes(trial):
        raise DataError(
            f"{what}: this model was trained on the test classes as well (study.refit.classes: all, or "
            "trial.data.split.test_fraction: 0), so nothing can be measured on them. Cure: images of other classes "
            f"(--data FOLDER), or a run of the study that was trained without them ({instead} --on test)"
        )
    if part == "val" and trains_on_test_classes(trial):
        raise DataError(
            f"{what}: no class validates this model, which was trained on every class, the test classes included. "
            "Cure: images of other classes (--data FOLDER)"
        )
    if part == "val" and not validates(trial):
        raise DataError(
            f"{what}: no class validates this model, which was trained on all development classes. Cure: the "
            "test classes (--on test; the read is recorded), images of other classes (--data FOLDER), or a run of its "
            f"study that validates ({instead} --on val)"
        )


def refuse_training_images(
    card: Mapping[str, Any], catalogs: Sequence[Catalog], what: str, instead: str = "STUDY:confirm-000"
) -> None:
    """Raise DataError where a model that trained on every class of a data set would be scored on images of it.

    These are another name or list of the same benchmark, images with the same content hash, and files that are among
    those that it trained on, under any name. Images that were written again (resized, say) are not recognized.

    card: the model card, with its ``trial`` and the digests of its files. catalogs: of the images to score and of
    distractors. what: the model, for the message. instead: a run of its study that was trained without the test
    classes. To be called before the read of the images is recorded.
    """
    trained = trained_on_every_class_of(card)
    if not trained:
        return
    data = card["trial"]["data"]
    digests = set(card.get("trained_on_files", "").split())
    for catalog in catalogs:
        if _has_images_of(catalog.name, data["name"]):
            reason = f"{catalog.name} has images of it"
        elif data.get("content") == catalog.content:
            reason = f"{catalog.root or catalog.name} has the same images"
        else:
            known = [path for path, digest in digests_of_files(catalog).items() if digest in digests]
            reason = f"{len(known)} of {len(catalog.paths)} images in {catalog.root} are among them: {listed(known, 3)}"
            if not known:
                continue
        raise DataError(
            f"{what}: this model was trained on every class of {trained}, and {reason}, so no score would be one of "
            "unseen images. Cure: images of other classes, or a run of the study that was trained without the test "
            f"classes ({instead})"
        )


def _has_images_of(name: str, other: str) -> bool:
    """Return whether two names are of the same benchmark, or of the same drawn images."""
    named = other in BENCHMARK_OF or other in WITHOUT_FILES  # the others are the user's own, of any content
    return named and BENCHMARK_OF.get(name, name) == BENCHMARK_OF.get(other, other)


def trained_on_every_class_of(card: Mapping[str, Any]) -> str:
    """Return the name of the data set that a model was trained on with its test classes, or "" for other models."""
    trial = card.get("trial") or {}
    return str(trial["data"]["name"]) if trains_on_test_classes(trial) else ""


def _open_part(
    trial: Trial, part: str, machine: Machine, key: TestKey | None, catalogs: Catalogs | None
) -> tuple[Images, list[str], dict[str, Any]]:
    """Return the images of a part, the names of its classes, and how it is scored, as saved beside embeddings."""
    if part == "val":
        opened = open_development(trial, machine, augmented=False, catalogs=catalogs)
        names = [opened.catalog.class_names[number] for number in opened.split.val]
        # declared protocols and lists are for the test classes
        return opened.val, names, {"protocols": list(protocols_of(opened.val.roles, (), opened.val.groups))}
    assert key is not None
    catalog, images = open_test(trial, machine, key, catalogs)
    names = [catalog.class_names[number] for number in split_for(trial, catalog).test]
    return images, names, _scored_by(catalog, images.roles, images.groups)


def _scored_by(catalog: Catalog, roles: Sequence[str] | None, groups: Groups | None) -> dict[str, Any]:
    """Return the protocols of the test part, and its lists where it has some: name -> names of the classes."""
    lists = {name: list(classes) for name, classes in catalog.lists.items()}
    return {"protocols": list(protocols_of(roles, catalog.protocols, groups)), **({"lists": lists} if lists else {})}


class Collection(NamedTuple):
    """A data set and the key that opens it: its images may be test images of a study, so each read is recorded."""

    catalog: Catalog
    key: TestKey


def embed_collection(
    network: nn.Module,
    preprocessing: Preprocessing,
    collection: Collection,
    machine: Machine,
    *,
    distractors: Collection | None = None,
    device: str | None = None,
    precision: str = "fp32",
    facts: dict[str, Any],
) -> SavedEmbeddings:
    """Embed the test images of a data set with a given split, or all images of another one.

    Args:
        network: images (B, 3, crop, crop), prepared by `preprocessing`, to embeddings (B, D).
        distractors: further gallery images, wrong for every query; their labels do not matter.
        device: None takes `machine.device` ("auto": a GPU where torch sees one).
        facts: further facts to save beside the embeddings.
    """
    return embed_with_views(
        network, preprocessing, collection, machine, distractors=distractors, device=device, precision=precision,
        tta=None, facts=facts,
    )[0]  # fmt: skip


def embed_with_views(
    network: nn.Module,
    preprocessing: Preprocessing,
    collection: Collection,
    machine: Machine,
    *,
    distractors: Collection | None = None,
    device: str | None = None,
    precision: str = "fp32",
    tta: str | None,
    facts: dict[str, Any],
) -> tuple[SavedEmbeddings, NDArray[np.float32] | None]:
    """Return what `embed_collection` returns and, for a kind of test-time augmentation, the embeddings (N, D) of it."""
    run_on = device or device_of(machine)
    weights = digest_of_weights(network)
    network = network.to(run_on)
    catalog = collection.catalog
    parts = [_open(collection, preprocessing, machine)]
    if distractors is not None:
        parts.append(_open(distractors, preprocessing, machine))
    embed_pixels = partial(
        embed, network, preprocessing=preprocessing, device=run_on, batch_size=machine.evaluation_batch,
        precision=precision,
    )  # fmt: skip
    embeddings = [embed_pixels(part.pixels) for part in parts]
    view_rows = None
    if tta is not None:
        both = zip(embeddings, parts, strict=True)
        view_rows = np.concatenate([with_views(rows, of.pixels, preprocessing, tta, embed_pixels) for rows, of in both])
    class_names = [catalog.class_names[number] for number in _classes_of(catalog)]
    labels, roles, groups = parts[0].labels, parts[0].roles, parts[0].groups
    if distractors is not None:
        labels = np.concatenate([labels, np.full(len(parts[1].labels), len(class_names))])
        roles = (*(roles or [""] * len(parts[0].labels)), *[DISTRACTOR] * len(parts[1].labels))
        if groups is not None:
            groups = groups._replace(names=(*groups.names, *[""] * len(parts[1].labels)))
        class_names.append(f"({DISTRACTOR})")
    part_name = "all" if catalog.given_split is None else "test"
    saved = SavedEmbeddings(
        np.concatenate(embeddings),
        labels,
        tuple(class_names),
        tuple(path for part in parts for path in part.paths),
        roles,
        {"dataset": catalog.name, "part": part_name, **_scored_by(catalog, roles, groups), "weights": weights, **facts},
        groups,
    )
    return saved, view_rows


def evaluate_saved(
    saved: SavedEmbeddings, spec: MetricSpec, device: str = "cpu", refinements: Refinements | None = None
) -> Evaluation:
    """Score saved embeddings by the protocols and lists saved beside them; needs neither a model nor images.

    refinements: what is scored beside the plain embeddings.

    Raises DataError for images of one class alone.
    """
    if len(np.unique(saved.labels)) < 2:
        raise DataError(
            f"all {len(saved.labels)} images are of one class, {saved.class_names[saved.labels[0]]!r}: every neighbour "
            "is right, and every score 1. Cure: images of two classes at least"
        )
    protocols: Sequence[str] = saved.facts.get("protocols") or protocols_of(saved.roles, (), saved.groups)
    numbers = {name: number for number, name in enumerate(saved.class_names)}
    listed: Mapping[str, Sequence[str]] = saved.facts.get("lists") or {}
    lists = {name: [numbers[one] for one in classes if one in numbers] for name, classes in listed.items()}
    spec = spec._replace(lone_misses=lone_queries_miss(str(saved.facts.get("dataset", ""))))
    scored = (saved.labels, saved.roles, protocols, spec, device, lists)
    found = evaluate_embeddings(saved.embeddings, *scored, saved.groups)
    refined: tuple[RefinedEvaluation, ...] = ()
    if refinements is not None:
        refined = evaluate_refinements(saved.embeddings, *scored, refinements, saved.groups)
    verified = None
    if spec.verification:
        verified = verify(saved.embeddings, saved.labels, saved.roles, protocols[0], groups=saved.groups)
    if spec.dims:
        images = (saved.embeddings, saved.labels, saved.roles)
        metrics = score_prefixes(
            *images, protocols[0], spec.dims, device, groups=saved.groups, lone_misses=spec.lone_misses
        )
        found = found._replace(metrics={**found.metrics, **metrics})
    return found._replace(refined=refined, verification=verified)


def _open(collection: Collection, preprocessing: Preprocessing, machine: Machine) -> Images:
    split = Split((), (), _classes_of(collection.catalog))
    return load_test(collection.catalog, split, storage_for(preprocessing, machine), key=collection.key)


def _classes_of(catalog: Catalog) -> tuple[int, ...]:
    if catalog.given_split is None:
        return tuple(range(len(catalog.class_names)))
    is_test = np.array(catalog.given_split) == "test"
    return tuple(int(number) for number in np.unique(catalog.labels[is_test]))
