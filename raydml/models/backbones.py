"""The backbones: one table of how each is built and which images and weights it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch is slow to import, and a configuration is checked without it
    from torch import nn
    from torchvision.models import GoogLeNet, ResNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: What the name of a network of timm begins with, and behind that the name of one of the Hugging Face hub.
TIMM = "timm:"
HUB = "hf-hub:"
#: How the last map of a backbone of the table becomes a vector.
TABLE_POOLINGS = ("average", "max", "gem")
_BN_INCEPTION_CROP_PX = 31  # the smallest


class ModelError(ValueError):
    """An unknown backbone or layer, or a crop that a backbone cannot take."""


def _convnet(pooling: nn.Module) -> nn.Module:
    from raydml.models.convnet import ConvNet

    return ConvNet(pooling)


def _resnet18(pooling: nn.Module) -> nn.Module:
    from torchvision.models import resnet18

    return _with_pooling(resnet18(), pooling)


def _resnet50(pooling: nn.Module) -> nn.Module:
    from torchvision.models import resnet50

    return _with_pooling(resnet50(), pooling)


def _googlenet(pooling: nn.Module) -> nn.Module:
    from torchvision.models import googlenet

    # The auxiliary classifiers and the dropout before the classifier belong to ImageNet training.
    trunk = googlenet(aux_logits=False, transform_input=False, init_weights=True, dropout=0.0)
    return _with_pooling(trunk, pooling)


def _with_pooling(trunk: ResNet | GoogLeNet, pooling: nn.Module) -> nn.Module:
    from torch.nn import Identity

    trunk.avgpool, trunk.fc = pooling, Identity()
    return trunk


def _bn_inception(pooling: nn.Module) -> nn.Module:
    from raydml.models.bn_inception import BNInception

    return BNInception(pooling)


def _convnext_tiny(pooling: nn.Module) -> nn.Module:
    from torch.nn import Identity
    from torchvision.models import convnext_tiny

    trunk = convnext_tiny()
    trunk.avgpool = pooling
    trunk.classifier[2] = Identity()  # the layer norm before it stays: it was trained with the backbone
    return trunk


def _vit_b_16(pooling: nn.Module) -> nn.Module:  # noqa: ARG001 - its feature is the class token
    from torch.nn import Identity
    from torchvision.models import vit_b_16

    trunk = vit_b_16()
    trunk.heads = Identity()
    return trunk


def _bn_inception_takes(crop_px: int) -> bool:
    """Return whether the branches of all blocks have maps of one size: 31 to 38 px, 63 to 70, ..., 223 to 230, ...

    In a block that halves an odd map, the convolutions round up and the pooling rounds down.
    """
    return crop_px >= _BN_INCEPTION_CROP_PX and (crop_px + 1) % 32 < 8


def _any(crop_px: int) -> bool:  # noqa: ARG001
    return True


@dataclass(frozen=True)
class BackboneFacts:
    """Facts about a backbone.

    build: takes a global pooling (B, C, H, W) -> (B, C, 1, 1) and returns the backbone, randomly initialised, (B, 3, H,
    W) -> (B, feature_dim); one of timm takes the name of the pooling, and see `TimmTrunk`. has_pooling: false for a
    backbone without a map to pool. poolings: those of timm's, with the number of features of each, and own_pooling the
    one that it was trained with; the others have `TABLE_POOLINGS`. num_blocks: how many can be chosen to learn.
    takes_drop_path, can_checkpoint: of timm's, what they can do. has_batch_norm: whether it has statistics of batches.
    has_layers: whether its parameters have an order, in which their rates can fall. adaptable, why_not_adaptable: see
    `adaptable_layers`.
    stages: the submodules whose outputs are its four stages: the last map of each size, or a transformer's tokens after
    each quarter of its blocks.
    minimum_crop_px: the smallest image it takes. fixed_crop_px: the only image size it takes, or None. fits: a further
    condition on the crop; which_fit: that condition in words. weights_file: the published weights (torchvision
    IMAGENET1K_V1) or None. weights_by_path: published weights that the user must download. classifier: prefixes of the
    names in either file that the embedding does not need. mean, std, channels, value_range: the normalisation of those
    weights, see Preprocessing.
    """

    build: Callable[..., nn.Module]
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
    poolings: Mapping[str, int] | None = None
    own_pooling: str = "average"
    is_timm: bool = False
    num_blocks: int = 4
    takes_drop_path: bool = False
    can_checkpoint: bool = False
    has_batch_norm: bool = True
    has_layers: bool = True
    adaptable: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    why_not_adaptable: str = "is not one of timm's transformers"

    def features(self, pooling: str) -> int | None:
        """Return the number of features with a pooling; None where the backbone does not have it."""
        if self.poolings is not None:
            return self.poolings.get(pooling)
        return self.feature_dim if pooling in self.pooling_names else None

    @property
    def pooling_names(self) -> tuple[str, ...]:
        """The poolings that the backbone has."""
        if self.poolings is not None:
            return tuple(self.poolings)
        return TABLE_POOLINGS if self.has_pooling else ("average",)

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
_RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
BACKBONES: dict[str, BackboneFacts] = {
    "convnet": BackboneFacts(
        _convnet, 128, 8, None, None, (), ("blocks.0", "blocks.1", "blocks.2", "blocks.3"), _HALF, _HALF
    ),
    "resnet18": BackboneFacts(_resnet18, 512, 32, None, "resnet18-f37072fd.pth", ("fc.",), _RESNET_STAGES),
    "resnet50": BackboneFacts(_resnet50, 2048, 32, None, "resnet50-0676ba61.pth", ("fc.",), _RESNET_STAGES),
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
        _bn_inception,
        1024,
        _BN_INCEPTION_CROP_PX,
        None,
        None,
        ("last_linear.", "classifier."),
        ("conv2_3x3_relu", "inception_3b_output", "inception_4d_output", "inception_5b_output"),
        (104.0, 117.0, 128.0),
        (1.0, 1.0, 1.0),
        channels="BGR",
        value_range=255.0,
        fits=_bn_inception_takes,
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
        has_batch_norm=False,
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
        num_blocks=12,
        has_batch_norm=False,
    ),
}
