"""k-means as faiss runs it, on torch tensors and any device: its draws, its rule for empty clusters, its partition.

Three things are done differently, and none changes more than rounding decides anyway. Distances come from float32
matrix products; where two centroids are closer to a point than float32 can tell apart, float64 decides, and the lower
index where it cannot either, so that neither threads nor chunks do. An assignment that repeats ends the iterations, as
the same means would follow for ever; faiss 1.15 ends them when its float32 objective repeats. And random numbers are
drawn here rather than by the installed faiss, so that a seed means the same rows whatever faiss becomes.

Source: Lloyd 1982; faiss `Clustering.cpp` and `random.cpp` (up to 1.15) for everything that Lloyd leaves open.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from raydml.ops.progress import tell

# Bytes of a chunk's points and scores in float64. Chunks of a quarter are a tenth slower, larger ones no faster.
_CHUNK_BYTES = 32 * 2**20
# faiss splits a cluster by moving every second coordinate up and the others down by this share of themselves.
_SPLIT = 1 / 1024
_SPLIT_SEED = 1234


class Fit(NamedTuple):
    """centroids (K, F); objective: the squared distances of the points to the centroids that the last iteration began
    with, summed (spherical: their inner products)."""

    centroids: Tensor
    objective: float


def lloyd(points: Tensor, centroids: Tensor, *, num_iterations: int, spherical: bool) -> Fit:
    """Lloyd's iterations from given centroids: each point to its nearest, each centroid to the mean of its points.

    A cluster left empty takes half of another one (`_split`). With `spherical` the centroids, the initial ones too,
    are scaled to length 1 and "nearest" is the largest inner product; the points are taken as they are.

    Args:
        points: (n, F) float32, finite.
        centroids: (K, F) float32, on the same device, K < n.
        num_iterations: at most so many, at least 1.
    """
    lengths = torch.linalg.vector_norm(points, dim=1)
    centroids = on_sphere(centroids) if spherical else centroids
    searched, assignment = centroids, None
    for iteration in range(num_iterations):
        tell("clustering", iteration, num_iterations, "iterations")
        searched, previous = centroids, assignment
        assignment = nearest(points, searched, spherical=spherical, lengths=lengths)
        if previous is not None and torch.equal(assignment, previous):
            break
        centroids = _means(points, assignment, len(centroids))
        centroids = on_sphere(centroids) if spherical else centroids
    tell("clustering", num_iterations, num_iterations, "iterations")
    assert assignment is not None, "at least one iteration"
    return Fit(centroids, _objective(points, searched, assignment, spherical))


def nearest(points: Tensor, centroids: Tensor, *, spherical: bool, lengths: Tensor | None = None) -> Tensor:
    """(n,) int64: the nearest centroid of every point (n, F); of those that are equally near, the lowest index.

    lengths: (n,) of the points, where they are known.
    """
    lengths = torch.linalg.vector_norm(points, dim=1) if lengths is None else lengths
    found, num_near = (torch.empty(len(points), dtype=torch.int64, device=points.device) for _ in range(2))
    num_rows = max(1, _CHUNK_BYTES // (8 * sum(centroids.shape)))
    for start in range(0, len(points), num_rows):
        rows = slice(start, start + num_rows)
        found[rows], num_near[rows] = _first_within(*_scores(points[rows], lengths[rows], centroids, spherical))
    for unsure in (num_near > 1).nonzero()[:, 0].split(num_rows):
        exact = _scores(points[unsure].double(), lengths[unsure], centroids.double(), spherical)
        found[unsure], _ = _first_within(*exact)
    return found


def _scores(points: Tensor, lengths: Tensor, centroids: Tensor, spherical: bool) -> tuple[Tensor, Tensor]:
    """(n, K) half the squared distances, less what is the same for all centroids, and (n,) how far two may be off."""
    norms = torch.linalg.vector_norm(centroids, dim=1)
    half = torch.zeros_like(norms) if spherical else norms.square() / 2
    scores = torch.addmm(half, points, centroids.T, alpha=-1)
    # Rounding grows with the lengths and with the root of the number of terms. The largest differences measured against
    # float64 are a tenth of this and less.
    eps = torch.finfo(points.dtype).eps * points.shape[1] ** 0.5
    return scores, eps * norms.max() * (lengths + norms.max())


def _first_within(scores: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) the first column whose score is the row's least, give or take the margin, and (n,) how many of them."""
    row, column = (scores <= (scores.amin(dim=1) + margin)[:, None]).nonzero(as_tuple=True)
    num_columns = torch.bincount(row, minlength=len(scores))
    return column[num_columns.cumsum(0) - num_columns], num_columns


