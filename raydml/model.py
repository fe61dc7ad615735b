"""Backbones, the embedding head, and the preprocessing that belongs to a set of weights."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor, nn

from raydml.distances import euclidean, full_precision
from raydml.pretrained import WeightsError, load_exactly, published_weights, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ModelError(ValueError):
    """A network or a preprocessing that cannot be built as asked."""


@dataclass(frozen=True)
class Preprocessing:
    """What was done to an image before the network saw it; kept with the weights, never apart from them.

    ``mean`` and ``std`` are in the units of ``value_range``: pixels 0..255 are first scaled to
    0..value_range, then ``(x - mean) / std`` channel by channel, in the order that ``channels`` names.
    """

    resize_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: str = "RGB"
    value_range: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.crop_px <= self.resize_px:
            raise ModelError(
                f"crop_px: {self.crop_px} does not fit into resize_px: {self.resize_px}; "
                f"give crop_px between 1 and {self.resize_px}, or enlarge resize_px"
            )
        if self.channels not in ("RGB", "BGR"):
            raise ModelError(f"channels: {self.channels!r}; one of RGB, BGR")

    def to_dict(self) -> dict[str, object]:
        """Plain values (lists for tuples), ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Preprocessing":
        """The inverse of to_dict."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})  # type: ignore[arg-type]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels 0..255, RGB, uint8 or float (B, H, W, 3) -> float32 (B, 3, H, W), on the same device."""
        images = pixels.permute(0, 3, 1, 2).float()
        if self.channels == "BGR":
            images = images.flip(1)
        scale, shift = _scale_and_shift(self, images.device)
        return images * scale + shift

    def for_evaluation(self, pixels: Tensor) -> Tensor:
        """uint8 (B, S, S, 3) -> float32 (B, 3, crop_px, crop_px): the centre, normalised."""
        top, left = _centre(pixels.shape[1], self.crop_px), _centre(pixels.shape[2], self.crop_px)
        return self.normalise(pixels[:, top : top + self.crop_px, left : left + self.crop_px])

    def read(self, image: Image.Image | Path | str | np.ndarray) -> np.ndarray:
        """One image -> uint8 (resize_px, resize_px, 3), RGB: short side to resize_px, centre square.

        Takes a path, a PIL image of any mode (its EXIF rotation is applied), or a uint8 array (H, W, 3) or
        (H, W). Raises ModelError for an array of another kind and OSError for an unreadable file.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
                raise ModelError(f"an image array is uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}")
            return square(Image.fromarray(image), self.resize_px)
        if isinstance(image, Image.Image):
            return square(image, self.resize_px)
        with Image.open(image) as opened:
            return square(opened, self.resize_px)


def square(image: Image.Image, resize_px: int) -> np.ndarray:
    """PIL image -> uint8 (resize_px, resize_px, 3): EXIF rotation, RGB, short side resized, centre crop.

    Bilinear with antialiasing, rounding as torchvision's Resize and CenterCrop do.
    """
    upright = ImageOps.exif_transpose(image).convert("RGB")
    short = min(upright.size)
    size = (int(resize_px * upright.width / short), int(resize_px * upright.height / short))
    resized = upright if size == upright.size else upright.resize(size, Image.Resampling.BILINEAR)
    left, top = _centre(size[0], resize_px), _centre(size[1], resize_px)
    return np.asarray(resized.crop((left, top, left + resize_px, top + resize_px)))


def _centre(size_px: int, crop_px: int) -> int:
    return round((size_px - crop_px) / 2)


@lru_cache(maxsize=32)  # a copy to the device each batch would make the host wait for it
def _scale_and_shift(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # whoever asks first, the constants serve training too
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        scale = preprocessing.value_range / 255 / std
        shift = -torch.tensor(preprocessing.mean, dtype=torch.float64) / std
        return scale.float().view(1, -1, 1, 1).to(device), shift.float().view(1, -1, 1, 1).to(device)


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


def preprocessing_for(backbone: str, *, resize_px: int, crop_px: int) -> Preprocessing:
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
    return Preprocessing(resize_px=resize_px, crop_px=crop_px, mean=facts.mean, std=facts.std)


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
