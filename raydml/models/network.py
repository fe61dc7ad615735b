"""The network: a backbone with an embedding head, and the preprocessing that belongs to it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydml.images.preprocessing import Interpolation, Preprocessing, Resize
from raydml.models.adapters import add_adapters, is_of_adapter, merged
from raydml.models.backbones import TIMM, BackboneFacts, ModelError
from raydml.models.choices import AdaptedPart, HeadInit, Normalisation, Pooling, Projection, TrainedPart
from raydml.models.lookup import facts_of
from raydml.models.pooling import GeM, pooling_layer
from raydml.models.pretrained import WeightsError, load_exactly, published_weights, read_weights
from raydml.models.releases import IMAGENET_CLASSES, RELEASES, recognised
from raydml.models.trunk_parts import block_ends, has_batch_norm, layers_of
from raydml.ops.distances import euclidean, full_precision

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Head(nn.Module):
    """Features (B, F) -> embeddings (B, D), float32.

    The order is [layer norm] -> [dropout] -> [projection] -> [BNNeck] -> [normalisation].

    The layer norm has no parameters (eps 1e-5) and comes first, as in Zhai & Wu, "Classification is a Strong Baseline
    for Deep Metric Learning", BMVC 2019, section 3.2; their head is layer_norm with projection "none" for D = F and
    "linear_no_bias" for another D. Always computed in float32 (or wider), also under autocast.

    projection: "linear" with a bias, "linear_no_bias", or "none", where D = F.
    num_slices: an embedding is the concatenation of num_slices slices of D / num_slices, each normalised on its own.
    normalize: "l2" divides each slice by max(its norm, 1e-12). "mean_distance" divides a training batch by the mean
    distance of its pairs and does nothing in evaluation: Kim & Park, "Multi-Level Distance Regularization", AAAI 2021.
    The gradient flows through the mean, so the scale of the linear layer has no effect on the loss; a batch of one, or
    of equal rows, is unchanged. "none" does nothing.
    init: "torch" is the initialisation of nn.Linear. "xavier_normal": weights of deviation
    sqrt(2 / (F + D / num_slices)), each slice as a layer of its own, biases uniform within 1 / sqrt(F), as in Divide &
    Conquer's release (Sanakoyeu et al., CVPR 2019). "kaiming_normal": weights of deviation sqrt(2 / D), biases 0, as in
    the release of the multi-similarity loss (Wang et al., CVPR 2019).
    dropout: the probability of dropping a feature in training. bn_neck: see `BNNeck`.

    settings: its keyword arguments except num_slices, for building another head like it.
    """

    def __init__(
        self,
        feature_dim: int,
        embedding_dim: int,
        *,
        layer_norm: bool,
        normalize: Normalisation,
        num_slices: int = 1,
        projection: Projection = "linear",
        init: HeadInit = "torch",
        dropout: float = 0.0,
        bn_neck: bool = False,
    ) -> None:
        super().__init__()
        assert embedding_dim % num_slices == 0
        assert projection != "none" or embedding_dim == feature_dim
        self.feature_dim = feature_dim
        self.embedding_dim = embedding_dim
        self.num_slices = num_slices
        self.normalize: Normalisation = normalize
        self.settings: dict[str, Any] = {
            "layer_norm": layer_norm,
            "normalize": normalize,
            "projection": projection,
            "init": init,
            "dropout": dropout,
            "bn_neck": bn_neck,
        }
        self.standardise = nn.LayerNorm(feature_dim, elementwise_affine=False) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear: nn.Linear | None = None
        if projection != "none":
            self.linear = nn.Linear(feature_dim, embedding_dim, bias=projection == "linear")
            _initialise(self.linear, init, num_slices)
        self.neck = BNNeck(embedding_dim) if bn_neck else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        return normalised(self.project(features), self.normalize, self.num_slices, training=self.training)

    def project(self, features: Tensor) -> Tensor:
        """Return the embeddings before they are normalised."""
        with torch.autocast(features.device.type, enabled=False):
            embeddings: Tensor = self.dropout(self.standardise(full_precision(features)))
            return self.neck(embeddings if self.linear is None else self.linear(embeddings))


class BNNeck(nn.BatchNorm1d):
    """BatchNorm of embeddings (B, D) that scales and does not shift, before they are normalised.

    Luo et al., "Bag of Tricks and a Strong Baseline for Deep Person Re-identification", CVPR Workshops 2019, section
    3.6. Their triplet loss takes the embeddings before it and their softmax those behind it; here every loss takes what
    is compared in the end, those behind it. A batch of one image has no statistics: the running ones count for it.
    Its statistics always learn, also where those of the backbone are frozen.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__(embedding_dim)
        self.bias.requires_grad_(False)

    def forward(self, embeddings: Tensor) -> Tensor:
        if self.training and len(embeddings) < 2:
            return nn.functional.batch_norm(
                embeddings, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(embeddings)


def normalised(embeddings: Tensor, normalize: Normalisation, num_slices: int, *, training: bool) -> Tensor:
    """Normalise embeddings (B, D), float32 or wider, slice by slice; see `Head`."""
    with torch.autocast(embeddings.device.type, enabled=False):
        if normalize == "l2":
            slices = embeddings.unflatten(1, (num_slices, -1))
            return nn.functional.normalize(slices, dim=2, eps=1e-12).flatten(1)
        if normalize == "mean_distance" and training:
            return torch.cat([piece / _mean_distance(piece) for piece in embeddings.chunk(num_slices, dim=1)], dim=1)
        return embeddings


def _initialise(linear: nn.Linear, init: HeadInit, num_slices: int) -> None:
    with torch.no_grad():
        if init == "xavier_normal":  # the bias keeps the initialisation of nn.Linear
            for rows in linear.weight.chunk(num_slices):
                nn.init.xavier_normal_(rows)
        elif init == "kaiming_normal":
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def _mean_distance(points: Tensor) -> Tensor:
    """Return the mean Euclidean distance over all pairs of different rows of (B, D), a scalar; 1 if below 1e-5."""
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    total = euclidean(points).masked_fill(itself, 0).sum()
    mean = total / max(len(points) * (len(points) - 1), 1)
    return mean.masked_fill(mean < 1e-5, 1)


class Network(nn.Module):
    """Images (B, 3, H, W) -> embeddings (B, D) float32. ``trunk`` and ``head`` learn at their own rates.

    freeze_batch_norm: every BatchNorm of the trunk uses and keeps its running statistics also in training mode; its
    scale and shift still learn. stages: the submodules of the trunk that ``layer`` calls stage1, stage2, ...

    gather: a function of features, with gradient, between trunk and head in training; None for none. Where several
    processes train one network, each sends its rows of a batch through the trunk, and gets the features of all here.

    chunked: a function of images in the place of the trunk in training, which gives it chunks of them; None for none.
    """

    gather: Callable[[Tensor], Tensor] | None = None
    chunked: Callable[[Tensor], Tensor] | None = None

    def __init__(self, trunk: nn.Module, head: Head, *, freeze_batch_norm: bool, stages: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.freeze_batch_norm = freeze_batch_norm
        self._frozen: list[nn.Module] = []  # modules of the trunk that stay in evaluation mode
        self._has_adapters = False
        self._held: set[int] = set()  # identities of the parameters of the trunk that do not learn
        self.stages = {f"stage{number}": module for number, module in enumerate(stages, start=1)}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, F) before the head, in training those of the whole batch (see ``gather``).

        images: (B, 3, H, W); with a frozen trunk also (B, F), what it gave before, which passes it by.
        """
        is_frozen = self.trunk in self._frozen
        if is_frozen and images.ndim == 2:
            features = images
        else:
            through = self.trunk if self.chunked is None or not self.training else self.chunked
            with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
                features = through(images)
        return self.gather(features) if self.training and self.gather is not None else features

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the trunk that were left to learn, also while a warm-up holds them."""
        return [parameter for parameter in self.trunk.parameters() if id(parameter) not in self._held]

    def plain_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of the same network without adapters: they are added to the weights of their layers.

        Without adapters it is the state dict itself. The embeddings are the same but for rounding.
        """
        return merged(self, self.state_dict()) if self._has_adapters else self.state_dict()

    def adapt(self, layers: Sequence[str], *, rank: int, alpha: float) -> None:
        """Add adapters to linear layers of a trunk of timm; see `add_adapters`. Only they will learn of the trunk.

        The trunk keeps its weights and the statistics of its BatchNorm.
        """
        add_adapters(self.trunk.get_submodule("model"), layers, rank=rank, alpha=alpha)
        self._has_adapters = True
        own = [parameter for name, parameter in self.trunk.named_parameters() if not is_of_adapter(name)]
        self._frozen = [module for module in self.trunk.modules() if isinstance(module, _BatchNorm)]
        self._hold(own)

    def _hold(self, parameters: Sequence[nn.Parameter]) -> None:
        self._held = {id(parameter) for parameter in parameters}
        for parameter in parameters:
            parameter.requires_grad_(False)

    def layers(self) -> dict[int, int]:
        """Return the layer of each parameter of the trunk, by its identity, from 0; see `layers_of`."""
        found = layers_of(self.trunk, tuple(self.stages.values()))
        return {id(parameter): found[name] for name, parameter in self.trunk.named_parameters()}

    def freeze(self, train: TrainedPart) -> None:
        """Let only a part of the trunk learn: "all", nothing ("head"), or ``{"last_blocks": N}``.

        The last blocks are those that `block_ends` returns; what follows them learns as well. The modules before them
        keep their weights and stay in evaluation mode, with their statistics and without dropout. Raises ModelError for
        more blocks than there are.
        """
        if train == "all":
            return
        modules = list(self.trunk.modules())  # in the order in which they were defined, which is that of the layers
        begin = len(modules)
        if not isinstance(train, str):
            number, ends = train["last_blocks"], block_ends(self.trunk, tuple(self.stages.values()))
            if number > len(ends):
                raise ModelError(f"train: last_blocks: {number}; this backbone has {len(ends)} blocks")
            begin = 0 if number == len(ends) else modules.index(ends[-number - 1]) + 1
        learning = {id(module) for module in modules[begin:]}
        # A parameter of the trunk itself, such as a class token, belongs to what comes before its blocks.
        self._frozen = [
            module for module in modules[:begin] if learning.isdisjoint(id(inner) for inner in module.modules())
        ]
        own = [parameter for module in modules[:begin] for parameter in module.parameters(recurse=False)]
        self._hold(own)

    def checkpoint_gradients(self) -> None:
        """Compute the activations of the trunk's blocks a second time in backward instead of keeping them.

        Raises ModelError for a backbone that cannot, and where the second time would move statistics of BatchNorm.
        """
        if not self.freeze_batch_norm and has_batch_norm(self.trunk):
            raise ModelError("gradient_checkpointing: would move the statistics of BatchNorm twice a step; freeze them")
        switch = getattr(getattr(self.trunk, "model", None), "set_grad_checkpointing", None)
        try:
            if switch is None:
                raise AssertionError
            switch(True)
        except AssertionError:
            raise ModelError("gradient_checkpointing: this backbone does not have it; many of timm's do") from None

    def layer(self, images: Tensor, name: str) -> Tensor:
        """Return the output of one layer of the trunk for images (B, 3, H, W), in the current mode and autocast.

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
            self.trunk.forward(images)  # a compiled trunk that ran before ignores later hooks
        finally:
            hook.remove()
        if seen[0].ndim == 4:
            return seen[0].permute(0, 3, 1, 2) if getattr(self.trunk, "is_channels_last", False) else seen[0]
        return _tokens_as_map(seen[0], getattr(self.trunk, "num_prefix_tokens", 1))

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.trunk.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        for module in self._frozen:
            module.training = False
        return self


def _tokens_as_map(tokens: Tensor, num_prefix: int) -> Tensor:
    """Lay out tokens (B, P + side * side, C) as a map (B, C, side, side): P that are no patch, then row by row."""
    side = round((tokens.shape[1] - num_prefix) ** 0.5)
    return tokens[:, num_prefix:].transpose(1, 2).unflatten(2, (side, side))


def preprocessing_for(
    backbone: str,
    *,
    resize_px: int,
    crop_px: int,
    resize: Resize = "short_side",
    interpolation: Interpolation = "bilinear",
) -> Preprocessing:
    """Return the preprocessing of a backbone at these sizes. Raises ModelError for a crop it cannot take."""
    facts = facts_of(backbone)
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
    crop_px: int | None = None,
    drop_path: float = 0.0,
    gradient_checkpointing: bool = False,
    train: TrainedPart = "all",
    bn_neck: bool = False,
) -> Network:
    """Build a network in training mode on the CPU; ``seed`` alone decides every random initial value.

    weights: "default" (the published ImageNet weights, downloaded once), "none" (random), or the path of a state dict:
    of the backbone alone as its publisher writes it, or of a whole Network (as in a raydml checkpoint). pooling: how
    the last map, or the tokens, become a vector. Of timm's networks only: crop_px, the side of the images, to which
    position embeddings are interpolated (None: the network's own), drop_path, the probability of leaving out a block in
    training (of the last one; it grows with the depth), and gradient_checkpointing, which computes activations twice
    instead of keeping them. train: see `TrainedPart`, `Network.freeze` and `Network.adapt`. The other settings
    are those of `Head`. The caller's random state is unchanged.

    Raises ModelError for an unknown backbone, WeightsError for weights that are not available or do not fit. The rules
    between settings are those of raydml/config.
    """
    facts = facts_of(backbone)
    path = fetch_weights(backbone, weights)
    num_features = facts.features(pooling)
    if num_features is None:
        raise ModelError(f"pooling: {pooling}; backbone {backbone} has {', '.join(facts.pooling_names)}")
    state = read_weights(path) if path is not None else None
    is_for_timm = facts.is_timm and state is not None and not _is_whole(state)  # timm itself loads it
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the generators of the GPUs
        if facts.is_timm:
            given = {"state": state, "origin": str(path)} if is_for_timm else {}
            trunk = facts.build(pooling, crop_px=crop_px, drop_path=drop_path, **given)
        else:
            trunk = facts.build(pooling_layer(pooling))
        head = Head(
            num_features,
            embedding_dim,
            layer_norm=layer_norm,
            normalize=normalize,
            num_slices=num_slices,
            projection=projection,
            init=head_init,
            dropout=dropout,
            bn_neck=bn_neck,
        )
        network = Network(trunk, head, freeze_batch_norm=freeze_batch_norm, stages=facts.stages)
        if state is not None and not is_for_timm:
            _load(network, facts, state, str(path))
        if gradient_checkpointing:
            network.checkpoint_gradients()
        if isinstance(train, Mapping) and "lora" in train:
            _adapt(network, backbone, **train["lora"])
        else:
            network.freeze(train)
    return network.train()


