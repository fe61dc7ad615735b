import io
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from raydml.data import benchmarks, matlab_annotations
from raydml.data.benchmark_lists import (
    cars196_entries,
    cub200_entries,
    inshop_entries,
    sop_entries,
    vehicleid_entries,
    vehicleid_list,
)
from raydml.data.benchmarks import (
    BENCHMARK_OF,
    BENCHMARKS,
    PublishedCount,
    count_differences,
    folder_of,
    notes_of,
    part_counts,
    published_catalog,
    read_benchmark,
)
from raydml.data.catalog import DataError, ImageEntry
from raydml.data.datasets import DATASETS, open_catalog
from raydml.data.miniatures import build
from raydml.data.splits import make_split
from tests.data.layouts import EVERY_LAYOUT, edit
from tests.data.refusals import LISTS, assert_contains, needs_real_lists, refusal
from tests.golden_vectors import golden_arrays, golden_facts


def partition(paths, labels) -> set[frozenset[str]]:
    """The classes as sets of paths: what a numbering of labels cannot change."""
    groups = defaultdict(set)
    for path, label in zip(paths, labels, strict=True):
        groups[label].add(str(path))
    return {frozenset(group) for group in groups.values()}


def of_part(entries: list[ImageEntry], part: str) -> set[frozenset[str]]:
    chosen = [entry for entry in entries if part in (entry.part, entry.role)]
    return partition([entry.path for entry in chosen], [entry.class_name for entry in chosen])


@pytest.fixture
def golden_lists(tmp_path):
    """The list files of classification_datasets, written below tmp_path/<data set>."""
    arrays = golden_arrays("classification_datasets")
    for key in arrays:
        if match := re.fullmatch(r"(\w+?)__file__(.+)", key):
            (tmp_path / match[1]).mkdir(exist_ok=True)
            (tmp_path / match[1] / match[2]).write_bytes(arrays[key].tobytes())
    return tmp_path, arrays


TRAIN_TEST = ("train", "test")


class TestGoldenParsers:
    """The seeds number labels by first appearance or by sorted id within a part; we keep the published id as the name
    of the class. So the partition into classes is compared, and the paths. The seeds put the first half of the classes
    present into train; here the last id of that half is given instead (published: 100 and 98)."""

    @pytest.mark.parametrize(
        ("name", "read", "parts", "classes"),
        [
            ("cub200", partial(cub200_entries, last_train_class=3), TRAIN_TEST, None),
            (
                "cars196",
                partial(cars196_entries, last_train_class=4),
                ("train", "test"),
                [f"00{c}" for c in range(1, 9)],
            ),
            ("sop", sop_entries, TRAIN_TEST, [f"{c:05d}" for c in range(1, 15)]),
            ("inshop", inshop_entries, ("train", "query", "gallery"), None),
        ],
    )
    def test_the_parts_of_the_release(self, golden_lists, name, read, parts, classes):
        root, arrays = golden_lists
        entries = read(root / name)
        for part in parts:
            paths, labels = arrays[f"{name}__{part}_paths"], arrays[f"{name}__{part}_labels"]
            assert of_part(entries, part) == partition(paths, labels)
        assert classes is None or sorted({entry.class_name for entry in entries}) == classes

    def test_query_and_gallery_of_inshop_share_one_numbering(self, golden_lists):
        root, arrays = golden_lists
        entries = inshop_entries(root / "inshop")
        of_label = dict(zip(arrays["inshop__query_labels"].tolist(), arrays["inshop__query_paths"], strict=True))
        for path, label in zip(arrays["inshop__gallery_paths"], arrays["inshop__gallery_labels"].tolist(), strict=True):
            assert len({entry.class_name for entry in entries if entry.path in (path, of_label[label])}) == 1

    @pytest.mark.parametrize(
        ("name", "read", "parts"),
        [
            ("online_products", sop_entries, {"train": "training", "test": "testing"}),
            ("in-shop", inshop_entries, {"train": "training", "query": "testing_query", "gallery": "testing_gallery"}),
            *(
                ("vehicle_id", partial(vehicleid_entries, num_test_classes=800 * k), {"train": "training", "test": one})
                for k, one in enumerate(("testing_set1", "testing_set2", "testing_set3"), start=1)
            ),
        ],
    )
    def test_the_parts_of_mic(self, tmp_path, name, read, parts):
        expected = self.mic_layout(tmp_path, name)
        entries = read(tmp_path)
        if name == "in-shop":  # its parser loses the first row
            first = "img/WOMEN/Dresses/id_00000007/01_1_front.jpg"
            assert any(entry.path == first for entry in entries)
            entries = [entry for entry in entries if entry.path != first]
        assert {theirs: of_part(entries, ours) for ours, theirs in parts.items()} == {
            theirs: expected[theirs] for theirs in parts.values()
        }

    def mic_layout(self, root: Path, name: str) -> dict[str, set[frozenset[str]]]:
        case = golden_facts("mic_parsers")["expected"][name]
        for file, content in case["files"].items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(content or "")
        return {part: partition(*zip(*split["image_list"], strict=True)) for part, split in case["splits"].items()}

    def test_deep_metric_list_is_an_image_list_with_other_separators(self, tmp_path):
        """Its `path label` files are no published format; with commas and a header they are an image_list."""
        arrays = golden_arrays("deep_metric_datasets")
        for path in arrays["cub_list__paths"]:
            (tmp_path / str(path)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(path)).write_bytes(b"x")
        text = arrays["cub_list__file"].tobytes().decode().replace(" ", ",")
        (tmp_path / "list.csv").write_text("path,label\n" + text)
        catalog = open_catalog("image_list", tmp_path, "list.csv")
        expected = partition(arrays["cub_list__paths"], arrays["cub_list__labels"])
        assert partition(catalog.paths, catalog.labels.tolist()) == expected
        assert list(catalog.class_names) == [str(label) for label in arrays["cub_list__classes_sorted"].tolist()]


