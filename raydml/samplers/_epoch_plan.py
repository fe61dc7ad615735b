"""The batches of one epoch, planned in advance so that they can be counted, saved and repeated; and samplers."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raydml.data.catalog import DataError

_KEYS = ("images", "batch_sizes", "coverage", "num_duplicates", "learners", "targets", "flip")


class EpochPlan(NamedTuple):
    """batches: int64 (batch size,) row numbers of the N training images, one array a batch.

    coverage: share of all N images shown at least once this epoch, 0..1. num_duplicates: places in a batch whose image
    is already earlier in the same batch, summed over the batches. learners: int64 (batches,), which learner of the
    method each batch is for, or None. targets: int64 (batch size,) one array a batch, the labels to train with where
    they are not those of the images, or None. flip: bool (batches,), whether the images of a batch may be mirrored
    where the trial's augmentation does so, or None: all may.
    """

    batches: list[np.ndarray]
    coverage: float
    num_duplicates: int
    learners: np.ndarray | None = None
    targets: list[np.ndarray] | None = None
    flip: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for `from_dict`: numbers, None and flat arrays; `learners` and `flip` are not copied.

        All batches are one array, and so are all targets: a checkpoint then holds seven entries and not thousands.
        """
        return {
            "images": _joined(self.batches),
            "batch_sizes": np.array([len(batch) for batch in self.batches], dtype=np.int64),
            "coverage": self.coverage,
            "num_duplicates": self.num_duplicates,
            "learners": self.learners,
            "targets": None if self.targets is None else _joined(self.targets),
            "flip": self.flip,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "EpochPlan":
        """Return the plan of `to_dict`, whose arrays may have become torch tensors on the CPU or lists.

        Raises DataError where entries are missing or do not fit together.
        """
        missing = [key for key in _KEYS if key not in state]
        if missing:
            raise DataError(f"the saved epoch plan lacks {', '.join(missing)}; give what EpochPlan.to_dict returned")
        images, sizes = _integers(state["images"]), _integers(state["batch_sizes"])
        learners = None if state["learners"] is None else _integers(state["learners"])
        targets = None if state["targets"] is None else _integers(state["targets"])
        flip = None if state["flip"] is None else _integers(state["flip"]).astype(bool)
        fits = (sizes > 0).all() and sizes.sum() == len(images)
        fits = fits and all(each is None or len(each) == len(sizes) for each in (learners, flip))
        fits = fits and (targets is None or len(targets) == len(images))
        if not fits:
            raise DataError(
                f"the saved epoch plan is damaged: {len(sizes)} batches of {sizes.sum()} images, but {len(images)} "
                f"images, {_number_of(learners)} learners, {_number_of(targets)} targets and {_number_of(flip)} flips; "
                "start the epoch anew"
            )
        ends = np.cumsum(sizes)[:-1]
        return cls(
            np.split(images, ends),
            float(state["coverage"]),
            int(state["num_duplicates"]),
            learners,
            None if targets is None else np.split(targets, ends),
            flip,
        )


class Sampler(abc.ABC):
    """Plans the batches of every epoch; built from the labels (N,) of the training images and its settings.

    All randomness comes from the generator given to `plan`: the same state and the same generator give the same plan.

    batch_size: images in a batch; the last batch of an epoch is smaller only where the sampler documents it.
    batches_per_epoch: the length of every plan.
    """

    batch_size: int
    batches_per_epoch: int

    @abc.abstractmethod
    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """Return the batches of the next epoch. Advances the state and the generator."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epoch depends on besides the generator, as plain lists of integers; {} for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. Raises DataError for a state of other images or of another sampler."""
        if state:
            raise DataError(
                f"{type(self).__name__} has no state, got {', '.join(state)}: the state is of another sampler; resume "
                "with the sampler that it was saved with"
            )


def make_plan(
    batches: Sequence[np.ndarray],
    num_images: int,
    *,
    learners: np.ndarray | None = None,
    targets: Sequence[np.ndarray] | None = None,
    flip: np.ndarray | None = None,
) -> EpochPlan:
    """Return the plan of these batches, row numbers below num_images, with its coverage and number of duplicates."""
    images = _joined(batches)
    shown = np.zeros(num_images, dtype=bool)
    shown[images] = True
    batch = np.repeat(np.arange(len(batches)), [len(rows) for rows in batches])
    # An image twice in a batch is the same number twice; sorted, the two are neighbours.
    places = np.sort(batch * num_images + images)
    num_duplicates = np.count_nonzero(places[1:] == places[:-1])
    return EpochPlan(
        list(batches),
        float(np.count_nonzero(shown) / num_images),
        int(num_duplicates),
        learners,
        None if targets is None else list(targets),
        flip,
    )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)


def _number_of(values: np.ndarray | None) -> int | str:
    return "no" if values is None else len(values)


def _integers(values: Any) -> np.ndarray:
    """Return a copy, so that training from a plan cannot change the checkpoint that it was read from."""
    return np.asarray(values).astype(np.int64)