def _adapt(network: Network, backbone: str, *, rank: int, alpha: float, targets: AdaptedPart) -> None:
    facts = facts_of(backbone)
    if targets not in facts.adaptable:
        raise ModelError(f"train: lora: backbone {backbone} {facts.why_not_adaptable}")
    network.adapt(facts.adaptable[targets], rank=rank, alpha=alpha)


def fetch_weights(backbone: str, weights: str) -> Path | None:
    """Return the file of weights on this machine, fetched if necessary; None for random ones.

    Raises ModelError for an unknown backbone, WeightsError where the file is not available.
    """
    if weights == "none":
        return None
    facts = facts_of(backbone)
    if weights == "default":
        if facts.weights_file is None:
            raise WeightsError(f"weights: default; backbone {backbone} has no published weights: {facts.weights_cure}")
        if facts.is_timm:
            from raydml.models.timm_source import source_of

            return source_of(backbone.removeprefix(TIMM)).fetched_weights("set weights: none, or weights: PATH")
        return published_weights(facts.weights_file)
    file = Path(weights).expanduser()
    if not file.is_file():
        raise WeightsError(f"weights: no such file: {weights}. Give a .pth or .safetensors file, default, or none")
    return file


def _is_whole(state: Mapping[str, Tensor]) -> bool:
    """Return whether weights are those of a network of raydml, with its head."""
    return any(name.startswith("trunk.") for name in state)


