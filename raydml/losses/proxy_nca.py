"""Proxy-NCA: Movshovitz-Attias et al., No Fuss Distance Metric Learning Using Proxies, ICCV 2017."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from raydml.losses._base import ClassLoss, class_cosines


class ProxyNCA(ClassLoss):
    """Proxy-NCA: near the own class's proxy, compared with all other proxies; takes no miner.

    With squared distances d between embedding x_i and proxy p_c, both normalised inside the loss (by max(norm, 1e-12))
    and multiplied by scale, the mean over the batch of

        d(x_i, p_{y_i}) + log sum_{c != y_i} exp(-d(x_i, p_c))

    The own proxy is not in the sum, so the loss has no lower bound at 0 and is often negative. Between vectors of one
    length, d = 2 scale^2 (1 - cos), and the constant cancels: computed from cosines.

    One proxy a class, drawn from N(0, 1) / 8. Scale 3 and this start are those of the MIC release and the ICML 2020
    benchmark. pytorch-metric-learning has the own proxy in the sum too (log(1 + exp(.)) of each item's loss here) and
    leaves the scale at 1 (its softmax_scale is scale^2).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        scale: Annotated[
            float, Field(gt=0, description="length of embeddings and proxies; 3 in the MIC release and the benchmark")
        ] = 3.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(
                f"proxy_nca compares with the other classes' proxies, and num_classes = {num_classes} leaves none: "
                "train on two classes or more"
            )
        self.scale = scale
        self.proxies = nn.Parameter(torch.randn(num_classes, embedding_dim) / 8)

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        cosine = class_cosines(points, self.proxies)
        closeness = 2 * self.scale**2 * cosine
        own = labels[:, None]
        others = torch.logsumexp(closeness.scatter(1, own, -math.inf), dim=1)
        # Sum and division, because the mean of an empty batch is NaN.
        return (others - closeness.gather(1, own).squeeze(1)).sum() / max(len(labels), 1)
