"""Margin loss: Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from raydml.losses._base import TripletLoss, Tuples, both_sides, pair_squares
from raydml.ops.tuples import counts, per_tuple

# Inside the root, after the sum, as in the authors' code: keeps the gradient finite where two embeddings coincide.
DISTANCE_EPSILON = 1e-8


class Margin(TripletLoss):
    """Margin loss: hinges on the Euclidean distance on both sides of a learned boundary beta.

    With d = sqrt(|x_a - x_b|^2 + 1e-8), a positive pair costs max(0, d - beta + margin) and a negative pair
    max(0, beta - d + margin). The loss is the sum over the chosen pairs divided by the number of pairs whose hinge is
    active; 0 when none is. In triplets the two pairs count separately, so one triplet adds 0, 1 or 2 to the divisor
    (released code that adds two boolean masks counts it once on current PyTorch; we follow the original count).

    The penalty nu * sum(|beta|) is added before the division and only where a pair is active: once for a shared beta;
    with class_beta once for each triplet or positive pair (its anchor's beta), as in the Divide and Conquer release.
    pytorch-metric-learning does not divide the penalty of a shared beta.

    Embeddings are used as they come. Departure: the releases create beta as a parameter but never give it to the
    optimiser; here it trains, unless `trainable_beta: false` repeats what they in effect do.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        margin: Annotated[
            float, Field(gt=0, description="half the width of the band around beta; 0.2 in Wu et al.")
        ] = 0.2,
        beta: Annotated[
            float, Field(gt=0, description="initial boundary between positive and negative distances; 1.2 in Wu et al.")
        ] = 1.2,
        class_beta: Annotated[
            bool,
            Field(description="one boundary a class (that of the anchor counts), as in Wu et al.; false = one for all"),
        ] = True,
        trainable_beta: Annotated[
            bool, Field(description="learn the boundary, as in Wu et al.; false keeps its initial value")
        ] = True,
        nu: Annotated[
            float, Field(ge=0, description="weight of the penalty on |beta|; 0, no penalty, in the releases")
        ] = 0.0,
    ) -> None:
        super().__init__()
        if nu > 0 and not trainable_beta:
            raise ValueError(
                f"nu = {nu}, trainable_beta = {trainable_beta}: a penalty moves nothing where beta is constant; "
                "write nu: 0 or trainable_beta: true"
            )
        self.margin = margin
        self.class_beta = class_beta
        self.nu = nu
        start = torch.full((num_classes if class_beta else 1,), float(beta))
        if trainable_beta:
            self.beta = nn.Parameter(start)
        else:
            self.register_buffer("beta", start)

    def cost(self, points: Tensor, labels: Tensor, tuples: Tuples, references: Tensor | None) -> Tensor:
        distance = (pair_squares(points, tuples, references) + DISTANCE_EPSILON).sqrt()
        to_positive, to_negative = both_sides(distance, tuples)
        boundary = per_tuple(self.beta[labels] if self.class_beta else self.beta.expand(len(labels)), tuples)
        num_positive, num_negative = counts(tuples)
        pulled = (to_positive - boundary + self.margin).clamp(min=0)
        pushed = (boundary - to_negative + self.margin).clamp(min=0)
        num_active = ((pulled > 0) * num_positive).sum() + ((pushed > 0) * num_negative).sum()
        total = (pulled * num_positive).sum() + (pushed * num_negative).sum()
        if self.nu > 0:
            penalty = (boundary.abs() * num_positive).sum() if self.class_beta else self.beta.abs().sum()
            total = total + self.nu * penalty * (num_active > 0)
        return total / num_active.clamp(min=1)
