"""Points of a search space: a value for each domain that a configuration takes one from, and how configurations and
points are translated into each other.

A point is what a searcher works with: the position of the item of each choice, and the number of each range, by the
address of the domain. The domains inside an item of a choice belong to the points that take this item.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from raydml import registry
from raydml.errors import join_path
from raydml.search_space.domains import Address, Choice, Range, children, is_number, shared_keys, to_plain
from raydml.search_space.yaml_reader import Node

#: The position of the item of a choice, or the number of a range.
Value = int | float
#: Address of a domain -> its value.
Point = Mapping[Address, Value]
#: (address, domain) -> its value, for `resolve`.
Pick = Callable[[Address, Choice | Range], Value]

_KIND_OF = {"loss": "losses", "miner": "miners", "sampler": "samplers", "method": "methods"}


def key_of(address: Address) -> str:
    """Return an address as text, for a JSON file or a library that needs names."""
    return json.dumps(address)


def written_point(point: Point) -> dict[str, Value]:
    """Return a point with its addresses as text, for a JSON file; `read_point` returns it again."""
    return {key_of(address): value for address, value in point.items()}


def read_point(written: Mapping[str, Value]) -> dict[Address, Value]:
    """Return the point that was written so. Raises ValueError for other text."""
    return {tuple(json.loads(key)): value for key, value in written.items()}


def recording(pick: Pick, point: dict[Address, Value]) -> Pick:
    """Return a ``pick`` that also writes each value that it gives into a point."""

    def pick_and_record(address: Address, domain: Choice | Range) -> Value:
        point[address] = value = pick(address, domain)
        return value

    return pick_and_record


def taking(point: Point, otherwise: Pick) -> Pick:
    """Return a ``pick`` of the values of a point, and where it has none of another pick."""
    return lambda address, domain: point[address] if address in point else otherwise(address, domain)


def domains_of(node: Node, address: Address = ()) -> Iterator[tuple[Address, Choice | Range]]:
    """Yield every domain of a tree with its address, outer ones first."""
    if isinstance(node.value, Choice | Range):
        yield address, node.value
    for step, child in children(node):
        yield from domains_of(child, (*address, step))


def to_unit(domain: Range, number: float) -> float:
    """Return where a number is in a range, from 0 at its lower end to 1; of ``loguniform`` by logarithms."""
    low, high = _ends(domain)
    if domain.kind == "loguniform":
        low, high, number = math.log(low), math.log(high), math.log(number)
    return 0.5 if high == low else (number - low) / (high - low)


def from_unit(domain: Range, place: float) -> float:
    """Return the number of a range at a place between 0 and 1, rounded as a number that is drawn is."""
    low, high = _ends(domain)
    place = min(max(place, 0.0), 1.0)
    if domain.kind == "loguniform":
        return domain.rounded(math.exp(math.log(low) + place * (math.log(high) - math.log(low))))
    return domain.rounded(low + place * (high - low))


def _ends(domain: Range) -> tuple[float, float]:
    ends = domain.ends()
    return ends[0], ends[-1]


def published_defaults(node: Node) -> dict[Address, Value]:
    """Return the default of every domain: its `first`; else the first item of a choice; else the default of the
    plugin's setting where the range holds it; else the middle of the range."""
    return dict(_defaults(node, (), "", None))


def _defaults(
    node: Node, address: Address, key: str, block: Mapping[str, Node] | None, section: str = ""
) -> Iterator[tuple[Address, Value]]:
    value = node.value
    if isinstance(value, Choice):
        yield address, value.first or 0
    elif isinstance(value, Range):
        default = value.first if value.first is not None else _default_of_setting(section, key, block)
        yield address, default if default is not None and value.holds(default) else from_unit(value, 0.5)
    if isinstance(value, dict):
        for step, child in value.items():
            name = key if len(shared_keys(step)) > 1 else step
            yield from _defaults(child, (*address, step), name, value, key)
    elif isinstance(value, Choice):
        for position, item in enumerate(value.items):
            yield from _defaults(item, (*address, position), key, block, section)
    else:
        for step, child in children(node):
            yield from _defaults(child, (*address, step), key, block, section)


