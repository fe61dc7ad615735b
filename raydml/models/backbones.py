"""The backbones: one table of how each is built and which images and weights it takes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torchvision
from torch import Tensor, nn

from raydml.models import bn_inception

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Pooling = Literal["average", "max"]


class MaxPool(nn.Module):
    """The largest value of each channel: (B, C, H, W) -> (B, C, 1, 1). The gradient reaches one place of the map."""

    def forward(self, maps: Tensor) -> Tensor:
        # torch's adaptive_max_pool2d has no deterministic gradient on a GPU.
        return maps.flatten(2).max(dim=2).values[:, :, None, None]


def pooling_layer(pooling: Pooling) -> nn.Module:
    """Global pooling, (B, C, H, W) -> (B, C, 1, 1)."""
    return MaxPool() if pooling == "max" else nn.AdaptiveAvgPool2d(1)


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


def _resnet(build: Callable[[], torchvision.models.ResNet], pooling: nn.Module) -> nn.Module:
    trunk = build()
    trunk.avgpool, trunk.fc = pooling, nn.Identity()
    return trunk


def _googlenet(pooling: nn.Module) -> nn.Module:
    # The auxiliary classifiers and the dropout before the classifier belong to ImageNet training.
    trunk = torchvision.models.googlenet(aux_logits=False, transform_input=False, init_weights=True, dropout=0.0)
    trunk.avgpool, trunk.fc = pooling, nn.Identity()
    return trunk


def _convnext_tiny(pooling: nn.Module) -> nn.Module:
    trunk = torchvision.models.convnext_tiny()
    trunk.avgpool = pooling
    trunk.classifier[2] = nn.Identity()  # the layer norm before it stays: it was trained with the backbone
    return trunk


def _vit_b_16(pooling: nn.Module) -> nn.Module:  # noqa: ARG001 - its feature is the class token
    trunk = torchvision.models.vit_b_16()
    trunk.heads = nn.Identity()
    return trunk


def _any(crop_px: int) -> bool:  # noqa: ARG001
    return True


@dataclass(frozen=True)
class BackboneFacts:
    """Facts about a backbone.

    build: takes a global pooling (B, C, H, W) -> (B, C, 1, 1) and returns the backbone, randomly initialised,
    (B, 3, H, W) -> (B, feature_dim). has_pooling: false for a backbone without a map to pool. stages: the submodules
    whose outputs are its four stages: the last map of each size, or a transformer's tokens after each quarter of its
    blocks. minimum_crop_px: the smallest image it takes. fixed_crop_px: the only image size it takes, or None. fits: a
    further condition on the crop; which_fit: that condition in words. weights_file: the published weights (torchvision
    IMAGENET1K_V1) or None. weights_by_path: published weights that the user must download. classifier: prefixes of the
    names in either file that the embedding does not need. mean, std, channels, value_range: the normalisation of those
    weights, see Preprocessing.
    """

    build: Callable[[nn.Module], nn.Module]
    feature_dim: int
    minimum_crop_px: int
    fixed_crop_px: int | None
    weights_file: str | None
    classifier: tuple[str, ...]
    stages: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: Literal["RGB", "BGR"] = "RGB"
    value_range: float = 1.0
    has_pooling: bool = True
    fits: Callable[[int], bool] = _any
    which_fit: str = ""
    weights_by_path: str = ""

    def takes_crop(self, crop_px: int) -> bool:
        """Return whether the backbone takes images of crop_px x crop_px."""
        return crop_px >= self.minimum_crop_px and self.fixed_crop_px in (None, crop_px) and self.fits(crop_px)

    def nearest_crop_px(self, crop_px: int) -> int:
        """Return the accepted crop that is nearest to crop_px, the smaller of two."""
        taken = (size for size in range(1, crop_px + 512) if self.takes_crop(size))
        return min(taken, key=lambda size: abs(size - crop_px))

    @property
    def crops(self) -> str:
        """The accepted crops in words."""
        if self.fixed_crop_px is not None:
            return f"exactly {self.fixed_crop_px}"
        return self.which_fit or f"at least {self.minimum_crop_px}"

    @property
    def weights_cure(self) -> str:
        """The cure where no published weights can be fetched."""
        if not self.weights_by_path:
            return "write weights: none"
        return f"get {self.weights_by_path} and write weights: PATH with its path, or write weights: none"


_HALF = (0.5, 0.5, 0.5)
_RESNET18, _RESNET50 = partial(_resnet, torchvision.models.resnet18), partial(_resnet, torchvision.models.resnet50)
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
BACKBONES: dict[str, BackboneFacts] = {
    "convnet": BackboneFacts(
        ConvNet, 128, 8, None, None, (), ("blocks.0", "blocks.1", "blocks.2", "blocks.3"), _HALF, _HALF
    ),
    "resnet18": BackboneFacts(_RESNET18, 512, 32, None, "resnet18-f37072fd.pth", ("fc.",), _RESNET_STAGES),
    "resnet50": BackboneFacts(_RESNET50, 2048, 32, None, "resnet50-0676ba61.pth", ("fc.",), _RESNET_STAGES),
    # These weights come from TensorFlow and need pixels in -1..1, which torchvision does in transform_input.
    "googlenet": BackboneFacts(
        _googlenet,
        1024,
        32,
        None,
        "googlenet-1378be20.pth",
        ("fc.", "aux1.", "aux2."),
        ("conv3", "inception3b", "inception4e", "inception5b"),
        _HALF,
        _HALF,
    ),
    "bn_inception": BackboneFacts(
        bn_inception.BNInception,
        bn_inception.FEATURE_DIM,
        bn_inception.SMALLEST_CROP_PX,
        None,
        None,
        ("last_linear.", "classifier."),
        ("conv2_3x3_relu", "inception_3b_output", "inception_4d_output", "inception_5b_output"),
        (104.0, 117.0, 128.0),
        (1.0, 1.0, 1.0),
        channels="BGR",
        value_range=255.0,
        fits=bn_inception.takes_crop,
        which_fit="32 k - 1 to 32 k + 6 (such as 63 to 70 or 223 to 230)",
        weights_by_path="bn_inception-52deb4733.pth (of Cadene's pretrained-models.pytorch)",
    ),
    "convnext_tiny": BackboneFacts(
        _convnext_tiny,
        768,
        32,
        None,
        "convnext_tiny-983f1562.pth",
        ("classifier.2.",),
        ("features.1", "features.3", "features.5", "features.7"),
    ),
    "vit_b_16": BackboneFacts(
        _vit_b_16,
        768,
        224,
        224,
        "vit_b_16-c867db91.pth",
        ("heads.",),
        tuple(f"encoder.layers.encoder_layer_{number}" for number in (2, 5, 8, 11)),
        has_pooling=False,
    ),
}
