"""Which of several models no other one beats in both quality and cost."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points (cost, quality) that are on the front, by rising cost.

    A point is on it unless another one is as good in both, and better in one: cost is better where it is lower, quality
    where it is higher. Of equal points all are on it or none.
    """
    return sorted(
        (
            number
            for number, (cost, quality) in enumerate(points)
            if not any(
                other_cost <= cost and other_quality >= quality and (other_cost, other_quality) != (cost, quality)
                for other_cost, other_quality in points
            )
        ),
        key=lambda number: points[number],
    )
