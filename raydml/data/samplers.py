"""Which images form the batches of an epoch: a plan made in advance, so that it can be counted and repeated."""

from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge

from raydml.data.datasets import DataError


class EpochPlan(NamedTuple):
    """batches: int64 (batch size,) row numbers, one array a batch.

    coverage: share of all images shown at least once this epoch, 0..1. num_duplicates: how often an image had
    to stand in a batch again because its class has too few images, summed over the batches.
    """

    batches: list[np.ndarray]
    coverage: float
    num_duplicates: int


class ClassBalanced:
    """Batches of P distinct classes x K images each, laid out class by class; each class in every epoch.

    labels: (N,) integers. Classes come from random permutations of all C classes strung together, so in an
    epoch their numbers of visits differ by at most one. Images come from one such string for each class that goes on
    across epochs: a class with n >= K images shows every one of them once before any twice, and never one
    twice in a batch (its first ceil(n / K) visits show all). A class with n < K images fills up with repetitions: each
    visit shows all n, and the K - n repetitions are counted.
    batches_per_epoch None: max(ceil(N / (P * K)), ceil(C / P)): one pass over the images or the classes.

    Departures from the reference samplers, which draw classes independently for each batch (no class is sure to
    appear) and images with replacement, or skip the rest of a class when fewer than K remain.

    Raises DataError for fewer classes than P, and for fewer batches than show every class.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        classes_per_batch: Annotated[int, Ge(2)] = 8,
        images_per_class: Annotated[int, Ge(1)] = 4,
        batches_per_epoch: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        labels = np.asarray(labels)
        counts = np.unique(labels, return_counts=True)[1]
        if classes_per_batch < 2 or images_per_class < 1:
            raise DataError(
                f"sampler: classes_per_batch = {classes_per_batch} must be at least 2 and "
                f"images_per_class = {images_per_class} at least 1"
            )
        if len(counts) < classes_per_batch:
            raise DataError(
                f"sampler.classes_per_batch = {classes_per_batch}, but there are only {len(counts)} training "
                f"classes; give at most {len(counts)}"
            )
        self.classes_per_batch = classes_per_batch
        self.images_per_class = images_per_class
        self.batch_size = classes_per_batch * images_per_class
        fewest = -(-len(counts) // classes_per_batch)
        if batches_per_epoch is not None and batches_per_epoch < fewest:
            raise DataError(
                f"sampler.batches_per_epoch = {batches_per_epoch} cannot show all {len(counts)} classes, "
                f"{classes_per_batch} a batch; give at least {fewest}"
            )
        self.batches_per_epoch = batches_per_epoch or max(-(-len(labels) // self.batch_size), fewest)
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        # The string of images of class c: _order[start : start + count], shown up to _cursor; all shown = reshuffle.
        self._order = np.argsort(labels, kind="stable").astype(np.int64)
        self._cursor = counts.astype(np.int64)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch. Advances the cursors and the generator; same states, same plan."""
        classes = self._plan_classes(generator).reshape(-1)
        # A visit is a place of a class in a batch. The r-th visits of all classes are filled together: within
        # such a round each class occurs once, so it is one vectorised step.
        by_class = np.argsort(classes, kind="stable")
        visits = np.bincount(classes, minlength=len(self._counts))
        rounds = np.empty(len(classes), dtype=np.int64)
        rounds[by_class] = np.arange(len(classes)) - np.repeat(np.cumsum(visits) - visits, visits)
        by_round = np.argsort(rounds, kind="stable")
        images = np.empty((len(classes), self.images_per_class), dtype=np.int64)
        for places in np.split(by_round, np.cumsum(np.bincount(rounds))[:-1]):
            images[places] = self._visit(classes[places], generator)
        batches = list(images.reshape(self.batches_per_epoch, self.batch_size))
        missing = np.maximum(self.images_per_class - self._counts[classes], 0)
        return EpochPlan(batches, len(np.unique(images)) / len(self._order), int(missing.sum()))

    def _plan_classes(self, generator: np.random.Generator) -> np.ndarray:
        """(batches, P) class numbers: permutations strung together and cut; no class twice in a batch."""
        num_classes, per_batch = len(self._counts), self.classes_per_batch
        num_places = self.batches_per_epoch * per_batch
        num_rounds = -(-num_places // num_classes)
        string = generator.permuted(np.tile(np.arange(num_classes), (num_rounds, 1)), axis=1)
        for index in range(1, num_rounds):
            begun = index * num_classes % per_batch
            if begun:  # a batch holds the tail of one permutation and the head of the next: keep them distinct
                tail, current = string[index - 1, num_classes - begun :], string[index]
                fresh = np.flatnonzero(~np.isin(current, tail))[: per_batch - begun]
                string[index] = np.concatenate([current[fresh], np.delete(current, fresh)])
        return string.reshape(-1)[:num_places].reshape(-1, per_batch)

    def _visit(self, classes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The next K images of each of these distinct classes: (V,) -> row numbers (V, K)."""
        per_class = self.images_per_class
        counts, cursors = self._counts[classes], self._cursor[classes]
        steps = np.arange(per_class)
        ended = cursors + per_class > counts
        left = np.where(ended, counts - cursors, per_class)  # images that the old shuffle still gives
        last = np.minimum(cursors[:, None] + steps, counts[:, None] - 1)
        taken = self._order[self._starts[classes][:, None] + last]
        if ended.any():
            self._reshuffle(classes[ended], generator)
            head = (steps - left[:, None]) % counts[:, None]  # a small class goes round its images again
            renewed = self._order[self._starts[classes][:, None] + head]
            taken = np.where(steps < left[:, None], taken, renewed)
        # A class smaller than K starts anew at each visit: its cursor stays at the end.
        after = np.where(ended, per_class - left, cursors + per_class)
        self._cursor[classes] = np.where(counts < per_class, counts, after)
        return taken

    def _reshuffle(self, classes: np.ndarray, generator: np.random.Generator) -> None:
        """Shuffle the images of these classes; those not yet shown go last, as the visit under way shows them."""
        counts = self._counts[classes]
        owner = np.repeat(np.arange(len(classes)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = self._starts[classes][owner] + within
        keys = generator.random(len(rows)) + (within >= self._cursor[classes][owner])
        self._order[rows] = self._order[rows[np.lexsort((keys, owner))]]

    def state_dict(self) -> dict[str, Any]:
        """Plain lists of integers: the shuffled images of every class and how far each was shown."""
        return {"order": self._order.tolist(), "cursor": self._cursor.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state is not of the same labels."""
        order, cursor = (np.array(state[key], dtype=np.int64) for key in ("order", "cursor"))
        owner = np.repeat(np.arange(len(self._counts)), self._counts)
        if order.shape == self._order.shape and cursor.shape == self._cursor.shape:
            same_images = np.array_equal(
                order[np.lexsort((order, owner))], self._order[np.lexsort((self._order, owner))]
            )
        else:
            same_images = False
        if not same_images or (cursor < 0).any() or (cursor > self._counts).any():
            raise DataError(
                f"the sampler's state is of other images: {len(order)} images in {len(cursor)} classes, here "
                f"{len(self._order)} in {len(self._cursor)}; resume with the same data and the same split"
            )
        self._order, self._cursor = order, cursor


class Uniform:
    """Batches from one shuffle of all images an epoch; the last, incomplete batch is dropped.

    labels: (N,), only their number is used. No state of its own: the generator decides everything.
    Raises DataError for fewer images than a batch.
    """

    def __init__(self, labels: np.ndarray, *, batch_size: Annotated[int, Ge(2)] = 32) -> None:
        self.batch_size = batch_size
        self._num_images = len(labels)
        if not 2 <= batch_size <= self._num_images:
            raise DataError(f"sampler.batch_size = {batch_size} is not in 2..{self._num_images}, the training images")
        self.batches_per_epoch = self._num_images // batch_size

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch; no image occurs twice."""
        shown = generator.permutation(self._num_images)[: self.batches_per_epoch * self.batch_size]
        batches = list(shown.astype(np.int64).reshape(self.batches_per_epoch, self.batch_size))
        return EpochPlan(batches, len(shown) / self._num_images, 0)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise DataError(f"the uniform sampler has no state, got {', '.join(state)}: it belongs to another sampler")


SAMPLERS = {"class_balanced": ClassBalanced, "uniform": Uniform}
