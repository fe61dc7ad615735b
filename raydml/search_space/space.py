"""A search space: a YAML file in which any value of a trial may be a domain, checked as a whole, then sampled.

    study:     config.StudySettings    how many trials, which stages       (optional; no domains)
    machine:   config.Machine   where it runs                       (optional; no domains)
    trial:     config.Trial     what is searched                    (domains anywhere: see domains.py)

All mistakes are reported at once, with file and line, before anything starts. To find those that only some
configurations have, the check goes through a covering set: every alternative of every choice occurs, both ends of
every range occur, and so does every pair of them that can occur together (all losses with all miners, where these are
chosen independently). A mistake that needs three values at once can slip through; each sampled trial is validated too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from raydml import registry
from raydml.config.rules import problems_of_plugins, problems_without_validation
from raydml.config.trial import (
    MAX_STUDY_NAME,
    Machine,
    StudySettings,
    Trial,
    fingerprint,
    is_storage_name,
    parse_machine,
    parse_study,
    parse_trial,
    parse_values,
)
from raydml.data.catalog import WITHOUT_FILES
from raydml.errors import ABSENT, ConfigError, Problem, join_path, nearest_name, unknown_name
from raydml.search_space.domains import (
    DOMAINS,
    Address,
    Choice,
    Range,
    children,
    grid_points,
    has_first,
    num_configurations,
    problems_of_first,
    published_point,
    random_pick,
    resolve,
    shared_keys,
    to_plain,
    with_domains,
)
from raydml.search_space.shortening import with_epochs
from raydml.search_space.yaml_reader import Node, decoded_yaml, read_yaml

_Checked = TypeVar("_Checked")
_Accepted = TypeVar("_Accepted")
_logger = logging.getLogger("raydml")
_MAX_REDRAWS = 3_000  # about two seconds


class SpaceError(ConfigError):
    """Every problem of a search space, each with file and line."""


@dataclass(frozen=True)
class SearchSpace:
    """A valid search space. trial: the tree with its domains."""

    path: Path
    study: StudySettings
    machine: Machine
    trial: Node

    def to_dict(self) -> dict[str, Any]:
        """Return the space as it would be written in YAML, with the defaults of study and machine, after overrides."""
        settings = {"study": self.study.model_dump(mode="json"), "machine": self.machine.model_dump(mode="json")}
        return {**settings, "trial": to_plain(self.trial)}


def load_space(
    path: Path | str, overrides: Iterable[str] = (), max_epochs: int | None = None, *, bare_trial: bool = False
) -> SearchSpace:
    """Read, override (``"trial.epochs=5"``; values are YAML and may be domains) and check a space.

    max_epochs: the epochs of every trial, in place of those of the file and the overrides; what is counted in epochs is
    cut to fit (`shorten`). Without ``study.name`` the study is named after the file. bare_trial: whether one trial
    is needed: a file without the keys study, machine and trial may hold it, and stages that do not fit its split do not
    matter. Raises SpaceError with every problem found.
    """
    path = Path(path)
    try:
        text = decoded_yaml(path.read_bytes(), str(path))
    except ConfigError as error:
        raise SpaceError(error.problems) from error
    except OSError as error:
        raise SpaceError([Problem(str(path), ABSENT, f"cannot be read: {error}", cure="name a YAML file")]) from error
    root, problems = read_yaml(text, str(path))
    if root is None:
        raise SpaceError(problems)
    if root.value is not None and not isinstance(root.value, dict):
        cure = "write the keys study, machine and trial"
        raise SpaceError([Problem("", to_plain(root), "is not a block of keys", TOP, cure=cure, where=root.where)])
    if bare_trial and root.value and not any(key in TOP for key in root.value):
        root = Node({"trial": root}, root.where)
    known = {
        "study": list(StudySettings.model_fields),
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
    study = _settings(tops, "study", parse_study, {"name": study_name_from(path.stem)}, problems, places)
    machine = _settings(tops, "machine", parse_machine, {}, problems, places)
    structural: list[Problem] = []
    tree = with_domains(tops["trial"], "trial", structural)
    if max_epochs is not None:
        tree, study = with_epochs(tree, study, max_epochs)
    # A broken domain gives its key no value, so what the check finds below that key is left out.
    broken = tuple(problem.path for problem in structural)
    covering = _covering_trials(tree)
    trials: list[Trial] = []

    def check_values(raw: Mapping[str, Any]) -> list[Problem]:
        trials.append(parse_values(raw))
        return _across(trials[-1], study, machine)

    found = _problems_of(covering, check_values, places)
    problems += [*structural, *problems_of_first(tree, "trial")]
    problems += [problem for problem in found if not _below(problem.path, broken)]
    if study is not None and not bare_trial:
        known_places = {**covering[0][1], **places}
        problems += [_located(problem, known_places) for problem in problems_without_validation(study, trials)]
    if not problems:  # last, because it imports torch
        with_places = zip(trials, (places for _, places in covering), strict=True)
        problems = _problems_of(with_places, _between_plugins, places)
    if problems or study is None or machine is None:
        raise SpaceError(problems)
    return SearchSpace(path, study, machine, tree)


def shorten(space: SearchSpace, epochs: int) -> SearchSpace:
    """Return a space whose trials have this many epochs; grace, milestones and warm-ups are cut to fit."""
    tree, study = with_epochs(space.trial, space.study, epochs)
    assert study is not None
    return replace(space, study=study, trial=tree)


def _below(path: str, others: tuple[str, ...]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in others)


def study_name_from(name: str) -> str:
    """Return the name of a study for the name of a file or folder, which may have any letters."""
    usable = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in name)
    usable = usable.lstrip("._-")[: MAX_STUDY_NAME - len("-study")] or "study"
    return f"{usable}-study" if is_storage_name(usable) else usable


def _settings(
    tops: Mapping[str, Node],
    key: str,
    parse: Callable[[Mapping[str, Any]], Any],
    defaults: Mapping[str, Any],
    problems: list[Problem],
    places: dict[str, str],
) -> Any:
    """Return the study or the machine of the file, or None after adding its problems. Neither may hold domains."""
    found: list[Problem] = []
    tree = with_domains(tops.get(key, Node({}, places[""])), key, found)

    def refuse(address: Address, domain: Choice | Range) -> Any:
        value = to_plain(Node(domain, ""))
        message = f"is a domain, and {key} is not searched: only values below trial are"
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
    """Return the problem with the place of its key, or of the nearest block around it, unless it has a place."""
    path = problem.path
    while path not in places and path:
        path = path.rpartition(".")[0]
    return problem._replace(where=problem.where or places.get(path, ""))


def _covering_trials(tree: Node) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Return the different configurations of the covering set as plain values, each with the places of its keys."""
    trials: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for pick in (published_point, *covering_picks(tree)):
        raw, places = resolve(tree, pick, "trial")
        trials.setdefault(json.dumps(raw, sort_keys=True), (raw, places))
    return list(trials.values())


