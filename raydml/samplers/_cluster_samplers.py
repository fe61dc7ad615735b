"""Samplers for methods that cluster the training images; each epoch follows the clusters assigned last."""

from typing import Any

import numpy as np

from raydml.data.catalog import DataError
from raydml.samplers._class_index import (
    NUM_NUMBERS,
    ClassIndex,
    ShuffledClasses,
    classes_in_batch,
    distinct_numbers,
    full_batches,
    group_classes,
    in_rounds,
)
from raydml.samplers._epoch_plan import EpochPlan, Sampler, make_plan


class ClusterGroups(Sampler):
    """Groups of images of one cluster each, with the cluster as target: the auxiliary task of MIC.

    Release of Roth, Brattoli and Ommer (ICCV 2019). labels: (N,), only their number is used. As ClassGroups, over
    clusters: each group of another cluster than the two before, uniformly, images with replacement. With probability
    random_cluster_probability an image is taken from a cluster drawn among all, possibly the same, while its target
    remains the cluster of the group. The plan's targets are the numbers given to `assign`. An epoch has
    floor(N / batch_size) batches. The state is the clusters.

    Departures from the release: as those of ClassGroups. Raises DataError for fewer images than batch_size, for a
    batch_size that is no multiple of images_per_cluster, for planning before `assign`, and for fewer than 3 clusters.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: int = 112,
        images_per_cluster: int = 4,
        random_cluster_probability: float = 0.2,
    ) -> None:
        classes_in_batch(batch_size, images_per_cluster, exact=True, images_key="images_per_cluster")
        self._num_images = len(labels)
        self._clusters: np.ndarray | None = None
        self.batch_size = batch_size
        self.images_per_cluster = images_per_cluster
        self.random_cluster_probability = random_cluster_probability
        self.batches_per_epoch = full_batches(self._num_images, batch_size)

    def assign(self, clusters: np.ndarray) -> None:
        """Follow these clusters from the next epoch on: (N,) whole numbers, -1 for an image that is not to be used.

        Raises DataError for anything else, and for fewer than 3 clusters with images.
        """
        clusters = checked_clusters(clusters, self._num_images)
        index = ClassIndex(clusters, np.flatnonzero(clusters >= 0))
        if len(index) < 3:
            raise DataError(
                f"a group differs in cluster from the two before it, which takes 3 clusters with images, and there are "
                f"{len(index)}; choose more clusters"
            )
        self._clusters, self._index = clusters, index

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """Return the batches of the next epoch. Raises DataError before `assign`."""
        refuse_unassigned(self._clusters)
        shape = self.batches_per_epoch * self.batch_size // self.images_per_cluster, self.images_per_cluster
        groups = group_classes(generator.integers(NUM_NUMBERS, size=shape[0]), len(self._index))
        elsewhere = generator.random(shape) < self.random_cluster_probability
        anywhere = generator.integers(len(self._index), size=shape)
        numbers = generator.integers(NUM_NUMBERS, size=shape)
        images = group_images(self._index, groups, np.where(elsewhere, anywhere, -1), numbers)
        targets = np.repeat(self._index.labels_present[groups], self.images_per_cluster)
        per_batch = self.batches_per_epoch, self.batch_size
        return make_plan(list(images.reshape(per_batch)), self._num_images, targets=list(targets.reshape(per_batch)))

    def state_dict(self) -> dict[str, Any]:
        """Return the clusters as a list, None before `assign`."""
        return {"clusters": None if self._clusters is None else self._clusters.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state is not of as many images."""
        clusters = clusters_in_state(state)
        if clusters is None:
            self._clusters = None
        else:
            self.assign(np.array(clusters))