class TestMiniatures:
    @pytest.mark.parametrize(("name", "layout"), EVERY_LAYOUT)
    def test_each_layout_opens(self, tmp_path, name, layout):
        folder = build(name, tmp_path, classes_per_part=3, images_per_class=4, layout=layout)
        for data_name in BENCHMARKS[name].data_names:
            size = {"vehicleid_small": 3, "vehicleid_medium": 6, "vehicleid_large": 9, "vehicleid": 9}.get(data_name, 3)
            catalog = open_catalog(data_name, folder)
            assert len(catalog.class_names) == 3 + size
            assert np.bincount(catalog.labels).tolist() == [4] * (3 + size)
            assert catalog.given_split.count("train") == 12
            assert catalog.given_split.count("test") == 4 * size
            assert catalog.protocols == BENCHMARKS[name].protocols

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_root_may_be_the_folder_or_the_one_above(self, tmp_path, name):
        data_name = BENCHMARKS[name].data_names[0]
        direct = open_catalog(data_name, build(name, tmp_path / BENCHMARKS[name].folders[0]))
        above = open_catalog(data_name, tmp_path)
        assert above.root == direct.root == tmp_path / BENCHMARKS[name].folders[0]
        assert (above.content, above.paths) == (direct.content, direct.paths)

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_an_empty_folder_says_what_was_looked_for(self, tmp_path, name):
        facts = BENCHMARKS[name]
        message = refusal(open_catalog, facts.data_names[0], tmp_path)
        assert_contains(message, facts.folders[0], facts.markers[0], facts.layout)

    @pytest.mark.parametrize(
        ("data_name", "classes"),
        [
            ("cub200", ("001.Black_footed_Albatross", "002.Laysan_Albatross", "101.White_Pelican")),
            ("cars196", ("001", "002", "099")),
            ("sop", ("00001", "00002", "11319")),
            ("inshop", ("id_00000001", "id_00000002", "id_00000003")),
            ("vehicleid_small", ("00030", "00037", "18515")),
        ],
    )
    def test_class_names_sort_as_their_ids(self, tmp_path, data_name, classes):
        catalog = open_catalog(data_name, build(BENCHMARK_OF[data_name], tmp_path, classes_per_part=2))
        assert catalog.class_names[:3] == classes
        ids = [int(re.search(r"\d+", name)[0]) for name in catalog.class_names]
        assert ids == sorted(ids)

    def test_inshop_roles(self, tmp_path):
        catalog = open_catalog("inshop", build("inshop", tmp_path))
        expected = {"train": {""}, "test": {"query", "gallery"}}
        for part, roles in expected.items():
            assert {r for r, p in zip(catalog.roles, catalog.given_split, strict=True) if p == part} == roles
        assert catalog.roles.count("query") == catalog.roles.count("gallery") == 6
        assert open_catalog("sop", build("sop", tmp_path / "sop")).roles is None

    def test_vehicle_images_keep_their_zeros(self, tmp_path):
        catalog = open_catalog("vehicleid_large", build("vehicleid", tmp_path))
        assert "image/0279029.jpg" in catalog.paths
        assert "image/0001000.jpg" in catalog.paths  # vehicle 0
        assert catalog.class_names[0] == "00000"

    def test_vehicleid_is_all_three_lists_and_where_they_disagree_it_is_none(self, tmp_path):
        root = build("vehicleid", tmp_path)
        catalog, large = open_catalog("vehicleid", root), open_catalog("vehicleid_large", root)
        assert (catalog.paths, catalog.given_split) == (large.paths, large.given_split)
        assert catalog.content != large.content  # other numbers come from it
        for name in ("small", "medium", "large"):
            alone = open_catalog(f"vehicleid_{name}", root)
            tested = {alone.class_names[c] for c in alone.labels[np.array(alone.given_split) == "test"]}
            assert catalog.lists[name] == tuple(sorted(tested))
        assert list(catalog.lists) == ["small", "medium", "large"]
        edit(root / "train_test_split" / "test_list_800.txt", "0279029 23781\n", "")
        message = refusal(open_catalog, "vehicleid", root)
        assert_contains(message, "test_list_800.txt and test_list_1600.txt have other images of 1 vehicles: 23781")
        assert "data.name: vehicleid_small" in message
        assert open_catalog("vehicleid_small", root).lists == {}

    def test_cars_of_both_folders_have_the_same_file_names(self, tmp_path):
        catalog = open_catalog("cars196", build("cars196", tmp_path, layout="devkit"))
        assert {"cars_train/00001.jpg", "cars_test/00001.jpg"} <= set(catalog.paths)
        parts = dict(zip(catalog.paths, catalog.given_split, strict=True))
        assert {parts[path] for path in parts if path.startswith("cars_train")} == {"train", "test"}

    def test_cars_layouts_agree(self, tmp_path):
        devkit = cars196_entries(build("cars196", tmp_path / "devkit", layout="devkit"))
        assert devkit == cars196_entries(build("cars196", tmp_path / "csv", layout="csv"))

    def test_devkit_with_the_csv_of_the_test_classes(self, tmp_path):
        build("cars196", tmp_path / "csv", layout="csv")
        folder = build("cars196", tmp_path / "devkit", layout="devkit")
        expected = cars196_entries(folder)
        (folder / "cars_test_annos_withlabels.mat").unlink()
        assert_contains(refusal(cars196_entries, folder), "anno_test.csv", "cars_test_annos.mat has none")
        (tmp_path / "csv" / "anno_test.csv").rename(folder / "anno_test.csv")
        assert cars196_entries(folder) == expected

    def test_one_image_classes_are_allowed(self, tmp_path):
        catalog = open_catalog("sop", build("sop", tmp_path, images_per_class=1))
        assert len(catalog.paths) == len(catalog.class_names) == 6

    def test_missing_images_are_counted_and_named(self, tmp_path):
        folder = build("cub200", tmp_path, images_per_class=8)
        for file in (folder / "images" / "002.Laysan_Albatross").iterdir():
            file.unlink()
        next((folder / "images" / "101.White_Pelican").iterdir()).unlink()
        (folder / "images" / "103.Sayornis" / "Sayornis_0000_103.jpg").unlink()
        (folder / "images" / "103.Sayornis" / "Sayornis_0000_103.jpg").mkdir()
        assert_contains(
            refusal(read_benchmark, "cub200", folder),
            "10 of 48 listed images cannot be found",
            *("images/002.Laysan_Albatross/Laysan_Albatross_0007_2.jpg", "Sayornis_0000_103.jpg (Is a directory)"),
        )

    def test_the_classification_split_of_cub_is_never_read(self, tmp_path):
        folder = build("cub200", tmp_path)
        before = open_catalog("cub200", folder)
        (folder / "train_test_split.txt").write_bytes(b"\xff nonsense")
        assert open_catalog("cub200", folder).given_split == before.given_split

    def test_carriage_returns_and_blank_ends_do_not_matter(self, tmp_path):
        folder = build("sop", tmp_path)
        before = sop_entries(folder)
        for part in ("train", "test"):
            file = folder / f"Ebay_{part}.txt"
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n  \r\n")
        assert sop_entries(folder) == before


