"""Proxy-Anchor: Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from raydml.losses._base import ClassLoss, class_cosines, sum_of_soft_maxima


class ProxyAnchor(ClassLoss):
    """Proxy-Anchor: each class's proxy is the anchor, against all items of the batch; takes no miner.

    With cosines s(x, p), X_p the items of proxy p's class, P all proxies and P+ those with an item in the batch:

        1/|P+| sum_{p in P+} log(1 + sum_{x in X_p} exp(-alpha (s(x, p) - delta)))
        + 1/|P| sum_{p in P} log(1 + sum_{x not in X_p} exp(alpha (s(x, p) + delta)))

    Embeddings and proxies are normalised inside the loss, both by max(norm, 1e-12). Agrees with
    pytorch-metric-learning.

    One proxy a class. They start from N(0, 2/num_classes), the He rule over the number of classes, as in the authors'
    release. Published runs give the proxies a learning rate 100 times the network's (loss_learning_rate).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        alpha: Annotated[float, Field(gt=0, description="sharpness on both sides; 32 in the paper")] = 32.0,
        delta: Annotated[float, Field(ge=0, description="margin, in cosine, on both sides; 0.1 in the paper")] = 0.1,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.delta = delta
        self.proxies = nn.Parameter(torch.randn(num_classes, embedding_dim) * math.sqrt(2 / num_classes))

    def cost(self, points: Tensor, labels: Tensor) -> Tensor:
        cosine = class_cosines(points, self.proxies)
        num_proxies = len(self.proxies)
        own = labels[:, None] == torch.arange(num_proxies, device=labels.device)
        pulled = sum_of_soft_maxima(-self.alpha * (cosine - self.delta).T, own.T)
        pushed = sum_of_soft_maxima(self.alpha * (cosine + self.delta).T, ~own.T)
        num_present = own.any(dim=0).sum().clamp(min=1)
        # Proxies without items of their class add log(1 + 0) to the first sum.
        return pulled / num_present + pushed / num_proxies
