"""A search space: a YAML file in which any value of a trial may be a domain, checked as a whole, then sampled.

    study:     config.Study     how many trials, which stages       (optional; no domains)
    machine:   config.Machine   where it runs                       (optional; no domains)
    trial:     config.Trial     what is searched                    (domains anywhere: see raydml.domains)

Every mistake in it is reported at once, with file and line, before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydml.config.trial import Machine, Study, Trial, fingerprint, parse_machine, parse_study, parse_trial
from raydml.errors import ABSENT, ConfigError, Problem, join_path, unknown_name
from raydml.search_space.coverage import covering_picks
from raydml.search_space.domain_reader import problems_of_first, with_domains
from raydml.search_space.domains import (
    Address,
    Choice,
    Range,
    draws,
    grid_points,
    has_first,
    num_configurations,
    published_point,
    resolve,
    to_plain,
)
from raydml.search_space.json_schema import json_schema
from raydml.search_space.overrides import TOP, with_overrides
from raydml.search_space.yaml_reader import Node, read_yaml

__all__ = ["Space", "SpaceError", "json_schema", "load_space", "sample_trials"]

_MAX_REDRAWS = 3_000  # about two seconds


class SpaceError(ConfigError):
    """Every problem of a search space, each with file and line."""


@dataclass(frozen=True)
class Space:
    """A valid search space. trial: the tree with its domains."""

    path: Path
    study: Study
    machine: Machine
    trial: Node

    def to_dict(self) -> dict[str, Any]:
        """As it would stand in YAML, defaults of study and machine filled in, overrides applied."""
        settings = {"study": self.study.model_dump(mode="json"), "machine": self.machine.model_dump(mode="json")}
        return {**settings, "trial": to_plain(self.trial)}


def load_space(path: Path | str, overrides: Iterable[str] = ()) -> Space:
    """Read, override (``"trial.epochs=5"``; values are YAML and may be domains) and check a space.

    Without ``study.name`` the study is named after the file. Raises SpaceError with every problem found.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpaceError([Problem(str(path), ABSENT, f"cannot be read: {error}", cure="name a YAML file")]) from error
    root, problems = read_yaml(text, str(path))
    if root is None:
        raise SpaceError(problems)
    if root.value is not None and not isinstance(root.value, dict):
        cure = "write the keys study, machine and trial"
        raise SpaceError([Problem("", to_plain(root), "is not a block of keys", TOP, cure=cure, where=root.where)])
    known = {
        "study": list(Study.model_fields),
        "trial": list(Trial.model_fields),
        "machine": list(Machine.model_fields),
    }
    root, mistakes = with_overrides(root, overrides, known)
    problems += mistakes
    tops = dict(root.value or {})
    tops.setdefault("trial", Node({}, root.where))
    for key, node in tops.items():
        if key not in TOP:
            problem = unknown_name(key, key, TOP, "a top-level key", node.where)
            problems.append(problem._replace(value=ABSENT))
    places: dict[str, str] = {"": root.where}
    study = _settings(tops, "study", parse_study, {"name": _name_from(path)}, problems, places)
    machine = _settings(tops, "machine", parse_machine, {}, problems, places)
    structural: list[Problem] = []
    tree = with_domains(tops["trial"], "trial", structural)
    # Where a domain is broken, its key has no value: what the check says about that key would only confuse.
    broken = tuple(problem.path for problem in structural)
    problems += [*structural, *problems_of_first(tree, "trial")] + [
        problem for problem in _check(tree, study, machine, places) if not _below(problem.path, broken)
    ]
    if problems or study is None or machine is None:
        raise SpaceError(problems)
    return Space(path, study, machine, tree)


def _below(path: str, others: tuple[str, ...]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in others)


def _name_from(path: Path) -> str:
    name = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in path.stem
    )
    return name.lstrip("._-") or "study"


def _settings(
    tops: Mapping[str, Node],
    key: str,
    parse: Callable[[Mapping[str, Any]], Any],
    defaults: Mapping[str, Any],
    problems: list[Problem],
    places: dict[str, str],
) -> Any:
    """The study or the machine of the file, or None after its problems were noted. Neither may hold domains."""
    found: list[Problem] = []
    tree = with_domains(tops.get(key, Node({}, places[""])), key, found)

    def refuse(address: Address, domain: Choice | Range) -> Any:
        value = to_plain(Node(domain, ""))
        message = f"is a domain, and {key} is not searched: only what stands below trial is"
        found.append(Problem(join_path(key, *address), value, message, cure="write one value"))
        return 0 if isinstance(domain, Choice) else domain.low

    raw, own_places = resolve(tree, refuse, key)
    places.update(own_places)
    settled = tuple(problem.path for problem in found)
    parsed = None
    try:
        parsed = parse({**defaults, **(raw or {})} if raw is None or isinstance(raw, dict) else raw)
    except ConfigError as error:
        found += [p for problem in error.problems if not _below((p := problem.under(key)).path, settled)]
    problems += [_located(problem, places) for problem in found]
    return parsed


