"""Readers of the list files of CUB-200-2011, Stanford Cars, Stanford Online Products, In-Shop Clothes and VehicleID.

Each reader takes the folder of the data set and returns the images that its lists name, without looking for the images.
Class names are padded so that their order as strings is the order of the published ids. The readers are strict: an
error names the file, the line number and the line.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from raydml.data.catalog import ROLES, DataError, ImageEntry, listed
from raydml.data.matlab_annotations import UnreadableAnnotations, read_annotations

SOP_COLUMNS = "image_id class_id super_class_id path"
INSHOP_COLUMNS = "image_name item_id evaluation_status"
INSHOP_LIST_FOLDERS = ("", "Eval", "Anno")  # the images are below the data set's own folder in each case
NUM_CARS_CLASSES = 196
_MAX_ID = 99_999  # class names of SOP and VehicleID have five digits
_MAX_QUOTED_LINES = 5
_MAX_QUOTED_CHARACTERS = 120


def cub200_entries(folder: Path, last_train_class: int = 100) -> list[ImageEntry]:
    """CUB-200-2011: images.txt, image_class_labels.txt and classes.txt; images under images/, classes "001.Name".

    Classes 1 to last_train_class are train, the others test (Song et al., "Deep Metric Learning via Lifted Structured
    Feature Embedding", 2016, section 6). train_test_split.txt divides the images of each class for classification and
    is never read. The boundary is an id, not half of the classes present as in the reference repositories, so each
    class of a subset keeps its published side.
    """
    classes_file = folder / "classes.txt"
    lines = read_list(classes_file, "class_id name")
    names = dict(zip(whole_numbers(classes_file, lines, 0), (line.fields[1] for line in lines), strict=True))
    wrong = [line for line in lines if not line.fields[1].startswith(f"{int(line.fields[0]):03d}.")]
    refuse_lines(classes_file, "must name a class by its id in three digits, a dot and a name", wrong)
    images_file = folder / "images.txt"
    lines = read_list(images_file, "image_id path")
    image_ids = whole_numbers(images_file, lines, 0)
    class_of = _cub200_classes(folder / "image_class_labels.txt", names, image_ids)
    misplaced = [
        line for line, i in zip(lines, image_ids, strict=True) if line.fields[1].split("/")[0] != names[class_of[i]]
    ]
    refuse_lines(images_file, "must have the folder that image_class_labels.txt and classes.txt give it", misplaced)
    entries = [
        ImageEntry(
            f"images/{line.fields[1]}", names[class_of[i]], "train" if class_of[i] <= last_train_class else "test"
        )
        for line, i in zip(lines, image_ids, strict=True)
    ]
    _refuse_faulty_entries(images_file, entries)
    return entries


def _cub200_classes(file: Path, names: dict[int, str], image_ids: list[int]) -> dict[int, int]:
    """Return the class id of each image id; the ids must be those of images.txt."""
    lines = read_list(file, "image_id class_id")
    class_ids = whole_numbers(file, lines, 1)
    unknown = [line for line, class_id in zip(lines, class_ids, strict=True) if class_id not in names]
    refuse_lines(file, "must give a class of classes.txt", unknown)
    labelled = whole_numbers(file, lines, 0)
    for ids, name in ((labelled, file.name), (image_ids, "images.txt")):
        if len(set(ids)) < len(ids):
            raise DataError(f"{file.parent / name}: {len(ids) - len(set(ids)):,} image ids are listed again")
    if differing := sorted(set(labelled) ^ set(image_ids)):
        raise DataError(
            f"{file} has {len(labelled):,} images, images.txt {len(image_ids):,}; they must be the same; these ids are "
            f"in one of them only: {listed(differing)}"
        )
    return dict(zip(labelled, class_ids, strict=True))


def cars196_entries(folder: Path, last_train_class: int = 98) -> list[ImageEntry]:
    """Stanford Cars, classes "001" to "196" by id (one class name has a slash); 1 to last_train_class are train.

    Three layouts circulate. (a) cars_annos.mat with car_ims/ (all 16,185 images in one folder). (b) The devkit:
    cars_train_annos.mat and cars_test_annos_withlabels.mat, with cars_train/ and cars_test/; the devkit's own
    cars_test_annos.mat has no classes and is not enough. (c) anno_train.csv and anno_test.csv
    (fname,x1,y1,x2,y2,class; no header) instead of either file of (b). File names repeat between the two folders, so
    the folder is part of the path. The archive's own train and test flags, made for classification, are never read.
    """
    merged = folder / "cars_annos.mat"
    if merged.is_file() and ((folder / "car_ims").is_dir() or not (folder / "cars_train").is_dir()):
        paths, class_ids = _cars196_annotations(merged, "relative_im_path")
        entries = _cars196_parts(merged, paths, class_ids, last_train_class)
    else:
        entries = []
        for part, mat_name in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
            file = _first_existing(folder, (mat_name, f"anno_{part}.csv"))
            names, class_ids = _cars196_annotations(file, "fname") if file.suffix == ".mat" else _cars196_csv(file)
            entries += _cars196_parts(file, [f"cars_{part}/{name}" for name in names], class_ids, last_train_class)
    _refuse_faulty_entries(folder, entries)
    return entries


def _first_existing(folder: Path, names: tuple[str, ...]) -> Path:
    files = [place / name for name in names for place in (folder, folder / "devkit")]
    for file in files:
        if file.is_file():
            return file
    raise DataError(
        f"cars196: found none of {', '.join(str(file) for file in files)}; the classes of the test images are in "
        "cars_test_annos_withlabels.mat or anno_test.csv (cars_test_annos.mat has none)"
    )


def _cars196_annotations(file: Path, path_field: str) -> tuple[list[str], list[int]]:
    try:
        return read_annotations(file, path_field)
    except UnreadableAnnotations as error:
        raise DataError(f"{file} cannot be read as a MATLAB file with annotations: {error}") from error


def _cars196_csv(file: Path) -> tuple[list[str], list[int]]:
    lines = read_list(file, "fname x1 y1 x2 y2 class", separator=",")
    return [line.fields[0] for line in lines], whole_numbers(file, lines, 5)


def _cars196_parts(file: Path, paths: list[str], class_ids: list[int], last_train_class: int) -> list[ImageEntry]:
    wrong = [f"{path} ({c})" for path, c in zip(paths, class_ids, strict=True) if not 1 <= c <= NUM_CARS_CLASSES]
    if wrong:
        raise DataError(
            f"{file}: classes are 1 to {NUM_CARS_CLASSES}; {len(wrong)} images have others: {listed(wrong)}"
        )
    return [
        ImageEntry(path, f"{c:03d}", "train" if c <= last_train_class else "test")
        for path, c in zip(paths, class_ids, strict=True)
    ]


def sop_entries(folder: Path) -> list[ImageEntry]:
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt, classes "00001" by class_id.

    Two layouts are read: that of the archive, lists beside images, and Info_Files/ with images/ as in MIC's release.
    """
    moved = not (folder / "Ebay_train.txt").exists() and (folder / "Info_Files").is_dir()
    lists, images = (folder / "Info_Files", "images/") if moved else (folder, "")
    entries = []
    for part in ("train", "test"):
        file = lists / f"Ebay_{part}.txt"
        lines = read_list(file, SOP_COLUMNS, header=SOP_COLUMNS.split(), num_header_lines=1)
        for class_id, line in zip(whole_numbers(file, lines, 1, most=_MAX_ID), lines, strict=True):
            entries.append(ImageEntry(f"{images}{line.fields[3]}", f"{class_id:05d}", part))
    _refuse_faulty_entries(lists, entries)
    return entries


def inshop_entries(folder: Path) -> list[ImageEntry]:
    """In-Shop Clothes Retrieval: list_eval_partition.txt, classes by item id; the test images have roles.

    Every row is read, also the first one, which MIC's release loses. The id is column 2, not the folder: the lists do
    not promise that an item is photographed under one category only.
    """
    files = [folder / place / "list_eval_partition.txt" for place in INSHOP_LIST_FOLDERS]
    file = next((file for file in files if file.exists()), files[0])
    lines = read_list(file, INSHOP_COLUMNS, header=INSHOP_COLUMNS.split(), num_header_lines=2)
    stated = _text_lines(file)[0].strip()
    if stated != str(len(lines)):
        raise DataError(
            f"{file}: line 1 states {stated[:40]!r} images, {len(lines)} follow; the file was cut or edited"
        )
    parts = {"train": ("train", ""), **{role: ("test", role) for role in ROLES}}
    unknown = [line for line in lines if line.fields[2] not in parts]
    refuse_lines(file, f"must end in one of {', '.join(parts)}", unknown)
    entries = [ImageEntry(path, item, *parts[status]) for _, (path, item, status) in lines]
    _refuse_faulty_entries(file, entries)
    queried, gallery = ({entry.class_name for entry in entries if entry.role == role} for role in ROLES)
    if alone := sorted(queried - gallery):
        raise DataError(f"{file}: {len(alone):,} items have queries and no gallery image to find: {listed(alone)}")
    return entries


def vehicleid_entries(folder: Path, num_test_classes: int) -> list[ImageEntry]:
    """VehicleID: train_list.txt with test_list_<num_test_classes>.txt (800, 1600 or 2400)."""
    lists = folder / "train_test_split"
    entries = vehicleid_list(lists / "train_list.txt", "train")
    entries += vehicleid_list(lists / f"test_list_{num_test_classes}.txt", "test")
    _refuse_faulty_entries(lists, entries)
    return entries


def vehicleid_entries_of_lists(folder: Path, num_test_classes: Mapping[str, int]) -> list[ImageEntry]:
    """VehicleID: train_list.txt with several test lists, each image once and with the names of its lists.

    num_test_classes: name of a list -> 800, 1600 or 2400. Raises DataError also where two lists have other images of a
    vehicle that is in both.
    """
    lists = folder / "train_test_split"
    files = {name: lists / f"test_list_{size}.txt" for name, size in num_test_classes.items()}
    train = vehicleid_list(lists / "train_list.txt", "train")
    tests = {name: vehicleid_list(file, "test") for name, file in files.items()}
    names: dict[ImageEntry, tuple[str, ...]] = {}
    for name, entries in tests.items():
        _refuse_faulty_entries(lists, train + entries)
        for entry in entries:
            names[entry] = (*names.get(entry, ()), name)
    for one, other in combinations(tests, 2):
        if vehicles := differing_classes(tests[one], tests[other]):
            raise DataError(
                f"{files[one]} and {files[other].name} have other images of {len(vehicles):,} vehicles: "
                f"{listed(vehicles)}; unpack the lists again, or score by one of them (data.name: vehicleid_{one} or "
                f"vehicleid_{other})"
            )
    union = train + [entry._replace(lists=of_entry) for entry, of_entry in names.items()]
    _refuse_faulty_entries(lists, union)
    return union


def differing_classes(one: Iterable[ImageEntry], other: Iterable[ImageEntry]) -> list[str]:
    """Return the classes that are in both lists with other images, sorted."""
    mine, theirs = (_paths_by_class(entries) for entries in (one, other))
    return sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])


