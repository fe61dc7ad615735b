"""The epochs at which successive halving compares trials, and how many epochs a search is expected to take."""

from __future__ import annotations

from bisect import insort
from functools import lru_cache
from itertools import accumulate

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

    scheduler: as for `expected_spans`.
    """
    spans = expected_spans(
        num_trials, scheduler, max_epochs=max_epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor
    )
    begins = [0, *(end for end, _ in spans)]
    return sum(number * (end - begin) for begin, (end, number) in zip(begins, spans, strict=False))


def expected_epochs_left(spans: tuple[tuple[int, float], ...], *, num_planned: int, num_done: int) -> float:
    """Return the expected number of epochs that one running trial has left, of ``num_planned``.

    spans: of `expected_spans`. A trial that runs has passed the rungs up to ``num_done``.
    """
    left, begin, num_here = 0.0, num_done, None
    for end, num_trials in spans:
        last = min(end, num_planned)
        if last > begin:
            num_here = num_here or num_trials
            left += num_trials / num_here * (last - begin)
            begin = last
    return left


@lru_cache(maxsize=64)  # the live view needs it several times per second
def expected_spans(
    num_trials: int, scheduler: str, *, max_epochs: int, grace_epochs: int, reduction_factor: int
) -> tuple[tuple[int, float], ...]:
    """Return (last epoch, expected number of trials that train there) of the epochs up to each rung and to the end.

    scheduler: "asha", where the numbers are means over random orders of the trials (see `_asha_arrivals`); "sync" and
    "none", where they are exact; "promotion", where as many pass a rung as with "sync", up to a few that were among the
    best when they arrived; and "pasha", of which they are the upper limit. No trial is taken to fail.
    """
    if scheduler == "none":
        return ((max_epochs, float(num_trials)),)
    rungs = milestones(max_epochs=max_epochs, grace_epochs=grace_epochs, reduction_factor=reduction_factor)
    if scheduler == "asha":
        import numpy as np  # not for `--help` and `status`

        generator = np.random.default_rng(0)
        orders = [generator.permutation(num_trials).tolist() for _ in range(_NUM_ORDERS)]
        running = np.mean([_asha_arrivals(order, len(rungs), reduction_factor) for order in orders], axis=0).tolist()
    else:
        running = list(accumulate(rungs, lambda number, _: max(1, number // reduction_factor), initial=num_trials))
    return tuple(zip([*rungs, max_epochs], map(float, running), strict=True))


def _asha_arrivals(qualities: list[int], num_rungs: int, reduction_factor: int) -> list[int]:
    """Return how many trials arrive at each rung and at the end, if they run one after the other.

    Each has the same quality at every rung.

    A trial passes a rung where it is not below the percentile 100 * (1 - 1 / rf) of those that were there before it,
    interpolated linearly, as in Ray; the first one passes. More than 1 / rf of the trials pass, because the early ones
    have few to beat.
    """
    arrived: list[list[int]] = [[] for _ in range(num_rungs)]  # in ascending order
    num_at_end = 0
    for quality in qualities:
        for others in arrived:
            passes = not others or quality >= _percentile(others, 1 - 1 / reduction_factor)
            insort(others, quality)
            if not passes:
                break
        else:
            num_at_end += 1
    return [*map(len, arrived), num_at_end]


def _percentile(ascending: list[int], share: float) -> float:
    position = share * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])
