"""Fair shares of the options of a choice in a search, and which options cannot win any more.

A ranking of losses is worth as much as its loss with the fewest trials. `Shares` gives each option its least number of
trials; then the searcher is free, except for options that are eliminated. It is known without Ray.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np

from raydml.config.trial import Balance
from raydml.errors import Problem, nearest_name
from raydml.search_space.domains import Address, Choice, shared_keys, to_plain
from raydml.search_space.points import domains_of
from raydml.search_space.yaml_reader import Node
from raydml.searchers._base import DrawnBefore

#: The note on an option that gets no further trials.
ELIMINATED = re.compile(r"search\.balance: (.+) gets no further trials after ")
#: How sure it must be that the best of the remaining trials of an option stays below the best value so far.
CONFIDENCE = 0.95


class Elimination(NamedTuple):
    """An option that cannot win any more.

    option: its name. num_trials: that it has had. epoch: of the last rung at which it was judged. reachable: what the
    best of all its remaining trials stays below in the end. best: the best value so far of all options.
    """

    option: str
    num_trials: int
    epoch: int
    reachable: float
    best: float


class Shares:
    """The shares of the options of one choice.

    Args:
        tree: the space of a trial, which has the choice: see `problems_of_balance`.
        rungs: the epochs at which trials are compared, ascending. max_epochs: of a trial.
    """

    def __init__(self, tree: Node, balance: Balance, seed: int, rungs: Sequence[int], max_epochs: int) -> None:
        self.address, self._choice = _choices(tree)[balance.of]
        self._balance, self._seed, self._rungs, self._max_epochs = balance, seed, rungs, max_epochs
        self.names = _names(self._choice)

    @property
    def num_forced(self) -> int:
        """How many trials it takes to give each option its least number."""
        return self._balance.least * len(self.names)

    def forced(self, before: Sequence[DrawnBefore]) -> list[int]:
        """Return the positions of the options that have too few trials yet; none where the searcher is free.

        The one with the fewest comes first, and of several the first in an order that the seed and their number give.
        """
        counts = Counter(trial.point.get(self.address) for trial in before)
        fewest = min(counts[position] for position in range(len(self.names)))
        order = np.random.default_rng([self._seed, fewest, len(self.names)]).permutation(len(self.names)).tolist()
        lacking = [position for position in order if counts[position] < self._balance.least]
        return sorted(lacking, key=lambda position: counts[position])

    def eliminated(self, before: Sequence[DrawnBefore], num_left: int) -> dict[int, Elimination]:
        """Return the options that cannot win any more, by their positions. num_left: trials that are still to come.

        At each rung, the best of ``num_left`` further trials of an option is expected below a limit (`reachable_best`),
        and no trial is expected to gain more after the rung than the one that has gained most, of those that have
        reached the next rung. An option is eliminated where both together stay below the best value of all, at every
        rung that at least `Balance.least` of its trials have reached and some trial has passed so. The option with the
        best value is never eliminated.
        """
        curves = [(trial.point.get(self.address), trial.curve) for trial in before if trial.curve]
        if not self._balance.eliminate or num_left < 1 or not curves:
            return {}
        best, winner = max(((max(curve.values()), position) for position, curve in curves), key=lambda found: found[0])
        found: dict[int, Elimination] = {}
        kept = {winner}
        for rung, following in zip(self._rungs, [*self._rungs[1:], self._max_epochs], strict=True):
            passed = [(curve, max(curve)) for _, curve in curves if rung in curve]
            gains = [
                max(value for epoch, value in curve.items() if epoch >= rung) - curve[rung]
                for curve, last in passed
                # One that has just passed the rung has yet to gain.
                if last >= following
            ]
            if not gains:
                continue
            for position in range(len(self.names)):
                values = [curve[rung] for own, curve in curves if own == position and rung in curve]
                if len(values) < self._balance.least:
                    continue
                reachable = reachable_best(values, num_left) + max(gains)
                if reachable >= best:
                    kept.add(position)
                else:
                    found[position] = Elimination(self.names[position], len(values), rung, reachable, best)
        counts = Counter(trial.point.get(self.address) for trial in before)
        return {
            position: one._replace(num_trials=counts[position])
            for position, one in found.items()
            if position not in kept
        }


def reachable_best(values: Sequence[float], num_further: int) -> float:
    """Return an upper bound, with `CONFIDENCE`, on the best of some further values of the same distribution.

    The values are taken as a sample of a normal distribution: the bound is mean + t s sqrt(1 + 1/n), with the quantile
    t of n - 1 degrees of freedom at CONFIDENCE^(1/num_further) (a prediction interval, Hahn 1969).
    """
    from scipy.stats import t  # takes longer to import than most commands that import this module

    num = len(values)
    quantile = float(t.ppf(CONFIDENCE ** (1 / num_further), num - 1))
    return fmean(values) + quantile * stdev(values) * math.sqrt(1 + 1 / num)


def problems_of_balance(tree: Node, balance: Balance, num_trials: int) -> list[Problem]:
    """Return why a space cannot be balanced so; paths begin with study."""
    choices = _choices(tree)
    if balance.of not in choices:
        nearest = nearest_name(balance.of, tuple(choices))
        message = "is no choice of the space that stands outside of other choices"
        cure = f"write {nearest}" if nearest else "name a key with a choice, or remove balance"
        path = "study.search.balance.of"
        return [Problem(path, balance.of, message, tuple(choices), nearest, cure)]
    if choices[balance.of][1].kind == "grid":
        message = "is a grid, whose items all get the same number of trials"
        cure = "remove balance, or write choice instead of grid"
        return [Problem("study.search.balance.of", balance.of, message, cure=cure)]
    num_options = len(choices[balance.of][1].items)
    if balance.least * num_options > num_trials:
        message = f"times {num_options} options is more than study.search.num_trials: {num_trials}"
        cure = f"write at most {num_trials // num_options}, or num_trials: {balance.least * num_options}"
        return [Problem("study.search.balance.least", balance.least, message, cure=cure)]
    return []


def _choices(tree: Node) -> dict[str, tuple[Address, Choice]]:
    """Return the choices outside of other choices by their keys; one that supplies several keys has each of them."""
    found: dict[str, tuple[Address, Choice]] = {}
    for address, domain in domains_of(tree):
        if isinstance(domain, Choice) and not any(isinstance(step, int) for step in address):
            *sections, keys = address
            for key in shared_keys(str(keys)):
                found[".".join([*(str(step) for step in sections), key])] = (address, domain)
    return found


def _names(choice: Choice) -> list[str]:
    """Return a name for each item of a choice: of its plugins, or the item as written; equal ones are numbered."""
    names = []
    for item in choice.items:
        plain = to_plain(item)
        if isinstance(plain, Mapping):
            blocks = [plain, *plain.values()]
            named = [str(block["name"]) for block in blocks if isinstance(block, Mapping) and "name" in block]
            names.append(" + ".join(named) or str(plain))
        else:
            names.append(str(plain))
    counts = Counter(names)
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[place] = f"{name} ({seen[name]})"
    return names
