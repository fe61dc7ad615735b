"""MIC's adversary: it predicts one embedding of an image from another, and the embeddings learn to prevent it."""

import torch
from torch import Tensor, nn

from raydml.ops.distances import full_precision


class Adversary(nn.Module):
    """Predicts one embedding of an image from another one; both embeddings learn to defeat it.

    With unit vectors c (target) and s (source) of D dimensions and R(s) = Linear(ReLU(Linear(s))), of unit length too,

        - mean over batch and dimensions of (c * R(s))^2

    the squares being of products of single features, not of the dot product. It is between -1/D and 0. R descends it as
    it is; the gradient of both embeddings is reversed, so that they, and the trunk behind them, ascend it
    (Roth, Brattoli and Ommer, ICCV 2019, in the form of their release).
    """

    def __init__(self, source_dim: int, target_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.predict = nn.Sequential(nn.Linear(source_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, target_dim))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source (B, S), target (B, D), of any length -> scalar, float32 or wider, also under autocast."""
        with torch.autocast(source.device.type, enabled=False):
            known, predicted = (_unit(_reversed(full_precision(points))) for points in (source, target))
            return -(predicted * _unit(self.predict(known))).square().mean()


def _reversed(points: Tensor) -> Tensor:
    """The points themselves, whose gradient arrives times -1. Doubling and subtracting is exact in floating point."""
    return 2 * points.detach() - points


def _unit(points: Tensor) -> Tensor:
    return nn.functional.normalize(points, dim=1)
