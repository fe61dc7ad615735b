"""The data sets by name: digits and glyphs (no files), the benchmarks, and the user's images in folders or a list."""

import csv
import hashlib
import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from raydml.data.benchmarks import BENCHMARK_OF, BENCHMARKS, folder_of, notes_of, read_benchmark
from raydml.data.catalog import (
    IMAGE_SUFFIXES,
    PARTS,
    ROLES,
    Catalog,
    DataError,
    ImageEntry,
    ImageFile,
    catalog_of,
    find_files,
    is_hidden,
    listed,
    refuse_small_classes,
)
from raydml.data.glyphs import draw_glyphs, open_glyphs
from raydml.errors import did_you_mean

DATASETS = {
    "digits": "scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, 10 classes; no files",
    "glyphs": "120 letters and digits in 12 to 20 typefaces, drawn from the fonts of matplotlib; no files",
    "image_folder": "root/<class>/*.jpg|png...; a class is a folder without sub-folders, named by its path",
    "image_list": "a CSV file with the columns path,label and optionally split (train, val or test) and role (query or "
    "gallery)",
    **{name: f"{BENCHMARKS[key].title}: {BENCHMARKS[key].layout}" for name, key in BENCHMARK_OF.items()},
}
_LIST_COLUMNS = ("path", "label", "split", "role")  # the first two are required
_MAX_NUM_LINES = 20  # with problems, in one message