def _paths_by_class(entries: Iterable[ImageEntry]) -> dict[str, set[str]]:
    paths: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        paths[entry.class_name].add(entry.path)
    return paths


def vehicleid_list(file: Path, part: str = "") -> list[ImageEntry]:
    """One list of VehicleID, lines `<image> <vehicle id>`: images image/<image>.jpg, classes "00000" by id.

    The name of an image stays text, since its leading zeros are part of the file name. The ids have gaps, and the lines
    are in no order.
    """
    lines = read_list(file, "image vehicle_id")
    whole_numbers(file, lines, 0)
    vehicle_ids = whole_numbers(file, lines, 1, most=_MAX_ID)
    return [
        ImageEntry(f"image/{line.fields[0]}.jpg", f"{vehicle_id:05d}", part)
        for line, vehicle_id in zip(lines, vehicle_ids, strict=True)
    ]


class ListLine(NamedTuple):
    """One line of a list: its number in the file, from 1, and its fields."""

    number: int
    fields: list[str]


def read_list(
    file: Path, columns: str, *, header: Sequence[str] = (), separator: str | None = None, num_header_lines: int = 0
) -> list[ListLine]:
    """Return the lines of a list after its header, each with exactly one field for each column.

    columns: their names, separated by blanks. separator None: a run of blanks or tabs. header: the names in the last of
    the num_header_lines. Carriage returns, blank lines at the end and a missing last end of line are accepted; a blank
    line between others is not.

    Raises DataError: an unreadable or empty file, another header, a line with more or fewer fields.
    """
    texts = _text_lines(file)
    names = "".join(texts[num_header_lines - 1 : num_header_lines])
    if header and names and names.split() != [*header]:
        raise DataError(f"{file}: line {num_header_lines} is {_quoted(names)}; it must be {' '.join(header)!r}")
    lines = [
        ListLine(number, [field.strip() for field in text.split(separator)])
        for number, text in enumerate(texts[num_header_lines:], start=num_header_lines + 1)
    ]
    if not lines:
        raise DataError(f"{file} ends after its header; lines with the columns {columns} must follow")
    num_fields = len(columns.split())
    wrong = [ListLine(n, [texts[n - 1]]) for n, fields in lines if len(fields) != num_fields or "" in fields]
    refuse_lines(file, f"must have the {num_fields} columns {columns}", wrong)
    return lines