def group_images(index: ClassIndex, groups: np.ndarray, swapped: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the images of groups of clusters, (G, m) row numbers: each is number mod size of its cluster.

    groups: (G,) the cluster of each group. swapped: (G, m) the cluster that an image is taken from instead, or -1.
    numbers: (G, m) >= 0.
    """
    used = np.where(swapped >= 0, swapped, groups[:, None])
    return index.images(used.reshape(-1), numbers.reshape(-1, 1)).reshape(numbers.shape)


class ClusterRoundRobin(Sampler):
    """Batches of one cluster each, class-balanced within it, the clusters taking turns in fixed order.

    Release of Sanakoyeu, Tschernezki, Büchler and Ommer, "Divide and Conquer the Embedding Space for Metric Learning"
    (CVPR 2019). labels: (N,) whole numbers. A batch has P = batch_size / images_per_class classes of its
    cluster, uniform and different, or with replacement where the cluster has fewer than P. A class of a cluster is
    shown in shuffled order, images_per_class at a time, also across epochs; when fewer are left, it is shuffled anew
    and those are skipped. From a class with fewer images than that, images are drawn with replacement.

    An epoch is L rounds of one batch a cluster, L = floor(n / batch_size) of the cluster with the most images n: small
    clusters are oversampled. The learner of a batch is the number of its cluster. `assign` resets the state.

    Departures from the release: (a) A cluster of n <= batch_size images, which gives no batch there and ends the epoch
    or crashes, takes its turns like any other, and L is at least 1. Skipping it would leave its learner untrained and
    its images unseen until the next clustering, and leave nothing at all of a small data set; that it is oversampled
    is visible in num_duplicates. (b) A cluster with a single class is skipped: its batches have no negative pair. (c) A
    pass over a cluster (ceil(n / batch_size) - 1 batches) is not kept apart from the next: the release, too, continues
    with the same shuffles where a pass ends.

    num_resampled: after `assign`, how many clusters have fewer than P classes, so that these repeat within a batch.

    Raises DataError for a batch_size that is no multiple of images_per_class or of fewer than 2 classes, for planning
    before `assign`, and where no cluster has two classes.
    """

    num_resampled: int

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: int = 80,
        images_per_class: int = 4,
    ) -> None:
        self._per_batch = classes_in_batch(batch_size, images_per_class, exact=True)
        index = ClassIndex(labels)
        self._num_classes = len(index)
        self._classes = np.searchsorted(index.labels_present, labels)
        self._clusters: np.ndarray | None = None
        self.batch_size = batch_size
        self.images_per_class = images_per_class

    @property
    def batches_per_epoch(self) -> int:  # type: ignore[override]
        """L times the clusters that take part. Raises DataError before `assign`."""
        refuse_unassigned(self._clusters)
        return self._num_rounds * len(self._ids)

    def assign(self, clusters: np.ndarray) -> None:
        """Follow these clusters from the next epoch on: (N,) whole numbers, -1 for an image that is not to be used.

        Raises DataError for anything else, and where no cluster has two classes.
        """
        clusters = checked_clusters(clusters, len(self._classes))
        # A cell is the images of one class in one cluster; the cells of a cluster are neighbours.
        cells = ClassIndex(clusters * self._num_classes + self._classes, np.flatnonzero(clusters >= 0))
        cluster_of_cell = cells.labels_present // self._num_classes
        ids, first_cell, num_cells = np.unique(cluster_of_cell, return_index=True, return_counts=True)
        takes_part = num_cells >= 2
        refuse_one_class_each(ids, takes_part)
        sizes = np.add.reduceat(cells.counts, first_cell)
        self._num_rounds = num_rounds(sizes[takes_part], self.batch_size)
        self._ids, self._first_cell, self._num_cells = ids[takes_part], first_cell[takes_part], num_cells[takes_part]
        self._clusters, self._cells, self._shuffled = clusters, cells, ShuffledClasses(cells)
        self.num_resampled = int(np.count_nonzero(self._num_cells < self._per_batch))

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """Return the batches of the next epoch. Raises DataError before `assign`. Advances state and generator."""
        refuse_unassigned(self._clusters)
        turns = np.tile(np.arange(len(self._ids)), self._num_rounds)
        cells = self._draw_cells(turns, generator).reshape(-1)
        images = np.empty((len(cells), self.images_per_class), dtype=np.int64)
        small = self._cells.counts[cells] < self.images_per_class
        images[small] = self._cells.with_replacement(cells[small], self.images_per_class, generator)
        large = np.flatnonzero(~small)
        for places in in_rounds(cells[large], len(self._cells)):
            visited = cells[large[places]]
            left = self._cells.counts[visited] - self._shuffled.shown[visited]
            self._shuffled.shuffle_anew(visited[left < self.images_per_class], generator)
            images[large[places]] = self._shuffled.take(visited, self.images_per_class)
        batches = list(images.reshape(len(turns), self.batch_size))
        return make_plan(batches, len(self._classes), learners=self._ids[turns])

    def _draw_cells(self, turns: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw P cells of the cluster of each batch: turns (batches,) -> (batches, P)."""
        below = self._num_cells[turns]
        cells = np.empty((len(turns), self._per_batch), dtype=np.int64)
        enough = below >= self._per_batch
        sizes = np.full(np.count_nonzero(enough), self._per_batch)
        cells[enough] = distinct_numbers(below[enough], sizes, generator).reshape(-1, self._per_batch)
        few = below[~enough][:, None]
        cells[~enough] = generator.integers(few, size=(len(few), self._per_batch))
        return cells + self._first_cell[turns][:, None]

    def state_dict(self) -> dict[str, Any]:
        """Return plain lists of integers: the clusters, the shuffles within them and how far each was shown."""
        if self._clusters is None:
            return {"clusters": None}
        return {"clusters": self._clusters.tolist(), **self._shuffled.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state is not of the same labels."""
        clusters = clusters_in_state(state)
        if clusters is None:
            self._clusters = None
        else:
            self.assign(np.array(clusters))
            self._shuffled.load_state_dict(state)


def num_rounds(sizes: np.ndarray, batch_size: int) -> int:
    """Return in how many rounds of one batch a cluster the largest cluster is shown about once, at least 1."""
    return max(int(sizes.max()) // batch_size, 1)


def checked_clusters(clusters: np.ndarray, num_images: int) -> np.ndarray:
    """Return a copy as int64. Raises DataError for anything but one cluster number an image."""
    clusters = np.asarray(clusters)
    if clusters.shape != (num_images,) or clusters.dtype.kind not in "iu" or (clusters < -1).any():
        raise DataError(
            f"clusters of shape {clusters.shape} and type {clusters.dtype} are not one cluster for each of the "
            f"{num_images} images; give whole numbers from 0, and -1 for an image that is not to be used"
        )
    if (clusters < 0).all():
        raise DataError("clusters = -1 for every image leaves none to train on; give at least one a cluster")
    return clusters.astype(np.int64)


def refuse_unassigned(clusters: np.ndarray | None) -> None:
    """Raise DataError where `assign` was not called yet."""
    if clusters is None:
        raise DataError("there are no clusters yet to make batches of; call assign(clusters) before the first epoch")


def refuse_one_class_each(ids: np.ndarray, takes_part: np.ndarray) -> None:
    """Raise DataError where none of the clusters (K,) takes part, because none has a second class."""
    if not takes_part.any():
        raise DataError(
            f"none of the {len(ids)} clusters has images of two classes, so that no batch has a negative pair; "
            "choose fewer clusters"
        )


def clusters_in_state(state: dict[str, Any]) -> list[int] | None:
    """Return the clusters of a sampler's state; None before `assign`. Raises DataError for another sampler's state."""
    if "clusters" not in state:
        raise DataError(
            f"the sampler's state has {', '.join(state) or 'nothing'} and not clusters: it is another sampler's; "
            "resume with the sampler that it was saved with"
        )
    clusters: list[int] | None = state["clusters"]
    return clusters
