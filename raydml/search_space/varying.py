"""The keys of a search space that vary, each with its domain in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from raydml.config.recipe import value_text
from raydml.errors import join_path
from raydml.search_space.domains import Choice, Range, children, shared_keys
from raydml.search_space.yaml_reader import Node


class _Place(NamedTuple):
    """What one place of the tree gives a key: its domain, or its value, in words."""

    text: str
    is_domain: bool


def varying_keys(trial: Node) -> dict[str, str]:
    """Return the keys of a trial that may differ between trials, each with its domain, such as ``uniform 0.6 to 1.2``.

    trial: a tree with domains. A key that the blocks of a choice give different domains has them all, with "or" between
    them; one that has a plain value in each block is ``set by block``.
    """
    found: dict[str, list[_Place]] = {}
    for path, place in _places(trial, ""):
        if place not in found.setdefault(path, []):
            found[path].append(place)
    return {
        path: " or ".join(place.text for place in places)
        if any(place.is_domain for place in places)
        else "set by block"
        for path, places in found.items()
        if len(places) > 1 or places[0].is_domain
    }


def _places(node: Node, path: str) -> Iterator[tuple[str, _Place]]:
    value = node.value
    if isinstance(value, Range):
        step = "" if value.step is None else f" in steps of {value_text(value.step)}"
        high = value.high - 1 if value.kind == "randint" else value.high
        yield path, _Place(f"{value.kind} {value_text(value.low)} to {value_text(high)}{step}", True)
    elif isinstance(value, Choice):
        blocks = [item for item in value.items if isinstance(item.value, dict | Choice)]
        plain = [item for item in value.items if item not in blocks]
        if blocks:  # the absence of a block, such as `miner: null`, shows at its name
            for item in plain:
                yield join_path(path, "name"), _Place(value_text(_plain(item)), False)
        elif plain:
            items = ", ".join(value_text(_plain(item)) for item in plain)
            yield path, _Place(f"{value.kind} {items}", len(plain) > 1)
        for item in blocks:
            yield from _places(item, path)
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _places(child, path if len(shared_keys(key)) > 1 else join_path(path, key))
    else:
        varies = isinstance(value, list) and any(_has_domain(item) for item in value)
        yield path, _Place(value_text(_plain(node)), varies)


def _has_domain(node: Node) -> bool:
    return isinstance(node.value, Choice | Range) or any(_has_domain(child) for _, child in children(node))


def _plain(node: Node) -> Any:
    """Return a value without domains as plain values; a domain inside a list as its words."""
    if isinstance(node.value, list):
        return [_plain(item) for item in node.value]
    if isinstance(node.value, Choice | Range):
        return next(place.text for _, place in _places(node, ""))
    return node.value
