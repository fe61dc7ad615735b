"""Features whose clusters are pseudo-labels: properties that images of different classes share."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.ops.distances import full_precision

Standardise = Literal["mean", "mstd", "none"]

# Windows on a map, as MIC's release has them on the 56 pixels of ResNet50's first stage: 4 by 4 that overlap.
_WINDOW, _STRIDE = 18 / 56, 12 / 56

# A deviation below it is that of a feature which is constant within the class.
_SMALLEST_DEVIATION = 1e-12


def window_features(maps: Tensor) -> Tensor:
    """Return the output of a layer as one unit vector an image that keeps the position, in float32 or wider.

    maps: (B, C, H, W) -> (B, C * h * w), the averages over windows of 18/56 of a side every 12/56 of it, rounded to
    whole pixels, without padding; all windows of a channel stand together. A side of 56 has 4 windows (and 2 pixels
    that are in none), another one 3 to 5, or each of its pixels where it has fewer. (B, F): these features.
    For 56 by 56 this is what the release of MIC computes (Roth, Brattoli and Ommer, ICCV 2019).
    """
    features = full_precision(maps)
    if features.ndim == 4:
        sides = features.shape[-2:]
        window = [max(1, round(side * _WINDOW)) for side in sides]
        stride = [max(1, round(side * _STRIDE)) for side in sides]
        features = nn.functional.avg_pool2d(features, window, stride).flatten(1)
    return nn.functional.normalize(features, dim=1)


def standardise_by_class(features: NDArray[np.float32], labels: NDArray[np.int64], how: Standardise) -> None:
    """Remove from features (N, F), in place, the information on the class of their image: labels (N,).

    "mean" subtracts the mean of the class; "mstd" also divides by its deviation (of the population), feature by
    feature; "none" does nothing. Lengths are not made 1 again. In place because N * F is 1 GB on SOP.

    MIC's release subtracts the mean only; according to secondary sources (unchecked) its paper also divides. Departures
    from the release: a feature that is constant within a class (as in a class of one image) is 0 after "mstd", not NaN;
    "none" does nothing, where the release does "mean"; sums are float64.
    """
    if how == "none":
        return
    by_class = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[by_class], return_index=True)
    for rows in np.split(by_class, starts[1:]):
        own = features[rows].astype(np.float64)
        own -= own.mean(axis=0)
        if how == "mstd":
            deviation = own.std(axis=0)
            own /= np.where(deviation < _SMALLEST_DEVIATION, 1, deviation)
        features[rows] = own