def open_catalog(name: str, root: Path | None, list_file: str | None = None) -> Catalog:
    """List the images of a data set.

    name: a key of DATASETS. root: the folder that paths are relative to (digits and glyphs have none); for a benchmark
    its folder or the one that holds it, and the catalog's root is then its folder. list_file: the CSV file of
    image_list, relative to root or absolute. Class names are sorted as strings.

    A benchmark may be a subset, which people make deliberately. The `notes` of the catalog report counts that differ
    from the published ones, and the caller must print them; `raydml.data.check` refuses them. Some published classes
    have one image; in the user's own data such a class is an error.

    Raises DataError: an unknown name, no root, no images, what the readers of lists and folders refuse, and in the
    user's own data a class with one image (a query needs another image to find).
    """
    if name == "digits":
        return _open_digits()
    if name == "glyphs":
        return open_glyphs()
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise DataError(f"data.name = {name!r} is no data set; choices: {', '.join(DATASETS)}{hint}")
    if root is None:
        raise DataError(f"data.name = {name!r} needs machine.data_root, the folder that holds the images")
    if not root.is_dir():
        raise DataError(
            f"machine.data_root = {str(root)!r} is not a folder on this machine; give the folder that holds the images"
        )
    if name in BENCHMARK_OF:
        key = BENCHMARK_OF[name]
        files = read_benchmark(name, root)
        protocols, notes = BENCHMARKS[key].protocols, notes_of(name, files)
        return catalog_of(name, folder_of(key, root), files, protocols=protocols, notes=notes)
    files = scan_folders(root) if name == "image_folder" else read_image_list(root, list_file)
    # Without a split any class may become a test class; with one, the roles of the test part decide.
    with_roles = any(file.role for file in files if file.part in ("", "test"))
    catalog = catalog_of(name, root, files, protocols=("query_gallery",) if with_roles else ("leave_one_out",))
    refuse_small_classes(catalog.class_names, np.bincount(catalog.labels, minlength=len(catalog.class_names)))
    return catalog


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: uint8 (1797, 8, 8), 0..16 scaled to 0..255 and rounded, and labels (1797,)."""
    from sklearn.datasets import load_digits  # a slow import that only digits need

    bunch = load_digits()
    return np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target.astype(np.int64)


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
    times = np.zeros(len(labels), dtype=np.int64)
    return Catalog("digits", None, paths, labels, tuple("0123456789"), None, content, times)


def scan_folders(root: Path) -> list[ImageFile]:
    """Return the images of root/<class>/*.jpg|png...; a class is a folder without sub-folders, named by its path.

    Hidden files and folders, `__MACOSX` and files without an image suffix are ignored; links are followed.

    Raises DataError with all faults at once: no images, a folder with images beside sub-folders, an empty class, an
    unreadable folder or file, a link to nothing or to a folder above it.
    """
    entries: list[ImageEntry] = []
    faults: dict[str, list[str]] = {"empty": [], "mixed": [], "broken": [], "looping": [], "unreadable": []}
    _scan_folder(root, "", frozenset(), entries, faults)
    files, unreadable = find_files(root, entries)
    faults["unreadable"] += unreadable
    advice = {
        "empty": "classes without an image (empty class): {}; add images or remove these folders",
        "mixed": "folders with images beside sub-folders or in the root itself: {}; a class is a folder without "
        "sub-folders: move these images into a folder of their own",
        "broken": "links that lead nowhere: {}; repair or remove them",
        "looping": "links that lead back to a folder above them: {}; remove them",
        "unreadable": "files or folders that cannot be read: {}; change their permissions or remove them",
    }
    problems = [f"{len(found)} {advice[fault].format(listed(found))}" for fault, found in faults.items() if found]
    if not files and not problems:
        problems = [f"no class folder with images ({', '.join(IMAGE_SUFFIXES)}) in it"]
    if problems:
        raise DataError(f"machine.data_root = {str(root)!r}: " + "\n".join(problems))
    return files


def _scan_folder(
    folder: Path, prefix: str, above: frozenset[str], entries: list[ImageEntry], faults: dict[str, list[str]]
) -> None:
    real = os.path.realpath(folder)
    if real in above:
        faults["looping"].append(prefix)
        return
    try:
        with os.scandir(folder) as scan:
            found = sorted((entry for entry in scan if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        faults["unreadable"].append(f"{prefix or '.'} ({error.strerror})")
        return
    # A dangling link may have been a class, so its name does not matter. exists() is false for a link to itself too.
    broken = {entry.name for entry in found if entry.is_symlink() and not os.path.exists(entry.path)}
    faults["broken"] += [f"{prefix}/{name}".lstrip("/") for name in sorted(broken)]
    folders = [entry for entry in found if entry.name not in broken and entry.is_dir()]
    names = {entry.name for entry in folders} | broken
    images = [e.name for e in found if e.name.lower().endswith(IMAGE_SUFFIXES) and e.name not in names]
    if images and (folders or not prefix):
        faults["mixed"].append(f"{prefix or '.'} ({len(images)} images)")
    elif images:
        entries += [ImageEntry(f"{prefix}/{name}", prefix) for name in images]
    elif prefix and not folders and not broken:
        faults["empty"].append(prefix)
    for entry in folders:
        _scan_folder(Path(entry.path), f"{prefix}/{entry.name}".lstrip("/"), above | {real}, entries, faults)


def read_image_list(root: Path, list_file: str | None) -> list[ImageFile]:
    """Return the images of a CSV file (UTF-8) with the columns path,label[,split][,role]; other columns are ignored.

    path: relative to root, with "/". label: any text. split: train, val or test, for every image or for none. role:
    query or gallery, for every image of a part or for none of it; not in train, where nothing would use it.

    Raises DataError with all faults and their lines at once: missing columns or values, other splits or roles, paths
    listed twice, outside root or missing on the disk, a class in a part with roles without a query or a gallery image.
    """
    if list_file is None:
        raise DataError("data.name = 'image_list' needs data.list_file, a CSV file with the columns path,label")
    key = f"data.list_file = {str(root / list_file)!r}"
    by_path: dict[str, ImageEntry] = {}
    problems: list[str] = []
    for number, fields in _csv_lines(root / list_file, key):
        entry = _entry_of(fields)
        if isinstance(entry, str):
            problems.append(f"line {number}: {entry}")
        elif entry.path in by_path:
            problems.append(f"line {number}: {fields['path']!r} is listed twice; remove one (it would find itself)")
        else:
            by_path[entry.path] = entry
    if len(problems) > _MAX_NUM_LINES:
        problems[_MAX_NUM_LINES:] = [f"and {len(problems) - _MAX_NUM_LINES} more lines with problems"]
    entries = list(by_path.values())
    files, missing = find_files(root, entries)
    if missing:
        problems.append(f"{len(missing)} of {len(entries)} files do not exist under {root}: {listed(missing)}")
    if not entries and not problems:
        problems.append("lists no image")
    problems += _split_problems(entries) + _role_problems(entries)
    if problems:
        raise DataError(f"{key}: " + "\n".join(problems))
    return files


def _csv_lines(file: Path, key: str) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, values of _LIST_COLUMNS, "" if absent); a record of several lines has its last number."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            if lacking := [column for column in _LIST_COLUMNS[:2] if column not in columns]:
                raise DataError(
                    f"{key} has no column {' and no column '.join(lacking)}; it has: {', '.join(columns) or 'none'}. "
                    "Rename the column that holds it (needed: path, label; optional: split, role)"
                )
            lines = [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise DataError(f"{key} does not exist; the path is taken relative to machine.data_root") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{key} cannot be read as a CSV file in UTF-8: {error}") from error
    if too_long := [number for number, row in lines if None in row]:
        raise DataError(
            f"{key}: {len(too_long)} lines have more values than the header has columns: {listed(too_long)}; put "
            'paths and labels that hold a comma in double quotes: "a,b.jpg",label'
        )
    return [(number, {name: (row.get(name) or "").strip() for name in _LIST_COLUMNS}) for number, row in lines]


def _entry_of(fields: dict[str, str]) -> ImageEntry | str:
    """Return the image of one line, or the problem with the line."""
    path, label, part, role = (fields[column] for column in _LIST_COLUMNS)
    if not path or not label:
        return "path or label is empty"
    plain = os.path.normpath(path).replace(os.sep, "/")
    if plain in (".", "..") or plain.startswith(("/", "../")) or os.path.isabs(path):
        return f"{path!r} leaves machine.data_root; give paths relative to it"
    if part not in ("", *PARTS):
        return f"split = {part!r}; choices: {', '.join(PARTS)}, or no split at all"
    if role not in ("", *ROLES):
        return f"role = {role!r}; choices: {', '.join(ROLES)}, or no role at all"
    if role and part == "train":
        return f"role = {role!r} with split = 'train'; training images have no roles: leave it empty"
    return ImageEntry(plain, label, part, role)


def _split_problems(entries: list[ImageEntry]) -> list[str]:
    without = [entry.path for entry in entries if not entry.part]
    if not without or len(without) == len(entries):
        return []
    return [
        f"{len(without)} of {len(entries)} images have no split: {listed(without)}; fill in train, val or test "
        "for every image, or for none (then data.split decides)"
    ]


def _role_problems(entries: list[ImageEntry]) -> list[str]:
    roles: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    without: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        roles[entry.part][entry.class_name].add(entry.role)
        if not entry.role:
            without[entry.part].append(entry.path)
    problems = []
    for part, found in roles.items():
        place = f" of split {part}" if part else ""
        if set().union(*found.values()) == {""}:
            continue
        if without[part]:
            problems.append(
                f"{len(without[part])} images{place} have no role and others have one: {listed(without[part])}; fill "
                "in query or gallery for every image of the part, or for none"
            )
        for role in ROLES:
            lacking = [label for label, has in found.items() if role not in has and "" not in has]
            if lacking:
                problems.append(
                    f"{len(lacking)} classes{place} have no {role} image: {listed(sorted(lacking))}; each class of a "
                    "part with roles needs at least one query and one gallery image"
                )
    return problems
