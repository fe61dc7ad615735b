"""The five benchmarks of deep metric learning: their published counts, the layout of their files, and their images."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from raydml.data.benchmark_lists import (
    INSHOP_LIST_FOLDERS,
    cars196_entries,
    cub200_entries,
    inshop_entries,
    sop_entries,
    vehicleid_entries,
    vehicleid_entries_of_lists,
)
from raydml.data.catalog import Catalog, DataError, ImageEntry, ImageFile, catalog_of, find_files, listed
from raydml.errors import did_you_mean

VEHICLEID_TESTS = {"vehicleid_small": 800, "vehicleid_medium": 1_600, "vehicleid_large": 2_400}
#: A data set that is scored by several test lists -> the data sets of one of them each -> the name of the list, with
#: which the names of its metrics begin: "small_recall_at_1".
TEST_LISTS = {"vehicleid": {name: name.removeprefix("vehicleid_") for name in VEHICLEID_TESTS}}


@dataclass(frozen=True)
class PublishedCount:
    """Published numbers of images and classes of one part.

    confirmed: whether the real lists were counted and agree. also: other pairs (images, classes) that circulate for the
    same part and are accepted too.
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
    def evidence(self) -> str:
        return "counted in the real lists" if self.confirmed else "no real file has confirmed this"


@dataclass(frozen=True)
class Benchmark:
    """Facts about one data set.

    layout: the files in its folder. folders: the names of its folder in archives and in the reference repositories.
    markers: files of which any one identifies its folder. image_folders: the folders of its images; "" is the folder
    itself. counts: by part, named as in `part_counts`. data_names: the names under which it can be opened.
    subset_listed: its archive holds images that are in no list.
    """

    title: str
    layout: str
    folders: tuple[str, ...]
    markers: tuple[str, ...]
    image_folders: tuple[str, ...]
    counts: dict[str, PublishedCount]
    data_names: tuple[str, ...]
    protocols: tuple[str, ...] = ("leave_one_out",)
    subset_listed: bool = False


# Counts: Song et al. 2016 (CUB, Cars, SOP), Liu et al. "DeepFashion" 2016 (In-Shop); the spec files repeat them.
# VehicleID: the papers (Liu et al. 2016) print fewer images than the released lists hold. test_800 was counted in the
# real list (the papers print 6,532); the other numbers are those of public loaders and, second, of the papers.
BENCHMARKS: dict[str, Benchmark] = {
    "cub200": Benchmark(
        title="CUB-200-2011 (birds)",
        layout="images.txt, image_class_labels.txt, classes.txt and images/<NNN.Name>/*.jpg",
        folders=("CUB_200_2011", "cub200", "CUB200"),
        markers=("images.txt", "image_class_labels.txt"),
        image_folders=("images",),
        counts={"train": PublishedCount(5_864, 100, True), "test": PublishedCount(5_924, 100, True)},
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
        counts={"train": PublishedCount(8_054, 98, True), "test": PublishedCount(8_131, 98, True)},
        data_names=("cars196",),
    ),
    "sop": Benchmark(
        title="Stanford Online Products",
        layout="Ebay_train.txt, Ebay_test.txt, <name>_final/*.JPG; or Info_Files/Ebay_*.txt and images/<name>_final/",
        folders=("Stanford_Online_Products", "online_products", "sop", "SOP"),
        markers=("Ebay_train.txt", "Ebay_test.txt", "Info_Files/Ebay_train.txt", "Info_Files/Ebay_test.txt"),
        image_folders=("",),
        counts={"train": PublishedCount(59_551, 11_318, False), "test": PublishedCount(60_502, 11_316, False)},
        data_names=("sop",),
    ),
    "inshop": Benchmark(
        title="In-Shop Clothes Retrieval (DeepFashion)",
        layout="list_eval_partition.txt (here, in Eval/ or in Anno/) and img/<MEN|WOMEN>/<category>/<item>/*.jpg",
        folders=("In-shop Clothes Retrieval Benchmark", "in-shop", "Inshop", "inshop"),
        markers=tuple(f"{place}/list_eval_partition.txt".lstrip("/") for place in INSHOP_LIST_FOLDERS),
        image_folders=("img",),
        counts={
            "train": PublishedCount(25_882, 3_997, False),
            "query": PublishedCount(14_218, 3_985, False),
            "gallery": PublishedCount(12_612, 3_985, False),
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
            "train": PublishedCount(113_346, 13_164, False, ((110_178, 13_134),)),
            "test_800": PublishedCount(6_493, 800, True),
            "test_1600": PublishedCount(13_377, 1_600, False, ((11_395, 1_600),)),
            "test_2400": PublishedCount(19_777, 2_400, False, ((17_638, 2_400),)),
            "img2vid": PublishedCount(221_567, 26_328, True),
        },
        data_names=(*VEHICLEID_TESTS, "vehicleid"),
        protocols=("leave_one_out", "one_gallery_image"),
        subset_listed=True,
    ),
}
_SIZES = {TEST_LISTS["vehicleid"][name]: size for name, size in VEHICLEID_TESTS.items()}
_READERS: dict[str, Callable[[Path], list[ImageEntry]]] = {
    "cub200": cub200_entries,
    "cars196": cars196_entries,
    "sop": sop_entries,
    "inshop": inshop_entries,
    **{name: partial(vehicleid_entries, num_test_classes=size) for name, size in VEHICLEID_TESTS.items()},
    "vehicleid": partial(vehicleid_entries_of_lists, num_test_classes=_SIZES),
}
BENCHMARK_OF = {name: key for key, benchmark in BENCHMARKS.items() for name in benchmark.data_names}


