"""Which images there are and how their classes are split; no image file is opened here.

Everything a split or a result may depend on (paths relative to the root, class names, file sizes, a given
split) goes into `Catalog.content`, so two machines with the same content number run the same experiment.
"""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

DATASETS = {
    "digits": "scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 10 classes; no files",
    "image_folder": "root/<class>/*.jpg|png...; a class is a folder without sub-folders, named by its path",
    "image_list": "a CSV file with the columns path,label and, if wished, split (train, val or test)",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PARTS = ("train", "val", "test")
ORDERS = ("sorted", "shuffled")


class DataError(ValueError):
    """The images, the list or the split asked for cannot be used; the message names the cure."""


@dataclass(frozen=True, eq=False)
class Catalog:
    """The images of a data set, sorted by class and path, none of them opened.

    paths: N paths relative to root ("digits/0000" for digits). labels: (N,) int64 ids into class_names, which
    are sorted. given_split: N of "train" | "val" | "test", or None when the split is to be made.
    content: hexadecimal SHA-256 over (path, class name, size in bytes, given split) of every image.
    """

    name: str
    root: Path | None
    paths: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    given_split: tuple[str, ...] | None
    content: str


@dataclass(frozen=True)
class Split:
    """Class ids of the three parts, each ascending; no class is in two of them."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    def to_dict(self) -> dict[str, list[int]]:
        return {"train": list(self.train), "val": list(self.val), "test": list(self.test)}


def listed(names: Iterable[object], limit: int = 10) -> str:
    """The first `limit` of the names and how many more there are, for a message."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def open_catalog(name: str, root: Path | None, list_file: str | None = None) -> Catalog:
    """List the images of a data set.

    name: a key of DATASETS. root: the folder that paths are relative to (digits: ignored). list_file: the CSV
    of image_list, relative to root or absolute. Hidden files, hidden folders, `__MACOSX` and files without an
    image's suffix are ignored in folders. Class names are sorted as strings.

    Raises DataError: unknown name, no root, no images, a folder with images beside sub-folders, an empty class,
    a class with one image (retrieval needs a query and something to find), a bad row or a missing file in a list.
    """
    if name == "digits":
        return _open_digits()
    if name == "image_folder":
        rows = _scan_folders(_existing_root(name, root))
    elif name == "image_list":
        rows = _read_list(_existing_root(name, root), list_file)
    else:
        nearest = get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise DataError(f"data.name = {name!r} is no data set; choices: {', '.join(DATASETS)}; nearest: {nearest}")
    catalog = _catalog(name, root, rows)
    refuse_small_classes(catalog.class_names, np.bincount(catalog.labels, minlength=len(catalog.class_names)))
    return catalog


def refuse_small_classes(class_names: Sequence[str], counts: np.ndarray, cause: str = "") -> None:
    """Raise DataError naming every class with fewer than two images; counts is (C,)."""
    small = [f"{name} ({count})" for name, count in zip(class_names, counts, strict=True) if count < 2]
    if small:
        raise DataError(
            f"{len(small)} of {len(class_names)} classes have fewer than two images{cause}: {listed(small)}; "
            "a query needs another image of its class to find. Add images to these classes or remove them"
        )


_Row = tuple[str, str, int, str]  # path, class name, size in bytes, given split or ""


def _catalog(name: str, root: Path | None, rows: list[_Row]) -> Catalog:
    # The order in which a file system or a list names the images must not change the experiment.
    rows = sorted(rows, key=lambda row: (row[1], row[0]))
    class_names = tuple(sorted({row[1] for row in rows}))
    ids = {class_name: index for index, class_name in enumerate(class_names)}
    labels = np.array([ids[row[1]] for row in rows], dtype=np.int64)
    labels.setflags(write=False)
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row if row[3] else row[:3]).encode() + b"\n")
    given = tuple(row[3] for row in rows) if rows and rows[0][3] else None
    return Catalog(name, root, tuple(row[0] for row in rows), labels, class_names, given, content.hexdigest())


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 (1797, 8, 8), 0..16 scaled to 0..255 and rounded, and labels (1797,)."""
    from sklearn.datasets import load_digits  # a slow import that only digits need

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


def _open_digits() -> Catalog:
    images, labels = digit_images()
    labels.setflags(write=False)
    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    paths = tuple(f"digits/{index:04d}" for index in range(len(labels)))
    return Catalog("digits", None, paths, labels, tuple("0123456789"), None, content)


def _existing_root(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(f"data.name = {name!r} needs machine.data_root, the folder that holds the images")
    if not root.is_dir():
        raise DataError(
            f"machine.data_root = {str(root)!r} is not a folder on this machine; give the folder that holds the images"
        )
    return root


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _scan_folders(root: Path) -> list[_Row]:
    rows: list[_Row] = []
    faults: dict[str, list[str]] = {"empty": [], "mixed": [], "broken": []}
    try:
        _scan_folder(root, "", frozenset(), rows, faults)
    except OSError as error:
        raise DataError(f"machine.data_root = {str(root)!r} cannot be listed: {error}") from error
    advice = {
        "empty": "classes without an image (empty class): {}; add images or remove these folders",
        "mixed": "folders with images beside sub-folders or in the root itself: {}; a class is a folder without "
        "sub-folders: move these images into a folder of their own",
        "broken": "links that lead nowhere: {}; mend or remove them",
    }
    problems = [f"{len(found)} {advice[fault].format(listed(found))}" for fault, found in faults.items() if found]
    if not rows and not problems:
        problems = [f"no class folder with images ({', '.join(IMAGE_SUFFIXES)}) in it"]
    if problems:
        raise DataError(f"machine.data_root = {str(root)!r}: " + "\n".join(problems))
    return rows


def _scan_folder(
    folder: Path, prefix: str, above: frozenset[str], rows: list[_Row], faults: dict[str, list[str]]
) -> None:
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"machine.data_root: the link {prefix!r} leads back to a folder above it; remove it")
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not _ignored(entry.name)), key=lambda entry: entry.name)
    folders = [entry for entry in entries if entry.is_dir()]
    pictures = [entry for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir()]
    faults["broken"] += [f"{prefix}/{entry.name}".lstrip("/") for entry in pictures if not entry.is_file()]
    if pictures and (folders or not prefix):
        faults["mixed"].append(f"{prefix or '.'} ({len(pictures)} images)")
    elif pictures:
        rows += [(f"{prefix}/{e.name}", prefix, e.stat().st_size, "") for e in pictures if e.is_file()]
    elif prefix and not folders:
        faults["empty"].append(prefix)
    for entry in folders:
        _scan_folder(Path(entry.path), f"{prefix}/{entry.name}".lstrip("/"), above | {real}, rows, faults)


def _read_list(root: Path, list_file: str | None) -> list[_Row]:
    if list_file is None:
        raise DataError("data.name = 'image_list' needs data.list_file, a CSV file with the columns path,label")
    file = root / list_file
    key = f"data.list_file = {str(file)!r}"
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle, skipinitialspace=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            if lacking := [column for column in ("path", "label") if column not in columns]:
                raise DataError(
                    f"{key} has no column {' and no column '.join(lacking)}; it has: {', '.join(columns) or 'none'}. "
                    "Rename the column that holds it (needed: path, label; optional: split)"
                )
            lines = [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise DataError(f"{key} does not exist; the path is taken relative to machine.data_root") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{key} cannot be read as a CSV file in UTF-8: {error}") from error
    return _checked_rows(root, key, lines)


def _checked_rows(root: Path, key: str, lines: list[tuple[int, dict[str, str]]]) -> list[_Row]:
    rows: dict[str, _Row] = {}
    problems: list[str] = []
    missing: list[str] = []
    for number, line in lines:
        path, label, part = ((line.get(column) or "").strip() for column in ("path", "label", "split"))
        plain = os.path.normpath(path).replace(os.sep, "/") if path else ""
        if not path or not label:
            problems.append(f"line {number}: path or label is empty")
        elif plain.startswith(("/", "../")) or os.path.isabs(path):
            problems.append(f"line {number}: {path!r} leaves machine.data_root; give paths relative to it")
        elif part not in ("", *PARTS):
            problems.append(f"line {number}: split = {part!r}; choices: {', '.join(PARTS)}, or no split at all")
        elif plain in rows:
            problems.append(f"line {number}: {path!r} is listed twice; remove one (it would find itself)")
        else:
            file = root / plain
            if not file.is_file():
                missing.append(plain)
            rows[plain] = (plain, label, file.stat().st_size if file.is_file() else 0, part)
    without = [row[0] for row in rows.values() if not row[3]]
    if without and len(without) < len(rows):
        problems.append(
            f"{len(without)} of {len(rows)} images have no split: {listed(without)}; fill in train, val or test "
            "for every image, or for none (then data.split decides)"
        )
    if missing:
        problems.append(f"{len(missing)} of {len(rows)} files do not exist under {root}: {listed(missing)}")
    if not lines:
        problems.append("lists no image")
    if problems:
        raise DataError(f"{key}: " + "\n".join(problems))
    return list(rows.values())


def make_split(
    catalog: Catalog,
    *,
    test_fraction: float,
    val_fraction: float,
    num_folds: int,
    fold: int | None,
    order: str,
    seed: int,
) -> Split:
    """Divide the classes (never the images of a class) into train, val and test.

    The classes are put in order: "sorted" by name, or "shuffled" by the SHA-256 of seed and name, which no
    library version or platform can change. The last ceil(test_fraction * C) classes are test and the rest
    development. fold None: the last ceil(val_fraction * D) of the D development classes are val. fold i: val is
    the i-th of num_folds contiguous, nearly equal partitions of the development classes, train the others.
    A split given in an image list decides instead: test as given; fold None: val as given (made from the
    development classes if the list has no val); fold i: partitions of the given train and val classes together.

    Raises DataError: a fraction outside (0, 1), a fold out of range, a class shared by two given parts, a class
    with fewer than two images, a part with fewer than two classes (there would be nothing to tell apart).
    """
    counts = np.bincount(catalog.labels, minlength=len(catalog.class_names))
    refuse_small_classes(catalog.class_names, counts)
    if order not in ORDERS:
        raise DataError(f"data.split.order = {order!r}; choices: {', '.join(ORDERS)}")
    if fold is not None and not 0 <= fold < num_folds:
        raise DataError(
            f"data.split.fold = {fold} is out of range; data.split.num_folds = {num_folds}: 0 to {num_folds - 1}"
        )
    ordered = list(range(len(catalog.class_names)))  # class ids are in the order of the sorted names
    if order == "shuffled":
        ordered.sort(key=lambda c: hashlib.sha256(f"{seed}/{catalog.class_names[c]}".encode()).digest())
    if catalog.given_split is not None:
        part_of = _given_parts(catalog)
        test = [c for c in ordered if part_of[c] == "test"]
        given_val = [c for c in ordered if part_of[c] == "val"]
    else:
        test = ordered[len(ordered) - _share(len(ordered), test_fraction, "test_fraction") :]
        given_val = []
    development = [c for c in ordered if c not in set(test)]
    if fold is not None:
        val = [int(c) for c in np.array_split(np.array(development, dtype=np.int64), num_folds)[fold]]
    else:
        val = given_val or development[len(development) - _share(len(development), val_fraction, "val_fraction") :]
    train = [c for c in development if c not in set(val)]
    split = Split(tuple(sorted(train)), tuple(sorted(val)), tuple(sorted(test)))
    _refuse_small_parts(catalog, split, fold, num_folds)
    return split


def _share(num_classes: int, fraction: float, key: str) -> int:
    if not 0 < fraction < 1:
        raise DataError(f"data.split.{key} = {fraction} leaves an empty part; give a number between 0 and 1")
    # 0.07 * 100 is a hair above 7 in floating point and must not become 8 classes.
    return math.ceil(num_classes * fraction - 1e-9)


def _given_parts(catalog: Catalog) -> dict[int, str]:
    assert catalog.given_split is not None
    parts: dict[int, set[str]] = {}
    for label, part in zip(catalog.labels.tolist(), catalog.given_split, strict=True):
        parts.setdefault(label, set()).add(part)
    shared = [f"{catalog.class_names[c]} ({', '.join(sorted(found))})" for c, found in parts.items() if len(found) > 1]
    if shared:
        raise DataError(
            f"column split of data.list_file: {len(shared)} classes are in more than one part: {listed(shared)}; "
            "train, val and test must not share a class: put all images of a class into one part"
        )
    return {c: found.pop() for c, found in parts.items()}


def _refuse_small_parts(catalog: Catalog, split: Split, fold: int | None, num_folds: int) -> None:
    for part, classes in (("train", split.train), ("val", split.val), ("test", split.test)):
        if len(classes) >= 2:
            continue
        size = "is empty" if not classes else "has one class, and retrieval needs two to tell apart"
        if catalog.given_split is not None and (fold is None or part == "test"):
            cure = f"give more classes split = {part} in data.list_file"
        elif fold is not None and part != "test":
            cure = f"data.split.num_folds = {num_folds} is too many for the development classes; lower it"
        else:
            cure = "change data.split.test_fraction or data.split.val_fraction, or use more classes"
        raise DataError(
            f"data.split: the {part} part {size} ({len(catalog.class_names)} classes: {len(split.train)} train, "
            f"{len(split.val)} val, {len(split.test)} test); {cure}"
        )
