"""Verification metrics: are two images of one class, decided by a threshold of their distance.

A genuine pair is of one class, an impostor pair of two. A pair is accepted if its distance is at most the threshold.
All metrics here need, for each genuine pair, only how many impostor pairs are nearer and how many are as near.

FMR is the share of impostor pairs that are accepted, FNMR the share of genuine pairs that are not. Without failures to
acquire an image, FMR is the false accept rate (FAR), and 1 - FNMR the true accept rate (TAR). Source: ISO/IEC 19795-1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Rates at which TAR and FNMR are reported, largest first, as they are written.
FALSE_ACCEPT_RATES = ("1e-1", "1e-2", "1e-3", "1e-4")
#: False acceptances below which a rate is not reported: with 30 the true rate is within 30 % of it, at 90 % confidence.
LEAST_ACCEPTED = 30
MOST_POINTS = 1000  # of a ROC curve


class PairCounts(NamedTuple):
    """Impostor pairs beside each of G genuine pairs, which are sorted by distance; G is at least 1.

    distances: (G,) of the genuine pairs. nearer: (G,) impostor pairs with a smaller distance. within: (G,) those with a
    distance that is at most as large. num_impostors: at least 1.
    """

    distances: NDArray[np.float64]
    nearer: NDArray[np.int64]
    within: NDArray[np.int64]
    num_impostors: int


class RocPoints(NamedTuple):
    """Points of the ROC curve, the threshold rising: P at most MOST_POINTS.

    distances: (P,) the thresholds; pairs at most so far apart are accepted. far, tar: (P,) the shares of impostor and
    of genuine pairs that are accepted.
    """

    distances: NDArray[np.float64]
    far: NDArray[np.float64]
    tar: NDArray[np.float64]


def roc_points(counts: PairCounts) -> RocPoints:
    """Return the points of the ROC curve at distances of genuine pairs.

    Where there are more than MOST_POINTS distances, some are chosen: half of them evenly by TAR, and half evenly by the
    logarithm of FAR, so that small rates are there as well.
    """
    distances, starts, sizes = np.unique(counts.distances, return_index=True, return_counts=True)
    far = counts.within[starts] / counts.num_impostors
    tar = (starts + sizes) / len(counts.distances)
    if len(distances) > MOST_POINTS:
        half = MOST_POINTS // 2
        by_tar = np.searchsorted(tar, np.linspace(tar[0], 1, half))
        by_far = np.searchsorted(far, np.geomspace(1 / counts.num_impostors, 1, half))
        chosen = np.unique(np.minimum(np.concatenate([by_tar, by_far]), len(distances) - 1))
        distances, far, tar = distances[chosen], far[chosen], tar[chosen]
    return RocPoints(distances, far, tar)


def tar_at_far(counts: PairCounts, far: float) -> float:
    """Return the largest true accept rate of all thresholds whose false accept rate is at most far."""
    most = math.floor(far * counts.num_impostors * (1 + 1e-12))  # 0.1 * 30 is below 3 in floating point, say
    return float((counts.within <= most).mean())


def is_measured(far: float, num_impostors: int) -> bool:
    """Return whether there are enough impostor pairs for a false accept rate: 30 of them would be accepted.

    Source: the rule of 30, Doddington et al. 2000, "The NIST speaker recognition evaluation", Speech Communication 31.
    """
    return far * num_impostors * (1 + 1e-12) >= LEAST_ACCEPTED


def roc_auc(counts: PairCounts) -> float:
    """Return the area under the ROC curve: how often a genuine pair is nearer than an impostor pair, ties as a half."""
    beyond = counts.num_impostors - (counts.within + counts.nearer) / 2
    return float(beyond.mean() / counts.num_impostors)


def equal_error_rate(counts: PairCounts) -> float:
    """Return the rate where FMR and FNMR are equal, on the ROC curve with straight lines between its points.

    Where no threshold gives equal rates, this lies between the two thresholds that are nearest to it; pairs of equal
    distance make a straight line, as in `roc_auc`.
    """
    num_genuine = len(counts.distances)
    # The corners of the curve: before and behind each distance of genuine pairs.
    _, starts, sizes = np.unique(counts.distances, return_index=True, return_counts=True)
    false = np.stack([counts.nearer[starts], counts.within[starts]], axis=1).ravel() / counts.num_impostors
    true = np.stack([starts, starts + sizes], axis=1).ravel() / num_genuine
    false, true = (np.concatenate([[0.0], rates, [1.0]]) for rates in (false, true))
    return float(np.interp(0.0, false + true - 1, false))
