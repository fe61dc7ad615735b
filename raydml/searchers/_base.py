"""What a searcher is: it proposes the configurations of a search, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from raydml.search_space.domains import Address, random_pick
from raydml.search_space.points import Pick, Point
from raydml.search_space.yaml_reader import Node


class DrawnBefore(NamedTuple):
    """A trial that was drawn before, and what is known of it.

    point: where it is in the space. value: its best value of the selection metric so far, None without one. num_epochs:
    that it has trained. has_result: whether it has ended or reached a rung, so that its value says something. curve:
    epoch -> value.
    """

    point: Point
    value: float | None = None
    num_epochs: int = 0
    has_result: bool = False
    curve: Mapping[int, float] = {}


@dataclass(frozen=True)
class Draw:
    """What a proposal of a searcher depends on, beside the seed of the study.

    index: the number of the trial, from 0. redraw: how often its proposals for this trial were refused, because they
    were drawn before or are not valid. before: the trials drawn before, by their numbers. fixed: the positions that
    some choices must take, which are the point of the grids of this trial and what `search.balance` decides.
    num_grid_points: through which the trials go in turn.
    """

    index: int
    redraw: int = 0
    before: Sequence[DrawnBefore] = ()
    fixed: Mapping[Address, int] | None = None
    num_grid_points: int = 1

    @property
    def num_rounds(self) -> int:
        """How many trials there were before at the same point of the grids."""
        return self.index // self.num_grid_points


class Searcher:
    """Proposes configurations. A proposal depends on the seed of the study and on the `Draw`, and on nothing else.

    So a study that is resumed goes on as it would have: there is no state to save.

    Args:
        tree: the space of a trial.
        study_seed: of the study.
        first_points: what the space names as good points, which are the first trials of the study.
    """

    def __init__(self, tree: Node, study_seed: int, first_points: Sequence[Point] = ()) -> None:
        self.tree, self.study_seed, self.first_points = tree, study_seed, tuple(first_points)

    def num_independent(self, num_trials: int) -> int:
        """Return how many trials, from the first on, are proposed without any result. They are known before a study."""
        return num_trials

    def pick(self, draw: Draw) -> Pick:
        """Return the proposal for a trial, as a ``pick`` for `raydml.search_space.domains.resolve`."""
        raise NotImplementedError

    def random(self, draw: Draw) -> Pick:
        """Return what random search proposes for this trial."""
        return random_pick(self.study_seed, draw.index, draw.redraw, draw.fixed or {}, draw.num_grid_points)
