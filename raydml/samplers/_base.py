"""The plan of an epoch, the base of all samplers, and draws among the images of every class."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from raydml.data.catalog import DataError, log_notes

# Where the number of choices changes with every draw, random numbers below this are taken modulo that number. It is so
# large that the smaller remainders are too frequent by less than one part in 10^12.
NUM_NUMBERS = 1 << 62


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
    _shuffled: "ShuffledClasses | None" = None  # of a sampler that continues its shuffles from epoch to epoch

    @classmethod
    def cut_to(cls, labels: np.ndarray, **settings: Any) -> dict[str, Any]:  # noqa: ARG003
        """Return the settings with those that are upper limits cut to what images with these labels (N,) allow.

        Such as the classes in a batch, where there are fewer training classes. Settings that the constructor accepts
        are not changed.
        """
        return settings

    @abc.abstractmethod
    def plan(self, generator: np.random.Generator) -> EpochPlan:
        """Return the batches of the next epoch. Advances the state and the generator."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epoch depends on besides the generator, as plain lists of integers; {} for nothing."""
        return {} if self._shuffled is None else self._shuffled.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. Raises DataError for a state of other images or of another sampler."""
        if self._shuffled is not None:
            self._shuffled.load_state_dict(state)
        elif state:
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


class ClassIndex:
    """The images of C classes, one class after the other; classes are numbered 0..C-1 in the order of their labels.

    labels: (N,) whole numbers, not necessarily consecutive. rows: the images to use, ascending; all by default.
    labels_present: (C,) the label of each class. counts: (C,) images of each. order: int64 row numbers by class, in
    ascending order within it; class c has order[starts[c] : starts[c] + counts[c]]. num_images: N, rows or not.
    num_shared: the last so many classes are groups of classes with one image, see `index_for_groups`.
    Raises DataError for labels that are not one whole number an image, and where there is no image.
    """

    def __init__(self, labels: np.ndarray, rows: np.ndarray | None = None, *, num_shared: int = 0) -> None:
        labels = np.asarray(labels)
        self.num_shared = num_shared
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"sampler: labels of shape {labels.shape} and type {labels.dtype} are no labels; give one whole "
                "number an image, (N,)"
            )
        chosen = labels if rows is None else labels[rows]
        if not len(chosen):
            raise DataError("sampler: there is no training image; give at least one batch of them")
        self.num_images = len(labels)
        self.labels_present, classes, self.counts = np.unique(chosen, return_inverse=True, return_counts=True)
        self.starts = np.cumsum(self.counts) - self.counts
        by_class = np.argsort(classes, kind="stable").astype(np.int64)
        self.order = by_class if rows is None else rows[by_class]

    def __len__(self) -> int:
        """C, the number of classes."""
        return len(self.counts)

    def images(self, classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return images of classes by number, modulo class size: (V,) and (V, m) >= 0 -> row numbers (V, m)."""
        return self.order[self.starts[classes][:, None] + numbers % self.counts[classes][:, None]]

    def with_replacement(self, classes: np.ndarray, num_images: int, generator: np.random.Generator) -> np.ndarray:
        """Draw independently from each class: classes (V,) -> row numbers (V, num_images).

        Without replacement from groups of classes with one image: a positive pair there would be an image with itself.
        """
        counts = self.counts[classes][:, None]
        images = self.images(classes, generator.integers(counts, size=(len(classes), num_images)))
        if self.num_shared:
            is_shared = classes >= len(self) - self.num_shared
            shared = classes[is_shared]
            numbers = distinct_numbers(self.counts[shared], np.full(len(shared), num_images), generator)
            images[is_shared] = self.images(shared, numbers.reshape(-1, num_images))
        return images

    def distinct_if_enough(self, classes: np.ndarray, num_images: int, generator: np.random.Generator) -> np.ndarray:
        """Draw different images from a class of at least num_images, with replacement from a smaller one.

        classes (V,) -> row numbers (V, num_images).
        """
        images = np.empty((len(classes), num_images), dtype=np.int64)
        enough = self.counts[classes] >= num_images
        counts = self.counts[classes[enough]]
        numbers = distinct_numbers(counts, np.full(len(counts), num_images), generator)
        images[enough] = self.images(classes[enough], numbers.reshape(-1, num_images))
        images[~enough] = self.with_replacement(classes[~enough], num_images, generator)
        return images


