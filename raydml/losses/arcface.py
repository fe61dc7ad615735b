"""ArcFace: Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019."""

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from raydml.losses._base import ClassLoss, add_angular_margin, class_cosines, class_vectors, mean_cross_entropy


class ArcFace(ClassLoss):
    """ArcFace: classify by cosine, with a margin added to the angle to the own class; takes no miner.

    With theta_ic the angle between x_i and class vector w_c, the cross-entropy of the logits

        scale * cos(theta_ic + margin * [c = y_i])

    averaged over the batch: equation 3. Embeddings and class vectors are normalised inside the loss, both by
    max(norm, 1e-12); no bias. The cosine of the sum is cos(theta) cos(margin) - sin(theta) sin(margin), without an
    arc cosine, whose gradient is infinite at angles 0 and pi.

    Where theta + margin > pi, its cosine would rise again and reward an angle for growing. There the logit is
    scale * (cos(theta) - margin * sin(margin)), which goes on falling, as in the authors' release (its easy margin
    switched off) and in pytorch-metric-learning. At theta + margin = pi the logit drops by a step.

    The ICML 2020 benchmark takes scale 16, and also clamps every cosine to at least 1e-10, which stops gradients of
    obtuse angles; here nothing is clamped. The class matrix starts uniform in +-1/sqrt(embedding_dim).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: Annotated[
            float, Field(gt=0, description="multiplies the cosines; 64 in the paper, 16 in the ICML 2020 benchmark")
        ] = 64.0,
        margin: Annotated[
            float,
            Field(
                ge=0,
                le=math.pi / 2,
                description="added to the angle to the own class, in radians; 0.5 (28.6 degrees) in the paper",
            ),
        ] = 0.5,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = class_vectors(num_classes, embedding_dim)

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        cosine = add_angular_margin(class_cosines(points, self.weight), labels, self.margin)
        return mean_cross_entropy(self.scale * cosine, labels)