def _load(network: Network, facts: BackboneFacts, state: dict[str, Tensor], path: str) -> None:
    if _is_whole(state) or any(name.startswith("head.") for name in state):
        load_exactly(network, state, path)
    else:
        kept = {name: value for name, value in state.items() if not _is_classifier(name, value, facts)}
        release = recognised(kept)
        if release is not None and not kept.keys() <= network.trunk.state_dict().keys():
            raise WeightsError(
                f"weights: {path} is a checkpoint of {RELEASES[release].title}: a trained network with its head, not a "
                f"backbone. Cure: import it (launch.py import {path} FOLDER --from {release}), or score it "
                f"(launch.py evaluate {path} --from {release} --data NAME)"
            )
        load_exactly(network.trunk, {**_of_pooling(network.trunk), **kept}, path)


def _of_pooling(trunk: nn.Module) -> dict[str, Tensor]:
    """Return what a pooling has to learn, as it begins: published weights were trained with an average."""
    layers = [(name, module) for name, module in trunk.named_modules() if isinstance(module, GeM)]
    return {f"{name}.{key}": value for name, layer in layers for key, value in layer.state_dict().items()}


def _is_classifier(name: str, value: Tensor, facts: BackboneFacts) -> bool:
    """Return whether a tensor belongs to the ImageNet classifier, by its whole name and its 1,000 rows.

    The auxiliary classifiers of GoogLeNet have layers of other sizes; they belong to its training on ImageNet alone.
    """
    prefix = next((prefix for prefix in facts.classifier if name.startswith(prefix)), None)
    if prefix is None:
        return False
    is_layer = name.removeprefix(prefix) in ("weight", "bias", "head.weight", "head.bias")
    return prefix in ("aux1.", "aux2.") or (is_layer and value.ndim > 0 and value.shape[0] == IMAGENET_CLASSES)
