"""Global pooling: the last map of a backbone becomes one number for each channel."""

from torch import Tensor, nn

from raydml.models.choices import Pooling


class MaxPool(nn.Module):
    """The largest value of each channel: (B, C, H, W) -> (B, C, 1, 1). The gradient reaches one place of the map."""

    def forward(self, maps: Tensor) -> Tensor:
        # torch's adaptive_max_pool2d has no deterministic gradient on a GPU.
        return maps.flatten(2).max(dim=2).values[:, :, None, None]


def pooling_layer(pooling: Pooling) -> nn.Module:
    """Global pooling, (B, C, H, W) -> (B, C, 1, 1)."""
    return MaxPool() if pooling == "max" else nn.AdaptiveAvgPool2d(1)
