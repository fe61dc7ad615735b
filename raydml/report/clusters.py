"""The clusters of training images that a method made: read from a checkpoint, and drawn as galleries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.trial import Trial
from raydml.methods._base import Method
from raydml.methods.divide_conquer import DivideConquer
from raydml.methods.mic import MIC
from raydml.ops.wording import counted
from raydml.report.embedding_map import largest_classes
from raydml.report.image_rows import GREY, ImageCell, ImageRow, LabelledImages, different_classes_first, draw_image_rows
from raydml.training import checkpoint, parts

NUM_CLUSTERS, NUM_IMAGES = 8, 5


class ShownCluster(NamedTuple):
    """One cluster in a picture. rows: row numbers of the images shown, nearest to the mean first."""

    number: int
    num_images: int
    num_classes: int
    rows: list[int]


def largest_clusters(assignment: NDArray[np.int64], num_clusters: int = NUM_CLUSTERS) -> list[int]:
    """Return the numbers of the largest clusters, ascending. assignment: (N,), below 0 for images in no cluster."""
    return sorted(largest_classes(assignment[assignment >= 0], num_clusters))


def sample_of_clusters(
    assignment: NDArray[np.int64], numbers: Sequence[int], max_each: int, seed: int
) -> NDArray[np.int64]:
    """Draw at most max_each images from each of these clusters; return their row numbers, ascending."""
    order = np.random.default_rng(seed).permutation(len(assignment))
    return np.sort(np.concatenate([order[assignment[order] == number][:max_each] for number in numbers]))


def central_images(
    assignment: NDArray[np.int64],
    labels: NDArray[np.int64],
    sampled: NDArray[np.int64],
    points: NDArray[np.float32],
    num_images: int = NUM_IMAGES,
) -> list[ShownCluster]:
    """Return, for each sampled cluster, the images nearest to the mean of its sampled images.

    The nearest of every class come first, so that a cluster of several classes shows what they share.

    Args:
        assignment, labels: (N,) cluster and class of every training image.
        sampled: (S,) row numbers. points: (S, D) embeddings of these images.
    """
    shown = []
    for number in np.unique(assignment[sampled]).tolist():
        of_cluster = assignment[sampled] == number
        rows, places = sampled[of_cluster], points[of_cluster].astype(np.float64)
        order = np.argsort(((places - places.mean(axis=0)) ** 2).sum(axis=1), kind="stable")
        chosen = different_classes_first(rows[order], labels)[:num_images]
        members = labels[assignment == number]
        shown.append(ShownCluster(number, len(members), len(np.unique(members)), chosen.tolist()))
    return shown


def draw_clusters(shown: Sequence[ShownCluster], images: LabelledImages, path: Path, *, title: str) -> Path:
    """Draw a row of images for each cluster, under its size; their classes are above the images."""
    rows = []
    for cluster in shown:
        size = f"{counted(cluster.num_images, 'image')} of {counted(cluster.num_classes, 'class', 'classes')}"
        cells: list[ImageCell | None] = [
            ImageCell(row, images.class_names[images.labels[row]], colour=GREY) for row in cluster.rows
        ]
        rows.append(ImageRow(f"cluster {cluster.number}: {size}", [*cells, *[None] * (NUM_IMAGES - len(cells))]))
    return draw_image_rows(rows, images.pixels, path, title=title)


class KeptClusters(NamedTuple):
    """The clusters in a checkpoint, which is of the trial's last epoch.

    method: with the weights of that epoch, on the CPU. assignment: (N,) int64, the cluster of each training image in
    their order, below 0 for images in no cluster. space: images (B, 3, H, W) -> (B, F), the features that the method
    clusters; space_name: their name. is_auxiliary: whether they are an embedding beside the main one.
    """

    method: Method
    assignment: NDArray[np.int64]
    space: Callable[[Tensor], Tensor]
    space_name: str
    is_auxiliary: bool


def read_clusters(checkpoint_folder: Path, trial: Trial, train_labels: NDArray[np.int64]) -> KeptClusters | None:
    """Read the clusters in a checkpoint of Divide & Conquer or MIC; None for another method, or without clusters.

    train_labels: (N,) of the trial's training images.

    Raises CheckpointError for a damaged checkpoint, ValueError for another number of images than it was made from.
    """
    if trial.method.name not in ("divide_conquer", "mic"):
        return None
    state = checkpoint.load_state(checkpoint_folder)["method"]
    # All weights come from the checkpoint; compiling is not worth it for a few images.
    bare = trial.model_copy(update={"model": trial.model.model_copy(update={"weights": "none"}), "compile": False})
    method = parts.build_method(bare, train_labels, torch.device("cpu"))
    name = "clusters" if isinstance(method, DivideConquer) else "surrogate_labels"
    assignment = state[name].numpy().astype(np.int64)
    if len(assignment) != len(train_labels):
        raise ValueError(
            f"{checkpoint_folder} clusters {len(assignment)} training images, but there are {len(train_labels)}: some "
            "were skipped, or others are read now. Cure: the images the trial was trained on"
        )
    if not (assignment >= 0).any():
        return None
    method.load_state_dict(state)
    method.eval()
    if isinstance(method, MIC):
        head: nn.Module = method.auxiliary_head
        name = "the auxiliary embedding"
    else:
        head, name = nn.Identity(), "the backbone's features"

    def space(images: Tensor) -> Tensor:
        return nn.functional.normalize(head(method.network.trunk(images)).float(), dim=1)

    return KeptClusters(method, assignment, space, name, isinstance(method, MIC))
