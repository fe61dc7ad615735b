"""Readers of the list files of CUB-200-2011, Stanford Online Products, In-Shop Clothes and VehicleID.

Each takes the folder of the data set and returns what its lists name; no image is looked for. Class names are padded
so that their order as strings is the order of the ids, which keep their published values.
"""

from pathlib import Path

from raydml.data.catalog import ROLES, DataError, Entry, listed
from raydml.data.list_file import read_lines, read_list, refuse_faulty_entries, refuse_lines, whole_numbers

SOP_COLUMNS = "image_id class_id super_class_id path"
INSHOP_COLUMNS = "image_name item_id evaluation_status"
INSHOP_PLACES = ("", "Eval", "Anno")  # where the list lies; images lie below the folder itself in each case
_MAX_ID = 99_999  # class names of SOP and VehicleID have five digits


def cub200_entries(folder: Path, last_train_class: int = 100) -> list[Entry]:
    """CUB-200-2011: images.txt, image_class_labels.txt and classes.txt; images under images/, classes "001.Name".

    Classes 1 to last_train_class are train, the others test (Song et al., "Deep Metric Learning via Lifted Structured
    Feature Embedding", 2016, section 6). train_test_split.txt divides the images of each class for classification; it
    is never read. The boundary is an id, not half of the classes present as in the seed repositories: a class of a
    subset stays on its published side.
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
    strays = [
        line for line, i in zip(lines, image_ids, strict=True) if line.fields[1].split("/")[0] != names[class_of[i]]
    ]
    refuse_lines(images_file, "must lie in the folder that image_class_labels.txt and classes.txt give it", strays)
    entries = [
        Entry(f"images/{line.fields[1]}", names[class_of[i]], "train" if class_of[i] <= last_train_class else "test")
        for line, i in zip(lines, image_ids, strict=True)
    ]
    refuse_faulty_entries(images_file, entries)
    return entries


def _cub200_classes(file: Path, names: dict[int, str], image_ids: list[int]) -> dict[int, int]:
    """The class id of each image id, for just the images of images.txt."""
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


def sop_entries(folder: Path) -> list[Entry]:
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt, classes "00001" by class_id.

    Two layouts: the archive's, lists and images side by side, and Info_Files/ with images/ as MIC's release has it.
    """
    moved = not (folder / "Ebay_train.txt").exists() and (folder / "Info_Files").is_dir()
    lists, images = (folder / "Info_Files", "images/") if moved else (folder, "")
    entries = []
    for part in ("train", "test"):
        file = lists / f"Ebay_{part}.txt"
        lines = read_list(file, SOP_COLUMNS, header=SOP_COLUMNS.split(), num_header_lines=1)
        for class_id, line in zip(whole_numbers(file, lines, 1, most=_MAX_ID), lines, strict=True):
            entries.append(Entry(f"{images}{line.fields[3]}", f"{class_id:05d}", part))
    refuse_faulty_entries(lists, entries)
    return entries


def inshop_entries(folder: Path) -> list[Entry]:
    """In-Shop Clothes Retrieval: list_eval_partition.txt, classes by item id; the test images have roles.

    Every row is kept, the first one too, which MIC's release loses. The id is column 2,
    never the folder: nobody checked that an item is photographed under one category only.
    """
    files = [folder / place / "list_eval_partition.txt" for place in INSHOP_PLACES]
    file = next((file for file in files if file.exists()), files[0])
    lines = read_list(file, INSHOP_COLUMNS, header=INSHOP_COLUMNS.split(), num_header_lines=2)
    told = read_lines(file)[0].strip()
    if told != str(len(lines)):
        raise DataError(f"{file}: line 1 tells {told[:40]!r} images, {len(lines)} follow; the file was cut or edited")
    parts = {"train": ("train", ""), **{role: ("test", role) for role in ROLES}}
    unknown = [line for line in lines if line.fields[2] not in parts]
    refuse_lines(file, f"must end in one of {', '.join(parts)}", unknown)
    entries = [Entry(path, item, *parts[status]) for _, (path, item, status) in lines]
    refuse_faulty_entries(file, entries)
    queried, gallery = ({entry.class_name for entry in entries if entry.role == role} for role in ROLES)
    if alone := sorted(queried - gallery):
        raise DataError(f"{file}: {len(alone):,} items have queries and no gallery image to find: {listed(alone)}")
    return entries


def vehicleid_entries(folder: Path, num_test_classes: int) -> list[Entry]:
    """VehicleID: train_list.txt with test_list_<num_test_classes>.txt (800, 1600 or 2400)."""
    lists = folder / "train_test_split"
    entries = vehicleid_list(lists / "train_list.txt", "train")
    entries += vehicleid_list(lists / f"test_list_{num_test_classes}.txt", "test")
    refuse_faulty_entries(lists, entries)
    return entries


def vehicleid_list(file: Path, part: str = "") -> list[Entry]:
    """The lines `<image> <vehicle id>` of one list of VehicleID; images image/<image>.jpg, classes "00000" by id.

    An image's name stays text: its leading zeros are part of the file's name. The ids have gaps, the lines no order.
    """
    lines = read_list(file, "image vehicle_id")
    whole_numbers(file, lines, 0)
    vehicle_ids = whole_numbers(file, lines, 1, most=_MAX_ID)
    return [
        Entry(f"image/{line.fields[0]}.jpg", f"{vehicle_id:05d}", part)
        for line, vehicle_id in zip(lines, vehicle_ids, strict=True)
    ]