def _problems_of(
    trials: Iterable[tuple[_Checked, Mapping[str, str]]],
    check: Callable[[_Checked], list[Problem]],
    settings_places: Mapping[str, str],
) -> list[Problem]:
    """Return the problems that `check` finds or raises in trials with the places of their keys, each problem once."""
    found: dict[tuple[str, str, str, str], Problem] = {}
    for trial, places in trials:
        try:
            problems = check(trial)
        except ConfigError as error:
            problems = [problem.under("trial") for problem in error.problems]
        for problem in problems:
            located = _located(problem, {**settings_places, **places})
            found.setdefault((located.where, located.path, located.message, repr(located.value)), located)
    return list(found.values())


def _between_plugins(trial: Trial) -> list[Problem]:
    return [problem.under("trial") for problem in problems_of_plugins(dict(trial))]


def _across(trial: Trial, study: StudySettings | None, machine: Machine | None) -> list[Problem]:
    """Return what does not fit between the study, the machine and one trial."""
    problems = []
    if machine is not None and trial.data.name not in WITHOUT_FILES and machine.data_root is None:
        cure = "write --data-root FOLDER, or data_root: FOLDER below machine"
        problems.append(Problem("machine.data_root", None, f"is required by data.name {trial.data.name}", cure=cure))
    if study is None:
        return problems
    num_folds, num_epochs = trial.data.split.num_folds, trial.epochs
    if study.confirm is not None and study.confirm.folds > num_folds:
        cure = f"write at most {num_folds}, or raise trial.data.split.num_folds"
        message = f"trial.data.split.num_folds is {num_folds}"
        problems.append(Problem("study.confirm.folds", study.confirm.folds, message, cure=cure))
    if study.search.folds > num_folds:
        cure = f"write at most {num_folds}, or raise trial.data.split.num_folds"
        message = f"trial.data.split.num_folds is {num_folds}"
        problems.append(Problem("study.search.folds", study.search.folds, message, cure=cure))
    if study.search.scheduler != "none" and study.search.grace_epochs > num_epochs:
        cure = f"write at most {num_epochs}, or scheduler: none"
        message = f"no trial lasts that long: trial.epochs is {num_epochs}"
        problems.append(Problem("study.search.grace_epochs", study.search.grace_epochs, message, cure=cure))
    return problems


