"""Classes with replacement: Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from raydml.samplers._base import (
    EpochPlan,
    Sampler,
    classes_in_batch,
    cut_groups,
    distinct_numbers,
    full_batches,
    index_for_groups,
    make_plan,
    refuse_few_classes,
)


class BalancedWithReplacement(Sampler):
    """Few classes a batch, drawn without replacement, and images of each, drawn with replacement.

    The release takes 75 images, 25 a class on CUB and Cars, 5 on SOP and In-Shop. labels: (N,) whole numbers. A batch
    has P = floor(batch_size / images_per_class) classes, one after the other, so that the attribute
    batch_size = P * images_per_class may be below the setting. An epoch has floor(N / the setting) batches. An epoch
    may miss classes and images. Classes with one image share groups without replacement, see `index_for_groups`.

    Raises DataError for fewer classes than P, for P < 2, and for fewer images than batch_size.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Field(ge=2, description="images in a batch")] = 75,
        images_per_class: Annotated[int, Field(ge=1, description="images of a class in a batch")] = 25,
    ) -> None:
        self._per_batch = classes_in_batch(batch_size, images_per_class, exact=False)
        self._index = index_for_groups(labels, images_per_class, self._per_batch)
        refuse_few_classes(self._index, self._per_batch, images_per_class)
        self.images_per_class = images_per_class
        self.batch_size = self._per_batch * images_per_class
        self.batches_per_epoch = full_batches(self._index.num_images, batch_size)

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:
        return cut_groups(labels, settings, all_different=True)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        below = np.full(self.batches_per_epoch, len(self._index))
        classes = distinct_numbers(below, np.full(self.batches_per_epoch, self._per_batch), generator)
        images = self._index.with_replacement(classes, self.images_per_class, generator)
        return make_plan(list(images.reshape(self.batches_per_epoch, self.batch_size)), self._index.num_images)
