"""The network: a backbone with the embedding head on top of it, and the preprocessing it wants."""

from pathlib import Path

import torch
from torch import Tensor, nn

from raydml.images.preprocessing import Interpolation, Preprocessing, Resize
from raydml.models.backbones import BACKBONES, BackboneFacts, Pooling, pooling_layer
from raydml.models.head import Head, HeadInit, ModelError, Normalisation, Projection, refuse_unknown
from raydml.models.pretrained import WeightsError, load_exactly, published_weights, read_weights


class Network(nn.Module):
    """Images (B, 3, H, W) -> embeddings (B, D) float32. ``trunk`` and ``head`` learn at their own rates.

    With ``freeze_batch_norm`` every BatchNorm uses and keeps its running statistics also in training mode;
    its scale and shift still learn. stages: the submodules of the trunk that ``layer`` knows as stage1, stage2, ...
    """

    def __init__(self, trunk: nn.Module, head: Head, *, freeze_batch_norm: bool, stages: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.freeze_batch_norm = freeze_batch_norm
        self.stages = {f"stage{number}": module for number, module in enumerate(stages, start=1)}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def layer(self, images: Tensor, name: str) -> Tensor:
        """What the trunk makes of images (B, 3, H, W) at a layer, in the mode and under the autocast it is called in.

        "pooled": the features (B, F) before the head. "stage1" to "stage4": maps (B, C, H', W'), larger ones first; a
        transformer's tokens without the class token, laid out as a map. Raises ModelError for another name.
        """
        if name == "pooled":
            return self.trunk(images)
        if name not in self.stages:
            raise ModelError(f"layer: {name!r}; one of {', '.join([*self.stages, 'pooled'])}")
        seen: list[Tensor] = []
        hook = self.trunk.get_submodule(self.stages[name]).register_forward_hook(
            lambda _module, _inputs, output: seen.append(output)
        )
        try:
            self.trunk.forward(images)  # a trunk that was compiled and called before does not see later hooks
        finally:
            hook.remove()
        return seen[0] if seen[0].ndim == 4 else _tokens_as_map(seen[0])

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _tokens_as_map(tokens: Tensor) -> Tensor:
    """(B, 1 + side * side, C), the class token first and then row by row -> (B, C, side, side)."""
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


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
    if not facts.takes_crop(crop_px):
        raise ModelError(
            f"crop_px: {crop_px}; backbone {backbone} takes crops of {facts.crops} px: "
            f"set crop_px: {facts.nearest_crop_px(crop_px)} and a resize_px at least as large, "
            "or choose another backbone (convnet takes any crop from 8 px)"
        )
    return Preprocessing(
        resize_px=resize_px,
        crop_px=crop_px,
        mean=facts.mean,
        std=facts.std,
        channels=facts.channels,
        value_range=facts.value_range,
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
    pooling: Pooling = "average",
    dropout: float = 0.0,
    projection: Projection = "linear",
    head_init: HeadInit = "torch",
    num_slices: int = 1,
) -> Network:
    """A network in training mode on the CPU; every random initial value comes from ``seed`` alone.

    weights: "default" (the published ImageNet weights, fetched when they are not on this machine), "none"
    (random), or the path of a state dict: of the backbone alone as its publisher writes it, or of a whole
    Network (as in a raydml checkpoint). pooling: how the backbone's last map becomes a feature, by the average or the
    maximum of each channel; the others are the head's. The caller's random state is left as it was. Raises ModelError
    for an unknown backbone and settings that do not fit it, and WeightsError for weights that cannot be had or do not
    fit.
    """
    facts = _facts(backbone)
    refuse_unknown("pooling", pooling, Pooling)
    if pooling != "average" and not facts.has_pooling:
        raise ModelError(f"pooling: {pooling} has no effect: backbone {backbone} has no map to pool; leave it out")
    if weights == "default" and facts.weights_file is None:
        raise WeightsError(f"weights: default; backbone {backbone} has no published weights: {facts.weights_cure}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the GPUs' generators as well
        trunk = facts.build(pooling_layer(pooling))
        head = Head(
            facts.feature_dim,
            embedding_dim,
            layer_norm=layer_norm,
            normalize=normalize,
            num_slices=num_slices,
            projection=projection,
            init=head_init,
            dropout=dropout,
        )
    network = Network(trunk, head, freeze_batch_norm=freeze_batch_norm, stages=facts.stages)
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
