"""Networks of the five releases with random weights, built as their code builds them, and the files that they write.

The trunks are torchvision's ResNets and BN-Inception (tested against the original in test_bn_inception.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models as torchvision_models

from raydml.models.bn_inception import BNInception

CAFFE_MEAN = torch.tensor([104.0, 117.0, 128.0])
IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def as_caffe(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, 3), RGB -> (N, 3, H, W), BGR in 0..255 minus the mean."""
    return (pixels.flip(3).float() - CAFFE_MEAN).permute(0, 3, 1, 2)


def as_imagenet(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, 3), RGB -> (N, 3, H, W), 0..1, normalised."""
    return ((pixels.float() / 255 - IMAGENET_MEAN) / IMAGENET_STD).permute(0, 3, 1, 2)


class Mdr(nn.Module):
    """base.model is the ImageNet network with its classifier; a linear layer makes the embedding, nothing follows."""

    def __init__(self, _resnet: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.base = nn.Module()
        self.base.model = BNInception(nn.AdaptiveAvgPool2d(1))
        self.base.model["last_linear"] = nn.Linear(1024, 1000)
        self.linear = nn.Linear(1024, 512)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.linear(features_of(self.base.model, as_caffe(pixels)))


class DeepMetric(BNInception):
    """BN-Inception pooled by the maximum, classifier.linear, length 1; classifier.bn is there and not used."""

    def __init__(self, _resnet: Callable[[], nn.Module]) -> None:
        super().__init__(nn.AdaptiveMaxPool2d(1))
        self["classifier"] = nn.Module()
        self["classifier"].bn = nn.BatchNorm1d(1024)
        self["classifier"].linear = nn.Linear(1024, 512)

    def forward(self, pixels: Tensor) -> Tensor:
        return functional.normalize(self["classifier"].linear(features_of(self, as_caffe(pixels))), dim=1)


class DivideConquer(nn.Module):
    """A ResNet with all of its names, its layers once more as `features`, and an embedding of eight slices."""

    def __init__(self, resnet: Callable[[], nn.Module]) -> None:
        super().__init__()
        network = resnet()
        for name, child in network.named_children():
            setattr(self, name, child)
        self.features = nn.Sequential(*list(network.children())[:-2])
        self.embedding = nn.Linear(network.fc.in_features, 128)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.features(as_imagenet(pixels)).mean(dim=(2, 3))
        slices = self.embedding(pooled).chunk(8, dim=1)
        return torch.cat([piece / piece.norm(dim=1, keepdim=True) for piece in slices], dim=1)


class Classification(nn.Module):
    """The layers of a ResNet in a sequence, layer normalisation without parameters, [remap], length 1."""

    def __init__(self, resnet: Callable[[], nn.Module], remap_dim: int | None = None) -> None:
        super().__init__()
        network = resnet()
        self.feature = nn.Sequential(*list(network.children())[:-2])
        self.feature_dim = network.fc.in_features
        if remap_dim:
            self.remap = nn.Linear(self.feature_dim, remap_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = self.feature(as_imagenet(pixels)).mean(dim=(2, 3))
        pooled = functional.layer_norm(pooled, (self.feature_dim,))
        return functional.normalize(self.remap(pooled) if hasattr(self, "remap") else pooled, dim=1)


class Mic(nn.Module):
    """A ResNet below `model`, whose last layer is a dictionary of two; its stages once more as `layer_blocks`."""

    def __init__(self, resnet: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.model = resnet()
        dim = self.model.fc.in_features
        del self.model.fc
        self.model.last_linear = nn.ModuleDict({name: nn.Linear(dim, 128) for name in ("Class", "Shared")})
        self.layer_blocks = nn.ModuleList([getattr(self.model, f"layer{number}") for number in range(1, 5)])

    def forward(self, pixels: Tensor) -> Tensor:
        network = self.model
        maps = network.maxpool(network.relu(network.bn1(network.conv1(as_imagenet(pixels)))))
        for block in self.layer_blocks:
            maps = block(maps)
        return functional.normalize(network.last_linear["Class"](maps.mean(dim=(2, 3))), dim=1)


def features_of(network: BNInception, images: Tensor) -> Tensor:
    """The pooled features of a BN-Inception that has further layers."""
    return BNInception.forward(network, images)


class Progress:
    """An object of the release that its checkpoint pickles along."""

    def __init__(self) -> None:
        self.recall = [np.float64(0.5)]


class ReleaseFile(NamedTuple):
    """network: in evaluation mode. path: the checkpoint."""

    network: nn.Module
    path: Path


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mdr": Mdr,
    "deep_metric": DeepMetric,
    "divide_conquer": DivideConquer,
    "classification": Classification,
    "mic": Mic,
}
FILE_NAMES = {
    "mdr": "cub200.pth",
    "deep_metric": "ckp_ep600.pth.tar",
    "divide_conquer": "inshop.pt",
    "classification": "epoch_30.pth",
    "mic": "checkpoint_Class.pth.tar",
}


def write_release(key: str, folder: Path, *, resnet: str = "resnet18", **arguments: object) -> ReleaseFile:
    """Write a checkpoint with random weights as the release does, in the format of the torch of its time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = NETWORKS[key](getattr(torchvision_models, resnet), **arguments).eval()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.bias, std=0.1)
    path = folder / FILE_NAMES[key]
    torch.save(content_of(key, network.state_dict()), path, _use_new_zipfile_serialization=key in ("mdr", "mic"))
    return ReleaseFile(network, path)


def content_of(key: str, state: dict[str, Tensor]) -> object:
    """What the release passes to torch.save."""
    if key == "deep_metric":
        return {"state_dict": state, "epoch": 600}
    if key == "mic":
        return {"state_dict": state, "opt": argparse.Namespace(dataset="cub200", lr=1e-5), "progress": Progress()}
    return state