class TestNotes:
    def test_a_subset_opens_and_says_so(self, tmp_path):
        catalog = open_catalog("sop", build("sop", tmp_path))
        assert catalog.notes == (
            "sop: train has 12 images of 3 classes, published are 59,551 of 11,318 (no real file has confirmed this); "
            "`data check` says more",
            "sop: test has 12 images of 3 classes, published are 60,502 of 11,316 (no real file has confirmed this); "
            "`data check` says more",
        )
        catalog = open_catalog("cub200", build("cub200", tmp_path / "cub"))
        assert catalog.notes[0].endswith(
            "published are 5,864 of 100 (counted in the real lists); `data check` says more"
        )

    @pytest.mark.parametrize("data_name", list(BENCHMARK_OF))
    def test_published_counts_get_no_note_and_one_image_more_does(self, data_name):
        published = BENCHMARKS[BENCHMARK_OF[data_name]].counts
        size = {"vehicleid_small": 800, "vehicleid_medium": 1600, "vehicleid_large": 2400}.get(data_name)
        lists = {"test_800": ("small",), "test_1600": ("medium",), "test_2400": ("large",)}
        entries = []
        for part in published:
            if part == "img2vid" or (size and part.startswith("test_") and part != f"test_{size}"):
                continue
            count = published[part]
            role = part if part in ("query", "gallery") else ""
            kind = "train" if part == "train" else "test"
            items = "test" if role else part
            of_lists = lists.get(part, ())
            entries += [
                ImageEntry(f"{part}/{i}", f"{items}{i % count.num_classes}", kind, role, () if size else of_lists)
                for i in range(count.num_images)
            ]
        assert count_differences(data_name, entries) == {}
        (note,) = notes_of(
            data_name, count_differences(data_name, [*entries, ImageEntry("one/more", "train0", "train")])
        )
        assert note.startswith(f"{data_name}: train has ")

    def test_counts_that_circulate_are_as_good(self):
        count = PublishedCount(10, 3, False, ((8, 2),))
        assert [count.fits(*pair) for pair in ((10, 3), (8, 2), (10, 2), (8, 3))] == [True, True, False, False]
        assert str(count) == "10 of 3 or 8 of 2"

    def test_classes_are_counted_within_each_part(self):
        entries = [ImageEntry(path, "x", "test", role) for path, role in (("a", "query"), ("b", "gallery"))]
        entries.append(ImageEntry("c", "y", "train"))
        assert part_counts("inshop", entries) == {"train": (1, 1), "query": (1, 1), "gallery": (1, 1)}
        assert part_counts("vehicleid_medium", entries[2:]) == {"train": (1, 1), "test_1600": (0, 0)}

    def test_every_benchmark_can_be_named(self):
        assert set(BENCHMARK_OF) < set(DATASETS)
        own = {"digits", "glyphs", "image_folder", "image_list", "parquet", "webdataset"}
        assert own == set(DATASETS) - set(BENCHMARK_OF)
        for key, benchmark in BENCHMARKS.items():
            assert benchmark.data_names
            assert [BENCHMARK_OF[name] for name in benchmark.data_names] == [key] * len(benchmark.data_names)
        assert set(benchmarks._READERS) == set(BENCHMARK_OF)


