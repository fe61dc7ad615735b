"""Margin loss: Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017, "margin based loss"."""

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from raydml.tuples import Pairs, Triplets, all_pairs

# Inside the root, after the sum, as in the authors' code: keeps the gradient finite where two embeddings
# coincide.
DISTANCE_EPSILON = 1e-8


class Margin(nn.Module):
    """Margin loss: hinges on the Euclidean distance on both sides of a learned boundary beta.

    With d = sqrt(|x_a - x_b|^2 + 1e-8), a positive pair costs max(0, d - beta + margin) and a negative pair
    max(0, beta - d + margin). The loss is the sum over the chosen pairs divided by the number of pairs whose
    hinge is active; 0 when none is. In a triplet the two pairs count separately, so one triplet adds 0, 1 or
    2 to the divisor (released code that adds two boolean masks counts it once on current PyTorch; we follow
    the original count).

    margin: half the width of the band around the boundary. beta: where the boundary starts. class_beta: one
    boundary for each class, taken from the anchor's class, instead of one for all. nu: weight of sum(|beta|),
    added before the division and only where a pair is active: once for a shared beta; with class_beta once
    for each valid triplet or positive pair (its anchor's beta), as in the reference code.

    Departure: the reference releases create beta as a parameter but never give it to the optimiser; here it
    trains.
    """

    accepts: ClassVar[tuple[str, ...]] = ("pairs", "triplets")

    def __init__(
        self,
        num_classes: int,
        *,
        margin: Annotated[float, Gt(0)] = 0.2,
        beta: Annotated[float, Gt(0)] = 1.2,
        class_beta: bool = True,
        nu: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.class_beta = class_beta
        self.nu = nu
        self.beta = nn.Parameter(torch.full((num_classes if class_beta else 1,), float(beta)))

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: Pairs | Triplets | None = None) -> Tensor:
        """Scalar, float32 or wider. embeddings (B, D); labels (B,) int64 in 0..num_classes-1; None = all pairs."""
        tuples = all_pairs(labels) if tuples is None else tuples
        # Squares of differences need more than the 8 bits that autocast would leave them.
        with torch.autocast(embeddings.device.type, enabled=False):
            points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            beta = self.beta[labels] if self.class_beta else self.beta.expand(len(labels))  # (B,), by anchor
            if isinstance(tuples, Triplets):
                anchors = beta[tuples.anchor]
                positive_distance = _distance(points[tuples.anchor] - points[tuples.positive])
                negative_distance = _distance(points[tuples.anchor] - points[tuples.negative])
                positive_mask = negative_mask = tuples.valid
            else:
                anchors = beta[:, None].expand(-1, len(labels))
                # The exact form, not |x|^2 + |y|^2 - 2xy, which loses close pairs to rounding.
                distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
                positive_distance = negative_distance = (distance.square() + DISTANCE_EPSILON).sqrt()
                positive_mask, negative_mask = tuples
            positive = _hinge(positive_distance - anchors + self.margin, positive_mask)
            negative = _hinge(anchors - negative_distance + self.margin, negative_mask)
            num_active = (positive > 0).sum() + (negative > 0).sum()
            regulariser = (
                torch.where(positive_mask, anchors.abs(), 0).sum() if self.class_beta else self.beta.abs().sum()
            )
            total = positive.sum() + negative.sum() + self.nu * regulariser * (num_active > 0)
            return total / num_active.clamp(min=1)


def _distance(difference: Tensor) -> Tensor:
    """(T, D) differences to (T,) distances."""
    return (difference.square().sum(dim=1) + DISTANCE_EPSILON).sqrt()


def _hinge(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.clamp(min=0), 0)
