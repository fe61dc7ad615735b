"""Gaussian processes: Snoek, Larochelle and Adams, "Practical Bayesian Optimization", NeurIPS 2012.

By Optuna. The process models the parameters that every trial has; those inside a choice, such as the margin of one of
the losses, are drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from raydml.search_space.points import Point
from raydml.search_space.yaml_reader import Node
from raydml.searchers._with_optuna import ModelSearcher

if TYPE_CHECKING:
    import optuna


class Gp(ModelSearcher):
    """Draws where a Gaussian process expects the largest improvement (Optuna).

    Args:
        num_random: trials before the first that depends on results.
    """

    def __init__(
        self,
        tree: Node,
        study_seed: int,
        first_points: Sequence[Point] = (),
        *,
        num_random: Annotated[int, Field(ge=1, description="trials before the first that depends on results")] = 10,
    ) -> None:
        super().__init__(tree, study_seed, first_points, num_random)

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        independent = optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=1, independent_sampler=independent)
