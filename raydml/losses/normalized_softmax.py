"""Normalised softmax: Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from raydml.losses._base import ClassLoss, class_vectors, mean_cross_entropy
from raydml.ops.distances import products_with_unit


class NormalizedSoftmax(ClassLoss):
    """Normalised softmax: classify against unit class vectors at a low temperature; takes no miner.

    Cross-entropy of the logits <x_i, w_c / max(|w_c|, 1e-12)> / temperature, averaged over the batch (no bias).
    Embeddings are used as they come, so that the network decides whether they are unit vectors.

    The class matrix starts uniform in +-1/sqrt(embedding_dim). Its rows are normalised in the forward pass only;
    gradients flow through that, and weight decay acts on the raw rows, as in the reference.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        temperature: Annotated[
            float, Field(gt=0, description="divides the cosines; 0.05 in all published runs of the authors")
        ] = 0.05,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = class_vectors(num_classes, embedding_dim)

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        logits = products_with_unit(points, self.weight.to(points.dtype)) / self.temperature
        return mean_cross_entropy(logits, labels)
