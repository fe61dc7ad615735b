"""Grid search: every combination of the choices and of some numbers of each range.

The combinations are run in an order that is random and the same for the same seed, so that a study that has fewer
trials than there are combinations is spread over the space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from raydml.search_space.domains import Address, Choice, Range, children
from raydml.search_space.points import Pick, Point, Value, from_unit, taking
from raydml.search_space.yaml_reader import Node
from raydml.searchers._base import Draw, Searcher


class Grid(Searcher):
    """Runs the combinations of choices and evenly spaced numbers in a random order.

    Of a range of whole numbers or of steps that has no more numbers than `points`, all are taken. After the last
    combination, or where one is no valid configuration, trials are random.

    Args:
        points: numbers of each range, both ends included (the logarithms are evenly spaced in ``loguniform``).
    """

    def __init__(
        self,
        tree: Node,
        study_seed: int,
        first_points: Sequence[Point] = (),
        *,
        points: Annotated[int, Field(ge=2, description="numbers of each range, with both ends")] = 3,
    ) -> None:
        super().__init__(tree, study_seed, first_points)
        self._points = points
        self._orders: dict[frozenset[tuple[Address, int]], _RandomOrder] = {}

    def pick(self, draw: Draw) -> Pick:
        fixed = dict(draw.fixed or {})
        key = frozenset(fixed.items())
        if key not in self._orders:
            self._orders[key] = _RandomOrder(self._count(self.tree, (), fixed), self.study_seed)
        number = None if draw.redraw else self._orders[key].number(draw.num_rounds)
        if number is None:
            return self.random(draw)
        return taking(self._combination(self.tree, (), fixed, number), self.random(draw))

    def _count(self, node: Node, address: Address, fixed: Mapping[Address, int]) -> int:
        """Return how many combinations there are below a node."""
        value = node.value
        if isinstance(value, Range):
            return len(self._numbers(value))
        if isinstance(value, Choice):
            return sum(
                self._count(value.items[position], (*address, position), fixed)
                for position in _positions(value, address, fixed)
            )
        total = 1
        for step, child in children(node):
            total *= self._count(child, (*address, step), fixed)
        return total

    def _combination(
        self, node: Node, address: Address, fixed: Mapping[Address, int], number: int
    ) -> dict[Address, Value]:
        """Return one of the combinations below a node by its number, from 0."""
        value = node.value
        if isinstance(value, Range):
            return {address: self._numbers(value)[number]}
        if isinstance(value, Choice):
            for position in _positions(value, address, fixed):
                count = self._count(value.items[position], (*address, position), fixed)
                if number < count:
                    inside = self._combination(value.items[position], (*address, position), fixed, number)
                    return {address: position, **inside}
                number -= count
            raise AssertionError("the number is at most that of all combinations")
        found: dict[Address, Value] = {}
        for step, child in children(node):
            number, place = divmod(number, self._count(child, (*address, step), fixed))
            found |= self._combination(child, (*address, step), fixed, place)
        return found

    def _numbers(self, domain: Range) -> list[Value]:
        num_points = int(min(self._points, domain.count()))
        places = [step / (num_points - 1) for step in range(num_points)] if num_points > 1 else [0.0]
        return list(dict.fromkeys(from_unit(domain, place) for place in places))


def _positions(choice: Choice, address: Address, fixed: Mapping[Address, int]) -> Iterator[int]:
    yield from [fixed[address]] if address in fixed else range(len(choice.items))


class _RandomOrder:
    """The numbers below ``count``, each once, in a random order of which only the beginning is made."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._generator = count, np.random.default_rng(seed)
        self._order: list[int] = []
        self._moved: dict[int, int] = {}  # Fisher and Yates (Durstenfeld): the numbers that were exchanged

    def number(self, place: int) -> int | None:
        """Return the number at a place of the order; None behind its end."""
        if place >= self._count:
            return None
        while len(self._order) <= place:
            at = len(self._order)
            other = int(self._generator.integers(at, self._count))
            self._order.append(self._moved.get(other, other))
            self._moved[other] = self._moved.get(at, at)
        return self._order[place]