def metric_prefix(dataset: str, other: str) -> str | None:
    """Return the beginning of the names of the metrics of a data set that are those of another one; None for none.

    "" for the data set itself, "small_" for vehicleid_small in vehicleid.
    """
    if dataset == other:
        return ""
    found = TEST_LISTS.get(dataset, {}).get(other)
    return None if found is None else f"{found}_"


def benchmark_named(key: str) -> Benchmark:
    """Return BENCHMARKS[key]. Raises DataError with the choices for another key."""
    if key not in BENCHMARKS:
        hint = did_you_mean(key, BENCHMARKS)
        raise DataError(f"{key!r} is no benchmark; choices: {', '.join(BENCHMARKS)}{hint}")
    return BENCHMARKS[key]


def folder_of(key: str, root: Path) -> Path:
    """Return the folder that holds BENCHMARKS[key]: root itself, or the folder of that name in root.

    Raises DataError with the files and folders that were looked for.
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


def benchmark_entries(name: str, folder: Path) -> list[ImageEntry]:
    """Return the images that the lists in a folder of `folder_of` name, in their order; name: a key of BENCHMARK_OF."""
    return _READERS[name](folder)


def read_benchmark(name: str, root: Path) -> list[ImageFile]:
    """Return the images of a benchmark with sizes and times; their paths are relative to `folder_of`.

    name: a key of BENCHMARK_OF. root: the folder of the data set, or the one that holds it. part is "train" or "test",
    role "query" or "gallery" in the test part of In-Shop. Other counts than the published ones are accepted, see
    `notes_of`.

    Raises DataError: no such files under root, a line that cannot be read, listed images that are missing.
    """
    folder = folder_of(BENCHMARK_OF[name], root)
    entries = benchmark_entries(name, folder)
    files, missing = find_files(folder, entries)
    if missing:
        raise DataError(
            f"{name}: {len(missing):,} of {len(entries):,} listed images cannot be found in {folder}: "
            f"{listed(missing)}; unpack the archive again, or take these lines out of the lists"
        )
    return files


def part_counts(name: str, images: Iterable[ImageEntry | ImageFile]) -> dict[str, tuple[int, int]]:
    """Return (images, classes) by part, named as in BENCHMARKS: roles for In-Shop, "test_800" etc. for VehicleID."""
    num_images: Counter[str] = Counter()
    classes: dict[str, set[str]] = defaultdict(set)
    for image in images:
        for part in image.lists or (image.role or image.part,):
            num_images[part] += 1
            classes[part].add(image.class_name)
    parts = ["train", "query", "gallery"] if name == "inshop" else ["train", "test"]
    names = {"test": f"test_{VEHICLEID_TESTS[name]}"} if name in VEHICLEID_TESTS else {}
    if name in TEST_LISTS:
        parts = ["train", *TEST_LISTS[name].values()]
        names = {found: f"test_{VEHICLEID_TESTS[other]}" for other, found in TEST_LISTS[name].items()}
    return {names.get(part, part): (num_images[part], len(classes[part])) for part in parts}


def count_differences(name: str, images: Iterable[ImageEntry | ImageFile]) -> dict[str, str]:
    """Return part -> its counts and the published ones, in words, for each part where they differ."""
    published = BENCHMARKS[BENCHMARK_OF[name]].counts
    return {
        part: f"{part} has {num_images:,} images of {num_classes:,} classes, published are {published[part]}"
        for part, (num_images, num_classes) in part_counts(name, images).items()
        if not published[part].fits(num_images, num_classes)
    }


def notes_of(name: str, differences: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each of the `count_differences` of a benchmark.

    Subsets and look-alikes can be opened, but with these notes; `raydml.data.check` refuses them.
    """
    published = BENCHMARKS[BENCHMARK_OF[name]].counts
    return tuple(
        f"{name}: {words} ({published[part].evidence}); `data check` says more" for part, words in differences.items()
    )


def published_catalog(name: str) -> Catalog:
    """Return a catalog with the published numbers of images and classes of a benchmark; none of its images exists.

    name: a key of BENCHMARK_OF. All classes of a part have the same number of images, give or take one: of a split
    within a part, the number of classes is that of the real data set and the number of images is near it. For counting
    alone: its content is not that of the real images. Raises DataError for data without published counts.
    """
    if name not in BENCHMARK_OF:
        raise DataError(
            f"data.name = {name!r} has no published counts; {', '.join(BENCHMARK_OF)} have. "
            "Cure: leave out --as-published, and name the folder of the images"
        )
    benchmark = BENCHMARKS[BENCHMARK_OF[name]]
    lists = _SIZES if name in TEST_LISTS else {}
    test = "test" if BENCHMARK_OF[name] != "vehicleid" else f"test_{VEHICLEID_TESTS.get(name, max(_SIZES.values()))}"
    files = []
    for part, count in benchmark.counts.items():
        if part not in ("train", "query", "gallery", test):
            continue
        role = part if part in ("query", "gallery") else ""
        side = "train" if part == "train" else "test"
        for index in range(count.num_images):
            number = index % count.num_classes
            of_lists = tuple(found for found, size in lists.items() if number < size and side == "test")
            files.append(ImageFile(f"{part}/{number}/{index}", f"{side} {number:05d}", 0, side, role, of_lists))
    return catalog_of(name, None, files, protocols=benchmark.protocols)
