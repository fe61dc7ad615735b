"""Domains, which may replace any value in a search space, and the tree of values and domains.

    {choice: [8, 16, 32]}           one of these; items may be whole blocks, with domains of their own, to any depth
    {grid: [8, 16, 32]}             each of these in turn; several grids make a product; not inside a choice
    {uniform: [0.1, 0.5]}           a number between the ends
    {loguniform: [1e-6, 1e-3]}      a number between the ends, its logarithm uniform
    {randint: [1, 10]}              a whole number, the upper end excluded
    {quniform: [0.1, 0.5, 0.1]}     low, low + q, ..., high, all equally likely, without float noise

`uniform` and `loguniform` draw numbers of 6 significant digits, which are the same on every platform and can be typed.

Any but a grid may name its published value: {uniform: [0.6, 1.5], first: 1.2}, {choice: [64, 128], first: 128}. A space
with such values begins with the published point: trial 0 has the `first` of every domain, the first item of a choice
without one, and the first point of the grids. All other trials are drawn as if no `first` were there.

A choice (or grid) of blocks may supply several neighbouring keys at once. They are written as one key with commas,
and each block holds some of them (what it leaves out keeps its default):

    loss, miner:
      choice:
        - loss: {name: margin, beta: {uniform: [0.6, 1.2]}}
          miner: {name: distance_weighted}
        - loss: {name: normalized_softmax}
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import product
from typing import Any

import numpy as np

from raydml.errors import Problem, join_path, nearest_name
from raydml.search_space.yaml_reader import Node

DOMAINS = ("choice", "grid", "uniform", "loguniform", "randint", "quniform")

Address = tuple[str | int, ...]  # the path to a domain in the tree: keys, list positions and items of choices


@dataclass(frozen=True)
class Choice:
    """``choice`` or ``grid``: one of the items, or each in turn. first: position of the published item, if named."""

    kind: str
    items: tuple[Node, ...]
    first: int | None = None


@dataclass(frozen=True)
class Range:
    """A range of numbers; step is quniform's q, else None. first: the published number, if named."""

    kind: str
    low: float
    high: float
    step: float | None = None
    first: float | None = None

    def ends(self) -> tuple[float, ...]:
        """The smallest and the largest number that can be drawn."""
        high = self.high - 1 if self.kind == "randint" else self.high
        return (self.low,) if high == self.low else (self.low, high)

    def holds(self, number: float) -> bool:
        """Whether the number can be drawn."""
        if self.kind == "randint":
            return isinstance(number, int) and self.low <= number < self.high
        on_a_step = self.step is None or (Decimal(str(number)) - Decimal(str(self.low))) % Decimal(str(self.step)) == 0
        return self.low <= number <= self.high and on_a_step

    def count(self) -> float:
        """Return how many different numbers can be drawn; infinity for a continuous range."""
        if self.kind == "randint":
            return self.high - self.low
        if self.kind == "quniform":
            return self._num_steps() + 1
        return 1 if self.low == self.high else math.inf

    def draw(self, generator: np.random.Generator) -> float:
        """Draw one number."""
        if self.kind == "randint":
            return int(generator.integers(int(self.low), int(self.high)))
        if self.kind == "quniform":
            return self._step_to(int(generator.integers(self._num_steps() + 1)))
        if self.kind == "loguniform":
            drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            drawn = float(generator.uniform(self.low, self.high))
        return self.rounded(drawn)

    def rounded(self, number: float) -> float:
        """Return the nearest number that can be drawn: a whole one, one on a step, or one of 6 significant digits."""
        if self.kind == "randint":
            return min(max(round(number), int(self.low)), int(self.high) - 1)
        if self.kind == "quniform":
            step = round((number - self.low) / float(self.step or 1.0))
            return self._step_to(min(max(step, 0), self._num_steps()))
        return min(max(float(f"{number:.6g}"), self.low), self.high)  # rounding may step over an end

    def _num_steps(self) -> int:
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step)))

    def _step_to(self, k: int) -> float:
        # In decimals as written: 0.1 + 2 * 0.1 is 0.3 here, not 0.30000000000000004.
        number = Decimal(str(self.low)) + k * Decimal(str(self.step))
        return int(number) if isinstance(self.low, int) and isinstance(self.step, int) else float(number)


