"""Embeddings in one file, to be scored, searched and drawn without the model, and the ensemble of several such files.

The file is a NumPy archive (.npz) of plain arrays, without pickled objects:

    embeddings   (N, D) float32
    labels       (N,) int64, ids into class_names
    class_names  (C,) text
    paths        (N,) text, each image as its data set names it
    roles        (N,) text, "query" | "gallery"; absent if the data set has none
    groups       (N,) text, the second label of each image; absent if the data set has none
    facts        text, a JSON object: dataset, part, protocols, recall_at, fingerprint, checkpoint, ...; lists, the
                 names of the classes of each test list, where the data set has several; exclude_same, "group" where a
                 query does not find images of its own class and group
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.data.catalog import Groups
from raydml.metrics.geometry import unit_rows
from raydml.ops.files import is_zip_bomb, require_space, write_whole

_EXCLUDE_SAME = "exclude_same"


class SavedEmbeddingsError(ValueError):
    """A file without embeddings, or embeddings that do not fit together."""


class SavedEmbeddings(NamedTuple):
    """The content of the file, for N images of C classes. facts: JSON values on the origin of the embeddings."""

    embeddings: NDArray[np.float32]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    roles: tuple[str, ...] | None
    facts: dict[str, Any]
    groups: Groups | None = None


def save_embeddings(path: Path, saved: SavedEmbeddings) -> Path:
    """Write the file and its folder, and return its path. Raises SavedEmbeddingsError for arrays that do not fit."""
    _check(saved, str(path))
    arrays: dict[str, Any] = {
        "embeddings": saved.embeddings,
        "labels": saved.labels,
        "class_names": np.array(saved.class_names, dtype=np.str_),
        "paths": np.array(saved.paths, dtype=np.str_),
        "facts": np.array(json.dumps(saved.facts)),
    }
    if saved.groups is not None:
        arrays["groups"] = np.array(saved.groups.names, dtype=np.str_)
        if saved.groups.are_excluded:
            arrays["facts"] = np.array(json.dumps({**saved.facts, _EXCLUDE_SAME: "group"}))
    if saved.roles is not None:
        arrays["roles"] = np.array(saved.roles, dtype=np.str_)
    require_space(path, sum(array.nbytes for array in arrays.values()), "the file of the embeddings")
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:  # by handle: savez appends its own suffix to a name
            np.savez(file, **arrays)

    return write_whole(path, write)


def load_embeddings(path: Path) -> SavedEmbeddings:
    """Read a file of `save_embeddings`. Raises SavedEmbeddingsError for a missing, damaged or other file."""
    try:
        if is_zip_bomb(path):
            raise ValueError("it would unpack to more than 200 times its size")
        # Opened here: NumPy leaves the file open when it is no archive.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        facts = json.loads(str(arrays["facts"]))
        if not isinstance(facts, dict):
            raise ValueError(f"its facts are no JSON object, but {type(facts).__name__}")
        saved = SavedEmbeddings(
            arrays["embeddings"],
            arrays["labels"],
            _texts(arrays, "class_names"),
            _texts(arrays, "paths"),
            _texts(arrays, "roles") if "roles" in arrays else None,
            facts,
            Groups(_texts(arrays, "groups"), facts.get(_EXCLUDE_SAME) == "group") if "groups" in arrays else None,
        )
    except Exception as error:  # numpy, zipfile and json raise a dozen types for damaged files
        raise SavedEmbeddingsError(_unreadable(path, f"{type(error).__name__}: {error}")) from error
    try:
        _check(saved, str(path))
    except SavedEmbeddingsError as error:
        if not _is_of_study(path):
            raise
        raise SavedEmbeddingsError(_unreadable(path, str(error))) from error
    return saved


def _is_of_study(path: Path) -> bool:
    """Return whether a file is where a study keeps the embeddings of its test: STUDY/final/KEY.npz."""
    return path.parent.name == "final" and (path.absolute().parent.parent / "study.json").exists()


def _unreadable(path: Path, reason: str) -> str:
    reason = reason.partition("\n")[0]
    if not _is_of_study(path):
        cure = "Cure: a file that `launch.py evaluate ... --save-embeddings FILE` wrote"
        return f"{path} holds no embeddings ({reason}). {cure}"
    study = shlex.quote(str(path.absolute().parent.parent))
    return (
        f"{path} is damaged ({reason}). Cure: delete it and {path.stem}.json beside it, then launch.py resume {study}: "
        "a study whose test has not ended tests this network again and records the read; others work without the file"
    )


def _texts(arrays: dict[str, NDArray[Any]], name: str) -> tuple[str, ...]:
    """Return an array of texts (N,). Raises ValueError for another shape or type."""
    array = arrays[name]
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(f"{name} are texts (N,), not {array.dtype} of shape {array.shape}")
    return tuple(array.tolist())


def _check(saved: SavedEmbeddings, source: str) -> None:
    if saved.embeddings.ndim != 2 or saved.embeddings.dtype != np.float32:
        raise SavedEmbeddingsError(
            f"{source}: embeddings are float32 (N, D), not {saved.embeddings.dtype} of shape {saved.embeddings.shape}"
        )
    if saved.labels.ndim != 1 or not np.issubdtype(saved.labels.dtype, np.integer):
        raise SavedEmbeddingsError(f"{source}: labels are integers (N,), not {saved.labels.dtype} {saved.labels.shape}")
    counts = {"embeddings": len(saved.embeddings), "labels": len(saved.labels), "paths": len(saved.paths)}
    if saved.roles is not None:
        counts["roles"] = len(saved.roles)
    if saved.groups is not None:
        counts["groups"] = len(saved.groups.names)
    if len(set(counts.values())) > 1 or not counts["embeddings"]:
        found = ", ".join(f"{number} {name}" for name, number in counts.items())
        raise SavedEmbeddingsError(f"{source}: {found}: the numbers must be equal and at least 1")
    if saved.labels.min() < 0 or saved.labels.max() >= len(saved.class_names):
        raise SavedEmbeddingsError(
            f"{source}: labels from {saved.labels.min()} to {saved.labels.max()} "
            f"for {len(saved.class_names)} class names"
        )
    if num_broken := int((~np.isfinite(saved.embeddings).all(axis=1)).sum()):
        raise SavedEmbeddingsError(f"{source}: {num_broken} embeddings are not finite, so no distance to them is")


def concatenate(parts: Sequence[SavedEmbeddings]) -> SavedEmbeddings:
    """Concatenate embeddings (N, D_i) of the same N images by several networks to (N, sum D_i), rows of length 1.

    The rows of each network are scaled to length 1 first, so that all weigh the same; a row of zeros stays zero.

    Source: Musgrave, Belongie, Lim 2020, "A Metric Learning Reality Check", section 3.2: "concatenated", where four
    folds of 128 dimensions make 512; "separated" is the mean over the folds' own scores.

    Raises SavedEmbeddingsError if parts differ in images, labels or roles, or if there is no part.
    """
    if not parts:
        raise SavedEmbeddingsError("an ensemble needs the embeddings of at least one network")
    first = parts[0]
    for number, part in enumerate(parts[1:], start=2):
        same = (part.paths, part.roles, part.groups) == (first.paths, first.roles, first.groups)
        same = same and np.array_equal(part.labels, first.labels)
        if not same:
            raise SavedEmbeddingsError(f"part {number} of the ensemble is not of the images of part 1, in their order")
    rows = np.concatenate([unit_rows(part.embeddings.astype(np.float64)) for part in parts], axis=1) / np.sqrt(
        len(parts)
    )
    return first._replace(embeddings=rows.astype(np.float32), facts={**first.facts, "num_networks": len(parts)})
