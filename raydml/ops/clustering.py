"""Clusters of the training images: k-means, matching to earlier clusters, and what is logged about them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raydml.ops import kmeans

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

# faiss begins its n-th restart with this many times n added to the seed.
_RESTART_STRIDE = 15_486_557
# Beyond this a squared distance leaves float32; NaN fails every comparison.
_LARGEST = 1e17


class ClusteringError(ValueError):
    """Points, clusters or settings that k-means, the matching or the metrics are not defined for."""


class KMeans(NamedTuple):
    """The settings of k-means, with faiss' names' meanings and faiss' defaults.

    iterations: at most so many (faiss: niter). restarts: runs from other initial rows, of which the one with the best
    objective counts (nredo). max_points_per_centroid: of more than K times so many points, a random choice of that
    many is fitted; all points are assigned. spherical: centroids of length 1, compared by inner product.
    """

    iterations: int = 25
    restarts: int = 1
    max_points_per_centroid: int = 256
    spherical: bool = False
    seed: int = 1234


class Clusters(NamedTuple):
    """assignment (N,) int64 in 0..K-1; centroids (K, F); objective of the fitted points, as faiss reports it: the sum
    of squared distances (spherical: of inner products) before the centroids moved for the last time."""

    assignment: Ids
    centroids: Floats
    objective: float


def cluster(points: NDArray[np.floating], num_clusters: int, settings: KMeans, device: torch.device) -> Clusters:
    """k-means from random rows, as faiss does it (see `raydml.kmeans`): the same seed gives the same partition.

    Not more points than clusters: each distinct point is a cluster of its own (spherical: each direction), numbered by
    its first row, and the centroids left over repeat the first point and have no image. (faiss refuses fewer.)
    Duplicates and points equally far from two centroids go to the lower number, so a cluster may stay empty.

    Args:
        points: (N, F) float16, float32 or float64; computed in float32.
        num_clusters: K, at least 1.
        device: where it is computed. It takes the memory of the points, twice that where a choice of them is fitted,
            and at most 256 MiB besides, all of it from torch's own allocator.

    Raises:
        ClusteringError: no points, not (N, F) floats, NaN, infinity or numbers beyond 1e17, a setting below 1.
    """
    _check_settings(num_clusters, settings)
    rows = _usable(points)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _whole_float32():
        everything = torch.from_numpy(rows).to(device)
        fitted, limit = everything, num_clusters * settings.max_points_per_centroid
        if len(rows) > limit:
            fitted = everything[_on(kmeans.draw_rows(len(rows), limit, settings.seed), device)]
        if len(fitted) <= num_clusters:
            centroids = torch.cat([fitted, fitted[:1].expand(num_clusters - len(fitted), -1)])
            centroids = kmeans.on_sphere(centroids) if settings.spherical else centroids
            best = kmeans.Fit(centroids, 0.0)
        else:
            best = _best_fit(fitted, num_clusters, settings)
        assignment = kmeans.nearest(everything, best.centroids, spherical=settings.spherical)
    return Clusters(assignment.cpu().numpy(), best.centroids.cpu().numpy(), best.objective)


def _best_fit(points: torch.Tensor, num_clusters: int, settings: KMeans) -> kmeans.Fit:
    """The first of the restarts with the best objective: the smallest distances or the largest inner products."""
    best, sign = None, -1 if settings.spherical else 1
    for restart in range(settings.restarts):
        rows = kmeans.draw_rows(len(points), num_clusters, settings.seed + 1 + restart * _RESTART_STRIDE)
        initial = points[_on(rows, points.device)]
        fit = kmeans.lloyd(points, initial, num_iterations=settings.iterations, spherical=settings.spherical)
        if best is None or sign * fit.objective < sign * best.objective:
            best = fit
    assert best is not None, "at least one restart"
    return best


def _on(rows: Ids, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rows).to(device)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Matrix products without TF32 or bfloat16 inside, which a training may have asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_settings(num_clusters: int, settings: KMeans) -> None:
    numbers = {
        "num_clusters": num_clusters,
        "iterations": settings.iterations,
        "restarts": settings.restarts,
        "max_points_per_centroid": settings.max_points_per_centroid,
    }
    for name, number in numbers.items():
        if number < 1:
            raise ClusteringError(f"{name}: {number} is not at least 1.")


def _usable(points: NDArray[np.floating]) -> Floats:
    """(N, F) float32, contiguous."""
    if points.ndim != 2 or 0 in points.shape or not np.issubdtype(points.dtype, np.floating):
        raise ClusteringError(f"points: expected floats (N, F) with N, F >= 1, got {points.dtype} of {points.shape}.")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity, which is refused below
        rows = np.require(points, np.float32, ["C", "W"])  # torch shares memory with writeable arrays only
    usable = (np.abs(rows) < _LARGEST).all(axis=1)
    if not usable.all():
        raise ClusteringError(
            f"points: {int((~usable).sum())} of {len(points)} rows hold NaN, infinity or numbers beyond {_LARGEST:g}, "
            f"the first is row {int(usable.argmin())}. The training diverged: lower the learning rate or clip the "
            "gradient."
        )
    return rows


def match_to_previous(
    clusters: NDArray[np.integer],
    previous: NDArray[np.integer],
    num_clusters: int,
    *,
    release_matching: bool = False,
) -> Ids:
    """The new clusters renamed to the previous ones that they share most images with, one to one: (N,).

    The renaming m minimises the sum over clusters i of the cost[i, m(i)] of `membership_difference`.

    Args:
        clusters: (N,) new ids in 0..K-1.
        previous: (N,) ids in 0..K-1, or -1 for images that were in no cluster.
        release_matching: rename i to the cluster that m renames to i, as the published code of Divide and Conquer does
            (rows and columns are swapped there). The same only where m undoes itself: no change, or swaps.

    Source: Sanakoyeu et al. 2019, "Divide and Conquer the Embedding Space for Metric Learning", section 3.2.

    Raises:
        ClusteringError: arrays of different shapes, or ids out of range.
    """
    from scipy.optimize import linear_sum_assignment  # needed only by methods that cluster

    _, names = linear_sum_assignment(membership_difference(clusters, previous, num_clusters))
    return (np.argsort(names) if release_matching else names)[clusters].astype(np.int64)


def membership_difference(
    clusters: NDArray[np.integer], previous: NDArray[np.integer], num_clusters: int
) -> NDArray[np.int64]:
    """cost (K, K): [i, j] is the number of images in exactly one of new cluster i and previous cluster j.

    Arguments and errors as in `match_to_previous`.
    """
    check_ids("clusters", clusters, 0, num_clusters)
    check_ids("previous", previous, -1, num_clusters)
    if clusters.shape != previous.shape:
        raise ClusteringError(f"{clusters.shape} clusters and {previous.shape} previous ids; they must be as many.")
    # One row more on top takes the images that were in no cluster.
    pairs = (previous.astype(np.int64) + 1) * num_clusters + clusters
    shared = np.bincount(pairs, minlength=(num_clusters + 1) * num_clusters).reshape(num_clusters + 1, num_clusters)
    now, before = shared.sum(axis=0), shared[1:].sum(axis=1)
    return now[:, None] + before[None, :] - 2 * shared[1:].T


def without_singletons(clusters: NDArray[np.integer], labels: NDArray[np.integer]) -> Ids:
    """The clusters (N,) with -1 for each image that is the only one of its class in its cluster.

    labels: (N,) classes of the images, any integers. Images that are -1 already stay so.

    Raises:
        ClusteringError: arrays that are not integers of the same shape (N,).
    """
    _check_integers("clusters", clusters)
    _check_integers("labels", labels)
    if clusters.shape != labels.shape:
        raise ClusteringError(f"{clusters.shape} clusters and {labels.shape} labels; they must be as many.")
    _, pair, counts = np.unique(np.stack([clusters, labels]), axis=1, return_inverse=True, return_counts=True)
    return np.where(counts[pair.reshape(-1)] == 1, -1, clusters).astype(np.int64)


def check_ids(name: str, ids: NDArray[np.integer], lowest: int, num_clusters: int) -> None:
    _check_integers(name, ids)
    wrong = ids[(ids < lowest) | (ids >= num_clusters)]
    if len(wrong):
        raise ClusteringError(f"{name}: {wrong[0]} is not in {lowest}..{num_clusters - 1}.")


def _check_integers(name: str, ids: NDArray[np.integer]) -> None:
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ClusteringError(f"{name}: expected integers (N,), got {ids.dtype} of {ids.shape}.")