def duplicate_line(file: Path) -> None:
    lines = file.read_text().split("\n")
    file.write_text("\n".join([*lines[:-1], lines[-2], ""]))


# Each row: benchmark, list file, old text, new text, what the message must hold beside the file's name.
FAULTS = [
    ("cub200", "images.txt", "\n2 ", "\n2", ["line 2: '2001.Black", "image_id path"]),
    ("cub200", "images.txt", "\n2 ", "\n\n2 ", ["line 2: ''", "image_id path"]),
    ("cub200", "images.txt", "\n3 ", "\nthree ", ["line 3: 'three 001.", "whole number"]),
    ("cub200", "images.txt", "\n3 ", "\n2 ", ["1 image ids are listed again"]),
    ("cub200", "images.txt", "\n3 ", "\n77 ", ["3, 77"]),
    ("cub200", "images.txt", "\n3 001.B", "\n3 002.B", ["line 3: '3 002.B", "must have the folder"]),
    ("cub200", "images.txt", "_0003_", "_0002_", ["1 images are listed more than once"]),
    ("cub200", "image_class_labels.txt", "\n2 1\n", "\n2 1 1\n", ["line 2: '2 1 1'"]),
    ("cub200", "image_class_labels.txt", "\n2 1\n", "\n2 -1\n", ["line 2: '2 -1'"]),
    ("cub200", "image_class_labels.txt", "\n2 1\n", "\n2 \u0661\n", ["line 2:", "whole number"]),
    ("cub200", "image_class_labels.txt", "\n2 1\n", "\n2 9\n", ["line 2: '2 9'", "class of classes.txt"]),
    ("cub200", "image_class_labels.txt", "\n2 1\n", "\n2 2\n", ["line 2: '2 001.", "must have the folder"]),
    ("cub200", "classes.txt", "2 002", "2 020", ["line 2: '2 020.Laysan", "three digits"]),
    ("sop", "Ebay_train.txt", "super_class_id", "superclass_id", ["line 1 is 'image_id", "it must be 'image_id class"]),
    ("sop", "Ebay_train.txt", "\n1 1 ", "\n1 x ", ["line 2: '1 x 2", "column 2"]),
    ("sop", "Ebay_test.txt", "\n13 11319 ", "\n13 1 ", ["1 classes are in both train and test: 00001"]),
    ("sop", "Ebay_test.txt", "cabinet_final/", "../cabinet_final/", ["may lead out of the folder: ../cabinet"]),
    ("sop", "Ebay_test.txt", "cabinet_final/", "/cabinet_final/", ["may lead out of the folder: /cabinet"]),
    ("inshop", "list_eval_partition.txt", "24\n", "25\n", ["line 1 states '25' images, 24 follow"]),
    ("inshop", "list_eval_partition.txt", "item_id", "id", ["line 2 is 'image_name id"]),
    ("inshop", "list_eval_partition.txt", "query", "probe", ["line 7:", "train, query, gallery"]),
    ("inshop", "list_eval_partition.txt", "01 train", "02 train", ["both train and test: id_00000002"]),
    ("vehicleid", "train_test_split/train_list.txt", " 30\n", " 30 red\n", ["line 1: '0004000 30 red'"]),
    ("vehicleid", "train_test_split/train_list.txt", " 30\n", " 123456\n", ["line 1:", "0 to 99999"]),
    ("vehicleid", "train_test_split/train_list.txt", "0004000", "../../x", ["line 1: '../../x 30'"]),
    ("vehicleid", "train_test_split/train_list.txt", " 30\n", " 23781\n", ["both train and test: 23781"]),
]


