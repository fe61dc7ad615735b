"""The configurations of a search, as its searcher proposes them.

A proposal depends on the space, the seed of the study, the number of the trial and what the trials before it have
shown. The first ones need no results: they are drawn, checked and recorded before the study begins. It is known without
Ray, so that `--dry-run` and benchmarks use the same draws as a study.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from raydml import registry
from raydml.config.sections import SearcherBlock
from raydml.config.trial import StudySettings, Trial, fingerprint
from raydml.errors import ConfigError, Problem
from raydml.search_space.domains import (
    Address,
    Choice,
    Range,
    grid_points,
    has_first,
    published_point,
    random_pick,
    resolve,
)
from raydml.search_space.points import Pick, Point, Value, locate, published_defaults, recording, taking
from raydml.search_space.space import SearchSpace, SpaceError, new_trial, refuse_too_few, too_few
from raydml.search_space.yaml_reader import Node
from raydml.searchers._base import Draw, DrawnBefore, Searcher
from raydml.study.rungs import milestones
from raydml.study.shares import Elimination, Shares, problems_of_balance

#: After so many refused proposals for a trial the rest are random: a searcher may propose the same point for ever.
_MAX_PROPOSALS = 20


class DrawnTrial(NamedTuple):
    """A configuration, and where it is in the space."""

    trial: Trial
    point: Point


class TrialDraws:
    """Draws the trials of a search one after the other. Raises SpaceError where the space and its `first` do not fit.

    num_trials: of the search. num_known: how many of them, from the first on, depend on no result. can_adapt: whether
    any does. max_epochs: of any trial. rungs: the epochs at which the scheduler compares trials.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space, search = space, space.study.search
        if problems := problems_of_search(space):
            raise SpaceError(problems)
        self._grid = grid_points(space.trial)
        self.num_trials = search.num_trials * len(self._grid)
        refuse_too_few(space, self.num_trials)
        self.max_epochs = max_epochs_of(space)
        self.rungs = milestones(
            max_epochs=self.max_epochs, grace_epochs=search.grace_epochs, reduction_factor=search.reduction_factor
        )
        self._firsts = self._first_points()
        named = [point for points in self._firsts for point in points]
        self.searcher: Searcher = registry.build(
            "searchers", search.searcher.name, tree=space.trial, study_seed=space.study.seed, first_points=named,
            **search.searcher.settings,
        )  # fmt: skip
        self.shares = None
        self.num_known = self.searcher.num_independent(self.num_trials)
        if len(self._grid) == 1:
            self.num_known = max(self.num_known, len(named))
        if search.balance is not None:
            # With sync, all trials are drawn before one passes the first rung: nothing could be eliminated.
            eliminates = search.balance.eliminate and search.scheduler != "sync"
            balance = search.balance.model_copy(update={"eliminate": eliminates})
            self.shares = Shares(space.trial, balance, space.study.seed, self.rungs, self.max_epochs)
            if eliminates:
                self.num_known = min(self.num_known, self.shares.num_forced)
        self.num_known = min(self.num_known, self.num_trials)

    @property
    def can_adapt(self) -> bool:
        return self.num_known < self.num_trials

    def _first_points(self) -> list[list[Point]]:
        """Return the points that the search begins with, for each point of the grids."""
        firsts: list[list[Point]] = [[] for _ in self._grid]
        if has_first(self._space.trial):
            firsts[0].append(_point_of(self._space, published_point))
        defaults = published_defaults(self._space.trial)
        for configuration in self._space.study.search.first:
            found = locate(self._space.trial, configuration).point
            point = _point_of(self._space, taking(found, lambda address, _domain: defaults[address]))
            place = next(number for number, fixed in enumerate(self._grid) if fixed.items() <= point.items())
            firsts[place].append(point)
        return firsts

    def draw(
        self,
        index: int,
        before: Sequence[DrawnBefore] = (),
        taken: Collection[str] = (),
        finish: Callable[[Trial], Trial] = lambda trial: trial,
        refuse_invalid: bool = True,
        eliminated: Collection[int] | None = None,
    ) -> DrawnTrial | None:
        """Return trial number ``index``; None where the space has no other configuration.

        before: all trials that were drawn before, in their order. taken: the fingerprints of their configurations, none
        of which is drawn again. finish: returns a configuration as it runs, after the limits of its images, say; its
        fingerprint counts. refuse_invalid: raise SpaceError for a configuration that is invalid in a way that the check
        of the space did not find; else another one is drawn. eliminated: options of the balanced choice that get no
        further trials; None: those that `eliminations` finds.
        """
        options = [None] if self.shares is None else [*self.shares.forced(before), None]
        excluded = frozenset(self.eliminations(index, before) if eliminated is None else eliminated)
        for option in options:
            drawn = self._draw(index, before, taken, finish, option, excluded, refuse_invalid=refuse_invalid)
            if drawn is not None:  # else this option has no configuration left
                return drawn
        return None

    def _draw(
        self,
        index: int,
        before: Sequence[DrawnBefore],
        taken: Collection[str],
        finish: Callable[[Trial], Trial],
        option: int | None,
        excluded: frozenset[int],
        *,
        refuse_invalid: bool,
    ) -> DrawnTrial | None:
        """Draw a trial with this option of the balanced choice; None: with any but the excluded ones."""
        place, turn = index % len(self._grid), index // len(self._grid)
        fixed = dict(self._grid[place])
        if option is not None and self.shares is not None:
            fixed[self.shares.address] = option
        firsts = self._firsts[place]
        points: list[dict[Address, Value]] = []

        def propose(redraw: int) -> Pick:
            points.append({})
            if turn < len(firsts) and not redraw:
                found = taking(firsts[turn], random_pick(self._space.study.seed, index, redraw, fixed, len(self._grid)))
                return recording(found, points[-1])
            draw = Draw(index, redraw, before, fixed, len(self._grid))
            proposal = self.searcher.pick(draw) if redraw < _MAX_PROPOSALS else self.searcher.random(draw)
            return recording(self._without(excluded, proposal, draw) if option is None else proposal, points[-1])

        def accept(trial: Trial) -> DrawnTrial | None:
            try:
                finished = finish(trial)
            except ConfigError:
                if refuse_invalid:
                    raise
                return None
            return None if fingerprint(finished) in taken else DrawnTrial(finished, points[-1])

        return new_trial(self._space, propose, accept, refuse_invalid=refuse_invalid)

    def known(self, finish: Callable[[Trial], Trial] | None = None) -> list[DrawnTrial]:
        """Return the trials that depend on no result, and after them random ones, which stand for those to be drawn.

        finish: see `draw`. Equal trials after it are one: there may be fewer then. Without it, SpaceError is raised
        where the space has fewer configurations than trials.
        """
        random = (
            TrialDraws(replace(self._space, study=_with_random_search(self._space.study))) if self.can_adapt else self
        )
        found: list[DrawnTrial] = []
        before: list[DrawnBefore] = []
        taken: set[str] = set()
        for index in range(self.num_trials):
            draws = self if index < self.num_known else random
            drawn = draws.draw(index, before, taken, finish or (lambda trial: trial))
            if drawn is None:
                if finish is None:
                    raise SpaceError([too_few(self._space, self.num_trials, len(found), len(self._grid))])
                break
            taken.add(fingerprint(drawn.trial))
            found.append(drawn)
            before.append(DrawnBefore(drawn.point))
        return found

    def eliminations(self, index: int, before: Sequence[DrawnBefore]) -> dict[int, Elimination]:
        """Return the options of the balanced choice that get no further trials, from trial number ``index`` on."""
        return {} if self.shares is None else self.shares.eliminated(before, self.num_trials - index)

    def _without(self, excluded: frozenset[int], proposal: Pick, draw: Draw) -> Pick:
        """Return a proposal with another option in place of one that is excluded, each of those left equally likely."""
        if not excluded or self.shares is None:
            return proposal
        balanced, names = self.shares.address, self.shares.names
        left = [position for position in range(len(names)) if position not in excluded]

        def pick(address: Address, domain: Choice | Range) -> Value:
            value = proposal(address, domain)
            if address != balanced or value not in excluded:
                return value
            generator = np.random.default_rng([self._space.study.seed, draw.index, draw.redraw, 0x5348])
            return left[int(generator.integers(len(left)))]

        return pick