def sample_trials(space: SearchSpace) -> list[Trial]:
    """Return the trials of the search stage.

    These are all combinations of all grids, ``num_trials`` times (round by round), each with its own draw of everything
    else; without grids, ``num_trials`` trials. Draw number i depends on ``study.seed`` and i alone: the first 8 of 16
    trials are the 8 of 8. Where a domain names a ``first``, trial 0 is the published point; the others do not change. A
    duplicate is drawn again. ``Trial.seed`` is ``study.seed`` unless the space sets it. Raises SpaceError where there
    are not enough different configurations, or where a drawn one is invalid in a way that the check did not find.
    """
    points = grid_points(space.trial)
    num_trials = space.study.search.num_trials * len(points)
    refuse_too_few(space, num_trials)
    trials: list[Trial] = []
    seen: set[str] = set()
    for index in range(num_trials):
        picks = _random_picks(space, index, points[index % len(points)], len(points))
        found = new_trial(space, picks, lambda trial: trial if fingerprint(trial) not in seen else None)
        if found is None:
            raise SpaceError([too_few(space, num_trials, len(seen), len(points))])
        seen.add(fingerprint(found))
        trials.append(found)
    return trials


def _random_picks(
    space: SearchSpace, index: int, point: Mapping[Address, int], num_points: int
) -> Callable[[int], Callable[[Address, Choice | Range], Any]]:
    """Return redraw -> the ``pick`` of trial number ``index``."""
    begins = index == 0 and has_first(space.trial)
    return lambda redraw: (
        published_point if begins and not redraw else random_pick(space.study.seed, index, redraw, point, num_points)
    )


def refuse_too_few(space: SearchSpace, num_trials: int) -> None:
    """Raise SpaceError where a space has fewer different configurations than trials."""
    distinct = num_configurations(space.trial)
    if distinct < num_trials:
        raise SpaceError([too_few(space, num_trials, int(distinct), len(grid_points(space.trial)))])


def new_trial(
    space: SearchSpace,
    picks: Callable[[int], Callable[[Address, Choice | Range], Any]],
    accept: Callable[[Trial], _Accepted | None],
    *,
    refuse_invalid: bool = True,
) -> _Accepted | None:
    """Return the first configuration of several proposals that is accepted, as `accept` returns it; None for none.

    picks: number of the proposal, from 0 -> a ``pick`` for `resolve`. refuse_invalid: raise SpaceError for a proposal
    that is invalid in a way that the check of the space did not find; else the next one is looked at.
    """
    tried: set[str] = set()
    for redraw in range(_MAX_REDRAWS):
        raw, places = resolve(space.trial, picks(redraw), "trial")
        raw.setdefault("seed", space.study.seed)
        written = json.dumps(raw, sort_keys=True)
        if written in tried:
            continue
        tried.add(written)
        try:
            trial = parse_trial(raw)
        except ConfigError as error:
            if not refuse_invalid:
                continue
            raise SpaceError([_located(problem.under("trial"), places) for problem in error.problems]) from None
        if (found := accept(trial)) is not None:
            return found
    return None


def too_few(space: SearchSpace, num_trials: int, distinct: int, num_points: int) -> Problem:
    """Return the problem of a space that has fewer configurations than trials. num_points: of its grids."""
    needed = f"{num_trials} trials" + (f" ({num_points} grid points, each num_trials times)" if num_points > 1 else "")
    message = f"{needed} are needed, and the space has only {distinct} distinct configuration(s)"
    cure = f"write at most {max(1, distinct // num_points)}, or widen the space"
    return Problem("study.search.num_trials", space.study.search.num_trials, message, cure=cure, where=str(space.path))


ORIGIN = "--set"
TOP = ("study", "trial", "machine")


def with_overrides(
    root: Node, overrides: Iterable[str], known: Mapping[str, Sequence[str]]
) -> tuple[Node, list[Problem]]:
    """Return the tree with every ``path=value`` of `--set` in it, and the problems of those that are not possible.

    The value is YAML and may be a domain. known: top-level key -> the keys below it, for the cure of a path that lacks
    its top-level key.
    """
    problems: list[Problem] = []
    for text in overrides:
        path, equals, written = text.partition("=")
        steps = path.strip().split(".")
        mistake = _path_mistake(text, steps, equals, known)
        if mistake is not None:
            problems.append(mistake)
            continue
        value, unreadable = read_yaml(written, ORIGIN, lines=False)
        problems += [problem.under(path) for problem in unreadable]
        if value is None:
            continue
        changed = _put(root, steps, value, "")
        if isinstance(changed, Problem):
            problems.append(changed)
        else:
            root = changed
    return root, problems