def _located(problem: Problem, places: Mapping[str, str]) -> Problem:
    """The problem with the place of its key, or of the nearest block around it, unless it has one."""
    path = problem.path
    while path not in places and path:
        path = path.rpartition(".")[0]
    return problem._replace(where=problem.where or places.get(path, ""))


# --- the check -------------------------------------------------------------------------------------------------------


def _check(
    tree: Node, study: Study | None, machine: Machine | None, settings_places: Mapping[str, str]
) -> list[Problem]:
    """What is wrong anywhere in the space, each problem once."""
    found: dict[tuple[str, str, str, str], Problem] = {}
    seen: set[str] = set()
    for pick in (published_point, *covering_picks(tree)):
        raw, places = resolve(tree, pick, "trial")
        written = json.dumps(raw, sort_keys=True)
        if written in seen:
            continue
        seen.add(written)
        try:
            problems = _across(parse_trial(raw), study, machine)
        except ConfigError as error:
            problems = [problem.under("trial") for problem in error.problems]
        for problem in problems:
            located = _located(problem, {**settings_places, **places})
            found.setdefault((located.where, located.path, located.message, repr(located.value)), located)
    return list(found.values())


def _across(trial: Trial, study: Study | None, machine: Machine | None) -> list[Problem]:
    """What does not fit between the study, the machine and one trial."""
    problems = []
    if machine is not None and trial.data.name != "digits" and machine.data_root is None:
        cure = "write --set machine.data_root=FOLDER, or data_root: FOLDER below machine"
        problems.append(Problem("machine.data_root", None, f"is required by data.name {trial.data.name}", cure=cure))
    if study is None:
        return problems
    num_folds, num_epochs = trial.data.split.num_folds, trial.epochs
    if study.confirm is not None and study.confirm.folds > num_folds:
        cure = f"write at most {num_folds}, or raise trial.data.split.num_folds"
        message = f"trial.data.split.num_folds is {num_folds}"
        problems.append(Problem("study.confirm.folds", study.confirm.folds, message, cure=cure))
    if study.search.scheduler != "none" and study.search.grace_epochs > num_epochs:
        cure = f"write at most {num_epochs}, or scheduler: none"
        message = f"no trial lasts that long: trial.epochs is {num_epochs}"
        problems.append(Problem("study.search.grace_epochs", study.search.grace_epochs, message, cure=cure))
    return problems


# --- sampling --------------------------------------------------------------------------------------------------------


def sample_trials(space: Space) -> list[Trial]:
    """The trials of the search stage.

    Every combination of all grids, ``num_trials`` times over (round by round), each with its own draw of everything
    else; without grids simply ``num_trials`` trials. Draw number i depends on ``study.seed`` and i alone: the first 8
    of 16 trials are the 8 of 8. Where a domain names a ``first``, trial 0 is the published point and nothing else
    changes. A configuration drawn before is drawn again. ``Trial.seed`` is ``study.seed`` unless the space says
    otherwise. Raises SpaceError when there are not enough different configurations, or when a drawn
    one is invalid in a way that the check of the space could not see.
    """
    points = grid_points(space.trial)
    wanted = space.study.search.num_trials * len(points)
    distinct = num_configurations(space.trial)
    if distinct < wanted:
        raise SpaceError([_too_few(space, wanted, int(distinct), len(points))])
    trials: list[Trial] = []
    seen: set[str] = set()
    for index in range(wanted):
        trials.append(_draw_new(space, index, points[index % len(points)], seen, wanted, len(points)))
    return trials


def _draw_new(
    space: Space, index: int, point: Mapping[Address, int], seen: set[str], wanted: int, num_points: int
) -> Trial:
    """Trial number ``index``, different from all in ``seen`` (to which it is added)."""
    tried: set[str] = set()
    for redraw in range(_MAX_REDRAWS):
        begins = index == 0 and has_first(space.trial)
        pick = published_point if begins else draws(space.study.seed, index, redraw, point, num_points)
        raw, places = resolve(space.trial, pick, "trial")
        raw.setdefault("seed", space.study.seed)
        written = json.dumps(raw, sort_keys=True)
        if written in tried:
            continue
        tried.add(written)
        try:
            trial = parse_trial(raw)
        except ConfigError as error:
            raise SpaceError([_located(problem.under("trial"), places) for problem in error.problems]) from None
        name = fingerprint(trial)
        if name not in seen:
            seen.add(name)
            return trial
    raise SpaceError([_too_few(space, wanted, len(seen), num_points)])


def _too_few(space: Space, wanted: int, distinct: int, num_points: int) -> Problem:
    asked = f"{wanted} trials" + (f" ({num_points} grid points, each num_trials times)" if num_points > 1 else "")
    message = f"{asked} were asked for, and the space has only {distinct} distinct configuration(s)"
    cure = f"write at most {max(1, distinct // num_points)}, or widen the space"
    return Problem("study.search.num_trials", space.study.search.num_trials, message, cure=cure, where=str(space.path))
