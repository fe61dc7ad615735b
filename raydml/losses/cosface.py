"""CosFace: Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from raydml.losses._base import ClassLoss, class_cosines, class_vectors, mean_cross_entropy, subtract_margin


class CosFace(ClassLoss):
    """CosFace: classify by cosine, with a margin taken from the cosine to the own class; takes no miner.

    Cross-entropy of the logits scale * (cos(x_i, w_c) - margin * [c = y_i]), averaged over the batch: equation 4.
    Embeddings and class vectors are normalised inside the loss, both by max(norm, 1e-12); no bias.

    The class matrix starts uniform in +-1/sqrt(embedding_dim). The paper does not say how it starts;
    pytorch-metric-learning, which agrees in all else, draws from N(0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: Annotated[float, Field(gt=0, description="multiplies the cosines; 64 in the paper")] = 64.0,
        margin: Annotated[
            float, Field(ge=0, lt=2, description="subtracted from the cosine to the own class; 0.35 in the paper")
        ] = 0.35,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = class_vectors(num_classes, embedding_dim)

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        cosine = subtract_margin(class_cosines(points, self.weight), labels, self.margin)
        return mean_cross_entropy(self.scale * cosine, labels)
