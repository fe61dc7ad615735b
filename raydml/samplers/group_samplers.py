"""Batches of small groups one after the other, each of another class than the two before it: the rule of MIC.

Roth, Brattoli and Ommer, "MIC: mining interclass characteristics for improved metric learning" (ICCV 2019), whose
release applies it to classes (here) and to clusters (cluster_samplers.py).
"""

from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from raydml.data.catalog import DataError
from raydml.samplers._class_index import NUM_NUMBERS, ClassIndex, classes_in_batch, full_batches
from raydml.samplers._epoch_plan import EpochPlan, counted, refuse_state


def group_classes(numbers: np.ndarray, num_classes: int, before: int | None = None) -> np.ndarray:
    """The class of each group, chosen by the numbers (G,) >= 0: int64 (G,) in 0..num_classes-1.

    The first group has class numbers[0] mod num_classes. Every further one has candidates[number mod their count], the
    candidates being all classes, ascending, but those of the two groups before it. before: the class that stands in for
    the two groups before the second one, for the release begins with one drawn at random; None: the first group's own,
    so that the rule holds from the start. num_classes >= 3.
    """
    first = int(numbers[0]) % num_classes
    older = newer = first if before is None else before
    classes = [first]
    for number in numbers[1:].tolist():  # each depends on the two before it
        low, high = min(older, newer), max(older, newer)
        chosen = number % (num_classes - 1 - (low != high))
        chosen += chosen >= low
        chosen += low != high and chosen >= high
        classes.append(chosen)
        older, newer = newer, chosen
    return np.array(classes, dtype=np.int64)


class ClassGroups:
    """Groups of images_per_class images of a class that the two groups before did not have; MIC's main task.

    labels: (N,) whole numbers. The class of a group is uniform among the others, images are uniform with replacement: a
    class may come again in the same batch, three groups later or more, and an image twice. An epoch has
    floor(N / batch_size) batches; neither classes nor images are sure to come in it. Nothing is carried from epoch to
    epoch, as in the release, whose loading processes begin each epoch with a copy of the same state.

    Departures from MIC's release: one number of a shuffled list chose class and image there, which ties the first image
    of a group to its class; here each has its own. The two groups before are those of the plan, across batches; there,
    of the loading process. The second group differs from the first. images_per_class = 1, for which the release takes a
    plain shuffle, is refused in favour of the sampler uniform.

    Raises DataError for fewer than 3 classes, fewer images than batch_size, and a batch_size that is no multiple of
    images_per_class.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        batch_size: Annotated[int, Ge(2)] = 112,
        images_per_class: Annotated[int, Ge(2)] = 4,
    ) -> None:
        self._index = ClassIndex(labels)
        if images_per_class == 1:
            raise DataError(
                "sampler.images_per_class = 1 makes no groups; give at least 2, or take the sampler uniform"
            )
        classes_in_batch(batch_size, images_per_class, exact=True)
        if len(self._index) < 3:
            raise DataError(
                f"sampler: groups differ in class from the two before them, which takes 3 classes, and there are "
                f"{len(self._index)} training classes; take the sampler class_balanced"
            )
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.batches_per_epoch = full_batches(self._index.num_images, batch_size)

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch."""
        num_groups = self.batches_per_epoch * self.batch_size // self.images_per_class
        groups = group_classes(generator.integers(NUM_NUMBERS, size=num_groups), len(self._index))
        images = self._index.with_replacement(groups, self.images_per_class, generator)
        return counted(list(images.reshape(self.batches_per_epoch, self.batch_size)), self._index.num_images)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        refuse_state(state, "class_groups")
