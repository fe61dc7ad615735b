"""Features that a frozen backbone gave images, in each of a few views. They replace pixels where only a head learns."""

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from raydml.images.augmentation import draw, drawn_views
from raydml.images.augmentation_settings import Augmentation
from raydml.images.pixels import Rows


class KeptFeatures:
    """Features of N images in V views.

    values: (V, M, F) float32, in memory or memory-mapped; the views are those of `views_of`, the first of them the
    centre. rows: (N,) the place of each of these images in ``values``.
    """

    def __init__(self, values: np.ndarray, rows: np.ndarray) -> None:
        self.values, self.rows = values, rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Rows, views: np.ndarray | int = 0) -> np.ndarray:
        """Copy the features of these images, (B, F) float32. views: (B,) which view of each, or one for all."""
        return np.asarray(self.values[views, self.rows[np.asarray(rows)]])

    def select(self, rows: Rows) -> "KeptFeatures":
        """The features of these images as a set of its own; nothing is copied."""
        return KeptFeatures(self.values, self.rows[np.asarray(rows)])

    def batches(self, batch_size: int, device: str | torch.device) -> Generator[Tensor, None, None]:
        """Yield the features of the centres in order, float32 (B, F), on the device."""
        for start in range(0, len(self), batch_size):
            rows = range(start, min(start + batch_size, len(self)))
            yield torch.from_numpy(self.read(rows)).to(device)


class FeatureLoader:
    """Training batches of features. Each image is in the view that a `Loader` with the same seeds would cut.

    The arguments are those of `Loader`. The augmentation makes the views of the features, and no others.
    """

    def __init__(
        self,
        features: KeptFeatures,
        augmentation: Augmentation,
        *,
        device: torch.device,
        rows: Callable[[int], slice] = slice,
    ) -> None:
        self.features, self.augmentation, self.device, self.rows = features, augmentation, device, rows

    def batches(
        self, plan: Sequence[np.ndarray], seeds: np.ndarray | Sequence[int], flip: np.ndarray | None = None
    ) -> Generator[Tensor, None, None]:
        """The batches of a plan, as `Loader.batches` has them: float32 (B, F), on the device."""
        may_flip = np.ones(len(plan), dtype=bool) if flip is None else flip
        for rows, seed, flips in zip(plan, seeds, may_flip, strict=True):
            part = self.rows(len(rows))
            draws = draw(len(rows), int(seed)).rows(part)
            views = drawn_views(self.augmentation, draws if flips else draws.unmirrored())
            yield torch.from_numpy(self.features.read(rows[part], views)).to(self.device)