def _path_mistake(text: str, steps: list[str], equals: str, known: Mapping[str, Sequence[str]]) -> Problem | None:
    if not equals:
        return Problem(text, ABSENT, "has no =", cure="write --set key=value, such as trial.epochs=5", where=ORIGIN)
    if not all(steps):
        return Problem(text, ABSENT, "has an empty key", cure="write --set trial.epochs=5", where=ORIGIN)
    if steps[0] in TOP and len(steps) > 1:
        return None
    path = ".".join(steps)
    message = f"a path starts with {', '.join(f'{top}.' for top in TOP)}"
    owners = [top for top in TOP if steps[0] in known[top]]
    if owners:
        cure = f"write {' or '.join(f'{top}.{path}' for top in owners)}"
        return Problem(path, ABSENT, message, nearest=f"{owners[0]}.{path}", cure=cure, where=ORIGIN)
    nearest = nearest_name(steps[0], TOP)
    whole = ".".join([nearest, *steps[1:]]) if nearest else None
    cure = f"write {whole}" if whole else f"write --set {TOP[1]}.key=value"
    return Problem(path, ABSENT, message, TOP, whole, cure, ORIGIN)


def _put(node: Node, steps: list[str], value: Node, path: str) -> Node | Problem:
    if not steps:
        return Node(value.value, ORIGIN)
    entries = {} if node.value is None else node.value
    if not isinstance(entries, dict):
        cure = f"set {path} as a whole"
        return Problem(join_path(path, *steps), ABSENT, f"{path} is not a block of keys", cure=cure, where=ORIGIN)
    domain = next((name for name in entries if name in DOMAINS), None)
    if domain is not None and steps != ["first"]:
        if domain in ("choice", "grid") and _holds_blocks(entries[domain]):
            return _put_in_blocks(node, steps, value, path, f"the {domain} {path}")
        message, cure = f"{path} is a {domain}", f"set {path} as a whole, or change the file"
        return Problem(join_path(path, *steps), ABSENT, message, cure=cure, where=ORIGIN)
    step, *rest = steps
    if rest and step not in entries:
        owner = next((key for key in entries if step in shared_keys(key) and "," in key), None)
        if owner is not None:
            changed = _put_in_blocks(entries[owner], steps, value, path, f"`{owner}`")
            return changed if isinstance(changed, Problem) else Node({**entries, owner: changed}, node.where)
    changed = _put(entries.get(step, Node(None, ORIGIN)), rest, value, join_path(path, step))
    return changed if isinstance(changed, Problem) else Node({**entries, step: changed}, node.where)


def _holds_blocks(items: Node) -> bool:
    return isinstance(items.value, list) and any(isinstance(item.value, dict) for item in items.value)


def _put_in_blocks(node: Node, steps: list[str], value: Node, path: str, owner: str) -> Node | Problem:
    """Set a key in each block of a choice whose plugin has it; a note names the plugins that lack it.

    steps: from the blocks on. path: of the choice. owner: the choice, in words.
    """
    whole = join_path(path, *steps)
    section = join_path(path, *steps[:-1])
    cure = f"set {section} as a whole (it then replaces what the blocks say), or change the file"
    if steps[-1] == "name":
        message = f"the blocks of {owner} have settings that go with their names"
        return Problem(whole, ABSENT, message, cure=cure, where=ORIGIN)
    written, lacking = [0], dict[str, None]()
    changed = _with_key(node, steps, value, section.rpartition(".")[2], written, lacking)
    if not written[0]:
        of_these = f" ({', '.join(lacking)})" if lacking else ""
        choices = tuple(dict.fromkeys(key for name in lacking for key in _settings_of(section, name) or ()))
        message = f"no block of {owner} has this key{of_these}"
        return Problem(whole, ABSENT, message, choices, nearest_name(steps[-1], choices), cure, ORIGIN)
    if lacking:
        blocks, have = "1 block" if written[0] == 1 else f"{written[0]} blocks", "has" if len(lacking) == 1 else "have"
        lack = f"{', '.join(lacking)} {have} no such key"
        _logger.info("note: --set %s: set in %s of %s; %s", whole, blocks, owner, lack)
    return changed


