"""Samplers for methods that cluster the training images; each epoch follows the clusters assigned last.

In groups of one cluster each, or in batches of one cluster each: class-balanced, or by the trial's own sampler.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from raydml.data.catalog import DataError
from raydml.samplers._base import (
    NUM_NUMBERS,
    ClassIndex,
    EpochPlan,
    Sampler,
    ShuffledClasses,
    classes_in_batch,
    distinct_numbers,
    full_batches,
    group_classes,
    in_rounds,
    make_plan,
)
from raydml.samplers.class_balanced import ClassBalanced


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
        self._clusters = None
        if (clusters := clusters_in_state(state)) is not None:
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

    def __init__(self, labels: np.ndarray, *, batch_size: int = 80, images_per_class: int = 4) -> None:
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
        self._clusters, self._cells = clusters, cells
        self._shuffled: ShuffledClasses = ShuffledClasses(cells)
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
        self._clusters = None
        if (clusters := clusters_in_state(state)) is not None:
            self.assign(np.array(clusters))
            self._shuffled.load_state_dict(state)


class PerCluster(Sampler):
    """Batches of one cluster each, the clusters taking turns in fixed order, each with a sampler of its own.

    labels: (N,) whole numbers. make_sampler: labels (n,) of the images of a cluster -> a sampler for them.
    An epoch is L rounds of one batch a cluster, L = floor(n / batch_size) of the cluster with the most images n, at
    least 1, as in the Divide & Conquer release (CVPR 2019): small clusters are oversampled. Each cluster begins the
    epoch with a new plan of its sampler and takes another when that is used up; the rest of the last one is not shown.
    So batches_per_epoch of the trial's sampler is the length of a cluster's plan, not of an epoch. The learner of a
    batch is the number of its cluster. `assign` resets the state.

    A cluster with too few images or classes for its sampler (DataError) follows the rule of ClusterRoundRobin, which
    repeats classes and images: with the images_per_class of the trial's sampler, 1 where it has none, and cut to its
    batch size. num_resampled: after `assign`, how many clusters those are. A cluster with a
    single class is skipped: its batches have no negative pair.

    Raises DataError where make_sampler refuses the images as a whole, for planning before `assign`, and where no
    cluster has two classes.
    """

    num_resampled: int

    def __init__(self, labels: np.ndarray, make_sampler: Callable[[np.ndarray], Sampler]) -> None:
        whole = make_sampler(labels)
        self._labels = np.asarray(labels)
        self._make_sampler = make_sampler
        self._images_per_class = whole.images_per_class if isinstance(whole, _OfClasses) else 1
        self._clusters: np.ndarray | None = None
        self._parts: list[_Part] = []
        self.batch_size = whole.batch_size

    @property
    def batches_per_epoch(self) -> int:  # type: ignore[override]
        """L times the clusters that take part. Raises DataError before `assign`."""
        refuse_unassigned(self._clusters)
        return self._num_rounds * len(self._parts)

    def assign(self, clusters: np.ndarray) -> None:
        """Follow these clusters from the next epoch on: (N,) whole numbers, -1 for an image that is not to be used.

        Raises DataError for anything else, and where no cluster has two classes.
        """
        clusters = checked_clusters(clusters, len(self._labels))
        ids = np.unique(clusters[clusters >= 0])
        with_negatives = clusters_of_two_classes(clusters, self._labels)
        refuse_one_class_each(ids, np.isin(ids, with_negatives))
        self._parts = [self._part(cluster, np.flatnonzero(clusters == cluster)) for cluster in with_negatives.tolist()]
        self._num_rounds = num_rounds(np.array([len(part.rows) for part in self._parts]), self.batch_size)
        self.num_resampled = sum(part.resampled for part in self._parts)
        self._clusters = clusters

    def _part(self, cluster: int, rows: np.ndarray) -> "_Part":
        labels = self._labels[rows]
        try:
            return _Part(cluster, rows, self._make_sampler(labels), resampled=False)
        except DataError:  # it accepts the images as a whole, so this cluster is too small for it
            per_class = self._images_per_class
            whole_classes = -(-self.batch_size // per_class) * per_class
            sampler = ClusterRoundRobin(labels, batch_size=whole_classes, images_per_class=per_class)
            sampler.assign(np.zeros(len(rows), dtype=np.int64))
            return _Part(cluster, rows, sampler, resampled=True)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """Return the batches of the next epoch. Raises DataError before `assign`. Advances state and generator."""
        refuse_unassigned(self._clusters)
        of_parts = [self._batches_of(part, generator) for part in self._parts]
        batches = [batch for of_round in zip(*of_parts, strict=True) for batch in of_round]
        ids = np.array([part.cluster for part in self._parts], dtype=np.int64)
        return make_plan(batches, len(self._labels), learners=np.tile(ids, self._num_rounds))

    def _batches_of(self, part: "_Part", generator: np.random.Generator) -> list[np.ndarray]:
        """Return L batches of row numbers of all images."""
        batches: list[np.ndarray] = []
        while len(batches) < self._num_rounds:
            batches += part.sampler.plan(generator).batches
        return [part.rows[batch[: self.batch_size]] for batch in batches[: self._num_rounds]]

    def state_dict(self) -> dict[str, Any]:
        """Return plain lists of integers: the clusters, and the state of each one's sampler."""
        if self._clusters is None:
            return {"clusters": None}
        return {"clusters": self._clusters.tolist(), "samplers": [part.sampler.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state is not of the same labels or of another sampler."""
        clusters = clusters_in_state(state)
        if clusters is None:
            self._clusters = None
            return
        self.assign(np.array(clusters))
        states = state.get("samplers", ())
        if len(states) != len(self._parts):
            raise DataError(
                f"the sampler's state has samplers for {len(states)} clusters, and {len(self._parts)} take part: it is "
                "another sampler's or of other images; resume with the sampler and the data that it was saved with"
            )
        for part, own in zip(self._parts, states, strict=True):
            part.sampler.load_state_dict(own)


def cluster_sampler(
    labels: np.ndarray, make_sampler: Callable[[np.ndarray], Sampler]
) -> ClusterRoundRobin | PerCluster:
    """Return the sampler that forms batches inside clusters for a trial with this sampler.

    For class_balanced it is the rule of the Divide & Conquer release with as many classes, and images of each, a batch.
    Raises DataError where make_sampler refuses the images as a whole.
    """
    whole = make_sampler(labels)
    if isinstance(whole, ClassBalanced):
        return ClusterRoundRobin(labels, batch_size=whole.batch_size, images_per_class=whole.images_per_class)
    return PerCluster(labels, make_sampler)


def clusters_of_two_classes(clusters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the numbers, ascending, of the clusters (N,) with images of at least two classes; -1 is no cluster."""
    used = clusters >= 0
    cells = np.unique(np.stack([clusters[used], labels[used]]), axis=1)
    ids, num_classes = np.unique(cells[0], return_counts=True)
    return ids[num_classes >= 2]


class _Part(NamedTuple):
    """A cluster that takes part: its number, its images (n,), its sampler, and whether that replaces the trial's."""

    cluster: int
    rows: np.ndarray
    sampler: Sampler
    resampled: bool


@runtime_checkable
class _OfClasses(Protocol):
    """A sampler with a fixed number of images of a class."""

    images_per_class: int


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
