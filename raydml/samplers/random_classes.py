"""All classes, shuffled: Kim and Park, Multi-level Distance Regularization, AAAI 2021 (its sampler)."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from raydml.data.catalog import DataError
from raydml.samplers._base import ClassIndex, EpochPlan, Sampler, classes_in_batch, distinct_numbers, make_plan


class RandomClasses(Sampler):
    """All classes in random order, up to K different images of each, until the batch is full.

    K is images_per_class. The release takes 128 images and K = 4; 256 and 3 on SOP and In-Shop. labels: (N,) whole
    numbers. A class with fewer images gives all it has, and the last class of a batch only what fits: no image is twice
    in a batch, and a batch has exactly batch_size images. Batches are independent of each other; the release has 100 an
    epoch.

    Departure from the release, whose batches are smaller where all classes together do not fill one: DataError.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Field(ge=2, description="images in a batch")] = 128,
        images_per_class: Annotated[int, Field(ge=1, description="most images of a class in a batch")] = 4,
        batches_per_epoch: Annotated[int, Field(ge=1, description="batches in an epoch, for any data set")] = 100,
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
        self.batches_per_epoch = batches_per_epoch

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:
        counts = np.unique(labels, return_counts=True)[1]
        batch_size, images_per_class = settings["batch_size"], settings["images_per_class"]
        while (fitting := min(batch_size, int(np.minimum(counts, images_per_class).sum()))) < 2 * images_per_class:
            images_per_class -= 1
            if not images_per_class:
                return settings  # for the constructor to refuse
        return {**settings, "batch_size": fitting, "images_per_class": images_per_class}

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        # Every class gives at least one image: a batch has at most this many classes.
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
        return make_plan(list(images.reshape(self.batches_per_epoch, self.batch_size)), self._index.num_images)
