"""Backbones, the embedding head, and which preprocessing a backbone wants."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn

from raydml.distances import euclidean, full_precision
from raydml.preprocessing import Interpolation, Preprocessing, Resize
from raydml.pretrained import WeightsError, load_exactly, published_weights, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModelError(ValueError):
    """A network that cannot be built as asked, or a crop that it cannot take."""


class ConvNet(nn.Module):
    """A small network for images of 8 to 64 pixels: (B, 3, H, W) -> (B, 128).

    Four blocks of 3x3 convolution, BatchNorm and ReLU; after each block the map is halved while its short
    side is at least 8, so an 8x8 digit is seen at 4x4 by the last three blocks and 64x64 ends at 4x4 too.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, after in pairwise(widths)
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for block in self.blocks:
            maps = block(maps)
            if min(maps.shape[-2:]) >= 8:
                maps = nn.functional.max_pool2d(maps, kernel_size=2)
        return maps.mean(dim=(2, 3))


def _resnet18() -> nn.Module:
    trunk = torchvision.models.resnet18()
    trunk.fc = nn.Identity()
    return trunk


def _resnet50() -> nn.Module:
    trunk = torchvision.models.resnet50()
    trunk.fc = nn.Identity()
    return trunk


def _googlenet() -> nn.Module:
    # The auxiliary classifiers and the dropout before the classifier belong to ImageNet training.
    trunk = torchvision.models.googlenet(aux_logits=False, transform_input=False, init_weights=True, dropout=0.0)
    trunk.fc = nn.Identity()
    return trunk


def _convnext_tiny() -> nn.Module:
    trunk = torchvision.models.convnext_tiny()
    trunk.classifier[2] = nn.Identity()  # the layer norm before it stays: it was trained with the backbone
    return trunk


def _vit_b_16() -> nn.Module:
    trunk = torchvision.models.vit_b_16()
    trunk.heads = nn.Identity()
    return trunk


@dataclass(frozen=True)
class BackboneFacts:
    """What one must know about a backbone.

    build: makes it, randomly initialised, (B, 3, H, W) -> (B, feature_dim). minimum_crop_px: the smallest
    image it takes; fixed_crop_px: the only one it takes, or None. weights_file: the published weights
    (torchvision IMAGENET1K_V1) or None; classifier: names in that file that the embedding has no use for.
    mean and std: the normalisation those weights were trained with, for pixels in 0..1.
    """

    build: Callable[[], nn.Module]
    feature_dim: int
    minimum_crop_px: int
    fixed_crop_px: int | None
    weights_file: str | None
    classifier: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


_HALF = (0.5, 0.5, 0.5)
BACKBONES: dict[str, BackboneFacts] = {
    "convnet": BackboneFacts(ConvNet, 128, 8, None, None, (), _HALF, _HALF),
    "resnet18": BackboneFacts(_resnet18, 512, 32, None, "resnet18-f37072fd.pth", ("fc.",)),
    "resnet50": BackboneFacts(_resnet50, 2048, 32, None, "resnet50-0676ba61.pth", ("fc.",)),
    # These weights came from TensorFlow and want pixels in -1..1; torchvision hides it in transform_input.
    "googlenet": BackboneFacts(
        _googlenet, 1024, 32, None, "googlenet-1378be20.pth", ("fc.", "aux1.", "aux2."), _HALF, _HALF
    ),
    "convnext_tiny": BackboneFacts(_convnext_tiny, 768, 32, None, "convnext_tiny-983f1562.pth", ("classifier.2.",)),
    "vit_b_16": BackboneFacts(_vit_b_16, 768, 224, 224, "vit_b_16-c867db91.pth", ("heads.",)),
}


Normalisation = Literal["l2", "mean_distance", "none"]