class TestFaultyLists:
    @pytest.mark.parametrize(("name", "file", "old", "new", "parts"), FAULTS)
    def test_the_file_and_the_line_are_named(self, tmp_path, name, file, old, new, parts):
        folder = build(name, tmp_path)
        data_name = BENCHMARKS[name].data_names[0]
        read_benchmark(data_name, folder)
        edit(folder / file, old, new)
        message = refusal(read_benchmark, data_name, folder)
        if "both train" not in message and "lead out" not in message:
            assert str(folder / file) in message or "images.txt" in message
        assert_contains(message, *parts)

    def test_inshop_items_with_queries_only(self, tmp_path):
        folder = build("inshop", tmp_path, images_per_class=2)
        edit(folder / "list_eval_partition.txt", "gallery", "query  ")
        message = refusal(read_benchmark, "inshop", folder)
        assert "1 items have queries and no gallery image to find: id_00000002" in message

    @pytest.mark.parametrize(
        ("content", "part"),
        [(b"", "is empty"), (b"1 \xff\n", "UTF-8"), (b"image_id class_id super_class_id path", "ends")],
    )
    def test_files_that_are_no_lists(self, tmp_path, content, part):
        folder = build("sop", tmp_path)
        (folder / "Ebay_test.txt").write_bytes(content)
        assert part in refusal(read_benchmark, "sop", folder)

    def test_a_list_that_is_absent(self, tmp_path):
        folder = build("cub200", tmp_path)
        (folder / "classes.txt").unlink()
        assert "classes.txt" in refusal(read_benchmark, "cub200", folder)

    def test_many_wrong_lines_are_counted_and_five_quoted(self, tmp_path):
        folder = build("vehicleid", tmp_path, images_per_class=5)
        file = folder / "train_test_split" / "train_list.txt"
        file.write_text(file.read_text().replace(" ", ","))
        message = refusal(read_benchmark, "vehicleid_small", folder)
        assert_contains(message, "15 do not", "line 5:", "and 10 more")
        assert "line 6:" not in message

    def test_class_ids_of_cars(self, tmp_path):
        folder = build("cars196", tmp_path, layout="csv")
        edit(folder / "anno_train.csv", ",1\n", ",197\n")
        message = refusal(read_benchmark, "cars196", folder)
        assert "classes are 1 to 196; 1 images have others: cars_train/00001.jpg (197)" in message
        edit(folder / "anno_train.csv", ",197\n", ",0\n")
        assert "cars_train/00001.jpg (0)" in refusal(read_benchmark, "cars196", folder)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
            lambda file: file.write_text("<html>404</html>" * 50),
            lambda file: savemat(file, {"annos": np.zeros(3)}),
        ],
        ids=["empty", "cut", "text", "other variable"],
    )
    def test_damaged_annotations_of_cars(self, tmp_path, damage):
        folder = build("cars196", tmp_path, layout="merged")
        damage(folder / "cars_annos.mat")
        assert str(folder / "cars_annos.mat") in refusal(read_benchmark, "cars196", folder)

    def test_annotations_that_end_the_process_that_reads_them(self, tmp_path, monkeypatch):
        """scipy ends the process on some damaged files; here a signal stands in for such a file."""
        folder = build("cars196", tmp_path, layout="merged")
        script = tmp_path / "dies.py"
        script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
        monkeypatch.setattr(matlab_annotations, "__file__", str(script))
        message = refusal(read_benchmark, "cars196", folder)
        assert_contains(message, str(folder / "cars_annos.mat"), "signal 11")

    def test_annotations_of_cars_without_classes(self, tmp_path):
        folder = build("cars196", tmp_path, layout="merged")
        row = np.array([("a", 1)], dtype=[("relative_im_path", object), ("test", object)])
        savemat(folder / "cars_annos.mat", {"annotations": row})
        assert_contains(refusal(read_benchmark, "cars196", folder), str(folder / "cars_annos.mat"), "no class")


