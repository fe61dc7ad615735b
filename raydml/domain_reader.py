"""Finds the domains in a tree read from YAML, and what is wrong with them."""

from __future__ import annotations

import math
from decimal import Decimal

from raydml.domains import DOMAINS, Choice, Range, shared_keys, to_plain
from raydml.problems import Problem, join_path, nearest_name
from raydml.yaml_reader import Node


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
    if len(node.value) == 1:
        ((name, argument),) = node.value.items()
        if name in DOMAINS:
            return _domain(name, argument, node, path, problems, in_choice)
        nearest = nearest_name(name, DOMAINS)
        if nearest and isinstance(argument.value, list):
            written = {name: to_plain(argument)}
            message, cure = f"{name} is not a domain", f"write {nearest}"
            problems.append(Problem(path, written, message, DOMAINS, nearest, cure, argument.where))
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


def _domain(name: str, argument: Node, node: Node, path: str, problems: list[Problem], in_choice: bool) -> Node:
    written = {name: to_plain(argument)}
    broken = Node(None, node.where)

    def report(message: str, cure: str) -> Node:
        problems.append(Problem(path, written, message, cure=cure, where=argument.where))
        return broken

    if not isinstance(argument.value, list):
        return report(f"{name} needs a list", f"write {{{name}: [...]}}")
    if name in ("choice", "grid"):
        if name == "grid" and in_choice:
            return report(
                "a grid inside a choice would not be run in full", "write choice, or make the outer one a grid"
            )
        if not argument.value:
            return report(f"{name} is empty", "give at least one value")
        inside = in_choice or name == "choice"
        items = tuple(with_domains(item, path, problems, in_choice=inside) for item in argument.value)
        return Node(Choice(name, items), node.where)
    numbers = [item.value for item in argument.value]
    wanted = 3 if name == "quniform" else 2
    if len(numbers) != wanted or not all(_is_number(number) for number in numbers):
        spelling = "[low, high, q]" if wanted == 3 else "[low, high]"
        return report(f"{name} needs {wanted} numbers", f"write {{{name}: {spelling}}}")
    mistake = _range_mistake(name, *numbers)
    return report(*mistake) if mistake else Node(Range(name, *numbers), node.where)


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
