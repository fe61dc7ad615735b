"""Good points of an earlier study, or of a file, as the first trials of a search."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raydml.analysis.trials import TrialState
from raydml.config.trial import parse_study
from raydml.errors import Problem
from raydml.ops.wording import counted
from raydml.search_space.domains import shared_keys
from raydml.search_space.points import domains_of, locate
from raydml.search_space.space import SearchSpace, SpaceError
from raydml.search_space.yaml_reader import decoded_yaml, read_yaml
from raydml.study.draws import unknown_keys
from raydml.study.events import StudyState, read_state
from raydml.study.folder import StudyError, find_study

_logger = logging.getLogger("raydml")

#: Of an earlier study, this many of its best trials are taken.
NUM_POINTS = 5


def with_first_points(space: SearchSpace, source: str, storage: Path) -> SearchSpace:
    """Return a space whose search begins with the points of a source, before those that it names itself.

    source: a study, by name, path or address, whose best trials count; or a YAML file with a list of configurations,
    or one below the key ``first``. Points that the space does not hold are named and left out. Raises StudyError where
    none is left, or where there is no such study, and SpaceError for a file that is no such list.
    """
    path = Path(source)
    is_file = path.suffix in (".yaml", ".yml") and path.is_file()
    points = _points_of_file(path) if is_file else _points_of_study(find_study(source, storage))
    keys = {name for address, _ in domains_of(space.trial) for name in shared_keys(str(address[0]))}
    taken: list[dict[str, Any]] = []
    left_out: list[str] = []
    for name, configuration in points:
        found = {key: value for key, value in configuration.items() if key in keys} if not is_file else configuration
        outside = [*locate(space.trial, found).outside, *unknown_keys(found)]
        if outside:
            left_out.append(f"{name} ({'; '.join(outside)})")
        elif found not in taken:
            taken.append(dict(found))
    for text in left_out:
        _logger.info("note: --start-from %s: left out, because the space does not hold it: %s", source, text)
    if not taken:
        raise StudyError(
            f"--start-from {source}: the space holds none of its {counted(len(points), 'point')}. Cure: widen the "
            "ranges and choices named above, or leave the option out"
        )
    _logger.info("note: the search begins with %s of %s", counted(len(taken), "point"), source)
    study = space.study.model_dump(mode="json")
    search = {**study["search"], "first": [*taken, *(dict(one) for one in space.study.search.first)]}
    return replace(space, study=parse_study({**study, "search": search}))


def _points_of_study(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the best configurations of a study by the names of their trials, best first: confirmed ones, if any."""
    state = read_state(folder)
    by_configuration: dict[str, TrialState] = {}
    scored = [trial for trial in state.searched if trial.best is not None and trial.config]
    for trial in sorted(scored, key=lambda trial: -(trial.best or 0.0)):
        by_configuration.setdefault(trial.fingerprint or trial.trial, trial)
    ranked = [row["configuration"] for row in (_ranking_of(state, "confirm") or ())]
    ranked += [row.get("fingerprint") for row in (_ranking_of(state, "search") or ())]  # over all its folds
    order = dict.fromkeys([*ranked, *by_configuration])
    best = [by_configuration[name] for name in order if name in by_configuration][:NUM_POINTS]
    if not best:
        raise StudyError(
            f"--start-from {folder.name}: no trial of its search has a value of {state.metric}. Cure: a study whose "
            f"search has begun (launch.py status {folder.name}), or leave the option out"
        )
    return [(trial.trial, trial.config) for trial in best]


def _ranking_of(state: StudyState, stage: str) -> Sequence[Mapping[str, Any]] | None:
    return state.stages[stage].ranking if stage in state.stages else None


def _points_of_file(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the configurations of a file, each named by its line."""
    root, problems = read_yaml(decoded_yaml(path.read_bytes(), str(path)), str(path))
    if root is None:
        raise SpaceError(problems)
    entries = root.value
    if isinstance(entries, dict) and "first" in entries:
        entries = entries["first"].value
    if not isinstance(entries, list) or not all(isinstance(entry.value, dict) for entry in entries):
        message = "is no list of configurations"
        cure = "write `first:` and below it blocks such as `- loss: {name: margin, beta: 1.2}`"
        raise SpaceError([Problem("first", None, message, cure=cure, where=str(path))])
    return [(entry.where, _plain(entry)) for entry in entries]


def _plain(node: Any) -> Any:
    value = node.value
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    return [_plain(child) for child in value] if isinstance(value, list) else value
