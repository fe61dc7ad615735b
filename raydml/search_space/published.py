"""The published recipe of a search space: its published point, trained as the authors trained it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raydml.config.trial import parse_study
from raydml.errors import ABSENT, Problem, join_path
from raydml.search_space.domains import has_first, published_point, resolve
from raydml.search_space.space import SearchSpace, SpaceError
from raydml.search_space.yaml_reader import Node

_SUFFIX = "-published"
#: What the recipe decides: a setting of a user for one of these would be overwritten.
DECIDED_KEYS = (
    "study.search",
    "study.confirm",
    "study.refit",
    "study.finalize",
    "trial.data.split.val_fraction",
    "trial.data.split.fold",
    "trial.data.split.num_folds",
    "trial.select_on",
)


def published_recipe(space: SearchSpace, *, seeds: int, name: str | None = None) -> SearchSpace:
    """Return the study of the published point alone, trained on all published training classes and tested.

    The trial is trial 0 of the space, with its epochs and its schedule; no class validates, so its last weights count.
    It is trained with this number of seeds, from the seed of the study on. name: of the study; None: that of the space
    with ``-published``. Raises SpaceError where no domain of the space names a published value.
    """
    if not has_first(space.trial):
        message = "names no published point: none of its domains has a `first`"
        cure = "a space that has one (launch.py list spaces; those of the five systems do), or leave out --recipe"
        raise SpaceError([Problem("trial", ABSENT, message, cure=cure, where=str(space.path))])
    raw, places = resolve(space.trial, published_point, "trial")
    data = dict(raw["data"])
    data["split"] = {**data.get("split", {}), "val_fraction": 0.0, "fold": None}
    study = space.study.model_dump(mode="json")
    stages = {"confirm": None, "refit": {"top": 1, "seeds": seeds}, "finalize": {"top": 1}}
    search = {
        key: value for key, value in study["search"].items() if key not in ("searcher", "first", "balance", "folds")
    }
    search |= {"num_trials": 1, "scheduler": "none"}
    made = parse_study({**study, **stages, "search": search, "name": name or f"{space.study.name}{_SUFFIX}"})
    return replace(space, study=made, trial=_tree({**raw, "data": data}, "trial", places))


def _tree(value: Any, path: str, places: dict[str, str]) -> Node:
    """Return plain values as a tree without domains. places: key path -> ``file:line``."""
    inside = value
    if isinstance(value, dict):
        inside = {key: _tree(child, join_path(path, key), places) for key, child in value.items()}
    elif isinstance(value, list):
        inside = [_tree(child, join_path(path, number), places) for number, child in enumerate(value)]
    return Node(inside, places.get(path, places["trial"]))
