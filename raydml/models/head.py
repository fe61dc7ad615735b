"""The embedding head: from a backbone's features to embeddings."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydml.ops.distances import euclidean, full_precision

Normalisation = Literal["l2", "mean_distance", "none"]
Projection = Literal["linear", "linear_no_bias", "none"]
HeadInit = Literal["torch", "xavier_normal", "kaiming_normal"]


class Head(nn.Module):
    """Features (B, F) -> embeddings (B, D), float32: [layer norm] -> [dropout] -> [projection] -> [normalisation].

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
    dropout: the probability of dropping a feature in training.

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
        """Return the embeddings before they are normalised."""
        with torch.autocast(features.device.type, enabled=False):
            embeddings: Tensor = self.dropout(self.standardise(full_precision(features)))
            return embeddings if self.linear is None else self.linear(embeddings)


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