def problems_of_search(space: SearchSpace) -> list[Problem]:
    """Return what does not fit between the settings of the search and the space of its trials."""
    problems: list[Problem] = []
    search = space.study.search
    for number, configuration in enumerate(search.first):
        outside = [*locate(space.trial, configuration).outside, *unknown_keys(configuration)]
        if outside:
            cure = "write what the space can draw, or widen it"
            problems.append(Problem(f"study.search.first.{number}", dict(configuration), "; ".join(outside), cure=cure))
    if search.balance is not None:
        num_trials = search.num_trials * len(grid_points(space.trial))
        problems += problems_of_balance(space.trial, search.balance, num_trials)
    return [problem._replace(where=problem.where or str(space.path)) for problem in problems]


def _with_random_search(study: StudySettings) -> StudySettings:
    search = study.search.model_copy(update={"searcher": SearcherBlock(name="random"), "balance": None})
    return study.model_copy(update={"search": search})


def unknown_keys(configuration: Mapping[str, object]) -> list[str]:
    """Return in words which keys of a configuration are none of a trial's."""
    return [f"{key} is no key of a trial" for key in configuration if key not in Trial.model_fields]


def max_epochs_of(space: SearchSpace) -> int:
    """Return the largest number of epochs that a trial of a space can have."""
    whole = space.trial.value
    # The trials of a small copy of a study are a grid of whole trials.
    trials = [item.value for item in whole.items] if isinstance(whole, Choice) else [whole]
    default = Node(Trial.model_fields["epochs"].default, "epochs")
    return int(max(number for trial in trials for number in _numbers_in(trial.get("epochs", default))))


def _numbers_in(node: Node) -> list[float]:
    if isinstance(node.value, Range):
        return list(node.value.ends())
    if isinstance(node.value, Choice):
        return [number for item in node.value.items for number in _numbers_in(item)]
    return [node.value] if isinstance(node.value, int) else []


def _point_of(space: SearchSpace, pick: Pick) -> Point:
    point: dict[Address, Value] = {}
    resolve(space.trial, recording(pick, point))
    return point
