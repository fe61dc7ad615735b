"""Random search: Bergstra and Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 2012.

Choices are stratified: of n alternatives each occurs once in n consecutive trials.
"""

from __future__ import annotations

from collections.abc import Sequence

from raydml.search_space.points import Pick, Point
from raydml.search_space.yaml_reader import Node
from raydml.searchers._base import Draw, Searcher


class RandomSearch(Searcher):
    """Draws every trial from the domains, whatever came before."""

    def __init__(self, tree: Node, study_seed: int, first_points: Sequence[Point] = ()) -> None:
        super().__init__(tree, study_seed, first_points)

    def pick(self, draw: Draw) -> Pick:
        return self.random(draw)