def refuse_lines(file: Path, rule: str, wrong: Iterable[ListLine]) -> None:
    """Raise DataError with the rule and the first of the wrong lines, if there are any."""
    found = [f"line {number}: {_quoted(' '.join(fields))}" for number, fields in wrong]
    if found:
        raise DataError(f"{file}: every line {rule}; {len(found):,} do not: {listed(found, _MAX_QUOTED_LINES)}")


def whole_numbers(file: Path, lines: list[ListLine], column: int, most: int = 10**9) -> list[int]:
    """Return column `column`, from 0, as whole numbers of 0 to `most`. Raises DataError with the lines of others."""
    texts = [line.fields[column] for line in lines]
    # int() alone would also accept "+1", "1_0" and the digits of other scripts.
    wrong = [
        line
        for line, text in zip(lines, texts, strict=True)
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= most)
    ]
    refuse_lines(file, f"must have a whole number from 0 to {most} in column {column + 1}", wrong)
    return [int(text) for text in texts]


def _text_lines(file: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, without blanks at its end."""
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text in UTF-8: {error}") from error
    if lines == [""]:
        raise DataError(f"{file} is empty")
    return lines


def _refuse_faulty_entries(source: Path, entries: list[ImageEntry]) -> None:
    """Raise DataError for paths outside the folder, an image listed twice, or a class in both train and test."""
    outside = [e.path for e in entries if e.path.startswith("/") or "\\" in e.path or ".." in e.path.split("/")]
    if outside:
        raise DataError(f"{source}: {len(outside):,} paths may lead out of the folder: {listed(outside)}")
    twice = [path for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if twice:
        raise DataError(f"{source}: {len(twice):,} images are listed more than once: {listed(twice)}")
    train, test = ({entry.class_name for entry in entries if entry.part == part} for part in ("train", "test"))
    if shared := train & test:
        raise DataError(
            f"{source}: {len(shared):,} classes are in both train and test: {listed(sorted(shared))}; the parts must "
            "not share a class, so these are not the published lists"
        )


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED_CHARACTERS else text[:_MAX_QUOTED_CHARACTERS] + "...")
