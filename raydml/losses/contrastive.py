"""Contrastive loss: Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006."""

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from raydml.tuples import Pairs, Triplets, all_pairs


class Contrastive(nn.Module):
    """Contrastive loss: draw positives inside one distance, push negatives beyond another.

    With Euclidean distances d: mean of max(0, d - positive_margin) over the chosen positive pairs plus mean
    of max(0, negative_margin - d) over the chosen negative pairs, each mean 0 where it has no pair. This is
    the linear form of the ICML 2020 benchmark and of pytorch-metric-learning; the 2006 paper squares both
    terms.

    positive_margin, negative_margin: distances. average_over: "all" chosen pairs, as in the ICML 2020
    benchmark, or only the "active" ones whose hinge is above zero, as in pytorch-metric-learning; with every
    pair of a large batch as input most negatives are inactive, and "active" keeps them from diluting the
    others.

    Departure: no 1e-6 is added to the differences; where two embeddings coincide the gradient is 0. On a GPU
    the backward pass over all pairs takes 4 B^2 D bytes for a moment.
    """

    accepts: ClassVar[tuple[str, ...]] = ("pairs", "triplets")

    def __init__(
        self,
        *,
        positive_margin: Annotated[float, Ge(0)] = 0.0,
        negative_margin: Annotated[float, Gt(0)] = 1.0,
        average_over: Literal["all", "active"] = "all",
    ) -> None:
        super().__init__()
        self.positive_margin = positive_margin
        self.negative_margin = negative_margin
        self.average_over = average_over

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: Pairs | Triplets | None = None) -> Tensor:
        """Scalar, float32 or wider. embeddings: (B, D); labels: (B,) int64; None = all pairs."""
        tuples = all_pairs(labels) if tuples is None else tuples
        # Differences of nearby points need more than the 8 bits that autocast would leave them.
        with torch.autocast(embeddings.device.type, enabled=False):
            points = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            if isinstance(tuples, Triplets):
                anchors = points[tuples.anchor]
                positive_distance = torch.linalg.vector_norm(anchors - points[tuples.positive], dim=1)
                negative_distance = torch.linalg.vector_norm(anchors - points[tuples.negative], dim=1)
                positive_mask = negative_mask = tuples.valid
            else:
                # The exact form, not |x|^2 + |y|^2 - 2xy: its gradient at distance 0 is 0, and close pairs
                # stay close.
                distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
                positive_distance = negative_distance = distance
                positive_mask, negative_mask = tuples
            return self._mean_hinge(positive_distance - self.positive_margin, positive_mask) + self._mean_hinge(
                self.negative_margin - negative_distance, negative_mask
            )

    def _mean_hinge(self, values: Tensor, mask: Tensor) -> Tensor:
        hinge = torch.where(mask, values.clamp(min=0), 0)
        counted = mask if self.average_over == "all" else hinge > 0
        return hinge.sum() / counted.sum().clamp(min=1)
