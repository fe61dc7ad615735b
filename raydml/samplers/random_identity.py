"""Each class once an epoch: the FastRandomIdentitySampler of the Deep_Metric code by Wang et al."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from raydml.samplers._base import (
    EpochPlan,
    Sampler,
    classes_in_batch,
    cut_groups,
    index_for_groups,
    make_plan,
    refuse_few_classes,
)


class RandomIdentity(Sampler):
    """Each class once an epoch, in random order, with a few of its images; batches are cut from that list.

    From Wang's Deep_Metric code (its FastRandomIdentitySampler). labels: (N,) whole numbers. The images
    of a class are different where it has enough of them, else all are drawn with replacement. Classes with one image
    share groups of images_per_class, see `index_for_groups`, and not all of them come in an epoch. An epoch shows only
    images_per_class images of a class: CUB's 100 classes, 5 images each, are 6 batches of 80.
    drop_last: whether the last batch is left out, which is smaller than batch_size and may be of a single class.

    Departure from the release, which cuts anywhere: a batch_size that is no multiple of images_per_class is refused,
    because it would split a class between two batches. Raises DataError for that, and for too few classes for one batch
    with drop_last.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Field(ge=2, description="images in a batch")] = 80,
        images_per_class: Annotated[int, Field(ge=1, description="images of a class in a batch")] = 5,
        drop_last: Annotated[bool, Field(description="leave out the last, smaller batch of an epoch")] = True,
    ) -> None:
        per_batch = classes_in_batch(batch_size, images_per_class, exact=True)
        self._index = index_for_groups(labels, images_per_class, per_batch)
        if drop_last:
            refuse_few_classes(self._index, per_batch, images_per_class)
        else:
            refuse_few_classes(self._index, 2, images_per_class)
        num_full, rest = divmod(len(self._index), per_batch)
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.batches_per_epoch = num_full if drop_last else num_full + (rest > 0)

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:
        return cut_groups(labels, settings, each_class_once=settings["drop_last"])

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        classes = generator.permutation(len(self._index))
        images = self._index.distinct_if_enough(classes, self.images_per_class, generator).reshape(-1)
        starts = range(0, self.batches_per_epoch * self.batch_size, self.batch_size)
        return make_plan([images[start : start + self.batch_size] for start in starts], self._index.num_images)
