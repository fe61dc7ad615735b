"""Which configurations to look at so that a whole search space is checked before anything starts.

Every alternative of every choice occurs at least once, both ends of every range occur, and so does every pair of
them that can occur together (all losses with all miners, where these are chosen independently). What takes three
unlucky values at once can slip through here; each sampled trial is validated as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, islice
from typing import Any, NamedTuple

from raydml.search_space.domains import Address, Choice, Range, children
from raydml.search_space.yaml_reader import Node

MAX_CONFIGURATIONS = 4000  # about two seconds; pairs of ranges, the least telling, are what is left out


class _Pick(NamedTuple):
    """One value of one domain and the alternatives one must take to get there."""

    address: Address
    value: Any
    on_the_way: tuple[tuple[Address, int], ...]
    is_choice: bool

    def fixes(self) -> dict[Address, Any]:
        return {**dict(self.on_the_way), self.address: self.value}


def covering_picks(node: Node) -> Iterator[Callable[[Address, Choice | Range], Any]]:
    """A ``pick`` for `resolve` for each configuration of the covering set."""
    picks = list(_picks(node, (), ()))
    # Stable: alternatives before ends of ranges, so that the limit cuts the pairs of two ranges first.
    pairs = sorted(combinations(picks, 2), key=lambda pair: -pair[0].is_choice - pair[1].is_choice)
    yield _taking({})
    for pick in picks:
        yield _taking(pick.fixes())
    compatible = (fixes for first, second in pairs if (fixes := _together(first, second)) is not None)
    for fixes in islice(compatible, MAX_CONFIGURATIONS):
        yield _taking(fixes)


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
    """What to fix for both, or None when they exclude each other."""
    if first.address == second.address:
        return None
    fixed, other = first.fixes(), second.fixes()
    if any(fixed[address] != value for address, value in other.items() if address in fixed):
        return None
    return {**fixed, **other}


def _taking(fixed: dict[Address, Any]) -> Callable[[Address, Choice | Range], Any]:
    """The fixed values; elsewhere the first item and the low end."""

    def pick(address: Address, domain: Choice | Range) -> Any:
        return fixed.get(address, 0 if isinstance(domain, Choice) else domain.low)

    return pick