def index_for_groups(labels: np.ndarray, images_per_class: int, num_needed: int) -> ClassIndex:
    """Return the index for batches of groups of images_per_class images of a class each, of which a batch needs some.

    labels: (N,) whole numbers. num_needed: groups of different classes in a batch. A class with one image would be
    repeated in its group, and its positive pairs would be that image with itself, which any network solves. Such
    classes share groups instead, as if several were one class: each image then has one place in a batch, and is a
    negative of all others. There are as many shared groups as other classes at most, so that half the groups have
    positive pairs, or what a batch needs beside these classes. Fewer such images than one group has are left out.

    Where every class has one image, or a group has one, nothing is shared: an image is then the only positive of
    itself, in another crop. Data without such classes has the plain index.
    """
    index = ClassIndex(labels)
    num_lone = int((index.counts == 1).sum())
    num_others = len(index) - num_lone
    if not num_lone or not num_others or images_per_class == 1:
        return index
    labels = np.asarray(labels)
    is_lone = np.isin(labels, index.labels_present[index.counts == 1])
    if num_lone < images_per_class:
        log_notes(
            [
                f"{num_lone} of {len(index):,} training classes have one image, too few for a group of "
                f"{images_per_class} in a batch: they are left out of the batches"
            ]
        )
        return ClassIndex(labels, np.flatnonzero(~is_lone))
    num_shared = min(num_lone // images_per_class, max(num_others, num_needed - num_others))
    alone = np.flatnonzero(is_lone)
    alone = alone[np.argsort(labels[alone], kind="stable")]
    shared = labels.astype(np.int64)
    shared[alone] = labels.max() + 1 + np.arange(num_lone) * num_shared // num_lone
    return ClassIndex(shared, num_shared=num_shared)


def most_groups(labels: np.ndarray, images_per_class: int) -> int:
    """Return how many groups of different classes a batch has at most, see `index_for_groups`."""
    counts = np.unique(labels, return_counts=True)[1]
    num_lone = int((counts == 1).sum())
    if num_lone == len(counts) or images_per_class == 1:
        return len(counts)
    return len(counts) - num_lone + num_lone // images_per_class


class ShuffledClasses:
    """The images of every class in a random order, and how many of them were shown: a sampler's state.

    order: as ClassIndex.order, shuffled within each class. shown: (C,) int64, 0..counts. At first all are shown, so
    that the first visit of a class shuffles it.
    """

    def __init__(self, index: ClassIndex) -> None:
        self._index = index
        self.order = index.order.copy()
        self.shown = index.counts.astype(np.int64)

    def take(self, classes: np.ndarray, num_images: int) -> np.ndarray:
        """Return the next images of different classes (V,) with enough images left: row numbers (V, num_images)."""
        first = self._index.starts[classes] + self.shown[classes]
        self.shown[classes] += num_images
        return self.order[first[:, None] + np.arange(num_images)]

    def shuffle(self, classes: np.ndarray, generator: np.random.Generator) -> None:
        """Shuffle the images of different classes; images not yet shown come after those that were.

        `shown` does not change.
        """
        counts = self._index.counts[classes]
        owner = np.repeat(np.arange(len(classes)), counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = self._index.starts[classes][owner] + within
        keys = generator.random(len(rows)) + (within >= self.shown[classes][owner])
        self.order[rows] = self.order[rows[np.lexsort((keys, owner))]]

    def shuffle_anew(self, classes: np.ndarray, generator: np.random.Generator) -> None:
        """Shuffle all images of different classes and start at the first; images that were left are skipped."""
        self.shown[classes] = self._index.counts[classes]
        self.shuffle(classes, generator)
        self.shown[classes] = 0

    def state_dict(self) -> dict[str, Any]:
        """Return plain lists of integers: the shuffled images of every class and how many of each were shown."""
        return {"order": self.order.tolist(), "cursor": self.shown.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError if the state is not of the same images and classes."""
        index = self._index
        if not {"order", "cursor"} <= set(state):
            raise DataError(
                f"the sampler's state has {', '.join(state) or 'nothing'} and not order and cursor: it is another "
                "sampler's; resume with the sampler that it was saved with"
            )
        order, shown = (np.array(state[key], dtype=np.int64) for key in ("order", "cursor"))
        owner = np.repeat(np.arange(len(index)), index.counts)
        same = order.shape == self.order.shape and shown.shape == self.shown.shape
        if same:
            # `index.order` is ascending within each class, and so is any shuffle of it once it is sorted by class.
            same = np.array_equal(order[np.lexsort((order, owner))], index.order)
        if not same or (shown < 0).any() or (shown > index.counts).any():
            raise DataError(
                f"the sampler's state is of other images: {len(order)} images in {len(shown)} classes, here "
                f"{len(self.order)} in {len(self.shown)}; resume with the same data and the same split"
            )
        self.order, self.shown = order, shown


def distinct_numbers(below: np.ndarray, sizes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw, for each of V rows, `sizes` different numbers in 0..below-1, every set of them equally likely.

    below, sizes: (V,) with sizes <= below. Returns the rows one after the other, int64 (sizes.sum(),); the order within
    a row is not random. Robert Floyd's sampling ("Programming pearls: a sample of brilliance", CACM 30(9), 1987), all
    rows at once: no memory for numbers that are not drawn, and time in proportion to V * max(sizes)^2.
    """
    width = int(sizes.max(initial=0))
    picks = np.full((len(below), width), -1, dtype=np.int64)
    for step in range(width):
        # A complete row is drawn for, too; the extra numbers are dropped at the end.
        highest = below - sizes + step
        number = generator.integers(highest, endpoint=True)
        again = (picks[:, :step] == number[:, None]).any(axis=1)
        picks[:, step] = np.where(again, highest, number)
    return picks[np.arange(width) < sizes[:, None]]


def earlier_visits(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how often the class of each place occurs in earlier places: (V,) below num_classes -> (V,) int64."""
    visits = np.bincount(classes, minlength=num_classes)
    earlier = np.empty(len(classes), dtype=np.int64)
    by_class = np.argsort(classes, kind="stable")
    earlier[by_class] = np.arange(len(classes)) - np.repeat(np.cumsum(visits) - visits, visits)
    return earlier


def in_rounds(classes: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the places 0..V-1 in groups: group r holds the r-th visits of all classes, each class once.

    The visits of a class, which depend on one another, are thus computed for all classes at once.
    """
    rounds = earlier_visits(classes, num_classes)
    return np.split(np.argsort(rounds, kind="stable"), np.cumsum(np.bincount(rounds))[:-1])


def classes_in_batch(
    batch_size: int, images_per_class: int, *, exact: bool, images_key: str = "images_per_class"
) -> int:
    """Return how many classes a batch of this size holds, at least two.

    exact: whether batch_size must be a multiple. Raises DataError, naming batch_size and images_key.
    """
    if batch_size < 2 * images_per_class:
        raise DataError(
            f"sampler.batch_size = {batch_size} holds fewer than two groups of sampler.{images_key} = "
            f"{images_per_class}; give a batch_size of at least {2 * images_per_class}"
        )
    fitting, rest = divmod(batch_size, images_per_class)
    if exact and rest:
        below = fitting * images_per_class
        raise DataError(
            f"sampler.batch_size = {batch_size} is no multiple of sampler.{images_key} = {images_per_class}; "
            f"give a batch_size of {below} or {below + images_per_class}"
        )
    return fitting


def refuse_few_classes(index: ClassIndex, num_needed: int, images_per_class: int) -> None:
    """Raise DataError where a batch needs more classes than there are."""
    if len(index) < num_needed:
        most = len(index) * images_per_class
        cure = f"give a batch_size of at most {most}, or more images_per_class"
        if len(index) < 2:
            cure = "give training data of at least two classes"
        raise DataError(
            f"sampler.batch_size = {num_needed * images_per_class} of {images_per_class} images a class needs "
            f"{num_needed} classes a batch, but there are only {len(index)} training classes{in_words(index)}; {cure}"
        )


def in_words(index: ClassIndex) -> str:
    """Return how classes with one image are counted, for a message; nothing where they are not shared."""
    return f", those with one image taken as {index.num_shared}" if index.num_shared else ""


def cut_groups(
    labels: np.ndarray, settings: Mapping[str, Any], *, each_class_once: bool = True, all_different: bool = False
) -> dict[str, Any]:
    """Return settings with batch_size and images_per_class cut to what images with these labels (N,) allow.

    each_class_once: a batch has at most one group of a class. all_different: a batch has at most N images. A batch has
    at least two groups.
    """
    counts = np.unique(labels, return_counts=True)[1]
    batch_size, per_class = settings["batch_size"], settings["images_per_class"]
    fewer_images = min(per_class, max(1, int(counts.sum()) // 2)) if all_different else per_class
    limits = [batch_size // per_class]
    limits += [most_groups(labels, fewer_images)] if each_class_once else []
    limits += [int(counts.sum()) // fewer_images] if all_different else []
    num_groups = max(2, min(limits))
    too_large = all_different and batch_size > counts.sum()
    if fewer_images == per_class and num_groups == limits[0] and not too_large:
        return dict(settings)
    return {**settings, "batch_size": num_groups * fewer_images, "images_per_class": fewer_images}


def full_batches(num_images: int, batch_size: int) -> int:
    """Return the number of full batches of the images. Raises DataError where there is none."""
    if num_images < batch_size:
        raise DataError(
            f"sampler.batch_size = {batch_size}, but there are only {num_images} training images; "
            f"give at most {num_images}"
        )
    return num_images // batch_size


def group_classes(numbers: np.ndarray, num_classes: int, before: int | None = None) -> np.ndarray:
    """Return the class of each group, chosen by the numbers (G,) >= 0: int64 (G,) in 0..num_classes-1.

    The first group has class numbers[0] mod num_classes. Every further one has candidates[number mod their count], the
    candidates being all classes, ascending, but those of the two groups before it. before: the class used for
    the two groups before the second one (the release begins with one drawn at random); None: the first group's own, so
    that the rule holds from the start. num_classes >= 3.
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
