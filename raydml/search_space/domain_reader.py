"""Finds the domains in a tree read from YAML, and what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal

from raydml.errors import Problem, join_path, nearest_name
from raydml.search_space.domains import DOMAINS, Choice, Range, has_first, shared_keys, to_plain
from raydml.search_space.yaml_reader import Node


def with_domains(node: Node, path: str, problems: list[Problem], *, in_choice: bool = False) -> Node:
    """The tree with its domains recognised. What is wrong with a domain goes to ``problems``."""
    if isinstance(node.value, list):
        items = [
            with_domains(item, join_path(path, number), problems, in_choice=in_choice)
            for number, item in enumerate(node.value)
        ]
        return Node(items, node.where)
    if not isinstance(node.value, dict):
        return node
    named = [name for name in node.value if name in DOMAINS]
    if named:
        return _domain(named[0], node, path, problems, in_choice)
    others = [(name, argument) for name, argument in node.value.items() if name != "first"]
    if len(others) == 1:
        ((name, argument),) = others
        nearest = nearest_name(name, DOMAINS)
        if nearest and isinstance(argument.value, list):
            message, cure = f"{name} is not a domain", f"write {nearest}"
            problems.append(Problem(path, to_plain(node), message, DOMAINS, nearest, cure, argument.where))
            return Node(None, node.where)
    return _block(node, path, problems, in_choice)


def _block(node: Node, path: str, problems: list[Problem], in_choice: bool) -> Node:
    entries: dict[str, Node] = {}
    for key, child in node.value.items():
        names = shared_keys(key)
        if len(names) == 1:
            entries[key] = with_domains(child, join_path(path, key), problems, in_choice=in_choice)
            continue
        shared = with_domains(child, path, problems, in_choice=in_choice)
        taken = {name for other in node.value if other != key for name in shared_keys(other)}
        # A plain key of --set takes the place of what the blocks say.
        set_aside = {name for name, entry in node.value.items() if entry.where == "--set"}
        for name in names:
            if name in taken - set_aside or names.count(name) > 1 or not name:
                message = f"the key `{key}` supplies {name!r} a second time" if name else f"`{key}` has an empty name"
                cure = "name each key once"
                problems.append(Problem(join_path(path, name), None, message, cure=cure, where=child.where))
        _check_shared(shared, names, path, key, problems)
        entries[", ".join(names)] = shared
    return Node(entries, node.where)


def problems_of_first(node: Node, path: str) -> list[Problem]:
    """What is wrong with the published point of a tree with domains; nothing where no domain names a ``first``.

    Every range on the way to it must name one. One that is not on the way would be ignored, so it is refused.
    """
    problems: list[Problem] = []
    if not has_first(node):
        return problems
    for place, domain, taken in _domains_and_whether_taken(node, path, True, frozenset()):
        written = to_plain(domain)
        if taken and isinstance(domain.value, Range) and domain.value.first is None:
            message = "names no first, and other domains do: trial 0 is the published point, and has no value here"
            kind = domain.value.kind
            cure = f"write {{{kind}: {written[kind]}, first: VALUE}}, or remove every first"
            problems.append(Problem(place, written, message, cure=cure, where=domain.where))
        if not taken and domain.value.first is not None:
            message = "its first has no effect: the published point takes another item of a choice around it"
            cure = "remove it, or put the item that holds it first"
            problems.append(Problem(place, written, message, cure=cure, where=domain.where))
    return problems


def _domains_and_whether_taken(
    node: Node, path: str, taken: bool, set_aside: frozenset[str]
) -> Iterator[tuple[str, Node, bool]]:
    """(path, domain, whether the published point takes a value from it), below a node.

    set_aside: keys of shared blocks whose place a plain key beside them takes.
    """
    value = node.value
    if isinstance(value, Choice | Range):
        yield path, node, taken
    if isinstance(value, Choice):
        for position, item in enumerate(value.items):
            on_the_way = taken and position == (value.first or 0)
            yield from _domains_and_whether_taken(item, path, on_the_way, set_aside)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _domains_and_whether_taken(item, join_path(path, number), taken, frozenset())
    elif isinstance(value, dict):
        plain = frozenset(key for key in value if len(shared_keys(key)) == 1)
        for key, child in value.items():
            if key in plain and key not in set_aside:
                yield from _domains_and_whether_taken(child, join_path(path, key), taken, frozenset())
            elif key not in plain:
                yield from _domains_and_whether_taken(child, path, taken, set_aside | plain)


def _check_shared(node: Node, names: tuple[str, ...], path: str, key: str, problems: list[Problem]) -> None:
    if isinstance(node.value, Choice):
        for item in node.value.items:
            _check_shared(item, names, path, key, problems)
    elif not isinstance(node.value, dict):
        message = f"the key `{key}` needs a choice of blocks that hold these keys"
        cure = f"write {{choice: [{{{names[0]}: ..., {names[-1]}: ...}}, ...]}}"
        problems.append(Problem(join_path(path, key), to_plain(node), message, names, cure=cure, where=node.where))
    else:
        for name, child in node.value.items():
            for single in shared_keys(name):
                if single not in names:
                    nearest = nearest_name(single, names)
                    message = f"is not among the keys that `{key}` supplies"
                    cure = f"write {nearest}" if nearest else f"add it to `{key}`"
                    where = join_path(path, single)
                    problems.append(Problem(where, to_plain(child), message, names, nearest, cure, child.where))


def _domain(name: str, node: Node, path: str, problems: list[Problem], in_choice: bool) -> Node:
    argument, first = node.value[name], node.value.get("first")
    broken = Node(None, node.where)

    def report(message: str, cure: str, where: str = argument.where) -> Node:
        problems.append(Problem(path, to_plain(node), message, cure=cure, where=where))
        return broken

    others = [key for key in node.value if key not in (name, "first")]
    if others:
        return report(f"{others[0]} stands beside {name}, and only `first` may", "keep one domain, and write first")
    if not isinstance(argument.value, list):
        return report(f"{name} needs a list", f"write {{{name}: [...]}}")
    if name in ("choice", "grid"):
        if name == "grid" and in_choice:
            return report(
                "a grid inside a choice would not be run in full", "write choice, or make the outer one a grid"
            )
        if not argument.value:
            return report(f"{name} is empty", "give at least one value")
        if name == "grid" and first is not None:
            return report("a grid runs all its items, in order", "remove first, and put that item first", first.where)
        position = None if first is None else _position(first, argument.value)
        if first is not None and position is None:
            return report("first is none of its items", "write one of the items, or add it to them", first.where)
        inside = in_choice or name == "choice"
        items = tuple(with_domains(item, path, problems, in_choice=inside) for item in argument.value)
        return Node(Choice(name, items, position), node.where)
    numbers = [item.value for item in argument.value]
    wanted = 3 if name == "quniform" else 2
    if len(numbers) != wanted or not all(_is_number(number) for number in numbers):
        spelling = "[low, high, q]" if wanted == 3 else "[low, high]"
        return report(f"{name} needs {wanted} numbers", f"write {{{name}: {spelling}}}")
    mistake = _range_mistake(name, *numbers)
    if mistake:
        return report(*mistake)
    found = Range(name, *numbers)
    if first is None:
        return Node(found, node.where)
    if not _is_number(first.value) or not found.holds(first.value):
        return report("first cannot be drawn from it", "write a number of the range, or widen it", first.where)
    return Node(replace(found, first=first.value), node.where)


def _position(first: Node, items: list[Node]) -> int | None:
    """The position of the item that is written as ``first`` is, or None."""
    written = [json.dumps(to_plain(item), sort_keys=True) for item in (first, *items)]
    return written.index(written[0], 1) - 1 if written[0] in written[1:] else None


def _range_mistake(name: str, low: float, high: float, step: float | None = None) -> tuple[str, str] | None:
    """(message, cure), or None for a sound range."""
    if low > high:
        return "its bounds are reversed", f"write {{{name}: [{high}, {low}{'' if step is None else f', {step}'}]}}"
    if name == "loguniform" and low <= 0:
        return "its lower bound must be > 0: there is no logarithm of it", "raise the lower bound, or write uniform"
    if name == "randint":
        if not isinstance(low, int) or not isinstance(high, int):
            return "randint needs whole numbers", "write whole numbers, or uniform"
        if low == high:
            return "is empty: the upper end is excluded", f"write {{randint: [{low}, {high + 1}]}}"
    if step is not None:
        if step <= 0:
            return "its step q must be > 0", "write {quniform: [low, high, q]} with a positive q"
        if (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step)) != 0:
            return f"steps of {step} from {low} do not reach {high}", "make high - low a multiple of q"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
