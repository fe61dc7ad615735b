"""Classes x images: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017 (PK batches)."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from raydml.data.catalog import DataError
from raydml.samplers._base import (
    EpochPlan,
    Sampler,
    ShuffledClasses,
    in_rounds,
    in_words,
    index_for_groups,
    make_plan,
    most_groups,
)


class ClassBalanced(Sampler):
    """Batches of P distinct classes x K images each, class after class; each class in every epoch.

    labels: (N,) integers. Classes come from random permutations of all C classes, one after the other, so in an epoch
    their numbers of visits differ by at most one. The images of a class come from permutations in the same way, which
    continue across epochs: a class with n >= K images shows each of them once before any twice, and never one twice in
    a batch (its first ceil(n / K) visits show all). A class with n < K images is repeated: each visit shows all n, and
    the K - n repetitions count as duplicates. Classes with one image share groups of K, see `index_for_groups`.
    batches_per_epoch None: max(ceil(N / (P * K)), ceil(C / P)): one pass over the images or the classes.

    Departures from the reference samplers, which draw classes independently for each batch (no class is sure to
    appear) and images with replacement, or skip the rest of a class when fewer than K remain.

    Raises DataError for fewer classes than P, and for fewer batches than show every class.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        classes_per_batch: Annotated[int, Field(ge=2, description="P, classes in a batch")] = 8,
        images_per_class: Annotated[int, Field(ge=1, description="K, images of a class in a batch")] = 4,
        batches_per_epoch: Annotated[
            int | None, Field(ge=1, description="length of an epoch; null: to show every class and about every image")
        ] = None,
    ) -> None:
        index = index_for_groups(labels, images_per_class, classes_per_batch)
        counts = index.counts
        if len(counts) < classes_per_batch:
            raise DataError(
                f"sampler.classes_per_batch = {classes_per_batch}, but there are only {len(counts)} training "
                f"classes{in_words(index)}; give at most {len(counts)}"
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
        self._index = index
        self._shuffled: ShuffledClasses = ShuffledClasses(index)

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:
        # Not the images of a class: a class with fewer repeats them, each time in another crop.
        most = most_groups(labels, settings["images_per_class"])
        return {**settings, "classes_per_batch": min(settings["classes_per_batch"], max(2, most))}

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch. Advances the cursors and the generator; same states, same plan."""
        classes = self._plan_classes(generator).reshape(-1)
        images = np.empty((len(classes), self.images_per_class), dtype=np.int64)
        for places in in_rounds(classes, len(self._index)):
            images[places] = self._visit(classes[places], generator)
        batches = list(images.reshape(self.batches_per_epoch, self.batch_size))
        return make_plan(batches, self._index.num_images)

    def _plan_classes(self, generator: np.random.Generator) -> np.ndarray:
        """(batches, P) class numbers: permutations strung together and cut; no class twice in a batch."""
        num_classes, per_batch = len(self._index), self.classes_per_batch
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
        order, shown, first = self._shuffled.order, self._shuffled.shown, self._index.starts[classes]
        counts, before = self._index.counts[classes], shown[classes]
        steps = np.arange(per_class)
        ended = before + per_class > counts
        left = np.where(ended, counts - before, per_class)  # images that the old shuffle still gives
        last = np.minimum(before[:, None] + steps, counts[:, None] - 1)
        taken = order[first[:, None] + last]
        if ended.any():
            self._shuffled.shuffle(classes[ended], generator)  # images of this visit from the old shuffle come last
            head = (steps - left[:, None]) % counts[:, None]  # a small class begins its images again
            taken = np.where(steps < left[:, None], taken, order[first[:, None] + head])
        # A class smaller than K starts anew at each visit: it stays at the end.
        after = np.where(ended, per_class - left, before + per_class)
        shown[classes] = np.where(counts < per_class, counts, after)
        return taken