class Head(nn.Module):
    """Features (B, F) -> embeddings (B, D), float32: [layer norm] -> linear -> [normalisation].

    The layer norm has no parameters (eps 1e-5) and stands before the linear layer, as in Zhai & Wu,
    "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019, section 3.2. Departure: their
    linear layer has no bias and is left out when D = F; ours always exists and has one.
    Always computed in float32 (or wider), also under autocast.

    normalize: "l2" divides each embedding by max(its norm, 1e-12). "mean_distance" divides a training batch by the mean
    distance of its pairs and leaves embeddings alone in evaluation: Kim & Park, "Multi-Level Distance Regularization",
    AAAI 2021; the gradient flows through the mean, so the scale of the linear layer has no effect on the loss, and a
    batch of one, or of equal rows, is left as it is. "none" leaves them alone always.
    """

    def __init__(self, feature_dim: int, embedding_dim: int, *, layer_norm: bool, normalize: Normalisation) -> None:
        super().__init__()
        self.standardise = nn.LayerNorm(feature_dim, elementwise_affine=False) if layer_norm else nn.Identity()
        self.linear = nn.Linear(feature_dim, embedding_dim)
        self.normalize = normalize

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            embeddings = self.linear(self.standardise(full_precision(features)))
            if self.normalize == "l2":
                return nn.functional.normalize(embeddings, dim=1, eps=1e-12)
            if self.normalize == "mean_distance" and self.training:
                return embeddings / _mean_distance(embeddings)
            return embeddings


def _mean_distance(points: Tensor) -> Tensor:
    """Scalar: the mean Euclidean distance over all pairs of different rows of (B, D); 1 where it is next to 0."""
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    total = euclidean(points).masked_fill(itself, 0).sum()
    mean = total / max(len(points) * (len(points) - 1), 1)
    return mean.masked_fill(mean < 1e-5, 1)


class Network(nn.Module):
    """Images (B, 3, H, W) -> embeddings (B, D) float32. ``trunk`` and ``head`` learn at their own rates.

    With ``freeze_batch_norm`` every BatchNorm uses and keeps its running statistics also in training mode;
    its scale and shift still learn.
    """

    def __init__(self, trunk: nn.Module, head: Head, *, freeze_batch_norm: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.freeze_batch_norm = freeze_batch_norm

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def preprocessing_for(
    backbone: str,
    *,
    resize_px: int,
    crop_px: int,
    resize: Resize = "short_side",
    interpolation: Interpolation = "bilinear",
) -> Preprocessing:
    """The preprocessing a backbone wants at these sizes. Raises ModelError where it cannot take the crop."""
    facts = _facts(backbone)
    if facts.fixed_crop_px not in (None, crop_px):
        raise ModelError(
            f"crop_px: {crop_px}; backbone {backbone} takes exactly {facts.fixed_crop_px}: "
            f"set crop_px: {facts.fixed_crop_px}"
        )
    if crop_px < facts.minimum_crop_px:
        raise ModelError(
            f"crop_px: {crop_px}; backbone {backbone} needs at least {facts.minimum_crop_px}: "
            "enlarge resize_px and crop_px, or use backbone: convnet"
        )
    return Preprocessing(
        resize_px=resize_px,
        crop_px=crop_px,
        mean=facts.mean,
        std=facts.std,
        resize=resize,
        interpolation=interpolation,
    )


def build_network(
    *,
    backbone: str,
    embedding_dim: int,
    layer_norm: bool,
    normalize: Normalisation,
    freeze_batch_norm: bool,
    weights: str,
    seed: int,
) -> Network:
    """A network in training mode on the CPU; every random initial value comes from ``seed`` alone.

    weights: "default" (the published ImageNet weights, fetched when they are not on this machine), "none"
    (random), or the path of a state dict: of the backbone alone as torchvision writes it, or of a whole
    Network (as in a raydml checkpoint). The caller's random state is left as it was. Raises ModelError for an
    unknown backbone and WeightsError for weights that cannot be had or do not fit.
    """
    facts = _facts(backbone)
    if weights == "default" and facts.weights_file is None:
        raise WeightsError(f"weights: default; backbone {backbone} has no published weights: set weights: none")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the GPUs' generators as well
        trunk = facts.build()
        head = Head(facts.feature_dim, embedding_dim, layer_norm=layer_norm, normalize=normalize)
    network = Network(trunk, head, freeze_batch_norm=freeze_batch_norm)
    if weights != "none":
        _load(network, facts, weights)
    return network.train()


def _load(network: Network, facts: BackboneFacts, weights: str) -> None:
    path = published_weights(facts.weights_file) if weights == "default" and facts.weights_file else Path(weights)
    state = read_weights(path)
    if any(name.startswith("head.") for name in state):
        load_exactly(network, state, str(path))
    else:
        kept = {name: value for name, value in state.items() if not name.startswith(facts.classifier or ("\0",))}
        load_exactly(network.trunk, kept, str(path))


def _facts(backbone: str) -> BackboneFacts:
    if backbone not in BACKBONES:
        raise ModelError(f"backbone: {backbone!r}; one of {', '.join(BACKBONES)}")
    return BACKBONES[backbone]
