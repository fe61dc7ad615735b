"""Sub-center ArcFace: Deng et al., Boosting Face Recognition by Large-Scale Noisy Web Faces, ECCV 2020."""

import math
from typing import Annotated

from pydantic import Field
from torch import Tensor

from raydml.losses._base import ClassLoss, add_angular_margin, class_cosines, class_vectors, mean_cross_entropy


class SubCenterArcFace(ClassLoss):
    """Sub-center ArcFace: ArcFace with several centres a class, the nearest counts; takes no miner.

    With theta_ick the angle between x_i and centre k of class c, the angle to a class is that to its nearest centre,

        theta_ic = min_k theta_ick

    and the loss the cross-entropy of the logits scale * cos(theta_ic + margin * [c = y_i]), averaged over the batch. An
    item pulls only the centre that it is nearest to, so that noisy or unusual items of a class gather at centres of
    their own. With one centre it is ``arcface``, whose rules for angles at 0, at pi and beyond hold here too.

    Embeddings and centres are normalised inside the loss, by max(norm, 1e-12). Where two centres are equally near, each
    has half of the gradient.

    The paper afterwards drops all centres but the one with most items, and the items far from it, and trains anew; that
    second training is not part of the loss. Agrees with pytorch-metric-learning. Centres start uniform in
    +-1/sqrt(embedding_dim). Needs memory for B x C x K cosines.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        num_centers: Annotated[int, Field(ge=1, description="centres of each class (K); 3 in the paper")] = 3,
        scale: Annotated[float, Field(gt=0, description="multiplies the cosines; 64 in the paper")] = 64.0,
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
        self.num_centers = num_centers
        self.scale = scale
        self.margin = margin
        # Row c * K + k is centre k of class c.
        self.weight = class_vectors(num_classes * num_centers, embedding_dim)

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        cosine = class_cosines(points, self.weight).unflatten(1, (-1, self.num_centers)).amax(dim=2)
        return mean_cross_entropy(self.scale * add_angular_margin(cosine, labels, self.margin), labels)