@needs_real_lists
class TestRealLists:
    def test_cub200(self):
        entries = cub200_entries(LISTS / "cub200")
        assert part_counts("cub200", entries) == {"train": (5864, 100), "test": (5924, 100)}
        assert count_differences("cub200", entries) == {}
        sizes = np.unique([entry.class_name for entry in entries], return_counts=True)[1]
        assert (sizes.min(), sizes.max()) == (41, 60)  # its README

    def test_cars196_csv_agrees_with_the_mat_file(self, tmp_path):
        entries = cars196_entries(LISTS / "cars196")  # train from the .mat file, test from the CSV
        assert part_counts("cars196", entries) == {"train": (8054, 98), "test": (8131, 98)}
        for part in ("train", "test"):
            (tmp_path / f"anno_{part}.csv").symlink_to(LISTS / "cars196" / f"anno_{part}.csv")
        assert cars196_entries(tmp_path) == entries
        annotations = loadmat(io.BytesIO((LISTS / "cars196" / "cars_test_annos.mat").read_bytes()))["annotations"][0]
        names = {f"cars_test/{row['fname'][0]}" for row in annotations}
        assert {entry.path for entry in entries if entry.path.startswith("cars_test/")} == names
        in_train_folder = [entry for entry in entries if entry.path.startswith("cars_train/")]
        assert len([entry for entry in in_train_folder if entry.part == "train"]) == 4052

    def test_vehicleid(self):
        for name, part in (("test_list_800", "test_800"), ("img2vid", "img2vid")):
            entries = vehicleid_list(LISTS / "vehicleid" / f"{name}.txt")
            published = BENCHMARKS["vehicleid"].counts[part]
            assert published.confirmed
            assert len({entry.path for entry in entries}) == len(entries)
            assert published.fits(len(entries), len({entry.class_name for entry in entries}))
        train = vehicleid_list(LISTS / "vehicleid" / "train_partial_49999.txt")
        assert (len(train), len({entry.class_name for entry in train})) == (49_999, 5_055)

    def test_look_alikes_open_with_notes(self):
        for name, folder, counts in (
            ("cub200", "cub200_lookalike_web9788", {"train": (4864, 100), "test": (4924, 100)}),
            ("sop", "sop_lookalike_shoes", {"train": (9131, 2051), "test": (9091, 2050)}),
        ):
            entries = benchmarks.benchmark_entries(name, folder_of(name, LISTS / folder))
            assert part_counts(name, entries) == counts
            assert len(count_differences(name, entries)) == 2


