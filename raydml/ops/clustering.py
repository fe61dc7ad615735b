"""Clusters of images by k-means, their relation to earlier clusters, and the removal of singletons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.ops.progress import report_progress

if TYPE_CHECKING:
    import torch

_Floats = NDArray[np.float32]
_Ids = NDArray[np.int64]

# GPU memory that faiss works in, beside the centroids. Its own default is 1.5 GiB, which the training needs.
_SCRATCH_BYTES = 256 * 2**20
# The square of a larger number overflows float32. NaN fails every comparison.
_LARGEST = 1e17
LARGEST_SEED = 2**31 - 1  # of faiss


class ClusteringError(ValueError):
    """Points for which k-means is not defined."""


class KMeans(NamedTuple):
    """The settings of k-means, with the meanings and defaults of faiss.

    iterations: at most this many (faiss: niter); they end early when the objective repeats.
    restarts: runs from different initial rows, of which the one with the best objective is kept (faiss: nredo).
    max_points_per_centroid: if there are more than K times this many points, only a random sample of that size is
        fitted; all points are assigned.
    spherical: centroids have length 1, and points are compared with them by inner product.
    """

    iterations: int = 25
    restarts: int = 1
    max_points_per_centroid: int = 256
    spherical: bool = False
    seed: int = 1234


class Clusters(NamedTuple):
    """assignment (N,) int64 in 0..K-1; centroids (K, F); objective of the fitted points in the last iteration: the sum
    of squared distances (spherical: of inner products) before the centroids moved for the last time."""

    assignment: _Ids
    centroids: _Floats
    objective: float


def cluster(points: NDArray[np.floating], num_clusters: int, settings: KMeans, device: torch.device) -> Clusters:
    """Cluster points by the k-means of faiss, on the given GPU or on the CPU.

    The same seed gives the same clusters on one kind of device, for any number of threads. A CPU and a GPU round
    differently: a point that is almost equally far from two centroids may change its cluster between them.

    If there are at most as many points as clusters, each distinct point (spherical: each direction) becomes a cluster,
    numbered by its first row; the remaining centroids repeat the first point and receive no image.

    Args:
        points: (N, F) float16, float32 or float64; computed in float32.
        num_clusters: K, at least 1.
        device: a CUDA device runs on that GPU, with 256 MiB of scratch memory, if faiss supports GPUs; every other
            device runs on the CPU with as many threads as torch.

    Raises:
        ClusteringError: no points, not (N, F) floats, NaN, infinity or numbers beyond 1e17.
    """
    rows = _usable(points)
    if len(rows) <= num_clusters:
        return _clusters_of_their_own(rows, num_clusters, spherical=settings.spherical)
    import faiss  # here, because training without clusters needs no faiss

    fit = faiss.Clustering(rows.shape[1], num_clusters)
    fit.niter, fit.nredo, fit.seed = settings.iterations, settings.restarts, settings.seed
    fit.spherical, fit.max_points_per_centroid = settings.spherical, settings.max_points_per_centroid
    fit.min_points_per_centroid = 1  # no warning
    report_progress("clustering", 0, settings.iterations, "iterations")
    with faiss_threads():
        index = _flat_index(rows.shape[1], device, spherical=settings.spherical)
        fit.train(rows, index)  # leaves the centroids in the index
        _, nearest = index.search(rows, 1)
    report_progress("clustering", settings.iterations, settings.iterations, "iterations")
    centroids = faiss.vector_to_array(fit.centroids).reshape(num_clusters, -1)
    steps: Any = fit.iteration_stats
    objective = steps.at(steps.size() - 1).obj if steps.size() else 0.0
    return Clusters(nearest[:, 0], centroids, objective)


def _flat_index(dim: int, device: torch.device, *, spherical: bool) -> Any:
    """An empty faiss index that compares with every centroid, on the device if faiss can use it."""
    import faiss
    import torch

    if device.type != "cuda" or not faiss.get_num_gpus():
        return faiss.IndexFlatIP(dim) if spherical else faiss.IndexFlatL2(dim)
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_SCRATCH_BYTES)
    config = faiss.GpuIndexFlatConfig()
    config.device = torch.cuda.current_device() if device.index is None else device.index
    return (faiss.GpuIndexFlatIP if spherical else faiss.GpuIndexFlatL2)(resources, dim, config)


def num_gpus_of_faiss() -> int:
    """Return how many GPUs faiss can use."""
    import faiss

    return int(faiss.get_num_gpus())


@contextmanager
def faiss_threads() -> Iterator[None]:
    """Let faiss use as many threads as torch, and restore its own number afterwards."""
    import faiss
    import torch

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _clusters_of_their_own(rows: _Floats, num_clusters: int, *, spherical: bool) -> Clusters:
    if spherical:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    centroids = np.concatenate([rows, np.repeat(rows[:1], num_clusters - len(rows), axis=0)])
    return Clusters(first[inverse.reshape(-1)].astype(np.int64), centroids, 0.0)


def _usable(points: NDArray[np.floating]) -> _Floats:
    """The points as contiguous float32 (N, F)."""
    if points.ndim != 2 or 0 in points.shape or not np.issubdtype(points.dtype, np.floating):
        raise ClusteringError(f"points: expected floats (N, F) with N, F >= 1, got {points.dtype} of {points.shape}.")
    with np.errstate(over="ignore"):  # numbers beyond float32 become infinity, which is refused below
        rows = np.ascontiguousarray(points, dtype=np.float32)
    usable = (np.abs(rows) < _LARGEST).all(axis=1)
    if not usable.all():
        raise ClusteringError(
            f"points: {int((~usable).sum())} of {len(points)} rows hold NaN, infinity or numbers beyond {_LARGEST:g}, "
            f"the first is row {int(usable.argmin())}. The training diverged: lower the learning rate or clip the "
            "gradient."
        )
    return rows


def match_to_previous(
    clusters: NDArray[np.integer], previous: NDArray[np.integer], num_clusters: int, *, release_matching: bool = False
) -> _Ids:
    """Rename the new clusters to the previous ones with which they share the most images, one to one: (N,).

    The renaming m minimises the sum over clusters i of cost[i, m(i)] of `membership_difference`.

    Args:
        clusters: (N,) new ids in 0..K-1.
        previous: (N,) ids in 0..K-1, or -1 for images that were in no cluster.
        release_matching: use the inverse of m, as the published code of Divide and Conquer does (it swaps rows and
            columns). The result is the same only if m is its own inverse: no change, or swaps.

    Source: Sanakoyeu et al. 2019, "Divide and Conquer the Embedding Space for Metric Learning", section 3.2.
    """
    from scipy.optimize import linear_sum_assignment

    _, names = linear_sum_assignment(membership_difference(clusters, previous, num_clusters))
    return (np.argsort(names) if release_matching else names)[clusters].astype(np.int64)


def membership_difference(
    clusters: NDArray[np.integer], previous: NDArray[np.integer], num_clusters: int
) -> NDArray[np.int64]:
    """Return cost (K, K): [i, j] is the number of images in exactly one of new cluster i and previous cluster j.

    Arguments as in `match_to_previous`.
    """
    assert clusters.shape == previous.shape
    assert clusters.min() >= 0
    assert previous.min() >= -1
    assert max(clusters.max(), previous.max()) < num_clusters
    # The first row takes the images that were in no cluster.
    pairs = (previous.astype(np.int64) + 1) * num_clusters + clusters
    shared = np.bincount(pairs, minlength=(num_clusters + 1) * num_clusters).reshape(num_clusters + 1, num_clusters)
    now, before = shared.sum(axis=0), shared[1:].sum(axis=1)
    return now[:, None] + before[None, :] - 2 * shared[1:].T


def without_singletons(clusters: NDArray[np.integer], labels: NDArray[np.integer]) -> _Ids:
    """Return the clusters (N,) with -1 for each image that is the only one of its class in its cluster.

    labels: (N,) classes of the images, any integers. Images in no cluster (-1) keep their -1.
    """
    _, pair, counts = np.unique(np.stack([clusters, labels]), axis=1, return_inverse=True, return_counts=True)
    return np.where(counts[pair.reshape(-1)] == 1, -1, clusters).astype(np.int64)
