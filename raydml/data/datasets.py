"""The data sets by name, and their catalogs."""

import hashlib
from pathlib import Path

import numpy as np

from raydml.data.benchmarks import BENCHMARK_OF, BENCHMARKS, folder_of, notes_of, read
from raydml.data.catalog import Catalog, DataError, catalog_of, refuse_small_classes
from raydml.data.own_images import read_image_list, scan_folders
from raydml.errors import did_you_mean

DATASETS = {
    "digits": "scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 10 classes; no files",
    "image_folder": "root/<class>/*.jpg|png...; a class is a folder without sub-folders, named by its path",
    "image_list": "a CSV file with the columns path,label and, if wished, split (train, val or test) and role (query "
    "or gallery)",
    **{name: f"{BENCHMARKS[key].title}: {BENCHMARKS[key].layout}" for name, key in BENCHMARK_OF.items()},
}


def open_catalog(name: str, root: Path | None, list_file: str | None = None) -> Catalog:
    """List the images of a data set.

    name: a key of DATASETS. root: the folder that paths are relative to (digits: ignored); for a benchmark its folder
    or the one that holds it, and the catalog's root is then its folder. list_file: the CSV of image_list, relative to
    root or absolute. Class names are sorted as strings.

    A benchmark may be a subset: people make them knowingly. Where counts are not the published ones, the catalog's
    `notes` say so, which the caller must print; `raydml.data.check` refuses them. Its classes may have one image, as
    a few published ones have; in the user's own data such a class is a mistake.

    Raises DataError: unknown name, no root, no images, whatever `own_images` and `benchmarks` refuse, and in the
    user's own data a class with one image (retrieval needs a query and something to find).
    """
    if name == "digits":
        return _open_digits()
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise DataError(f"data.name = {name!r} is no data set; choices: {', '.join(DATASETS)}{hint}")
    root = _existing_root(name, root)
    if name in BENCHMARK_OF:
        key = BENCHMARK_OF[name]
        rows = read(name, root)
        protocols, notes = BENCHMARKS[key].protocols, notes_of(name, rows)
        return catalog_of(name, folder_of(key, root), rows, protocols=protocols, notes=notes)
    rows = scan_folders(root) if name == "image_folder" else read_image_list(root, list_file)
    # Without a split any class may become a test class; with one, the roles of the test part decide.
    with_roles = any(row.role for row in rows if row.part in ("", "test"))
    catalog = catalog_of(name, root, rows, protocols=("query_gallery",) if with_roles else ("leave_one_out",))
    refuse_small_classes(catalog.class_names, np.bincount(catalog.labels, minlength=len(catalog.class_names)))
    return catalog


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
    times = np.zeros(len(labels), dtype=np.int64)
    return Catalog("digits", None, paths, labels, tuple("0123456789"), None, content, times)


def _existing_root(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(f"data.name = {name!r} needs machine.data_root, the folder that holds the images")
    if not root.is_dir():
        raise DataError(
            f"machine.data_root = {str(root)!r} is not a folder on this machine; give the folder that holds the images"
        )
    return root
