"""Tree-structured Parzen estimators: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011.

By Optuna: multivariate (Falkner et al., "BOHB", ICML 2018), the parameters of each loss modelled together where trials
have them, and trials that still run count as bad ones, so that parallel trials differ.
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


class Tpe(ModelSearcher):
    """Draws where good trials are dense and bad ones rare (Optuna).

    Args:
        num_random: trials before the first that depends on results.
        num_candidates: of which the one with the highest ratio of the densities is proposed.
    """

    def __init__(
        self,
        tree: Node,
        study_seed: int,
        first_points: Sequence[Point] = (),
        *,
        num_random: Annotated[int, Field(ge=1, description="trials before the first that depends on results")] = 10,
        num_candidates: Annotated[int, Field(ge=1, description="of which the most promising is proposed")] = 24,
    ) -> None:
        super().__init__(tree, study_seed, first_points, num_random)
        self._num_candidates = num_candidates

    def sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        import optuna

        return optuna.samplers.TPESampler(
            n_startup_trials=1, n_ei_candidates=self._num_candidates, multivariate=True, group=True,
            constant_liar=True, seed=seed,
        )  # fmt: skip
