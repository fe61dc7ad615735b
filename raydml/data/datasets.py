"""The data sets by name: digits and glyphs (no files), the benchmarks, and the user's images in folders or a list."""

import gzip
import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np

from raydml.data.benchmarks import BENCHMARK_OF, BENCHMARKS, count_differences, folder_of, notes_of, read_benchmark
from raydml.data.catalog import Catalog, DataError, catalog_of, without_small_classes
from raydml.data.containers import CONTAINERS, unpacked_images
from raydml.data.glyphs import draw_glyphs, open_glyphs
from raydml.data.image_folder import grouped_by_parent, scan_folders
from raydml.data.image_list import find_list, read_image_list
from raydml.data.samples import Columns
from raydml.errors import did_you_mean
from raydml.ops.wording import counted

DATASETS = {
    "digits": "scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 10 classes; no files",
    "glyphs": "120 letters and digits in 12 to 20 typefaces, drawn from the fonts of matplotlib; no files",
    "image_folder": "root/<class>/*.jpg|png...; a class is a folder without sub-folders, named by its path",
    "image_list": "a CSV file with the columns path,label and optionally split (train, val or test) and role (query or "
    "gallery)",
    "parquet": "Parquet or Arrow files with a column of images and one of labels, also of the datasets library",
    "webdataset": "tars of the WebDataset layout: images with a .cls or .json each",
    **{name: f"{BENCHMARKS[key].title}: {BENCHMARKS[key].layout}" for name, key in BENCHMARK_OF.items()},
}


def open_catalog(
    name: str,
    root: Path | None,
    list_file: str | None = None,
    *,
    min_images_per_class: int = 1,
    group: str | None = None,
    exclude_same: str = "nothing",
    path: str | None = None,
    image: str = "image",
    label: str = "label",
    cache_dir: Path | None = None,
) -> Catalog:
    """List the images of a data set.

    name: a key of DATASETS. root: the folder that paths are relative to (digits and glyphs have none); for a benchmark
    its folder or the one that holds it, and the catalog's root is then its folder. list_file: the CSV file of
    image_list, relative to root or absolute. min_images_per_class: smaller classes of the user's own images are left
    out. group: where the second label of these images is: a column of the list, or "parent", the folder above a class
    folder. exclude_same: "group" where a query does not find images of its own class and group, or "nothing". path,
    image, label, cache_dir: see containers.py. Class names are sorted as strings.

    A benchmark may be a subset, which people make deliberately. The `notes` of the catalog report counts that differ
    from the published ones, and the caller must print them; `raydml.data.check` refuses them.

    Raises DataError: an unknown name, no root, no images, and what the readers of lists and folders refuse.
    """
    if name == "digits":
        return _open_digits()
    if name == "glyphs":
        return open_glyphs()
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise DataError(f"data.name = {name!r} is no data set; choices: {', '.join(DATASETS)}{hint}")
    if root is None:
        raise DataError(f"data.name = {name!r} needs machine.data_root, the folder of the images (--data-root)")
    if not root.is_dir():
        raise DataError(
            f"machine.data_root = {str(root)!r} is not a folder on this machine; give the folder of the images "
            "(--data-root), or mount its disk"
        )
    if name in BENCHMARK_OF:
        key = BENCHMARK_OF[name]
        files = read_benchmark(name, root)
        protocols, differences = BENCHMARKS[key].protocols, count_differences(name, files)
        kind = f"{BENCHMARKS[key].title}: {{classes}}"
        return replace(
            catalog_of(name, folder_of(key, root), files, protocols=protocols, kind=kind),
            notes=notes_of(name, differences),
            differences=tuple(differences.values()),
        )
    if name == "image_folder":
        files, notes, kind = scan_folders(root)
        if group not in (None, "parent"):
            raise DataError(f"group = {group!r}: those of an image_folder are the folders above its classes: parent")
        if group is not None:
            files = grouped_by_parent(files)
        if list_found := find_list(root):
            notes += (
                f"the folders are the classes; the list {list_found} is not used (data.name: image_list uses it)",
            )
    elif name in CONTAINERS:
        unpacked = unpacked_images(name, root, path, Columns(image, label, group), cache_dir)
        root, files, notes = unpacked.folder, unpacked.files, ()
        kind = f"{{classes}} in {counted(unpacked.num_sources, f'{CONTAINERS[name].in_words} file')}"
    else:
        files, notes = read_image_list(root, list_file, group)
        kind = f"{{classes}} in the list {Path(str(list_file)).name}"
    # Without a split any class may become a test class; with one, the roles of the test part decide.
    with_roles = any(file.role for file in files if file.part in ("", "test"))
    protocols = ("query_gallery",) if with_roles else ("leave_one_out",)
    files, small_notes = without_small_classes(files, min_images_per_class)
    return catalog_of(
        name,
        root,
        files,
        protocols=protocols,
        notes=(*notes, *small_notes),
        kind=kind,
        groups_are_excluded=exclude_same == "group",
    )


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 (1797, 8, 8), 0..16 scaled to 0..255 and rounded, and labels (1797,)."""
    # Its file is read as `sklearn.datasets.load_digits` does it: the import takes 1 s in each trial's process.
    found = importlib.util.find_spec("sklearn")
    assert found is not None
    assert found.origin is not None
    with gzip.open(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    images = table[:, :-1].reshape(-1, 8, 8)
    return np.rint(images * (255 / 16)).astype(np.uint8), table[:, -1].copy()


def images_without_files(catalog: Catalog, rows: np.ndarray) -> np.ndarray:
    """Return images of a data set that has no files (its catalog has no root): rows (N,) -> uint8 (N, H, W)."""
    if catalog.name == "glyphs":
        return draw_glyphs(catalog.paths[row] for row in rows)
    assert catalog.name == "digits", catalog.name
    return digit_images()[0][rows]


def _open_digits() -> Catalog:
    images, labels = digit_images()
    labels.setflags(write=False)
    content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    paths = tuple(f"digits/{index:04d}" for index in range(len(labels)))
    names, about = tuple("0123456789"), "10 classes of handwritten digits, 1,797 images"
    return Catalog("digits", None, paths, labels, names, None, content, description=about)