@needs_real_lists
@pytest.mark.parametrize(
    ("name", "first_test", "sizes"), [("cub200", 100, [25] * 4), ("cars196", 98, [25, 25, 24, 24])]
)
def test_reality_check_folds_of_the_real_classes(name, first_test, sizes):
    """4 contiguous quarters of the training classes; the given test classes do not move."""
    from raydml.data.catalog import ImageFile, catalog_of

    rows = [ImageFile(*entry[:2], 1, *entry[2:]) for entry in benchmarks.benchmark_entries(name, LISTS / name)]
    catalog = catalog_of(name, LISTS, rows)
    settings = {"test_fraction": 0.1, "val_fraction": 0.2, "num_folds": 4, "order": "sorted", "seed": 0}
    folds = [make_split(catalog, fold=fold, **settings) for fold in range(4)]
    assert [len(split.val) for split in folds] == sizes
    assert [c for split in folds for c in split.val] == list(range(first_test))
    assert {split.test for split in folds} == {tuple(range(first_test, 2 * first_test))}
    search = make_split(catalog, fold=None, **settings)
    assert search.val == tuple(range(first_test - 20, first_test))
    assert search.train == tuple(range(first_test - 20))


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("cub200", (5_864, 100), (5_924, 100)),
        ("inshop", (25_882, 3_997), (14_218 + 12_612, 3_985)),
        ("vehicleid_small", (113_346, 13_164), (6_493, 800)),
        ("vehicleid", (113_346, 13_164), (19_777, 2_400)),
    ],
)
def test_a_published_catalog_has_the_published_counts(name, train, test):
    catalog = published_catalog(name)
    parts = np.array(catalog.given_split)
    for part, expected in (("train", train), ("test", test)):
        labels = catalog.labels[parts == part]
        assert (len(labels), len(set(labels.tolist()))) == expected
    if name == "inshop":
        roles = np.array(catalog.roles)
        assert [(roles == role).sum() for role in ("query", "gallery")] == [14_218, 12_612]
        assert len({catalog.labels[i] for i in np.flatnonzero(roles == "query")}) == 3_985
    sizes = {"small": 800, "medium": 1600, "large": 2400} if name == "vehicleid" else {}
    assert {of: len(classes) for of, classes in catalog.lists.items()} == sizes
    with pytest.raises(DataError, match="no published counts"):
        published_catalog("image_folder")
