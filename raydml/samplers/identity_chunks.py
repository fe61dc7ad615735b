"""Classes in chunks: Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019 (its sampler)."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from raydml.samplers._base import (
    NUM_NUMBERS,
    EpochPlan,
    Sampler,
    ShuffledClasses,
    classes_in_batch,
    cut_groups,
    earlier_visits,
    index_for_groups,
    make_plan,
    refuse_few_classes,
)


class IdentityChunks(Sampler):
    """The images of each class in chunks; a batch takes one chunk each of P classes that have chunks left.

    Called RandomIdentitySampler in the release. labels: (N,) whole numbers. Each class is shuffled and cut into chunks
    of images_per_class, the rest is left out; a class with fewer images is one chunk, all its images and some of them
    again; classes with one image share chunks, see `index_for_groups`. When fewer than
    P = floor(batch_size / images_per_class) classes have chunks left, all are shuffled and cut anew. This continues
    across epochs: an epoch may begin in the middle of a round. At the end of a round chunks of large classes are left,
    so part of their images is not shown.
    batches_per_epoch None: ceil(N / batch size), about one pass. The attribute batch_size is P * images_per_class.

    Departure from the release, which has one endless epoch. Raises DataError for fewer classes than P and for P < 2.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Field(ge=2, description="images in a batch")] = 80,
        images_per_class: Annotated[int, Field(ge=1, description="images of a class in a batch")] = 5,
        batches_per_epoch: Annotated[
            int | None, Field(ge=1, description="length of an epoch; null: about one pass over the images")
        ] = None,
    ) -> None:
        self._per_batch = classes_in_batch(batch_size, images_per_class, exact=False)
        self._index = index_for_groups(labels, images_per_class, self._per_batch)
        refuse_few_classes(self._index, self._per_batch, images_per_class)
        self.images_per_class = images_per_class
        self.batch_size = self._per_batch * images_per_class
        about_one_pass = -(-self._index.num_images // self.batch_size)
        self.batches_per_epoch = batches_per_epoch or about_one_pass
        self._shuffled: ShuffledClasses = ShuffledClasses(self._index)

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:
        return cut_groups(labels, settings)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch. Advances the chunks and the generator; same states, same plan."""
        parts: list[np.ndarray] = []
        num_missing = self.batches_per_epoch
        while num_missing:
            left = self._num_chunks_left()
            if np.count_nonzero(left) < self._per_batch:
                self._shuffled.shuffle_anew(np.arange(len(self._index)), generator)
                left = self._num_chunks_left()
            classes = self._draw_classes(left, num_missing, generator)
            parts.append(self._chunks(classes, generator))
            num_missing -= len(classes) // self._per_batch
        images = np.concatenate(parts).reshape(self.batches_per_epoch, self.batch_size)
        return make_plan(list(images), self._index.num_images)

    def _num_chunks_left(self) -> np.ndarray:
        """(C,); a class smaller than a chunk is one until any of it was shown."""
        counts, shown = self._index.counts, self._shuffled.shown
        return np.where(counts < self.images_per_class, shown == 0, (counts - shown) // self.images_per_class)

    def _draw_classes(self, left: np.ndarray, num_batches: int, generator: np.random.Generator) -> np.ndarray:
        """Classes of up to num_batches batches, (batches * P,), until the chunks left (C,) run short."""
        num_left = left.tolist()
        available = np.flatnonzero(left).tolist()
        drawn: list[int] = []
        num_batches = min(num_batches, sum(num_left) // self._per_batch)  # for more there are no chunks
        for numbers in generator.integers(NUM_NUMBERS, size=(num_batches, self._per_batch)):
            if len(available) < self._per_batch:
                break
            for place, number in enumerate(numbers.tolist()):  # the first P of a shuffle
                other = place + number % (len(available) - place)
                available[place], available[other] = available[other], available[place]
            drawn += available[: self._per_batch]
            # Backwards, so that the last class, which moves into a free place, has been counted already.
            for place in reversed(range(self._per_batch)):
                num_left[available[place]] -= 1
                if not num_left[available[place]]:
                    available[place] = available[-1]
                    available.pop()
        return np.array(drawn, dtype=np.int64)

    def _chunks(self, classes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The next chunks of these classes, which may occur more than once: (V,) -> row numbers (V, images)."""
        counts, steps = self._index.counts[classes][:, None], np.arange(self.images_per_class)
        chunk = earlier_visits(classes, len(self._index))[:, None]
        numbers = self._shuffled.shown[classes][:, None] + chunk * self.images_per_class + steps
        # A class smaller than a chunk shows all its images, then draws among them.
        missing = steps >= counts
        numbers[missing] = generator.integers(np.broadcast_to(counts, missing.shape)[missing])
        shown = self._shuffled.shown + self.images_per_class * np.bincount(classes, minlength=len(self._index))
        self._shuffled.shown = np.minimum(shown, self._index.counts)
        return self._shuffled.order[self._index.starts[classes][:, None] + numbers]