def _means(points: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """(K, F) the mean of each cluster, its points added in their order; empty clusters take half of another one."""
    counts = torch.bincount(assignment, minlength=num_clusters)
    order = torch.argsort(assignment, stable=True)
    sums = functional.embedding_bag(order, points, counts.cumsum(0) - counts, mode="sum")
    means = sums * (1 / counts.clamp(min=1).to(points.dtype))[:, None]
    if not counts.all():
        _split(means, counts.cpu().numpy(), len(points))
    return means


def _split(centroids: Tensor, counts: NDArray[np.int64], num_points: int) -> None:
    """Give each empty cluster, in place and in order, half of a larger one, which is drawn as faiss draws it.

    Round and round the clusters, each is taken with a chance of (its points - 1) / (all points - K); after that the
    two count half of the points each. The random numbers are the same at every call.
    """
    sizes = counts.astype(np.float32)
    generator = np.random.RandomState(_SPLIT_SEED)
    draws = np.empty(0, dtype=np.float32)
    up = torch.full_like(centroids[0], 1 + _SPLIT)
    up[1::2] = 1 - _SPLIT
    for empty in np.flatnonzero(counts == 0):
        while True:
            if len(draws) < len(sizes):
                more = generator.randint(0, 2**32, size=64 * len(sizes), dtype=np.uint32)
                draws = np.concatenate([draws, more.astype(np.float32) / np.float32(2**32)])
            chances = ((sizes - 1.0) / np.float32(num_points - len(sizes))).astype(np.float32)
            taken = np.flatnonzero(draws[: len(sizes)] < chances)
            if len(taken):
                break
            draws = draws[len(sizes) :]
        donor = taken[0]
        draws = draws[donor + 1 :]
        centroids[empty] = centroids[donor] * up
        centroids[donor] *= 2 - up
        sizes[empty] = sizes[donor] / 2
        sizes[donor] -= sizes[empty]


def on_sphere(centroids: Tensor) -> Tensor:
    """Every row scaled to length 1; zeros stay."""
    norms = torch.linalg.vector_norm(centroids, dim=1, keepdim=True)
    return torch.where(norms > 0, centroids / norms, centroids)


def _objective(points: Tensor, centroids: Tensor, assignment: Tensor, spherical: bool) -> float:
    total = torch.zeros((), dtype=torch.float64, device=points.device)
    num_rows = max(1, _CHUNK_BYTES // (8 * points.shape[1]))
    for start in range(0, len(points), num_rows):
        rows = slice(start, start + num_rows)
        own = centroids[assignment[rows]]
        if spherical:
            terms = torch.linalg.vecdot(points[rows], own).double()
        else:
            terms = torch.linalg.vector_norm(own.sub_(points[rows]), dim=1).double().square()
        total += terms.sum()
    return float(total)


def draw_rows(num_points: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """(num_rows,) different numbers below num_points: the beginning of faiss' random permutation of that seed.

    It is a Fisher-Yates shuffle with std::mt19937 (numpy's legacy RandomState is the same generator), which takes the
    remainder of 32-bit numbers: faiss' rule up to 1.15.
    """
    raw = np.random.RandomState(seed % 2**32).randint(0, 2**32, size=num_rows, dtype=np.uint32).astype(np.int64)
    places = np.arange(num_rows)
    partners = (places + raw % (num_points - places)).tolist()
    rows = list(range(num_points))
    for place, partner in enumerate(partners):
        rows[place], rows[partner] = rows[partner], rows[place]
    return np.array(rows[:num_rows], dtype=np.int64)
