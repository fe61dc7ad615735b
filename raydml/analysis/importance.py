"""Which of the sampled parameters moved the result: a random forest over the trials, and what it loses without each.

The idea is that of functional ANOVA over a forest (Hutter, Hoos, Leyton-Brown 2014); the measure is Breiman's (2001)
permutation importance, which needs no grid over the space; permuted are all trials, not only those out of a tree's bag.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_TRIALS = 8  # below it a forest learns the trials by heart and every answer looks like one
_NUM_TREES, _NUM_PERMUTATIONS = 200, 20


class Importance(NamedTuple):
    """shares: parameter -> share of what the forest explains, largest first, in sum 1; empty where `reason` is given.

    r2: how well the forest predicts trials that it was not grown on (out of bag; 1 is perfect, 0 no better than the
    mean). reason: why nothing can be said, in words.
    """

    shares: dict[str, float]
    r2: float | None
    num_trials: int
    reason: str | None = None


def importance_of(
    configs: Sequence[Mapping[str, Any]], values: Sequence[float | None], parameters: Sequence[str], *, seed: int = 0
) -> Importance:
    """Importance of `parameters` for the values of trials.

    configs: flattened, one a trial; a parameter that a trial does not have is missing.
    values: what the trials reached; those without a finite value are left out.

    A choice (text, truth values) is one column a level and is permuted as a whole. A missing number is replaced by the
    median, so that a parameter of one loss does not stand in for the loss.
    """
    known = [
        (config, value) for config, value in zip(configs, values, strict=True) if value is not None and _finite(value)
    ]
    if len(known) < MIN_TRIALS:
        count = f"{len(known)} trial" + ("" if len(known) == 1 else "s")
        return Importance({}, None, len(known), f"{count} with a value: at least {MIN_TRIALS} are needed")
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
        reason = "a forest over the parameters predicts trials it has not seen no better than their mean does"
        return Importance({}, r2, len(known), reason)
    shares = {name: loss / total for name, loss in zip(columns, losses, strict=True)}
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), r2, len(known))


def _losses(blocks: Sequence[NDArray[np.float64]], values: NDArray[np.float64], seed: int) -> tuple[list[float], float]:
    """For each block of columns the mean squared error that permuting its rows adds (at least 0), and the forest's
    out-of-bag R²."""
    from sklearn.ensemble import RandomForestRegressor

    table = np.concatenate(blocks, axis=1)
    # Half of the columns a split: with all of them one strong parameter would hide the others in every tree.
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
    """(trials, 1) of a number, (trials, levels) of a choice."""
    present = [value for value in values if value is not None]
    if present and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present):
        median = float(np.median(present))
        return np.array([[median if value is None else float(value)] for value in values])
    levels = sorted({repr(value) for value in values})
    return np.array([[float(repr(value) == level) for level in levels] for value in values])


def _finite(value: float) -> bool:
    return math.isfinite(value)
