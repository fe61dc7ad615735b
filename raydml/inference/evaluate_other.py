"""Any network on any images, and embeddings that were kept: evaluation outside a trial's own data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from raydml.config.trial import Machine
from raydml.data.catalog import Catalog
from raydml.data.seal import TestKey
from raydml.data.splits import Split
from raydml.evaluation.embed import Evaluated, Wanted, device_of, embed, evaluate_embeddings
from raydml.evaluation.protocols import DISTRACTOR, protocols_of
from raydml.evaluation.saved_embeddings import SavedEmbeddings
from raydml.images.image_cache import Images, Storage, load_test
from raydml.images.preprocessing import Preprocessing


class Sealed(NamedTuple):
    """A data set and the key that opens it: its images may be sealed in some study, so each read is on record."""

    catalog: Catalog
    key: TestKey


def embed_collection(
    network: nn.Module,
    preprocessing: Preprocessing,
    collection: Sealed,
    machine: Machine,
    *,
    distractors: Sealed | None = None,
    device: str | None = None,
    precision: str = "fp32",
    facts: dict[str, Any],
) -> SavedEmbeddings:
    """The embeddings of a data set: of its test images where it comes with a split of its own, else of all.

    Args:
        network: images (B, 3, crop, crop), prepared as `preprocessing` says, to embeddings (B, D).
        distractors: images that every query searches too and that are never right; their labels do not matter.
        device: None takes `machine.device` ("auto": a GPU where torch sees one).
        facts: what else to keep beside the embeddings.

    Raises what reading and embedding raise.
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
    protocols = protocols_of(roles, catalog.protocols)
    about = {"dataset": catalog.name, "part": "all" if catalog.given_split is None else "test"}
    return SavedEmbeddings(
        np.concatenate(embeddings),
        labels,
        tuple(class_names),
        tuple(path for part in parts for path in part.paths),
        roles,
        {**about, "protocols": list(protocols), **facts},
    )


def evaluate_saved(saved: SavedEmbeddings, wanted: Wanted, device: str = "cpu") -> Evaluated:
    """Score embeddings by the protocols that they were kept with. Needs neither a model nor images."""
    protocols: Sequence[str] = saved.facts.get("protocols") or protocols_of(saved.roles, ())
    return evaluate_embeddings(saved.embeddings, saved.labels, saved.roles, protocols, wanted, device)


def _open(collection: Sealed, preprocessing: Preprocessing, machine: Machine) -> Images:
    storage = Storage(
        resize_px=preprocessing.resize_px,
        resize=preprocessing.resize,
        interpolation=preprocessing.interpolation,
        cache_dir=machine.cache_dir,
        max_bytes=None if machine.max_cache_gib is None else int(machine.max_cache_gib * 2**30),
        on_unreadable=machine.on_unreadable,
    )
    classes = _classes_of(collection.catalog)
    return load_test(collection.catalog, Split((), (), classes), storage, key=collection.key)


def _classes_of(catalog: Catalog) -> tuple[int, ...]:
    if catalog.given_split is None:
        return tuple(range(len(catalog.class_names)))
    is_test = np.array(catalog.given_split) == "test"
    return tuple(int(number) for number in np.unique(catalog.labels[is_test]))
