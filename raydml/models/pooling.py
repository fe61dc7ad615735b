"""Global pooling: the last map of a backbone becomes one number for each channel."""

import torch
from torch import Tensor, nn

from raydml.models.choices import Pooling
from raydml.ops.distances import full_precision


class MaxPool(nn.Module):
    """The largest value of each channel: (B, C, H, W) -> (B, C, 1, 1). The gradient reaches one place of the map."""

    def forward(self, maps: Tensor) -> Tensor:
        # torch's adaptive_max_pool2d has no deterministic gradient on a GPU.
        return maps.flatten(2).max(dim=2).values[:, :, None, None]


class GeM(nn.Module):
    """The generalised mean of each channel, (B, C, H, W) -> (B, C, 1, 1): (mean of x^p)^(1/p), with p learned from 3.

    Values below 1e-6 count as 1e-6. p = 1 is the average, and a large p nearly the maximum. Computed in float32 (or
    wider): powers of half precision overflow. Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human
    Annotation", TPAMI 2019, equation 3.
    """

    def __init__(self, p: float = 3.0, least: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))
        self._least = least

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            powers = full_precision(maps).clamp(min=self._least).pow(self.p)
            return powers.flatten(2).mean(dim=2).pow(1.0 / self.p)[:, :, None, None]


def pooling_layer(pooling: Pooling) -> nn.Module:
    """Global pooling, (B, C, H, W) -> (B, C, 1, 1): "average", "max" or "gem"."""
    if pooling == "gem":
        return GeM()
    return MaxPool() if pooling == "max" else nn.AdaptiveAvgPool2d(1)