def _default_of_setting(section: str, key: str, block: Mapping[str, Node] | None) -> float | None:
    """Return the default of a setting of a plugin, None where there is none. section: the key of its block."""
    kind, name = _KIND_OF.get(section.removeprefix("auxiliary_")), None if block is None else block.get("name")
    if kind is None or name is None or name.value not in registry.names(kind):
        return None
    field = registry.settings_model(kind, name.value).model_fields.get(key)
    default = None if field is None else field.default
    return default if isinstance(default, int | float) and not isinstance(default, bool) else None


class Located(NamedTuple):
    """Where a configuration is in a space. outside: what of it the space does not hold, in words."""

    point: dict[Address, Value]
    outside: tuple[str, ...]


def locate(tree: Node, configuration: Mapping[str, Any]) -> Located:
    """Return the values of the domains of a space that give a configuration, which may lack keys.

    A domain at a key that the configuration lacks gets no value. What the space fixes is not compared: only inside an
    item of a choice, where it tells the items apart. Numbers are rounded as drawn ones are.
    """
    point: dict[Address, Value] = {}
    outside: list[str] = []
    _locate(tree, configuration, (), "trial", point, outside, strict=False)
    return Located(point, tuple(outside))


_ABSENT = object()


def _locate(
    node: Node,
    found: Any,
    address: Address,
    path: str,
    point: dict[Address, Value],
    outside: list[str],
    *,
    strict: bool,
) -> None:
    """Add the values of the domains below a node. strict: whether what the space fixes must be the same."""
    value = node.value
    if found is _ABSENT:
        return
    if isinstance(value, Range):
        low, high = _ends(value)
        if is_number(found) and low <= found <= high:
            point[address] = value.rounded(found)
        else:
            outside.append(f"{path} = {found} is not in {to_plain(node)}")
    elif isinstance(value, Choice):
        _locate_in_choice(value, found, address, path, point, outside)
    elif isinstance(value, dict):
        if not isinstance(found, Mapping):
            if strict:
                outside.append(f"{path} = {found} is no block")
            return
        for step, child in value.items():
            names = shared_keys(step)
            if len(names) > 1:
                inside: Any = {name: found[name] for name in names if name in found}
                _locate(child, inside, (*address, step), path, point, outside, strict=strict)
            else:
                inside = found.get(step, _ABSENT)
                _locate(child, inside, (*address, step), join_path(path, step), point, outside, strict=strict)
    elif isinstance(value, list):
        if not isinstance(found, Sequence) or len(found) != len(value):
            if strict:
                outside.append(f"{path} = {found} has another length")
            return
        for number, (child, inside) in enumerate(zip(value, found, strict=True)):
            _locate(child, inside, (*address, number), join_path(path, number), point, outside, strict=strict)
    elif strict and found != value:
        outside.append(f"{path} = {found} is not {value}")


def _locate_in_choice(
    choice: Choice, found: Any, address: Address, path: str, point: dict[Address, Value], outside: list[str]
) -> None:
    """Take the first item that gives what was found, else say what the nearest one lacks."""
    lacking: list[tuple[Node, list[str]]] = []
    for position, item in enumerate(choice.items):
        within: dict[Address, Value] = {}
        wrong: list[str] = []
        _locate(item, found, (*address, position), path, within, wrong, strict=True)
        if not wrong:
            point.update({address: position, **within})
            return
        lacking.append((item, wrong))
    # An item with the same plugins is nearer than one with fewer differences.
    nearest, wrong = min(lacking, key=lambda pair: (sum(".name = " in text for text in pair[1]), len(pair[1])))
    for key, _ in _names_in(nearest):
        names = {str(named) for item in choice.items for other, named in _names_in(item) if other == key}
        given = found.get("name") if not key and isinstance(found, Mapping) else _name_of(found, key)
        if given is not None and str(given) not in names:
            outside.append(f"{join_path(path, key) if key else path} = {given} is none of {', '.join(sorted(names))}")
            return
    outside += wrong


def _names_in(item: Node) -> list[tuple[str, Any]]:
    """Return (key, name) of the plugins of a block: with an empty key its own, else of the blocks at its keys."""
    if not isinstance(item.value, dict):
        return []
    own = [("", item.value["name"].value)] if "name" in item.value else []
    inner = [
        (key, child.value["name"].value)
        for key, child in item.value.items()
        if isinstance(child.value, dict) and "name" in child.value
    ]
    return own + inner


def _name_of(found: Any, key: str) -> Any:
    block = found.get(key) if isinstance(found, Mapping) else None
    return block.get("name") if isinstance(block, Mapping) else None
