"""Samplers of published systems that draw classes, then images of each: one class here is one paper's rule."""

from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from raydml.data.catalog import DataError
from raydml.samplers._class_index import (
    NUM_NUMBERS,
    ClassIndex,
    ShuffledClasses,
    classes_in_batch,
    distinct_numbers,
    earlier_visits,
    full_batches,
    refuse_few_classes,
)
from raydml.samplers._epoch_plan import EpochPlan, counted, refuse_state


class BalancedWithReplacement:
    """Every batch: classes drawn anew, without replacement; images of each, with replacement however many there are.

    Release of Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning" (BMVC 2019): 75 images, 25 a
    class on CUB and Cars, 5 on SOP and In-Shop. labels: (N,) whole numbers. A batch has
    P = floor(batch_size / images_per_class) classes, laid out class by class, so that the attribute
    batch_size = P * images_per_class may be below the setting. An epoch has floor(N / the setting) batches. Neither
    classes nor images are sure to come in an epoch.

    Raises DataError for fewer classes than P, for P < 2, and for fewer images than batch_size.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Ge(2)] = 75,
        images_per_class: Annotated[int, Ge(1)] = 25,
    ) -> None:
        self._index = ClassIndex(labels)
        self._per_batch = classes_in_batch(batch_size, images_per_class, exact=False)
        refuse_few_classes(self._index, self._per_batch, images_per_class)
        self.images_per_class = images_per_class
        self.batch_size = self._per_batch * images_per_class
        self.batches_per_epoch = full_batches(self._index.num_images, batch_size)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        below = np.full(self.batches_per_epoch, len(self._index))
        classes = distinct_numbers(below, np.full(self.batches_per_epoch, self._per_batch), generator)
        images = self._index.with_replacement(classes, self.images_per_class, generator)
        return counted(list(images.reshape(self.batches_per_epoch, self.batch_size)), self._index.num_images)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_state(state, "balanced_with_replacement")


class RandomIdentity:
    """Every epoch each class once, in random order, with images_per_class of its images; batches are cut from that.

    From Wang's Deep_Metric code (its FastRandomIdentitySampler). labels: (N,) whole numbers. The images
    of a class are different where it has enough of them, else all are drawn with replacement. An epoch shows only
    images_per_class images of a class: CUB's 100 classes, 5 images each, are 6 batches of 80.
    drop_last: whether the last batch is left out, which is smaller than batch_size and may be of a single class.

    Departure from the release, which cuts anywhere: a batch_size that is no multiple of images_per_class is refused,
    for it would tear classes apart. Raises DataError for that, and for too few classes for one batch with drop_last.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Ge(2)] = 80,
        images_per_class: Annotated[int, Ge(1)] = 5,
        drop_last: bool = True,
    ) -> None:
        self._index = ClassIndex(labels)
        per_batch = classes_in_batch(batch_size, images_per_class, exact=True)
        if drop_last:
            refuse_few_classes(self._index, per_batch, images_per_class)
        else:
            refuse_few_classes(self._index, 2, images_per_class)
        num_full, rest = divmod(len(self._index), per_batch)
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.batches_per_epoch = num_full if drop_last else num_full + (rest > 0)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        classes = generator.permutation(len(self._index))
        images = self._index.distinct_if_enough(classes, self.images_per_class, generator).reshape(-1)
        starts = range(0, self.batches_per_epoch * self.batch_size, self.batch_size)
        return counted([images[start : start + self.batch_size] for start in starts], self._index.num_images)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_state(state, "random_identity")


