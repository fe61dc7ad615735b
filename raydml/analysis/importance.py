"""What moved the result: the weight of every sampled parameter, and a table of the two choices that varied most.

The weight is Breiman's (2001) permutation importance in a random forest over the trials: what the forest's prediction
loses when one parameter is shuffled. It needs no grid over the space, as functional ANOVA over a forest does (Hutter,
Hoos, Leyton-Brown 2014). All trials are shuffled, not only those outside a tree's bag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.analysis.trials import CHOICES, TrialState, level_of

_FEWEST_TRIALS = 8  # a forest over fewer memorises them
_NUM_TREES, _NUM_PERMUTATIONS = 200, 20


class Importance(NamedTuple):
    """The weights of the parameters, or the reason why there are none.

    shares: parameter -> share of what the forest explains, largest first, in sum 1; empty where `reason` is given.
    r2: how well the forest predicts trials outside each tree's bag; 1 is perfect, 0 no better than the mean.
    reason: why there are no shares, in words.
    """

    shares: dict[str, float]
    r2: float | None
    num_trials: int
    reason: str | None = None


class CrossingCell(NamedTuple):
    """The values of the trials that made one pair of choices."""

    best: float
    median: float
    num_trials: int


class Crossing(NamedTuple):
    """A table of two choices.

    rows_of, columns_of: the choices, such as "loss"; columns_of is None where only one varies. rows, columns: their
    levels, best first. cells: (row, column) -> values; a pair without a trial that has a value is missing.
    """

    rows_of: str
    columns_of: str | None
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], CrossingCell]


def importance_of(
    configs: Sequence[Mapping[str, Any]], values: Sequence[float | None], parameters: Sequence[str], *, seed: int = 0
) -> Importance:
    """Return the importance of `parameters` for the values of trials.

    configs: flattened, one for each trial; a parameter that a trial does not have is missing.
    values: one for each trial; trials without a finite value are left out.

    A choice (text, truth value) is one column for each level, and these are shuffled together. A missing number is
    replaced by the median, so that a parameter of one loss does not get the weight of the loss itself.
    """
    known = [
        (config, value)
        for config, value in zip(configs, values, strict=True)
        if value is not None and math.isfinite(value)
    ]
    if len(known) < _FEWEST_TRIALS:
        count = f"{len(known)} trial" + ("" if len(known) == 1 else "s")
        return Importance({}, None, len(known), f"{count} with a value: at least {_FEWEST_TRIALS} are needed")
    columns = {name: _columns([config.get(name) for config, _ in known]) for name in parameters}
    columns = {name: block for name, block in columns.items() if np.ptp(block, axis=0).any()}
    if not columns:
        return Importance({}, None, len(known), "no parameter differs between the trials")
    reached = np.array([value for _, value in known], dtype=np.float64)
    if not np.ptp(reached):
        return Importance({}, None, len(known), "all trials have the same value")
    losses, r2 = _losses(list(columns.values()), reached, seed)
    total = sum(losses)
    if r2 <= 0 or total <= 0:
        reason = "a forest over the parameters predicts unseen trials no better than their mean does"
        return Importance({}, r2, len(known), reason)
    shares = {name: loss / total for name, loss in zip(columns, losses, strict=True)}
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), r2, len(known))


def crossing_of(trials: Sequence[TrialState]) -> Crossing | None:
    """Cross the two choices that vary most; None where no choice varies or no trial has a value."""
    reached = [(trial, trial.best) for trial in trials if trial.best is not None]
    levels = {choice: {level_of(trial.config, choice) for trial, _ in reached} for choice in CHOICES}
    # Of two that vary equally, the one that comes first in CHOICES.
    varied = sorted((choice for choice in CHOICES if len(levels[choice]) > 1), key=lambda c: -len(levels[c]))
    if not varied:
        return None
    rows_of, columns_of = varied[0], varied[1] if len(varied) > 1 else None
    values: dict[tuple[str, str], list[float]] = {}
    for trial, best in reached:
        column = level_of(trial.config, columns_of) if columns_of else ""
        values.setdefault((level_of(trial.config, rows_of), column), []).append(best)
    cells = {pair: CrossingCell(max(own), median(own), len(own)) for pair, own in values.items()}
    order = sorted(cells, key=lambda pair: -cells[pair].best)
    rows, columns = (list(dict.fromkeys(pair[side] for pair in order)) for side in (0, 1))
    return Crossing(rows_of, columns_of, rows, columns, cells)


def _losses(blocks: Sequence[NDArray[np.float64]], values: NDArray[np.float64], seed: int) -> tuple[list[float], float]:
    """Return (losses, R²): the mean squared error that shuffling each block of columns adds, at least 0, and the
    forest's out-of-bag R²."""
    from sklearn.ensemble import RandomForestRegressor

    table = np.concatenate(blocks, axis=1)
    # Half of the columns at each split: with all of them, one strong parameter would hide the others in every tree.
    forest = RandomForestRegressor(
        _NUM_TREES, max_features=0.5, min_samples_leaf=2, oob_score=True, random_state=seed, n_jobs=1
    )
    forest.fit(table, values)
    generator = np.random.default_rng(seed)
    error = float(np.mean((forest.predict(table) - values) ** 2))
    losses, start = [], 0
    for block in blocks:
        end = start + block.shape[1]
        shuffled = np.tile(table, (_NUM_PERMUTATIONS, 1))
        orders = [generator.permutation(len(values)) for _ in range(_NUM_PERMUTATIONS)]
        shuffled[:, start:end] = table[np.concatenate(orders), start:end]
        wrong = np.mean((forest.predict(shuffled) - np.tile(values, _NUM_PERMUTATIONS)) ** 2)
        losses.append(max(float(wrong) - error, 0.0))
        start = end
    return losses, float(forest.oob_score_)


def _columns(values: Sequence[Any]) -> NDArray[np.float64]:
    """Return (trials, 1) for a number, (trials, levels) for a choice."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        middle = float(np.median(present))
        return np.array([[middle if value is None else float(value)] for value in values])
    levels = sorted({repr(value) for value in values})
    return np.array([[float(repr(value) == level) for level in levels] for value in values])
