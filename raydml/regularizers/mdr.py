"""MDR: Kim and Park, Multi-level Distance Regularization for Deep Metric Learning, AAAI 2021."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from raydml.ops.distances import euclidean
from raydml.regularizers._base import Regularizer


class MDR(Regularizer):
    """MDR: hold all pairwise distances near a few learned levels, independent of the labels.

    With d_ij the Euclidean distances of the batch, mu and sigma running statistics of them and levels s_k:

        weight * mean_{i != j} min_k |(d_ij - mu) / sigma - s_k| + level_weight * sum_k s_k^2

    mu and sigma are the mean and the unbiased deviation over the whole (B, B) matrix, its zero diagonal included, as in
    the authors' release. They are constants to the gradient. The first batch sets them; each later one is blended in
    before they are used: momentum * old + (1 - momentum) * new. A batch of fewer than two rows has no pairs: it costs
    nothing and leaves the statistics alone.

    The levels are parameters and start evenly between -level_spread and level_spread (-3, 0, 3 in the paper); a level
    learns from the distances nearest to it. In the paper embeddings are not of unit length: training batches are
    divided by their mean distance (the model's normalize: mean_distance).

    Departure: the release forgets, in a checkpoint, whether the statistics were set; here that is part of the state.
    """

    mean: Tensor
    deviation: Tensor
    initialised: Tensor

    def __init__(
        self,
        *,
        weight: Annotated[
            float,
            Field(
                ge=0, description="multiplies the mean; 0.6 on CUB, 0.2 on Cars, 0.1 on SOP and In-Shop in the release"
            ),
        ] = 0.6,
        level_weight: Annotated[
            float, Field(ge=0, description="multiplies the sum of the squared levels; 0.01 in the release")
        ] = 0.01,
        num_levels: Annotated[
            int, Field(ge=2, description="number of levels that distances are drawn to; 3 in the paper")
        ] = 3,
        level_spread: Annotated[
            float, Field(gt=0, description="initial outermost levels, in standard deviations; 3 in the paper")
        ] = 3.0,
        momentum: Annotated[
            float, Field(ge=0, lt=1, description="share of the old statistics that a batch keeps; 0.9 in the release")
        ] = 0.9,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.level_weight = level_weight
        self.momentum = momentum
        self.levels = nn.Parameter(torch.linspace(-level_spread, level_spread, num_levels))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    def term(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
        levels = self.levels.to(points.dtype)
        if len(points) < 2:
            return 0 * (points[:0].sum() + levels.sum())
        itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
        distance = euclidean(points).masked_fill(itself, 0)
        mean, deviation = self._blend(distance)
        nearest = ((distance - mean) / deviation)[:, :, None].sub(levels).abs().amin(dim=2)
        num_pairs = len(points) * (len(points) - 1)
        term = nearest.masked_fill(itself, 0).sum() / num_pairs
        return self.weight * term + self.level_weight * levels.square().sum()

    @torch.no_grad()
    def _blend(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Blend this batch into the running mean and deviation, and return them."""
        deviation, mean = torch.std_mean(distance)
        blended = []
        for running, new in ((self.mean, mean), (self.deviation, deviation)):
            old = torch.where(self.initialised, running.to(new.dtype), new)  # where unset, the batch alone
            blended.append(torch.lerp(new, old, self.momentum))
            running.copy_(blended[-1])
        self.initialised.fill_(True)
        return blended[0], blended[1]
