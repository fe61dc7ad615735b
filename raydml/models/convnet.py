"""A small network for small images."""

from itertools import pairwise

from torch import Tensor, nn


class ConvNet(nn.Module):
    """A small network for images of 8 to 64 pixels: (B, 3, H, W) -> (B, 128).

    Four blocks of 3x3 convolution, BatchNorm and ReLU; after each block the map is halved while its short
    side is at least 8, so an 8x8 digit is seen at 4x4 by the last three blocks and 64x64 ends at 4x4 too.
    """

    def __init__(self, pooling: nn.Module) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                _HalveLarge(),
            )
            for before, after in pairwise(widths)
        )
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for block in self.blocks:
            maps = block(maps)
        return self.pooling(maps).flatten(1)


class _HalveLarge(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return nn.functional.max_pool2d(maps, kernel_size=2) if min(maps.shape[-2:]) >= 8 else maps
