"""Shuffled images without regard to their classes."""

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from raydml.samplers._base import EpochPlan, Sampler, full_batches, make_plan


class Uniform(Sampler):
    """Shuffled images without regard to their classes; the last, incomplete batch is dropped.

    labels: (N,), only their number is used. There is no state: the generator decides everything.
    Raises DataError for fewer images than a batch.
    """

    def __init__(
        self, labels: np.ndarray, *, batch_size: Annotated[int, Field(ge=2, description="images in a batch")] = 32
    ) -> None:
        self.batch_size = batch_size
        self._num_images = len(labels)
        self.batches_per_epoch = full_batches(self._num_images, batch_size)

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:
        return {**settings, "batch_size": min(settings["batch_size"], max(2, len(labels)))}

    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """The batches of the next epoch; no image occurs twice."""
        shown = generator.permutation(self._num_images)[: self.batches_per_epoch * self.batch_size]
        batches = list(shown.astype(np.int64).reshape(self.batches_per_epoch, self.batch_size))
        return make_plan(batches, self._num_images)
