"""Groups of a class: Roth, Brattoli and Ommer, MIC: Mining Interclass Characteristics, ICCV 2019 (its main task)."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from raydml.data.catalog import DataError
from raydml.samplers._base import (
    NUM_NUMBERS,
    EpochPlan,
    Sampler,
    classes_in_batch,
    cut_groups,
    full_batches,
    group_classes,
    index_for_groups,
    make_plan,
)


class ClassGroups(Sampler):
    """Groups of images of a class, each of another class than the two groups before it; MIC's main task.

    labels: (N,) whole numbers. The class of a group is uniform among the others, images are uniform with replacement: a
    class may come again in the same batch, three groups later or more, and an image twice. Classes with one image share
    groups without replacement, see `index_for_groups`. An epoch has
    floor(N / batch_size) batches; neither classes nor images are sure to come in it. There is no
    state, as in the release, whose loading processes begin each epoch with a copy of the same state.

    Departures from MIC's release: one number of a shuffled list chose class and image there, which ties the first image
    of a group to its class; here each has its own. The two groups before are those of the plan, across batches; there,
    of the loading process. The second group differs from the first. images_per_class = 1, for which the release takes a
    plain shuffle, is not allowed: that is the sampler uniform.

    Raises DataError for fewer than 3 classes, fewer images than batch_size, and a batch_size that is no multiple of
    images_per_class.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Field(ge=2, description="images in a batch")] = 112,
        images_per_class: Annotated[int, Field(ge=2, description="images in a group")] = 4,
    ) -> None:
        classes_in_batch(batch_size, images_per_class, exact=True)
        self._index = index_for_groups(labels, images_per_class, 3)
        if len(self._index) < 3:
            raise DataError(
                f"sampler: groups differ in class from the two before them, which takes 3 classes, and there are "
                f"{len(self._index)} training classes; take the sampler class_balanced"
            )
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.batches_per_epoch = full_batches(self._index.num_images, batch_size)

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:
        return cut_groups(labels, settings, each_class_once=False, all_different=True)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        num_groups = self.batches_per_epoch * self.batch_size // self.images_per_class
        groups = group_classes(generator.integers(NUM_NUMBERS, size=num_groups), len(self._index))
        images = self._index.with_replacement(groups, self.images_per_class, generator)
        return make_plan(list(images.reshape(self.batches_per_epoch, self.batch_size)), self._index.num_images)
