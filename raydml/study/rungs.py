"""The epochs at which successive halving compares trials, and how many epochs a search is expected to take."""

from __future__ import annotations

from bisect import insort

import numpy as np

_NUM_ORDERS = 200


def milestones(*, max_epochs: int, grace_epochs: int, reduction_factor: int) -> list[int]:
    """Return the epochs at which trials are compared: grace, grace * rf, grace * rf^2, ... below ``max_epochs``."""
    rungs, rung = [], grace_epochs
    while rung < max_epochs:
        rungs.append(rung)
        rung *= reduction_factor
    return rungs


def expected_epochs(
    num_trials: int, scheduler: str, *, max_epochs: int, grace_epochs: int, reduction_factor: int
) -> float:
    """Return the expected number of epochs of all trials of a search together.

    scheduler: "asha", where the number is a mean over random orders of the trials (see `_asha_epochs`); "sync" and
    "none", where it is exact. No trial is taken to fail.
    """
    rungs = milestones(max_epochs=max_epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor)
    if scheduler == "none":
        return float(num_trials * max_epochs)
    if scheduler == "asha":
        generator = np.random.default_rng(0)
        orders = [generator.permutation(num_trials).tolist() for _ in range(_NUM_ORDERS)]
        return sum(_asha_epochs(order, rungs, max_epochs, reduction_factor) for order in orders) / _NUM_ORDERS
    running, total, done = num_trials, 0, 0
    for rung in rungs:
        total += running * (rung - done)
        running, done = max(1, running // reduction_factor), rung
    return float(total + running * (max_epochs - done))


def _asha_epochs(qualities: list[int], rungs: list[int], max_epochs: int, reduction_factor: int) -> int:
    """Return the epochs of trials that run one after the other, with the same quality at every rung.

    A trial passes a rung where it is not below the percentile 100 * (1 - 1 / rf) of those that were there before it,
    interpolated linearly, as in Ray; the first one passes. More than 1 / rf of the trials pass, because the early ones
    have few to beat.
    """
    arrived: dict[int, list[int]] = {rung: [] for rung in rungs}  # in ascending order
    total = 0
    for quality in qualities:
        for rung, others in arrived.items():
            passes = not others or quality >= _percentile(others, 1 - 1 / reduction_factor)
            insort(others, quality)
            if not passes:
                total += rung
                break
        else:
            total += max_epochs
    return total


def _percentile(ascending: list[int], share: float) -> float:
    position = share * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])
