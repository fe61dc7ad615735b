"""Searchers whose proposals come from a sampler of Optuna.

For each proposal, the study of Optuna is built anew from the trials drawn before, and the sampler is seeded by the seed
of the study and the number of the trial. A sampler that lived on would have to be saved and restored, and what it
proposes would depend on the order in which the results arrived.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raydml.search_space.domains import Address, Choice, Range, domain_at
from raydml.search_space.points import Pick, Point, Value, key_of
from raydml.search_space.yaml_reader import Node
from raydml.searchers._base import Draw, DrawnBefore, Searcher

if TYPE_CHECKING:
    import optuna


#: The smallest value of every metric that trials can be ranked by.
_WORST = 0.0


class ModelSearcher(Searcher):
    """A searcher that learns from the trials before. The first ones are random."""

    def __init__(self, tree: Node, study_seed: int, first_points: Sequence[Point], num_random: int) -> None:
        super().__init__(tree, study_seed, first_points)
        self._num_random = num_random
        self._distributions: dict[Address, tuple[str, Any]] = {}
        self._frozen_before: list[tuple[DrawnBefore, optuna.trial.FrozenTrial]] = []  # made once for each result

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        """Return a new sampler of Optuna."""
        raise NotImplementedError

    def num_independent(self, num_trials: int) -> int:
        return min(num_trials, self._num_random)

    def pick(self, draw: Draw) -> Pick:
        if draw.index < self._num_random:
            return self.random(draw)
        import optuna

        with _quiet():
            study = optuna.create_study(
                direction="maximize", sampler=self.sampler(_seed(self.study_seed, draw.index, draw.redraw))
            )
            study.add_trials(self._all_frozen(draw.before))
            trial = study.ask()
        fixed = draw.fixed or {}

        def pick(address: Address, domain: Choice | Range) -> Value:
            if address in fixed:
                return fixed[address]
            with _quiet():
                return _suggested(trial, key_of(address), domain)

        return pick

    def _all_frozen(self, before: Sequence[DrawnBefore]) -> list[optuna.trial.FrozenTrial]:
        known = self._frozen_before
        self._frozen_before = [
            known[place] if place < len(known) and _is_same(known[place][0], trial) else (trial, self._frozen(trial))
            for place, trial in enumerate(before)
        ]
        return [frozen for _, frozen in self._frozen_before]

    def _frozen(self, trial: DrawnBefore) -> optuna.trial.FrozenTrial:
        """Return a trial as Optuna keeps it: without a result as running; ended without a value as the worst."""
        import optuna

        params, distributions = {}, {}
        for address, value in trial.point.items():
            if address not in self._distributions:
                self._distributions[address] = key_of(address), _distribution(domain_at(self.tree, address))
            name, distribution = self._distributions[address]
            params[name], distributions[name] = value, distribution
        states = optuna.trial.TrialState
        if not trial.has_result:
            return optuna.trial.create_trial(state=states.RUNNING, params=params, distributions=distributions)
        value = _WORST if trial.value is None else trial.value
        return optuna.trial.create_trial(state=states.COMPLETE, value=value, params=params, distributions=distributions)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the lines that Optuna logs for each study and each independent parameter, and its marks of options that
    may change."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _is_same(first: DrawnBefore, second: DrawnBefore) -> bool:
    return first is second or first == second  # the comparison of 1,000 points takes 10 ms


def _seed(study_seed: int, index: int, redraw: int) -> int:
    """Return a seed of 32 bits that differs for each proposal of each study."""
    digest = hashlib.sha256(f"{study_seed} {index} {redraw}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _distribution(domain: Choice | Range) -> optuna.distributions.BaseDistribution:
    import optuna

    if isinstance(domain, Choice):
        return optuna.distributions.CategoricalDistribution(tuple(range(len(domain.items))))
    if domain.kind == "randint":
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high) - 1)
    # Numbers of quniform are rounded to their steps here: Optuna has steps without the float noise of ours.
    return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.kind == "loguniform")


def _suggested(trial: optuna.trial.Trial, name: str, domain: Choice | Range) -> Value:
    """Return what a trial of Optuna takes from a domain, rounded as a number that is drawn is."""
    if isinstance(domain, Choice):
        return int(trial.suggest_categorical(name, tuple(range(len(domain.items)))))
    if domain.kind == "randint":
        return trial.suggest_int(name, int(domain.low), int(domain.high) - 1)
    return domain.rounded(trial.suggest_float(name, domain.low, domain.high, log=domain.kind == "loguniform"))
