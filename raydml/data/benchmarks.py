"""The five benchmarks of deep metric learning: what was published about them, where their files lie, their images."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raydml.data.benchmark_lists import (
    INSHOP_PLACES,
    cub200_entries,
    inshop_entries,
    sop_entries,
    vehicleid_entries,
)
from raydml.data.cars_lists import cars196_entries
from raydml.data.catalog import DataError, Entry, Row, found_on_disk, listed

VEHICLEID_TESTS = {"vehicleid_small": 800, "vehicleid_medium": 1_600, "vehicleid_large": 2_400}


@dataclass(frozen=True)
class Count:
    """Images and classes of one part as published.

    confirmed: the real lists were counted and agree; otherwise no real file has confirmed the numbers.
    also: other pairs (images, classes) that circulate for the same part, as good as the first.
    """

    num_images: int
    num_classes: int
    confirmed: bool
    also: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        pairs = [(self.num_images, self.num_classes), *self.also]
        return " or ".join(f"{num_images:,} of {num_classes:,}" for num_images, num_classes in pairs)

    def fits(self, num_images: int, num_classes: int) -> bool:
        return (num_images, num_classes) in [(self.num_images, self.num_classes), *self.also]

    @property
    def standing(self) -> str:
        return "counted in the real lists" if self.confirmed else "no real file has confirmed this"


@dataclass(frozen=True)
class Benchmark:
    """Facts of one data set.

    counts: by part, a part being named as in `part_counts`. layout: what lies in its folder. folders: names under
    which archives unpack and seed repositories look for it. markers: files of which one shows that a folder is it.
    image_folders: where images lie; "" is the folder itself. subset_listed: its archive holds images that no list
    names. data_names: the names under which it can be opened.
    """

    title: str
    layout: str
    folders: tuple[str, ...]
    markers: tuple[str, ...]
    image_folders: tuple[str, ...]
    counts: dict[str, Count]
    data_names: tuple[str, ...]
    protocols: tuple[str, ...] = ("leave_one_out",)
    subset_listed: bool = False


# Counts: Song et al. 2016 (CUB, Cars, SOP), Liu et al. "DeepFashion" 2016 (In-Shop); the spec files repeat them.
# VehicleID: the papers (Liu et al. 2016) print fewer images than the released lists hold. test_800 is what the real
# list holds (the papers: 6,532); the other numbers are those of public loaders and, second, of the papers.
BENCHMARKS: dict[str, Benchmark] = {
    "cub200": Benchmark(
        title="CUB-200-2011 (birds)",
        layout="images.txt, image_class_labels.txt, classes.txt and images/<NNN.Name>/*.jpg",
        folders=("CUB_200_2011", "cub200", "CUB200"),
        markers=("images.txt", "image_class_labels.txt"),
        image_folders=("images",),
        counts={"train": Count(5_864, 100, True), "test": Count(5_924, 100, True)},
        data_names=("cub200",),
    ),
    "cars196": Benchmark(
        title="Stanford Cars (Cars196)",
        layout="cars_annos.mat and car_ims/*.jpg; or cars_train_annos.mat with cars_test_annos_withlabels.mat (here or "
        "in devkit/), or anno_train.csv with anno_test.csv, and cars_train/*.jpg, cars_test/*.jpg",
        folders=("cars196", "Cars196", "CARS196", "stanford_cars"),
        markers=(
            "cars_annos.mat",
            "cars_train_annos.mat",
            "devkit/cars_train_annos.mat",
            "anno_train.csv",
            "devkit/anno_train.csv",
        ),
        image_folders=("car_ims", "cars_train", "cars_test"),
        counts={"train": Count(8_054, 98, True), "test": Count(8_131, 98, True)},
        data_names=("cars196",),
    ),
    "sop": Benchmark(
        title="Stanford Online Products",
        layout="Ebay_train.txt, Ebay_test.txt, <name>_final/*.JPG; or Info_Files/Ebay_*.txt and images/<name>_final/",
        folders=("Stanford_Online_Products", "online_products", "sop", "SOP"),
        markers=("Ebay_train.txt", "Ebay_test.txt", "Info_Files/Ebay_train.txt", "Info_Files/Ebay_test.txt"),
        image_folders=("",),
        counts={"train": Count(59_551, 11_318, False), "test": Count(60_502, 11_316, False)},
        data_names=("sop",),
    ),
    "inshop": Benchmark(
        title="In-Shop Clothes Retrieval (DeepFashion)",
        layout="list_eval_partition.txt (here, in Eval/ or in Anno/) and img/<MEN|WOMEN>/<category>/<item>/*.jpg",
        folders=("In-shop Clothes Retrieval Benchmark", "in-shop", "Inshop", "inshop"),
        markers=tuple(f"{place}/list_eval_partition.txt".lstrip("/") for place in INSHOP_PLACES),
        image_folders=("img",),
        counts={
            "train": Count(25_882, 3_997, False),
            "query": Count(14_218, 3_985, False),
            "gallery": Count(12_612, 3_985, False),
        },
        data_names=("inshop",),
        protocols=("query_gallery",),
    ),
    "vehicleid": Benchmark(
        title="PKU VehicleID",
        layout="train_test_split/{train_list,test_list_800,test_list_1600,test_list_2400}.txt and image/<name>.jpg",
        folders=("VehicleID_V1.0", "VehicleID", "vehicle_id", "vehicleid"),
        markers=(
            "train_test_split/train_list.txt",
            *(f"train_test_split/test_list_{size}.txt" for size in VEHICLEID_TESTS.values()),
        ),
        image_folders=("image",),
        counts={
            "train": Count(113_346, 13_164, False, ((110_178, 13_134),)),
            "test_800": Count(6_493, 800, True),
            "test_1600": Count(13_377, 1_600, False, ((11_395, 1_600),)),
            "test_2400": Count(19_777, 2_400, False, ((17_638, 2_400),)),
            "img2vid": Count(221_567, 26_328, True),
        },
        data_names=tuple(VEHICLEID_TESTS),
        protocols=("leave_one_out", "one_gallery_image"),
        subset_listed=True,
    ),
}
_READERS: dict[str, Callable[[Path], list[Entry]]] = {
    "cub200": cub200_entries,
    "cars196": cars196_entries,
    "sop": sop_entries,
    "inshop": inshop_entries,
    **{name: partial(vehicleid_entries, num_test_classes=size) for name, size in VEHICLEID_TESTS.items()},
}
BENCHMARK_OF = {name: key for key, benchmark in BENCHMARKS.items() for name in benchmark.data_names}


def folder_of(key: str, root: Path) -> Path:
    """The folder with the files of BENCHMARKS[key]: root itself, or the folder of that name in root.

    Raises DataError naming the files and folders that were looked for.
    """
    benchmark = BENCHMARKS[key]
    folders = [root, *(root / name for name in benchmark.folders)]
    for folder in folders:
        if any((folder / marker).is_file() for marker in benchmark.markers):
            return folder
    raise DataError(
        f"{key}: no {benchmark.title} in {root}; looked there and in its folders {', '.join(benchmark.folders)} for "
        f"{', '.join(benchmark.markers)}. The layout is: {benchmark.layout}"
    )


def entries_of(name: str, folder: Path) -> list[Entry]:
    """What the lists in a folder of `folder_of` name, in their order; name: a key of BENCHMARK_OF."""
    return _READERS[name](folder)


def read(name: str, root: Path) -> list[Row]:
    """The images of a benchmark with sizes and times; their paths are relative to `folder_of`.

    name: a key of BENCHMARK_OF. root: the folder of the data set, or the one that holds it. part is "train" or "test",
    role "query" or "gallery" in the test part of In-Shop. Published counts are not required: see `notes_of`.

    Raises DataError: no such files under root, a line that cannot be read, images that are listed and missing.
    """
    key = BENCHMARK_OF[name]
    folder = folder_of(key, root)
    entries = entries_of(name, folder)
    rows, missing = found_on_disk(folder, entries)
    if missing:
        raise DataError(
            f"{name}: {len(missing):,} of {len(entries):,} listed images cannot be found in {folder}: "
            f"{listed(missing)}; unpack the archive again, or take these lines out of the lists"
        )
    return rows


def part_counts(name: str, images: Iterable[Entry | Row]) -> dict[str, tuple[int, int]]:
    """(images, classes) by part as BENCHMARKS names the parts: role for query and gallery, "test_800" for VehicleID."""
    num_images: Counter[str] = Counter()
    classes: dict[str, set[str]] = defaultdict(set)
    for image in images:
        part = image.role or image.part
        num_images[part] += 1
        classes[part].add(image.class_name)
    expected = ["train", "query", "gallery"] if name == "inshop" else ["train", "test"]
    told = {"test": f"test_{VEHICLEID_TESTS[name]}"} if name in VEHICLEID_TESTS else {}
    return {told.get(part, part): (num_images[part], len(classes[part])) for part in expected}


def notes_of(name: str, images: Iterable[Entry | Row]) -> tuple[str, ...]:
    """A sentence for each part whose counts are not the published ones; none for the data set as published.

    Subsets and look-alikes can be opened, but never in silence; `raydml.data.check` refuses them.
    """
    published = BENCHMARKS[BENCHMARK_OF[name]].counts
    return tuple(
        f"{name}: {part} has {num_images:,} images of {num_classes:,} classes, published are {published[part]} "
        f"({published[part].standing})"
        for part, (num_images, num_classes) in part_counts(name, images).items()
        if not published[part].fits(num_images, num_classes)
    )