class IdentityChunks:
    """The images of each class in chunks; a batch takes one chunk each of P classes that still have some.

    Release of Wang et al., "Multi-Similarity Loss with General Pair Weighting" (CVPR 2019), its RandomIdentitySampler.
    labels: (N,) whole numbers. Each class is shuffled and cut into chunks of images_per_class, the rest is left out; a
    class with fewer images is one chunk, all its images and some of them again. When fewer than
    P = floor(batch_size / images_per_class) classes have chunks left, all are shuffled and cut anew. That goes on
    across epochs, which are only so many batches: an epoch may begin in the middle. Large classes are left over at the
    end of each round, so part of them is not shown.
    batches_per_epoch None: ceil(N / batch size), about one pass. The attribute batch_size is P * images_per_class.

    Departure from the release, which has one endless epoch. Raises DataError for fewer classes than P and for P < 2.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Ge(2)] = 80,
        images_per_class: Annotated[int, Ge(1)] = 5,
        batches_per_epoch: Annotated[int, Ge(1)] | None = None,
    ) -> None:
        self._index = ClassIndex(labels)
        self._per_batch = classes_in_batch(batch_size, images_per_class, exact=False)
        refuse_few_classes(self._index, self._per_batch, images_per_class)
        self.images_per_class = images_per_class
        self.batch_size = self._per_batch * images_per_class
        about_one_pass = -(-self._index.num_images // self.batch_size)
        self.batches_per_epoch = _at_least_one(batches_per_epoch, default=about_one_pass)
        self._shuffled = ShuffledClasses(self._index)

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
        return counted(list(images), self._index.num_images)

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
            for place in reversed(range(self._per_batch)):  # so that the last, moved up, has had its turn
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

    def state_dict(self) -> dict[str, Any]:
        """Plain lists of integers: the shuffled images of every class and how far each was shown."""
        return self._shuffled.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises DataError if the state is not of the same labels."""
        self._shuffled.load_state_dict(state)


class RandomClasses:
    """Every batch: all classes in random order, up to images_per_class different images of each, until it is full.

    Release of Kim and Park, "Multi-level Distance Regularization for Deep Metric Learning" (AAAI 2021): 128 images, 4
    a class; 256 and 3 on SOP and In-Shop. labels: (N,) whole numbers. A class with fewer images gives all it has,
    and the last class of a batch only what fits: no image stands twice in a batch, and a batch has exactly batch_size.
    Batches are independent of each other, and their number is a setting: 100 in the release, whatever the data.

    Departure from the release, whose batches are smaller where all classes together do not fill one: DataError.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Ge(2)] = 128,
        images_per_class: Annotated[int, Ge(1)] = 4,
        batches_per_epoch: Annotated[int, Ge(1)] = 100,
    ) -> None:
        self._index = ClassIndex(labels)
        classes_in_batch(batch_size, images_per_class, exact=False)
        most = int(np.minimum(self._index.counts, images_per_class).sum())
        if most < batch_size:
            raise DataError(
                f"sampler.batch_size = {batch_size}, but {len(self._index)} training classes with up to "
                f"{images_per_class} images each give only {most}; give a batch_size of at most {most}, or more "
                "images_per_class"
            )
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.batches_per_epoch = _at_least_one(batches_per_epoch, default=100)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        # Every class gives at least one image: a batch never gets further than this many classes.
        num_walked = min(len(self._index), self.batch_size)
        classes = np.stack(
            [generator.choice(len(self._index), num_walked, replace=False) for _ in range(self.batches_per_epoch)]
        )
        sizes = np.minimum(self._index.counts[classes], self.images_per_class)
        room = self.batch_size - (np.cumsum(sizes, axis=1) - sizes)
        sizes = np.clip(room, 0, sizes)
        taken = sizes > 0
        classes, sizes = classes[taken], sizes[taken]
        numbers = distinct_numbers(self._index.counts[classes], sizes, generator)
        images = self._index.images(np.repeat(classes, sizes), numbers[:, None])
        return counted(list(images.reshape(self.batches_per_epoch, self.batch_size)), self._index.num_images)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_state(state, "random_classes")


def _at_least_one(batches_per_epoch: int | None, *, default: int) -> int:
    if batches_per_epoch is None:
        return default
    if batches_per_epoch < 1:
        raise DataError(f"sampler.batches_per_epoch = {batches_per_epoch} must be at least 1")
    return batches_per_epoch
