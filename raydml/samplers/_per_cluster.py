"""Batches of one cluster each, which the trial's own sampler forms inside every cluster."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from raydml.data.catalog import DataError
from raydml.samplers._cluster_samplers import (
    ClusterRoundRobin,
    checked_clusters,
    clusters_in_state,
    num_rounds,
    refuse_one_class_each,
    refuse_unassigned,
)
from raydml.samplers._epoch_plan import EpochPlan, Sampler, make_plan
from raydml.samplers.class_balanced import ClassBalanced


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