def shared_keys(key: str) -> tuple[str, ...]:
    """``"loss, miner" -> ("loss", "miner")``: the neighbouring keys that one choice of blocks supplies."""
    return tuple(name.strip() for name in key.split(","))


def resolve(node: Node, pick: Callable[[Address, Choice | Range], Any], path: str = "") -> tuple[Any, dict[str, str]]:
    """Return the tree with a value for each domain, and key path -> ``file:line`` of the result.

    pick: (address, domain) -> the position of the item of a choice, or the number of a range. path: the prefix of the
    key paths.
    """
    places: dict[str, str] = {}
    return _resolve(node, pick, (), path, places), places


def _resolve(
    node: Node, pick: Callable[[Address, Choice | Range], Any], address: Address, path: str, places: dict[str, str]
) -> Any:
    value = node.value
    places[path] = node.where
    if isinstance(value, Choice):
        position = pick(address, value)
        return _resolve(value.items[position], pick, (*address, position), path, places)
    if isinstance(value, Range):
        return pick(address, value)
    if isinstance(value, list):
        return [
            _resolve(item, pick, (*address, number), join_path(path, number), places)
            for number, item in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    block: dict[str, Any] = {}
    # Shared keys first: a plain key beside them comes from --set and replaces theirs.
    for key, child in sorted(value.items(), key=lambda entry: "," not in entry[0]):
        if "," in key:
            supplied = _resolve(child, pick, (*address, key), path, places)
            block.update(supplied if isinstance(supplied, dict) else {})
            places[path] = node.where
        else:
            block[key] = _resolve(child, pick, (*address, key), join_path(path, key), places)
    return block


def to_plain(node: Node) -> Any:
    """Return the tree as it would be written in YAML."""
    value = node.value
    if isinstance(value, Choice):
        first = {} if value.first is None else {"first": to_plain(value.items[value.first])}
        return {value.kind: [to_plain(item) for item in value.items], **first}
    if isinstance(value, Range):
        first = {} if value.first is None else {"first": value.first}
        return {value.kind: [value.low, value.high, *([] if value.step is None else [value.step])], **first}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def children(node: Node) -> Iterator[tuple[str | int, Node]]:
    """Yield (step, child) of a block, a list or a choice."""
    value = node.value
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
    elif isinstance(value, Choice):
        yield from enumerate(value.items)


def grid_points(node: Node, address: Address = ()) -> list[dict[Address, int]]:
    """Return every combination of the items of all grids: address -> position; one empty combination without grids."""
    if isinstance(node.value, Choice) and node.value.kind == "grid":
        return [
            {address: position, **point}
            for position, item in enumerate(node.value.items)
            for point in grid_points(item, (*address, position))
        ]
    if isinstance(node.value, Choice):
        return [{}]  # no grid inside a choice
    parts = [grid_points(child, (*address, step)) for step, child in children(node)]
    return [{key: value for part in combination for key, value in part.items()} for combination in product(*parts)]


def num_configurations(node: Node) -> float:
    """Return how many different values the tree can have, counting equal items apart; infinity if it is continuous."""
    if isinstance(node.value, Range):
        return node.value.count()
    counts = [num_configurations(child) for _, child in children(node)]
    return sum(counts) if isinstance(node.value, Choice) else math.prod(counts)


def random_pick(
    seed: int, index: int, redraw: int, fixed: Mapping[Address, int], num_points: int = 1
) -> Callable[[Address, Choice | Range], Any]:
    """Return a ``pick`` for `resolve` that draws trial number ``index``, except for the fixed positions.

    Choices are stratified: of n alternatives each occurs once in every n consecutive trials, in an order that differs
    from choice to choice, so that 16 trials over 4 losses try each loss 4 times. (Tune draws independently; a seed then
    decides whether a loss is tried at all.) The points of a grid, which trials go through in turn, are stratified each
    by itself. A redraw, after a duplicate, is independent.
    """
    turn, point = divmod(index, num_points)
    generator = np.random.default_rng([seed, index, redraw])

    def pick(address: Address, domain: Choice | Range) -> Any:
        if isinstance(domain, Range):
            return domain.draw(generator)
        if address in fixed:
            return fixed[address]
        num_items = len(domain.items)
        if redraw:
            return int(generator.integers(num_items))
        deck = np.random.default_rng([seed, turn // num_items, zlib.crc32(repr((point, address)).encode())])
        return int(deck.permutation(num_items)[turn % num_items])

    return pick


def has_first(node: Node) -> bool:
    """Return whether any domain of the tree names its published value."""
    named = isinstance(node.value, Choice | Range) and node.value.first is not None
    return named or any(has_first(child) for _, child in children(node))


def published_point(_address: Address, domain: Choice | Range) -> Any:
    """Pick trial 0 of a space with published values; a ``pick`` for `resolve`."""
    if isinstance(domain, Choice):
        return domain.first or 0
    # A range without a first is refused by `problems_of_first`, but the check of a space still gets here.
    return domain.low if domain.first is None else domain.first


def with_domains(node: Node, path: str, problems: list[Problem], *, in_choice: bool = False) -> Node:
    """Return the tree with its domains in place of their blocks. Mistakes in a domain are added to ``problems``."""
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
        # A plain key of --set replaces the value in the blocks.
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
    """Return the mistakes in the published point of a tree with domains; none where no domain names a ``first``.

    Every range that the published point takes a value from must name one. Elsewhere a ``first`` would have no effect
    and is refused.
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
    """Yield (path, domain, whether the published point takes a value from it) of the domains below a node.

    set_aside: keys of shared blocks that a plain key beside them replaces.
    """
    value = node.value
    if isinstance(value, Choice | Range):
        yield path, node, taken
    if isinstance(value, Choice):
        for position, item in enumerate(value.items):
            yield from _domains_and_whether_taken(item, path, taken and position == (value.first or 0), set_aside)
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
        return report(f"{others[0]} is beside {name}, where only `first` may be", "keep one domain, and write first")
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
    num_ends = 3 if name == "quniform" else 2
    if len(numbers) != num_ends or not all(is_number(number) for number in numbers):
        spelling = "[low, high, q]" if num_ends == 3 else "[low, high]"
        return report(f"{name} needs {num_ends} numbers", f"write {{{name}: {spelling}}}")
    mistake = _range_mistake(name, *numbers)
    if mistake:
        return report(*mistake)
    found = Range(name, *numbers)
    if first is None:
        return Node(found, node.where)
    if not is_number(first.value) or not found.holds(first.value):
        return report("first cannot be drawn from it", "write a number of the range, or widen it", first.where)
    return Node(replace(found, first=first.value), node.where)


def _position(first: Node, items: list[Node]) -> int | None:
    """Return the position of the item that equals ``first``, or None."""
    written = [json.dumps(to_plain(item), sort_keys=True) for item in (first, *items)]
    return written.index(written[0], 1) - 1 if written[0] in written[1:] else None


def _range_mistake(name: str, low: float, high: float, step: float | None = None) -> tuple[str, str] | None:
    """Return (message, cure), or None for a valid range."""
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


def is_number(value: object) -> bool:
    """Return whether a value is a finite number: true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def domain_at(node: Node, address: Address) -> Choice | Range:
    """Return the domain at an address of a tree. Raises KeyError or IndexError where there is nothing."""
    for step in address:
        value = node.value
        if isinstance(value, Choice):
            node = value.items[int(step)]
        elif isinstance(value, list):
            node = value[int(step)]
        else:
            node = value[step]
    assert isinstance(node.value, Choice | Range)
    return node.value
