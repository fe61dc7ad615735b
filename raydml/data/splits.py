"""The division of the classes of a data set into train, val and test; the images of a class stay together."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from raydml.data.catalog import ROLES, Catalog, DataError, listed
from raydml.ops.wording import counted

FEWEST_CLASSES = 6  # two in each part


@dataclass(frozen=True)
class Split:
    """Class ids of the three parts, each ascending; no class is in two of them."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    def to_dict(self) -> dict[str, list[int]]:
        return {"train": list(self.train), "val": list(self.val), "test": list(self.test)}


def make_split(
    catalog: Catalog,
    *,
    test_fraction: float,
    val_fraction: float,
    num_folds: int,
    fold: int | None,
    order: Literal["sorted", "shuffled"],
    seed: int,
) -> Split:
    """Divide the classes into train, val and test.

    The classes are put in order: "sorted" by name, or "shuffled" by the SHA-256 of seed and name, which no
    library version or platform can change. The last ceil(test_fraction * C) classes are test and the rest
    development. fold None: the last ceil(val_fraction * D) of the D development classes are val. With few classes a
    part has one class more or less, so that each has two: 6 classes at 0.5 and 0.25 are 2 train, 2 val and 2 test.
    val_fraction 0: all development classes are train, and val is empty; the test classes are those of any other
    val_fraction. With test_fraction 0 as well, test is empty and every class is train.
    fold i: val is the i-th of num_folds contiguous, nearly equal partitions of the development classes, train the
    others.
    A split given by the catalog (a benchmark's, or one in an image list) decides instead: test as given, unless
    test_fraction is 0; fold None: val as given (made from the development classes if none is given), or empty with
    val_fraction 0; fold i: partitions of the given train and val classes together. The folds are those of Musgrave,
    Belongie and Lim, "A Metric Learning Reality Check" (2020), section 3: with order "sorted" and 4 folds, each quarter
    of the training classes is val once.

    Classes with one image are accepted; as queries they have nothing to find.

    Raises DataError: a class shared by two given parts; a part with fewer than two classes (retrieval needs two), other
    than those that are empty by a fraction of 0; a val or test part in which no query has an image to find.
    """
    if catalog.given_split is None and len(catalog.class_names) < FEWEST_CLASSES and test_fraction:
        where = "" if catalog.root is None else f"machine.data_root = {str(catalog.root)!r}: "
        raise DataError(
            f"{where}{catalog.description or counted(len(catalog.class_names), 'class', 'classes')}; a study needs "
            f"{FEWEST_CLASSES} classes, two each to train, to validate and for the sealed test. Found: "
            f"{listed(catalog.class_names)}. Cure: add classes, or name the folder that holds all of them (--data-root)"
        )
    ordered = list(range(len(catalog.class_names)))  # class ids are in the order of the sorted names
    if order == "shuffled":
        ordered.sort(key=lambda c: hashlib.sha256(f"{seed}/{catalog.class_names[c]}".encode()).digest())
    if catalog.given_split is not None:
        part_of = _given_parts(catalog)
        test = [c for c in ordered if part_of[c] == "test"]
        given_val = [c for c in ordered if part_of[c] == "val"]
    else:
        test = ordered[len(ordered) - _num_test(len(ordered), test_fraction) :]
        given_val = []
    if not test_fraction:
        test = []
    development: list[int] = np.setdiff1d(ordered, test, assume_unique=True).tolist()  # in their order
    val: list[int] = []
    if fold is not None:
        val = np.array_split(np.array(development, dtype=np.int64), num_folds)[fold].tolist()
    elif val_fraction:
        val = given_val or development[len(development) - _num_val(len(development), val_fraction) :]
    train = np.setdiff1d(development, val, assume_unique=True).tolist()
    split = Split(tuple(sorted(train)), tuple(sorted(val)), tuple(sorted(test)))
    wanted = {"train": True, "val": fold is not None or val_fraction > 0, "test": test_fraction > 0}
    parts = [part for part, is_wanted in wanted.items() if is_wanted]
    _refuse_small_parts(catalog, split, fold, num_folds, parts)
    _refuse_lone_parts(catalog, split, parts)
    return split


def _share(num_classes: int, fraction: float) -> int:
    # 0.07 * 100 is a hair above 7 in floating point and must not become 8 classes.
    return math.ceil(num_classes * fraction - 1e-9)


def _num_test(num_classes: int, fraction: float) -> int:
    """Return the number of test classes: one less than the share where that leaves two each to train and validate."""
    share = _share(num_classes, fraction)
    return share - 1 if num_classes - share == 3 and share > 2 else share


def _num_val(num_classes: int, fraction: float) -> int:
    """Return the number of validation classes, of the development classes: the share, give or take one class."""
    share = _share(num_classes, fraction)
    if num_classes < 4:
        return share
    return 2 if share == 1 else min(share, max(num_classes - 2, share - 1))


