"""The embedding head: from a backbone's features to embeddings."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from raydml.ops.distances import euclidean, full_precision


class ModelError(ValueError):
    """A network that cannot be built as asked, or a crop that it cannot take."""


Normalisation = Literal["l2", "mean_distance", "none"]
Projection = Literal["linear", "linear_no_bias", "none"]
HeadInit = Literal["torch", "xavier_normal", "kaiming_normal"]


class Head(nn.Module):
    """Features (B, F) -> embeddings (B, D), float32: [layer norm] -> [dropout] -> [projection] -> [normalisation].

    The layer norm has no parameters (eps 1e-5) and comes first, as in Zhai & Wu, "Classification is a Strong Baseline
    for Deep Metric Learning", BMVC 2019, section 3.2; their head is layer_norm with projection "none" for D = F and
    "linear_no_bias" for another D. Always computed in float32 (or wider), also under autocast.

    projection: "linear" with a bias, "linear_no_bias", or "none", where D = F.
    num_slices: an embedding is the concatenation of so many slices of D / num_slices, each normalised on its own.
    normalize: "l2" divides each slice by max(its norm, 1e-12). "mean_distance" divides a training batch by the mean
    distance of its pairs and leaves embeddings alone in evaluation: Kim & Park, "Multi-Level Distance Regularization",
    AAAI 2021; the gradient flows through the mean, so the scale of the linear layer has no effect on the loss, and a
    batch of one, or of equal rows, is left as it is. "none" leaves them alone always.
    init: "torch" is nn.Linear's own. "xavier_normal": weights of deviation sqrt(2 / (F + D / num_slices)), each slice
    as a layer of its own, biases uniform within 1 / sqrt(F), as in Divide & Conquer's release (Sanakoyeu et al., CVPR
    2019). "kaiming_normal": weights of deviation sqrt(2 / D), biases 0, as in the release of the multi-similarity loss
    (Wang et al., CVPR 2019). dropout: its probability for each feature, in training.

    settings: what it was built with, num_slices apart, so that another head can be built alike.

    Raises ModelError for settings that do not fit together.
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
    ) -> None:
        super().__init__()
        refuse_unknown("normalize", normalize, Normalisation)
        _refuse_head(feature_dim, embedding_dim, num_slices, projection, init, dropout)
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
        }
        self.standardise = nn.LayerNorm(feature_dim, elementwise_affine=False) if layer_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear: nn.Linear | None = None
        if projection != "none":
            self.linear = nn.Linear(feature_dim, embedding_dim, bias=projection == "linear")
            _initialise(self.linear, init, num_slices)

    def forward(self, features: Tensor) -> Tensor:
        return normalised(self.project(features), self.normalize, self.num_slices, training=self.training)

    def project(self, features: Tensor) -> Tensor:
        """The embeddings before they are normalised."""
        with torch.autocast(features.device.type, enabled=False):
            embeddings: Tensor = self.dropout(self.standardise(full_precision(features)))
            return embeddings if self.linear is None else self.linear(embeddings)


def normalised(embeddings: Tensor, normalize: Normalisation, num_slices: int, *, training: bool) -> Tensor:
    """Embeddings (B, D), float32 or wider, normalised slice by slice as `Head` says, in training or in evaluation."""
    with torch.autocast(embeddings.device.type, enabled=False):
        if normalize == "l2":
            slices = embeddings.unflatten(1, (num_slices, -1))
            return nn.functional.normalize(slices, dim=2, eps=1e-12).flatten(1)
        if normalize == "mean_distance" and training:
            return torch.cat([piece / _mean_distance(piece) for piece in embeddings.chunk(num_slices, dim=1)], dim=1)
        return embeddings


def _refuse_head(
    feature_dim: int, embedding_dim: int, num_slices: int, projection: Projection, init: HeadInit, dropout: float
) -> None:
    refuse_unknown("projection", projection, Projection)
    refuse_unknown("head_init", init, HeadInit)
    if num_slices < 1 or embedding_dim % num_slices:
        largest = max(embedding_dim // max(num_slices, 1), 1) * max(num_slices, 1)
        raise ModelError(
            f"embedding_dim: {embedding_dim} cannot be cut into {num_slices} equal slices; "
            f"set embedding_dim: {largest}, or another number of slices"
        )
    if projection == "none" and embedding_dim != feature_dim:
        raise ModelError(
            f"embedding_dim: {embedding_dim}; with projection: none the embedding is the backbone's feature: "
            f"set embedding_dim: {feature_dim}, or projection: linear or linear_no_bias"
        )
    if projection == "none" and init != "torch":
        raise ModelError(f"head_init: {init} has no effect with projection: none; leave it out")
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout: {dropout} is not a probability below 1; set for example dropout: 0.01, or 0")


def refuse_unknown(key: str, value: str, choices: Any) -> None:
    """Raises ModelError for a value that is none of the choices, a Literal."""
    if value not in get_args(choices):
        raise ModelError(f"{key}: {value!r}; one of {', '.join(get_args(choices))}")


def _initialise(linear: nn.Linear, init: HeadInit, num_slices: int) -> None:
    with torch.no_grad():
        if init == "xavier_normal":  # the bias is nn.Linear's own
            for rows in linear.weight.chunk(num_slices):
                nn.init.xavier_normal_(rows)
        elif init == "kaiming_normal":
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


def _mean_distance(points: Tensor) -> Tensor:
    """Scalar: the mean Euclidean distance over all pairs of different rows of (B, D); 1 where it is next to 0."""
    itself = torch.eye(len(points), dtype=torch.bool, device=points.device)
    total = euclidean(points).masked_fill(itself, 0).sum()
    mean = total / max(len(points) * (len(points) - 1), 1)
    return mean.masked_fill(mean < 1e-5, 1)
