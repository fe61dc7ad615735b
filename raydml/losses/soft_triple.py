"""SoftTriple: Qian et al., SoftTriple Loss: Deep Metric Learning Without Triplet Sampling, ICCV 2019."""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from raydml.losses._base import ClassLoss, mean_cross_entropy, subtract_margin
from raydml.ops.distances import products_with_unit

# Inside the root, as in the authors' release: keeps the gradient finite where two centres coincide, which is where the
# regulariser draws them.
DISTANCE_EPSILON = 1e-5


class SoftTriple(ClassLoss):
    """SoftTriple: softmax over classes that have several centres each; takes no miner.

    With cosines s_ick of x_i and centre k of class c, the similarity to a class is a soft maximum over its centres,

        S_ic = sum_k q_k s_ick,   q = softmax_k(s_ick / gamma)

    and the loss the cross-entropy of the logits scale * (S_ic - margin * [c = y_i]), averaged over the batch, plus

        tau / (C K (K - 1)) * sum_c sum_{k < l} |w_ck - w_cl|

    which merges centres that a class can do without (0 for K = 1 centre, and for an empty batch). Embeddings and
    centres are normalised inside the loss, by max(norm, 1e-12). The distance is sqrt(2 - 2 cos + 1e-5), as in the
    release.

    Follows the paper and its release. The ICML 2020 benchmark's code does not: its softmax runs over classes instead of
    centres. pytorch-metric-learning has the regulariser apart (SparseCentersRegularizer). Centres start uniform in
    +-1/sqrt(C K), as in the release. Needs memory for B x C x K cosines.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        num_centers: Annotated[int, Field(ge=1, description="centres of each class; 10 in the paper")] = 10,
        scale: Annotated[
            float, Field(gt=0, description="multiplies the similarities (lambda); 20 in the paper")
        ] = 20.0,
        gamma: Annotated[
            float, Field(gt=0, description="softness of the maximum over a class's centres; 0.1 in the paper")
        ] = 0.1,
        margin: Annotated[
            float,
            Field(ge=0, lt=2, description="subtracted from the similarity to the own class (delta); 0.01 in the paper"),
        ] = 0.01,
        tau: Annotated[
            float, Field(ge=0, description="weight of the distances between a class's centres; 0.2 in the paper")
        ] = 0.2,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.gamma = gamma
        self.margin = margin
        self.tau = tau
        bound = (num_classes * num_centers) ** -0.5
        self.centers = nn.Parameter(torch.empty(num_classes, num_centers, embedding_dim).uniform_(-bound, bound))

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        centers = self.centers.to(points.dtype)
        # The points are divided by gamma, not their many more cosines.
        sharpened = functional.normalize(points) / self.gamma
        cosine = products_with_unit(sharpened, centers.flatten(end_dim=1)).unflatten(1, centers.shape[:2])
        similarity = _SoftMaximum.apply(cosine) * self.gamma
        logits = self.scale * subtract_margin(similarity, labels, self.margin)
        classification = mean_cross_entropy(logits, labels)
        if self.tau == 0:
            return classification
        return classification + self.tau * min(len(labels), 1) * _spread(functional.normalize(centers, dim=2))


class _SoftMaximum(torch.autograd.Function):
    """The mean over the last dimension weighted by its softmax, in few passes over many numbers (B x C x K)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        share = values.softmax(dim=-1)
        mean = (share * values).sum(dim=-1)
        ctx.save_for_backward(values, share, mean)
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        values, share, mean = ctx.saved_tensors
        return (values - (mean - 1)[..., None]).mul_(share).mul_(gradient[..., None])


def _spread(centers: Tensor) -> Tensor:
    """Half the mean distance between different centres of a class. centers: (C, K, D), unit vectors."""
    num_classes, num_centers, _ = centers.shape
    squares = (2 + DISTANCE_EPSILON - 2 * (centers @ centers.mT)).clamp(min=DISTANCE_EPSILON)
    return squares.sqrt().triu(diagonal=1).sum() / max(num_classes * num_centers * (num_centers - 1), 1)
