"""Small copies of the data sets: files in the true layout and format, and drawn pictures from which one can learn."""

import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# The first names and lines of the real lists; further classes are named in the same way.
CUB_NAMES = {
    1: "001.Black_footed_Albatross",
    2: "002.Laysan_Albatross",
    3: "003.Sooty_Albatross",
    101: "101.White_Pelican",
    102: "102.Western_Wood_Pewee",
    103: "103.Sayornis",
}
VEHICLES = [23781, 18515]  # the first two of the real test_list_800.txt
VEHICLE_IMAGES = [279029, 217649]  # their first images; the names go down from there
_Row = tuple[int | str, ...]
LAYOUTS = {
    "cub200": ("archive",),
    "cars196": ("merged", "devkit", "csv"),
    "sop": ("archive", "info_files"),
    "inshop": ("", "Eval", "Anno"),
    "vehicleid": ("archive",),
    "image_folder": ("folders",),
    "image_list": ("list.csv",),
}


def build(
    name: str,
    root: Path,
    *,
    classes_per_part: int = 3,
    images_per_class: int = 4,
    size_px: int = 16,
    layout: str | None = None,
) -> Path:
    """Write a miniature of a data set into root, which becomes its folder and is returned.

    name: a benchmark ("cub200", "cars196", "sop", "inshop", "vehicleid"), "image_folder" or "image_list". VehicleID
    gets all three test lists, each part of the next larger one (1, 2 and 3 times classes_per_part); image_folder and
    image_list, which have no parts, get twice classes_per_part. classes_per_part: at most 90. images_per_class: of
    In-Shop's test items every second one is a query, so at least 2. layout: one of LAYOUTS[name], of image_list the
    path of the list; None: the first.
    """
    layout = LAYOUTS[name][0] if layout is None else layout
    assert name == "image_list" or layout in LAYOUTS[name]
    root.mkdir(parents=True, exist_ok=True)
    _WRITERS[name](root, classes_per_part, images_per_class, size_px, layout)
    return root


def draw(file: Path, class_id: int, index: int, size_px: int) -> None:
    """Write a JPEG of 5 x 4 proportions: its colour depends on the class, a bright stripe and noise on the image."""
    red, green, blue = colorsys.hsv_to_rgb(class_id * 0.618034 % 1.0, 0.9, 0.7)
    width_px = size_px * 5 // 4
    noise = np.random.default_rng((class_id, index)).normal(0, 12, (size_px, width_px, 3))
    pixels = np.array([red, green, blue]) * 255 + noise
    pixels[:, index % width_px] += 60
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)


def _write_lines(file: Path, lines: list[str], end: str = "\n") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(("\n".join(lines) + end).encode())


def _cub200(root: Path, classes_per_part: int, images_per_class: int, size_px: int, _layout: str) -> None:
    ids = [first + index for first in (1, 101) for index in range(classes_per_part)]
    names = {class_id: CUB_NAMES.get(class_id, f"{class_id:03d}.Bird_{class_id}") for class_id in ids}
    images = []
    for class_id in ids:
        for index in reversed(range(images_per_class)):  # the real list is not in the order of the file names either
            path = f"{names[class_id]}/{names[class_id][4:]}_{index:04d}_{class_id}.jpg"
            draw(root / "images" / path, class_id, index, size_px)
            images.append((class_id, path))
    numbered = list(enumerate(images, start=1))
    _write_lines(root / "images.txt", [f"{i} {path}" for i, (_, path) in numbered])
    _write_lines(root / "image_class_labels.txt", [f"{i} {class_id}" for i, (class_id, _) in numbered])
    _write_lines(root / "classes.txt", [f"{class_id} {name}" for class_id, name in names.items()])
    _write_lines(root / "train_test_split.txt", [f"{i} {i % 2}" for i, _ in numbered])
    _write_lines(root / "bounding_boxes.txt", [f"{i} 1.0 2.0 {size_px - 1}.0 {size_px - 2}.0" for i, _ in numbered])


def _cars196(root: Path, classes_per_part: int, images_per_class: int, size_px: int, layout: str) -> None:
    ids = [first + index for first in (1, 99) for index in range(classes_per_part)]
    # As in the real files, images of a class are scattered over the list and over both folders.
    images = [(class_id, index) for index in range(images_per_class) for class_id in ids]
    box = (1, 2, size_px - 1, size_px - 2)
    if layout == "merged":
        merged: list[_Row] = [
            (f"car_ims/{n:06d}.jpg", *box, c, index % 2) for n, (c, index) in enumerate(images, start=1)
        ]
        for (class_id, index), row in zip(images, merged, strict=True):
            draw(root / str(row[0]), class_id, index, size_px)
        names = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
        _write_annotations(root / "cars_annos.mat", names, merged)
        return
    for part, odd in (("train", 0), ("test", 1)):
        numbered = list(enumerate([image for image in images if image[1] % 2 == odd], start=1))
        for number, (class_id, index) in numbered:  # both folders start at 00001.jpg
            draw(root / f"cars_{part}" / f"{number:05d}.jpg", class_id, index, size_px)
        rows: list[_Row] = [(*box, class_id, f"{number:05d}.jpg") for number, (class_id, _) in numbered]
        if layout == "csv":
            lines = [",".join(map(str, (fname, *box_and_class))) for *box_and_class, fname in rows]
            _write_lines(root / f"anno_{part}.csv", lines)
            continue
        fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
        if part == "train":
            _write_annotations(root / "devkit" / "cars_train_annos.mat", fields, rows)
        else:
            without = [(*row[:4], row[5]) for row in rows]
            _write_annotations(root / "devkit" / "cars_test_annos.mat", (*fields[:4], "fname"), without)
            _write_annotations(root / "cars_test_annos_withlabels.mat", fields, rows)