class UsedSplits(NamedTuple):
    """The divisions that a study uses. search: by the settings as given. num_folds: as many as the classes allow.

    splits: of the search and of each used fold, with this number of folds.
    """

    search: Split
    num_folds: int
    splits: list[Split]


def further_folds(own: int | None, num_folds: int, number: int) -> list[int]:
    """Return the folds that follow a fold, so that there are ``number`` with it, and begin again at 0 after the last.

    own: None is the split without a fold. It validates on the last of the development classes, so fold 0 follows.
    """
    return [((-1 if own is None else own) + step) % num_folds for step in range(1, number)]


def used_splits(catalog: Catalog, num_used: int, num_in_row: int = 1, **settings: Any) -> UsedSplits:
    """Divide the classes for a search and the first ``num_used`` folds, with fewer folds where the classes are few.

    num_in_row: on how many folds the search itself runs, from its own one on. settings: the arguments of `make_split`,
    from which it raises DataError.
    """
    search, own, num_folds = make_split(catalog, **settings), settings["fold"], settings["num_folds"]
    further = further_folds(own, num_folds, num_in_row)
    if last := max(num_used, *(fold + 1 for fold in (own, *further) if fold is not None), 0):
        num_folds = largest_num_folds(len(search.train) + len(search.val), num_folds, last)
    further = further_folds(own, num_folds, num_in_row)
    folds = dict.fromkeys((own, *range(min(num_used, num_folds)), *further))
    splits = [make_split(catalog, **{**settings, "num_folds": num_folds, "fold": fold}) for fold in folds]
    return UsedSplits(search, num_folds, splits)


def largest_num_folds(num_development: int, num_folds: int, num_used: int) -> int:
    """Return the largest number of folds, at most num_folds, in which each used fold leaves two classes on each side.

    num_used: the first so many folds are used. Where there is none, num_folds, which `make_split` refuses.
    """
    for number in range(num_folds, 1, -1):
        sizes = [num_development // number + (fold < num_development % number) for fold in range(min(num_used, number))]
        if all(2 <= size <= num_development - 2 for size in sizes):
            return number
    return num_folds


def _given_parts(catalog: Catalog) -> dict[int, str]:
    assert catalog.given_split is not None
    parts: dict[int, set[str]] = {}
    for label, part in zip(catalog.labels.tolist(), catalog.given_split, strict=True):
        parts.setdefault(label, set()).add(part)
    shared = [f"{catalog.class_names[c]} ({', '.join(sorted(found))})" for c, found in parts.items() if len(found) > 1]
    if shared:
        raise DataError(
            f"the split given by {catalog.name}: {len(shared)} classes are in more than one part: {listed(shared)}; "
            "train, val and test must not share a class: put all images of a class into one part (in an image_list: "
            "column split of data.list_file)"
        )
    return {c: found.pop() for c, found in parts.items()}


def _refuse_small_parts(catalog: Catalog, split: Split, fold: int | None, num_folds: int, parts: Sequence[str]) -> None:
    for part in parts:
        classes = getattr(split, part)
        if len(classes) >= 2:
            continue
        size = "is empty" if not classes else "has one class, and retrieval needs two"
        given = catalog.given_split is not None and (fold is None or part == "test")
        if given and catalog.name == "image_list":
            cure = f"give more classes split = {part} in data.list_file"
        elif given:
            cure = f"the lists of {catalog.name} decide: keep more of its classes"
        elif fold is not None and part != "test":
            cure = f"data.split.num_folds = {num_folds} is too many for the development classes; lower it"
        else:
            cure = "change data.split.test_fraction or data.split.val_fraction, or use more classes"
        raise DataError(
            f"data.split: the {part} part {size} ({len(catalog.class_names)} classes: {len(split.train)} train, "
            f"{len(split.val)} val, {len(split.test)} test); {cure}"
        )


def _refuse_lone_parts(catalog: Catalog, split: Split, parts: Sequence[str]) -> None:
    """Raise DataError where a part is scored and none of its queries has an image of its class to find."""
    roles = np.array(catalog.roles or [""] * len(catalog.labels), dtype=np.str_)
    both, queries, gallery = (
        np.bincount(catalog.labels[roles == role], minlength=len(catalog.class_names)) for role in ("", *ROLES)
    )
    can_be_scored = (both > 1) | ((queries > 0) & (gallery > 0))
    if catalog.groups is not None and catalog.groups.are_excluded:
        pairs = set(zip(catalog.labels.tolist(), catalog.groups.names, strict=True))
        of_pairs = np.array([label for label, _ in pairs])
        can_be_scored &= np.bincount(of_pairs, minlength=len(can_be_scored)) > 1
    for part in parts:
        classes = list(getattr(split, part))
        if part != "train" and not can_be_scored[classes].any():
            raise DataError(
                f"data.split: no class of the {part} part ({counted(len(classes), 'class', 'classes')}) has a query "
                "and another image to find (with data.exclude_same: in another group), so nothing can be scored. Cure: "
                "more images of these classes; data.min_images_per_class = 2 leaves out classes with one image"
            )