def _with_key(
    node: Node, steps: list[str], value: Node, section: str, written: list[int], lacking: dict[str, None]
) -> Node:
    """Return a choice of blocks, or one block, with the key set; counts the blocks in `written`, the others' names in
    `lacking`. Blocks without the section are left as they are."""
    entries = node.value
    if not isinstance(entries, dict):
        return node
    if domain := next((name for name in ("choice", "grid") if name in entries), None):
        items = entries[domain].value
        if not isinstance(items, list):
            return node
        set_in = [_with_key(item, steps, value, section, written, lacking) for item in items]
        changed = {**entries, domain: Node(set_in, entries[domain].where)}
        if "first" in entries:  # it repeats one of the items
            changed["first"] = _with_key(entries["first"], steps, value, section, [0], {})
        return Node(changed, node.where)
    step, *rest = steps
    if rest:
        if step not in entries:
            return node
        inside = _with_key(entries[step], rest, value, section, written, lacking)
        return Node({**entries, step: inside}, node.where)
    name = entries["name"].value if "name" in entries else None
    known = _settings_of(section, name)
    if known is not None and step not in known:
        lacking[str(name)] = None
        return node
    written[0] += 1
    return Node({**entries, step: Node(value.value, ORIGIN)}, node.where)


def _settings_of(section: str, name: Any) -> Sequence[str] | None:
    """Return the settings of a plugin, or None where the section has no plugins of this name: then all keys pass."""
    key = section.rpartition(".")[2].removeprefix("auxiliary_")
    kind = {"loss": "losses", "miner": "miners", "sampler": "samplers", "method": "methods"}.get(key)
    if kind is None or name not in registry.names(kind):
        return None
    return tuple(registry.settings_model(kind, name).model_fields)


MAX_CONFIGURATIONS = 4000  # about two seconds; what is left out are pairs of ranges


class _Pick(NamedTuple):
    """One value of one domain, and the alternatives around that domain that must be chosen with it."""

    address: Address
    value: Any
    on_the_way: tuple[tuple[Address, int], ...]
    is_choice: bool

    def fixes(self) -> dict[Address, Any]:
        return {**dict(self.on_the_way), self.address: self.value}


def covering_picks(node: Node) -> Iterator[Callable[[Address, Choice | Range], Any]]:
    """Yield a ``pick`` for `resolve` for each configuration of the covering set."""
    picks = list(_picks(node, (), ()))
    # Stable: alternatives before ends of ranges, so that the limit cuts the pairs of two ranges first.
    pairs = sorted(combinations(picks, 2), key=lambda pair: -pair[0].is_choice - pair[1].is_choice)
    yield _taking({})
    for pick in picks:
        yield _taking(pick.fixes())
    compatible = (fixes for first, second in pairs if (fixes := _together(first, second)) is not None)
    for fixes in islice(compatible, MAX_CONFIGURATIONS):
        yield _taking(fixes)


def each_alternative(space: SearchSpace) -> Iterator[Trial]:
    """Yield valid trials of a space: each item of each choice and both ends of each range occur in one of them."""
    picks = list(_picks(space.trial, (), ()))
    for pick in (_taking({}), *(_taking(one.fixes()) for one in picks)):
        with suppress(ConfigError):  # a combination that no searched trial has either
            yield parse_values(resolve(space.trial, pick, "trial")[0])


def _picks(node: Node, address: Address, on_the_way: tuple[tuple[Address, int], ...]) -> Iterator[_Pick]:
    if isinstance(node.value, Range):
        for end in node.value.ends():
            yield _Pick(address, end, on_the_way, False)
        return
    for step, child in children(node):
        inside = on_the_way
        if isinstance(node.value, Choice):
            assert isinstance(step, int)
            yield _Pick(address, step, on_the_way, True)
            inside = (*on_the_way, (address, step))
        yield from _picks(child, (*address, step), inside)


def _together(first: _Pick, second: _Pick) -> dict[Address, Any] | None:
    """Return the values that both need, or None where they exclude each other."""
    if first.address == second.address:
        return None
    fixed, other = first.fixes(), second.fixes()
    if any(fixed[address] != value for address, value in other.items() if address in fixed):
        return None
    return {**fixed, **other}


def _taking(fixed: dict[Address, Any]) -> Callable[[Address, Choice | Range], Any]:
    """Return a ``pick`` of the fixed values; elsewhere it takes the first item and the low end."""

    def pick(address: Address, domain: Choice | Range) -> Any:
        return fixed.get(address, 0 if isinstance(domain, Choice) else domain.low)

    return pick