def _write_annotations(file: Path, fields: tuple[str, ...], rows: list[_Row]) -> None:
    from scipy.io import savemat  # a slow import that only Cars needs

    annotations = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for index, row in enumerate(rows):
        annotations[0, index] = tuple(
            value if isinstance(value, str) else np.array([[value]], dtype=np.uint8 if value < 256 else np.uint16)
            for value in row
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {"annotations": annotations})


def _sop(root: Path, classes_per_part: int, images_per_class: int, size_px: int, layout: str) -> None:
    lists, images = (root, root) if layout == "archive" else (root / "Info_Files", root / "images")
    kinds = ("bicycle", "cabinet", "chair")
    image_id = 0
    for part, first in (("train", 1), ("test", 11319)):
        lines = ["image_id class_id super_class_id path"]
        for class_id in range(first, first + classes_per_part):
            kind = class_id % len(kinds)
            for index in range(images_per_class):
                image_id += 1
                path = f"{kinds[kind]}_final/{111085122871 + class_id}_{index}.JPG"
                draw(images / path, class_id, index, size_px)
                lines.append(f"{image_id} {class_id} {kind + 1} {path}")
        _write_lines(lists / f"Ebay_{part}.txt", lines)


def _inshop(root: Path, classes_per_part: int, images_per_class: int, size_px: int, layout: str) -> None:
    assert images_per_class >= 2
    rows = []
    for item in range(1, 2 * classes_per_part + 1):  # train and test items alternate, as in the real list
        folder = f"img/{'WOMEN/Dresses' if item % 3 else 'MEN/Denim'}/id_{item:08d}"
        for index in range(images_per_class):
            path = f"{folder}/{index + 1:02d}_1_front.jpg"
            draw(root / path, item, index, size_px)
            status = "train" if item % 2 else ("query", "gallery")[index % 2]
            rows.append(f"{path:<70}{f'id_{item:08d}':<12}{status:<8}")
    _write_lines(
        root / layout / "list_eval_partition.txt", [str(len(rows)), "image_name item_id evaluation_status", *rows]
    )


def _vehicleid(root: Path, classes_per_part: int, images_per_class: int, size_px: int, _layout: str) -> None:
    tests = VEHICLES + [3 * index for index in range(3 * classes_per_part)]  # id 0 exists; ids have gaps
    tests = tests[: 3 * classes_per_part]
    trains = [30 + 7 * index for index in range(classes_per_part)]
    trains = [vehicle + (vehicle in tests) for vehicle in trains]
    names = {
        vehicle: [
            f"{(VEHICLE_IMAGES[VEHICLES.index(vehicle)] if vehicle in VEHICLES else 1000 + 100 * vehicle) - i:07d}"
            for i in range(images_per_class)
        ]
        for vehicle in tests + trains
    }
    parts = {"train_list": trains, **{f"test_list_{800 * k}": tests[: k * classes_per_part] for k in (1, 2, 3)}}
    for stem, vehicles in parts.items():
        # no runs of one vehicle, and no end of line at the end of the file
        lines = [f"{names[vehicle][i]} {vehicle}" for i in range(images_per_class) for vehicle in vehicles]
        _write_lines(root / "train_test_split" / f"{stem}.txt", lines, end="")
    for vehicle, images in names.items():
        for index, image in enumerate(images):
            draw(root / "image" / f"{image}.jpg", vehicle, index, size_px)
    lines = [f"{image} {vehicle}" for vehicle, images in names.items() for image in images]
    _write_lines(root / "attribute" / "img2vid.txt", lines)


def _image_folder(root: Path, classes_per_part: int, images_per_class: int, size_px: int, _layout: str) -> None:
    for class_id in range(2 * classes_per_part):
        for index in range(images_per_class):
            draw(root / f"class_{class_id:03d}" / f"{index:03d}.jpg", class_id, index, size_px)


def _image_list(root: Path, classes_per_part: int, images_per_class: int, size_px: int, layout: str) -> None:
    lines = ["path,label"]
    for class_id in range(2 * classes_per_part):
        for index in range(images_per_class):
            path = f"images/{class_id:03d}_{index:03d}.jpg"
            draw(root / path, class_id, index, size_px)
            lines.append(f"{path},class_{class_id:03d}")
    _write_lines(root / layout, lines)


_WRITERS: dict[str, Callable[[Path, int, int, int, str], None]] = {
    "cub200": _cub200,
    "cars196": _cars196,
    "sop": _sop,
    "inshop": _inshop,
    "vehicleid": _vehicleid,
    "image_folder": _image_folder,
    "image_list": _image_list,
}
