"""Evaluation of anything: a checkpoint on its trial's classes, other images, saved embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.refit import trains_on_test_classes, validates
from raydml.config.trial import Machine, Trial, parse_trial
from raydml.data.benchmarks import BENCHMARK_OF
from raydml.data.catalog import WITHOUT_FILES, Catalog, DataError, digests_of_files, listed
from raydml.data.seal import TestKey
from raydml.data.splits import Split
from raydml.evaluation.embed import Evaluation, device_of, embed, evaluate_embeddings, metric_spec_of
from raydml.evaluation.prefixes import score_prefixes
from raydml.evaluation.protocols import DISTRACTOR, protocols_of
from raydml.evaluation.saved_embeddings import SavedEmbeddings, save_embeddings
from raydml.evaluation.scoring import MetricSpec
from raydml.images.cache import Images, load_test
from raydml.images.pixels import Pixels
from raydml.images.preprocessing import Preprocessing
from raydml.inference.export import load_checkpoint
from raydml.models.network import build_network
from raydml.training.parts import network_arguments
from raydml.training.randomness import seed_for
from raydml.training.trial_images import Catalogs, open_development, open_test, split_for, storage_for


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
    }
    names = tuple(class_names)
    saved = SavedEmbeddings(embed_part(model.network), images.labels, names, images.paths, images.roles, facts)
    if save_to is not None:
        save_embeddings(save_to, saved)
    found = evaluate_saved(saved, spec, run_on)
    if untrained:
        beginning = build_network(
            **network_arguments(trial), weights=trial.model.weights, seed=seed_for(trial.seed, "network_init")
        )
        at_start = saved._replace(embeddings=embed_part(beginning))
        start = evaluate_saved(at_start, spec._replace(intervals=False, dims=()), run_on)
        found.metrics.update({f"untrained_{name}": value for name, value in start.metrics.items()})
    return found._replace(num_left_out=len(images.skipped))


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
        return opened.val, names, {"protocols": list(protocols_of(opened.val.roles, ()))}
    assert key is not None
    catalog, images = open_test(trial, machine, key, catalogs)
    names = [catalog.class_names[number] for number in split_for(trial, catalog).test]
    return images, names, _scored_by(catalog, images.roles)


def _scored_by(catalog: Catalog, roles: Sequence[str] | None) -> dict[str, Any]:
    """Return the protocols of the test part, and its lists where it has some: name -> names of the classes."""
    lists = {name: list(classes) for name, classes in catalog.lists.items()}
    return {"protocols": list(protocols_of(roles, catalog.protocols)), **({"lists": lists} if lists else {})}


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
    run_on = device or device_of(machine)
    network = network.to(run_on)
    catalog = collection.catalog
    parts = [_open(collection, preprocessing, machine)]
    if distractors is not None:
        parts.append(_open(distractors, preprocessing, machine))
    embeddings = [
        embed(
            network, part.pixels, preprocessing, device=run_on, batch_size=machine.evaluation_batch, precision=precision
        )
        for part in parts
    ]
    class_names = [catalog.class_names[number] for number in _classes_of(catalog)]
    labels, roles = parts[0].labels, parts[0].roles
    if distractors is not None:
        labels = np.concatenate([labels, np.full(len(parts[1].labels), len(class_names))])
        roles = (*(roles or [""] * len(parts[0].labels)), *[DISTRACTOR] * len(parts[1].labels))
        class_names.append(f"({DISTRACTOR})")
    part_name = "all" if catalog.given_split is None else "test"
    return SavedEmbeddings(
        np.concatenate(embeddings),
        labels,
        tuple(class_names),
        tuple(path for part in parts for path in part.paths),
        roles,
        {"dataset": catalog.name, "part": part_name, **_scored_by(catalog, roles), **facts},
    )


def evaluate_saved(saved: SavedEmbeddings, spec: MetricSpec, device: str = "cpu") -> Evaluation:
    """Score saved embeddings by the protocols and lists saved beside them; needs neither a model nor images.

    Raises DataError for images of one class alone.
    """
    if len(np.unique(saved.labels)) < 2:
        raise DataError(
            f"all {len(saved.labels)} images are of one class, {saved.class_names[saved.labels[0]]!r}: every neighbour "
            "is right, and every score 1. Cure: images of two classes at least"
        )
    protocols: Sequence[str] = saved.facts.get("protocols") or protocols_of(saved.roles, ())
    numbers = {name: number for number, name in enumerate(saved.class_names)}
    listed: Mapping[str, Sequence[str]] = saved.facts.get("lists") or {}
    lists = {name: [numbers[one] for one in classes if one in numbers] for name, classes in listed.items()}
    found = evaluate_embeddings(saved.embeddings, saved.labels, saved.roles, protocols, spec, device, lists)
    if spec.dims:
        images = (saved.embeddings, saved.labels, saved.roles)
        found.metrics.update(score_prefixes(*images, protocols[0], spec.dims, device))
    return found


def _open(collection: Collection, preprocessing: Preprocessing, machine: Machine) -> Images:
    split = Split((), (), _classes_of(collection.catalog))
    return load_test(collection.catalog, split, storage_for(preprocessing, machine), key=collection.key)


def _classes_of(catalog: Catalog) -> tuple[int, ...]:
    if catalog.given_split is None:
        return tuple(range(len(catalog.class_names)))
    is_test = np.array(catalog.given_split) == "test"
    return tuple(int(number) for number in np.unique(catalog.labels[is_test]))
