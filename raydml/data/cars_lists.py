"""Readers of the annotation files of Stanford Cars (Cars196), in the three forms in which they are passed on.

The split of deep metric learning is by class over both of the archive's parts; their own train and test flags, made
for classification, are never read.
"""

import zlib
from pathlib import Path

import numpy as np

from raydml.data.catalog import DataError, Entry, listed
from raydml.data.list_file import read_list, refuse_faulty_entries, whole_numbers

LAST_TRAIN_CLASS = 98
NUM_CLASSES = 196
# What scipy raises for a file that is cut, damaged or of another format, depending on where that is.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, NotImplementedError, zlib.error)


def cars196_entries(folder: Path, last_train_class: int = LAST_TRAIN_CLASS) -> list[Entry]:
    """The images of Cars196, classes "001" to "196" by id (one class name has a slash); 1 to last_train_class train.

    (a) cars_annos.mat with car_ims/ (all 16,185 in one). (b) The devkit: cars_train_annos.mat and
    cars_test_annos_withlabels.mat, with cars_train/ and cars_test/; the devkit's own cars_test_annos.mat has no
    classes and does not do alone. (c) anno_train.csv and anno_test.csv (fname,x1,y1,x2,y2,class; no header) in place
    of either. File names repeat between the two folders, so the folder belongs to the path.
    """
    merged = folder / "cars_annos.mat"
    if merged.is_file() and ((folder / "car_ims").is_dir() or not (folder / "cars_train").is_dir()):
        names, classes = _annotations(merged, "relative_im_path")
        return _entries(merged, names, classes, last_train_class)
    entries = []
    for part, mat_name in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        file = _first_of(folder, (mat_name, f"anno_{part}.csv"))
        names, classes = _annotations(file, "fname") if file.suffix == ".mat" else _csv(file)
        entries += _entries(file, [f"cars_{part}/{name}" for name in names], classes, last_train_class)
    refuse_faulty_entries(folder, entries)
    return entries


def _first_of(folder: Path, names: tuple[str, ...]) -> Path:
    files = [place / name for name in names for place in (folder, folder / "devkit")]
    for file in files:
        if file.is_file():
            return file
    raise DataError(
        f"cars196: found none of {', '.join(str(file) for file in files)}; the classes of the test images are in "
        "cars_test_annos_withlabels.mat or anno_test.csv (cars_test_annos.mat has none)"
    )


def _annotations(file: Path, path_field: str) -> tuple[list[str], list[int]]:
    from scipy.io import loadmat  # a slow import that only Cars196 needs
    from scipy.io.matlab import MatReadError

    try:
        annotations = np.atleast_1d(loadmat(file, squeeze_me=True, variable_names=["annotations"])["annotations"])
        fields = annotations.dtype.names or ()
        if lacking := [field for field in (path_field, "class") if field not in fields]:
            raise DataError(f"{file}: annotations have no {' and no '.join(lacking)}; they have {', '.join(fields)}")
        return [str(name) for name in annotations[path_field]], [int(c) for c in annotations["class"]]
    except DataError:
        raise
    except (*_UNREADABLE, MatReadError) as error:
        raise DataError(f"{file} cannot be read as a MATLAB file with annotations: {error!r}") from error


def _csv(file: Path) -> tuple[list[str], list[int]]:
    lines = read_list(file, "fname x1 y1 x2 y2 class", separator=",")
    return [line.fields[0] for line in lines], whole_numbers(file, lines, 5)


def _entries(file: Path, paths: list[str], class_ids: list[int], last_train_class: int) -> list[Entry]:
    wrong = [f"{path} ({c})" for path, c in zip(paths, class_ids, strict=True) if not 1 <= c <= NUM_CLASSES]
    if wrong:
        raise DataError(f"{file}: classes are 1 to {NUM_CLASSES}; {len(wrong)} images have others: {listed(wrong)}")
    entries = [
        Entry(path, f"{c:03d}", "train" if c <= last_train_class else "test")
        for path, c in zip(paths, class_ids, strict=True)
    ]
    refuse_faulty_entries(file, entries)
    return entries
