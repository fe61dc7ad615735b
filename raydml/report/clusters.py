"""Galleries of clusters: what the training images that a method put together have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raydml.report.image_rows import Cell, ImageRow, LabelledImages, draw_image_rows
from raydml.report.style import GREY, counted

NUM_CLUSTERS, NUM_IMAGES = 8, 5


class ShownCluster(NamedTuple):
    """number: of the cluster. num_images, num_classes: in it. rows: of the images shown, nearest to the mean first."""

    number: int
    num_images: int
    num_classes: int
    rows: list[int]


def largest_clusters(assignment: NDArray[np.int64], num_clusters: int = NUM_CLUSTERS) -> list[int]:
    """The numbers of the largest clusters, ascending. assignment: (N,), below 0 for images in no cluster."""
    found, counts = np.unique(assignment[assignment >= 0], return_counts=True)
    return sorted(int(number) for number in found[np.lexsort((found, -counts))][:num_clusters])


def sample_of_clusters(
    assignment: NDArray[np.int64], numbers: Sequence[int], max_each: int, seed: int
) -> NDArray[np.int64]:
    """Row numbers, ascending: of each of these clusters at most max_each images drawn at random."""
    order = np.random.default_rng(seed).permutation(len(assignment))
    return np.sort(np.concatenate([order[assignment[order] == number][:max_each] for number in numbers]))


def central_images(
    assignment: NDArray[np.int64],
    labels: NDArray[np.int64],
    sampled: NDArray[np.int64],
    points: NDArray[np.float32],
    num_images: int = NUM_IMAGES,
) -> list[ShownCluster]:
    """For each sampled cluster the images nearest to the mean of its sampled images.

    The nearest of every class come first, so that a cluster of several classes shows what these share.

    Args:
        assignment, labels: (N,) cluster and class of every training image.
        sampled: (S,) row numbers; points: (S, D), where these images lie.
    """
    shown = []
    for number in np.unique(assignment[sampled]).tolist():
        of_cluster = assignment[sampled] == number
        rows, places = sampled[of_cluster], points[of_cluster].astype(np.float64)
        order = np.argsort(((places - places.mean(axis=0)) ** 2).sum(axis=1), kind="stable")
        # The first of each class in this order, then the second of each, and so on.
        classes = labels[rows[order]]
        turns = np.array([(classes[:place] == label).sum() for place, label in enumerate(classes)])
        chosen = rows[order][np.argsort(turns, kind="stable")][:num_images]
        members = labels[assignment == number]
        shown.append(ShownCluster(number, len(members), len(np.unique(members)), chosen.tolist()))
    return shown


def draw_clusters(shown: Sequence[ShownCluster], images: LabelledImages, path: Path, *, title: str) -> Path:
    """One row of images for each cluster, with its size; the images' classes stand above them."""
    rows = []
    for cluster in shown:
        size = f"{counted(cluster.num_images, 'image')} of {counted(cluster.num_classes, 'class', 'classes')}"
        cells: list[Cell | None] = [
            Cell(row, images.class_names[images.labels[row]], colour=GREY) for row in cluster.rows
        ]
        rows.append(ImageRow(f"cluster {cluster.number}: {size}", [*cells, *[None] * (NUM_IMAGES - len(cells))]))
    return draw_image_rows(rows, images.pixels, path, title=title)
