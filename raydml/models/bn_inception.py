"""BN-Inception (Ioffe & Szegedy, ICML 2015) in its Caffe version, with the parameter names of its published weights."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

FEATURE_DIM = 1024


class _Block(NamedTuple):
    """Channels of the four branches, which are concatenated in this order.

    one: output of the 1x1 branch, 0 for none. three: reduced, output. double: reduced, middle, output. pool: output of
    the pooling branch, 0 for the pooled map itself. A block without ``one`` and ``pool`` halves the map.
    """

    one: int
    three: tuple[int, int]
    double: tuple[int, int, int]
    pool: int
    averages: bool = True

    @property
    def halves(self) -> bool:
        return self.pool == 0


_BLOCKS = {
    "3a": _Block(64, (64, 64), (64, 96, 96), 32),
    "3b": _Block(64, (64, 96), (64, 96, 96), 64),
    "3c": _Block(0, (128, 160), (64, 96, 96), 0, averages=False),
    "4a": _Block(224, (64, 96), (96, 128, 128), 128),
    "4b": _Block(192, (96, 128), (96, 128, 128), 128),
    "4c": _Block(160, (128, 160), (128, 160, 160), 128),
    "4d": _Block(96, (128, 192), (160, 192, 192), 128),
    "4e": _Block(0, (128, 192), (192, 256, 256), 0, averages=False),
    "5a": _Block(352, (192, 320), (160, 224, 224), 128),
    "5b": _Block(352, (192, 320), (192, 224, 224), 128, averages=False),
}


class BNInception(nn.ModuleDict):
    """Images (B, 3, H, W) -> features (B, 1024). Takes BGR pixels in 0..255 minus their mean.

    Every convolution has a bias and is followed by BatchNorm (eps 1e-5) and ReLU. Parameters are named as in Cadene's
    pretrained-models.pytorch, whose ``bn_inception-52deb4733.pth`` fits without its classifier ("last_linear").
    pooling: the last map (B, 1024, H/32, W/32) -> (B, 1024, 1, 1); Caffe averages, Wang's Deep_Metric code takes the
    maximum. Takes the sizes of its `BackboneFacts`. Its BatchNorm has torch's momentum of 0.1, not Deep_Metric's 0.9.
    """

    def __init__(self, pooling: nn.Module) -> None:
        super().__init__()
        self._add_convolution("conv1_7x7_s2", 3, 64, kernel=7, stride=2)
        self["pool1_3x3_s2"] = _halving_pool()
        self._add_convolution("conv2_3x3_reduce", 64, 64)
        self._add_convolution("conv2_3x3", 64, 192, kernel=3)
        self["pool2_3x3_s2"] = _halving_pool()
        channels = 192
        for name, block in _BLOCKS.items():
            channels = self._add_block(f"inception_{name}", channels, block)
        assert channels == FEATURE_DIM
        self["global_pool"] = pooling

    def _add_convolution(self, name: str, before: int, after: int, kernel: int = 1, stride: int = 1) -> None:
        self[name] = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2)
        self[f"{name}_bn"] = nn.BatchNorm2d(after)
        self[f"{name}_relu"] = nn.ReLU(inplace=True)

    def _add_block(self, name: str, channels: int, block: _Block) -> int:
        """Add the layers of a block for a map of `channels` channels; return the channels of its output."""
        stride = 2 if block.halves else 1
        if block.one:
            self._add_convolution(f"{name}_1x1", channels, block.one)
        self._add_convolution(f"{name}_3x3_reduce", channels, block.three[0])
        self._add_convolution(f"{name}_3x3", *block.three, kernel=3, stride=stride)
        self._add_convolution(f"{name}_double_3x3_reduce", channels, block.double[0])
        self._add_convolution(f"{name}_double_3x3_1", *block.double[:2], kernel=3)
        self._add_convolution(f"{name}_double_3x3_2", *block.double[1:], kernel=3, stride=stride)
        if block.halves:
            self[f"{name}_pool"] = _halving_pool()
        elif block.averages:
            self[f"{name}_pool"] = nn.AvgPool2d(3, stride=1, padding=1)
        else:
            self[f"{name}_pool"] = nn.MaxPool2d(3, stride=1, padding=1)
        if block.pool:
            self._add_convolution(f"{name}_pool_proj", channels, block.pool)
        self[f"{name}_output"] = _Concatenation()
        return block.one + block.three[-1] + block.double[-1] + (block.pool or channels)

    def forward(self, images: Tensor) -> Tensor:
        maps = self._convolved(images, "conv1_7x7_s2")
        maps = self._convolved(self["pool1_3x3_s2"](maps), "conv2_3x3_reduce", "conv2_3x3")
        maps = self["pool2_3x3_s2"](maps)
        for name, block in _BLOCKS.items():
            maps = self._through(f"inception_{name}", block, maps)
        return self["global_pool"](maps).flatten(1)

    def _through(self, name: str, block: _Block, maps: Tensor) -> Tensor:
        branches = [self._convolved(maps, f"{name}_1x1")] if block.one else []
        branches.append(self._convolved(maps, f"{name}_3x3_reduce", f"{name}_3x3"))
        double = (f"{name}_double_3x3_reduce", f"{name}_double_3x3_1", f"{name}_double_3x3_2")
        branches.append(self._convolved(maps, *double))
        pooled = self[f"{name}_pool"](maps)
        branches.append(self._convolved(pooled, f"{name}_pool_proj") if block.pool else pooled)
        return self[f"{name}_output"](*branches)

    def _convolved(self, maps: Tensor, *names: str) -> Tensor:
        for name in names:
            maps = self[f"{name}_relu"](self[f"{name}_bn"](self[name](maps)))
        return maps


class _Concatenation(nn.Module):
    """Concatenate maps along the channels; a module, so that hooks can see the output of a block."""

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.cat(maps, dim=1)


def _halving_pool() -> nn.Module:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
