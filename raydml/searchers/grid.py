"""Grid search: every combination of the choices and of some numbers of each range.

The combinations are run in an order that is random and the same for the same seed, so that a study that has fewer
trials than there are combinations is spread over the space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Annotated

import numpy as np
from pydantic import Field

from raydml.search_space.domains import Address, Choice, Range, children
from raydml.search_space.points import Pick, Point, Value, from_unit, taking
from raydml.search_space.yaml_reader import Node
from raydml.searchers._base import Draw, Searcher

_MAX_COMBINATIONS = 1_000_000


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
        self._orders: dict[frozenset[tuple[Address, int]], list[dict[Address, Value]]] = {}

    def pick(self, draw: Draw) -> Pick:
        order = self._order(draw)
        if draw.redraw or draw.num_rounds >= len(order):
            return self.random(draw)
        return taking(order[draw.num_rounds], self.random(draw))

    def _order(self, draw: Draw) -> list[dict[Address, Value]]:
        """Return the combinations with the fixed positions, in the order of this seed."""
        fixed = dict(draw.fixed or {})
        key = frozenset(fixed.items())
        if key not in self._orders:
            combinations = []
            for combination in self._combinations(self.tree, (), fixed):
                combinations.append(combination)
                if len(combinations) >= _MAX_COMBINATIONS:
                    break
            order = np.random.default_rng(self.study_seed).permutation(len(combinations))
            self._orders[key] = [combinations[place] for place in order]
        return self._orders[key]

    def _combinations(self, node: Node, address: Address, fixed: dict[Address, int]) -> Iterator[dict[Address, Value]]:
        value = node.value
        if isinstance(value, Range):
            yield from ({address: number} for number in self._numbers(value))
        elif isinstance(value, Choice):
            positions = [fixed[address]] if address in fixed else range(len(value.items))
            for position in positions:
                for inside in self._combinations(value.items[position], (*address, position), fixed):
                    yield {address: position, **inside}
        else:
            parts = [list(self._combinations(child, (*address, step), fixed)) for step, child in children(node)]
            for combination in product(*parts):
                yield {key: number for part in combination for key, number in part.items()}

    def _numbers(self, domain: Range) -> list[Value]:
        num_points = int(min(self._points, domain.count()))
        places = [step / (num_points - 1) for step in range(num_points)] if num_points > 1 else [0.0]
        return list(dict.fromkeys(from_unit(domain, place) for place in places))
