"""Draws around good points: the mixture of Mallik et al., "PriorBand", NeurIPS 2023.

A share of the trials is drawn around points: those that the space names as good ones, or else the published defaults of
its losses and other plugins; and, once some trials have ended, the best of them. The two compete by how likely the
best trials are under each. The rest is random, so that a misleading point costs only its share.

Departures: the share of random trials is a setting and not a function of the rung. A point is one of several, each
equally likely. The best trials are those with the best values, whatever their number of epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from raydml.search_space.domains import Address, Choice, Range, domain_at
from raydml.search_space.points import Pick, Point, Value, from_unit, published_defaults, to_unit
from raydml.search_space.yaml_reader import Node
from raydml.searchers._base import Draw, DrawnBefore, Searcher

_SPREAD = 0.25  # of the normal distribution around a point, where a range is 1 long
_MUTATED = 0.5  # the probability that a parameter of the best trial changes
_REDUCTION = 3  # the best third of the trials is looked at


class Priors(Searcher):
    """Draws some trials around published or named points and the best so far, the others at random.

    Args:
        share: of the trials that are drawn around a point.
        least_ended: trials that must have ended before the best of them is a point as well.
    """

    def __init__(
        self,
        tree: Node,
        study_seed: int,
        first_points: Sequence[Point] = (),
        *,
        share: Annotated[float, Field(gt=0, le=1, description="of the trials that are drawn around a point")] = 1 / 3,
        least_ended: Annotated[int, Field(ge=1, description="ended trials from which the best is a point")] = 9,
    ) -> None:
        super().__init__(tree, study_seed, first_points)
        self._share, self._least_ended = share, least_ended
        self._centres: list[Point] = list(self.first_points) or [published_defaults(tree)]

    def num_independent(self, num_trials: int) -> int:
        return min(num_trials, self._least_ended)

    def pick(self, draw: Draw) -> Pick:
        otherwise = self.random(draw)
        generator = np.random.default_rng([self.study_seed, draw.index, draw.redraw, 0x5052])
        # Evenly spread, so that a short study has its share: trials 2, 5, 8, ... for a third.
        begin, end = (math.floor(self._share * (draw.index + late) + 1e-9) for late in (0, 1))
        if begin == end:
            return otherwise
        centre = self._centres[int(generator.integers(len(self._centres)))]
        ended = sorted((trial for trial in draw.before if trial.has_result and trial.value is not None), key=_value)
        if len(ended) >= self._least_ended:
            best = ended[-1].point
            weight_of_best = self._weight_of_best(centre, best, ended[-max(1, len(ended) // _REDUCTION) :])
            if generator.random() < weight_of_best:
                return _around(best, generator, otherwise, draw, mutated=_MUTATED)
        return _around(centre, generator, otherwise, draw, mutated=1.0)

    def _weight_of_best(self, centre: Point, best: Point, top: Sequence[DrawnBefore]) -> float:
        """Return the probability that the best trial is the centre.

        Each of the top trials, the best with the largest weight, counts by its likelihood around either centre.
        """
        scores = [
            sum(
                (rank + 1) * math.exp(_log_likelihood(self.tree, trial.point, around) / max(1, len(trial.point)))
                for rank, trial in enumerate(top)
            )
            for around in (centre, best)
        ]
        return scores[1] / sum(scores) if sum(scores) else 0.5


def _value(trial: DrawnBefore) -> float:
    assert trial.value is not None
    return trial.value


def _around(centre: Point, generator: np.random.Generator, otherwise: Pick, draw: Draw, *, mutated: float) -> Pick:
    """Return a ``pick`` near a point. mutated: the probability that a value is not the point's own."""

    def pick(address: Address, domain: Choice | Range) -> Value:
        is_mutated, normal, kept = generator.random() < mutated, generator.normal(), generator.random()
        if address in (draw.fixed or {}) or address not in centre:
            return otherwise(address, domain)
        if not is_mutated:
            return centre[address]
        if isinstance(domain, Range):
            return from_unit(domain, _reflected(to_unit(domain, centre[address]) + _SPREAD * normal))
        # The item of the centre is twice as likely as each of the others.
        if kept < 2 / (len(domain.items) + 1):
            return centre[address]
        others = [position for position in range(len(domain.items)) if position != centre[address]]
        return others[int(generator.integers(len(others)))]

    return pick


def _reflected(place: float) -> float:
    """Return a place between 0 and 1; what lies outside comes back from the end."""
    place = abs(place) % 2
    return 2 - place if place > 1 else place


def _log_likelihood(tree: Node, point: Point, centre: Point) -> float:
    """Return the logarithm of the density of a point around a centre; what the centre lacks counts as uniform."""
    total = 0.0
    for address, value in point.items():
        if address not in centre:
            continue
        domain = domain_at(tree, address)
        if isinstance(domain, Range):
            offset = (to_unit(domain, value) - to_unit(domain, centre[address])) / _SPREAD
            total -= offset * offset / 2
        else:
            num_items = len(domain.items)
            total += math.log((2 if value == centre[address] else 1) / (num_items + 1))
    return total
