import csv
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydml.data.datasets import Catalog, DataError, digit_images, make_split, open_catalog

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SPLIT = {"test_fraction": 0.5, "val_fraction": 0.5, "num_folds": 4, "fold": None, "order": "sorted", "seed": 0}


def write_image(file: Path, shade: int = 100) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file)


def folder_of(root: Path, **images_per_class: int) -> Path:
    for name, count in images_per_class.items():
        for index in range(count):
            write_image(root / name / f"{index}.png", shade=index)
    return root


def write_list(root: Path, rows: list[list[str]], header: tuple[str, ...] = ("path", "label")) -> str:
    with open(root / "list.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])
    return "list.csv"


def catalog_of(num_classes: int, given: list[str] | None = None) -> Catalog:
    """Two images a class; `given` is one part a class."""
    labels = np.repeat(np.arange(num_classes), 2)
    names = tuple(f"class{index:02d}" for index in range(num_classes))
    parts = tuple(given[c] for c in labels) if given else None
    return Catalog("image_list", None, tuple(f"{i}.png" for i in range(len(labels))), labels, names, parts, "0")


def refusal(call, *args, **settings) -> str:
    with pytest.raises(DataError) as caught:
        call(*args, **settings)
    return str(caught.value)


class TestDigits:
    def test_catalog_is_scikit_learns(self):
        catalog = open_catalog("digits", None)
        # 178 zeros ... 180 nines: the counts in scikit-learn's description of the data set
        assert np.bincount(catalog.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert catalog.class_names == tuple("0123456789")
        assert len(set(catalog.paths)) == 1797

    def test_pixels_fill_the_byte(self):
        images, labels = digit_images()
        assert images.dtype == np.uint8
        assert images.shape == (1797, 8, 8)
        # the first digit is the zero printed in scikit-learn's documentation: row 0 is 0 0 5 13 9 1 0 0
        assert labels[0] == 0
        assert images[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
        assert images.max() == 255

    def test_sorted_halves_seal_five_to_nine(self):
        split = make_split(open_catalog("digits", None), **SPLIT)
        assert split.test == (5, 6, 7, 8, 9)
        assert split.train == (0, 1)
        assert split.val == (2, 3, 4)
        assert split.to_dict() == {"train": [0, 1], "val": [2, 3, 4], "test": [5, 6, 7, 8, 9]}

    def test_wrong_name_gets_the_nearest(self):
        message = refusal(open_catalog, "digit", None)
        assert "'digit'" in message
        assert "nearest: digits" in message
        assert "image_folder" in message


class TestFolder:
    def test_nested_leaf_folders_are_classes(self, tmp_path):
        folder_of(tmp_path, **{"Greek/character01": 2, "Latin/character01": 3})
        (tmp_path / "README.txt").write_text("not an image")
        write_image(tmp_path / ".thumbnails" / "x.png")
        write_image(tmp_path / "Greek" / "character01" / ".hidden.png")
        (tmp_path / "Greek" / "character01" / "Thumbs.db").write_text("")
        catalog = open_catalog("image_folder", tmp_path)
        assert catalog.class_names == ("Greek/character01", "Latin/character01")
        assert catalog.labels.tolist() == [0, 0, 1, 1, 1]
        assert catalog.paths[2] == "Latin/character01/0.png"

    def test_no_image_is_opened(self, tmp_path):
        for name in ("a", "b"):
            for index in range(2):
                (tmp_path / name).mkdir(exist_ok=True)
                (tmp_path / name / f"{index}.JPG").write_bytes(b"not a picture")
        assert len(open_catalog("image_folder", tmp_path).paths) == 4

    def test_content_is_the_same_elsewhere_and_notices_changes(self, tmp_path):
        here = open_catalog("image_folder", folder_of(tmp_path / "here", a=2, b=2)).content
        there = open_catalog("image_folder", folder_of(tmp_path / "there", b=2, a=2)).content
        assert here == there
        (tmp_path / "there" / "a" / "0.png").write_bytes(b"longer or shorter")
        assert open_catalog("image_folder", tmp_path / "there").content != here
        os.rename(tmp_path / "here" / "a", tmp_path / "here" / "c")
        assert open_catalog("image_folder", tmp_path / "here").content != here

    def test_empty_class_is_named(self, tmp_path):
        folder_of(tmp_path, a=2, b=2)
        (tmp_path / "hollow").mkdir()
        assert "empty class): hollow" in refusal(open_catalog, "image_folder", tmp_path)

    def test_classes_with_one_image_are_named(self, tmp_path):
        message = refusal(open_catalog, "image_folder", folder_of(tmp_path, a=2, lonely=1, single=1))
        assert "2 of 3 classes" in message
        assert "lonely (1), single (1)" in message
        assert "a (2)" not in message

    @pytest.mark.parametrize("stray", ["stray.png", "alphabet/stray.png"])
    def test_images_beside_sub_folders_are_refused(self, tmp_path, stray):
        folder_of(tmp_path, **{"alphabet/a": 2, "alphabet/b": 2})
        write_image(tmp_path / stray)
        message = refusal(open_catalog, "image_folder", tmp_path)
        assert "beside sub-folders" in message
        assert "(1 images)" in message

    def test_root_unset_absent_or_without_images(self, tmp_path):
        assert "machine.data_root" in refusal(open_catalog, "image_folder", None)
        assert "is not a folder" in refusal(open_catalog, "image_folder", tmp_path / "nowhere")
        assert "no class folder" in refusal(open_catalog, "image_folder", tmp_path)

    def test_links_that_lead_back_or_nowhere(self, tmp_path):
        folder_of(tmp_path, a=2, b=2)
        (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "absent.png")
        assert "1 links that lead nowhere: b/gone.png" in refusal(open_catalog, "image_folder", tmp_path)
        (tmp_path / "b" / "gone.png").unlink()
        (tmp_path / "loop").symlink_to(tmp_path)
        assert "'loop' leads back" in refusal(open_catalog, "image_folder", tmp_path)


class TestList:
    def test_rows_in_any_order_make_the_same_catalog(self, tmp_path):
        folder_of(tmp_path, x=4)
        rows = [["x/3.png", "b"], ["x/0.png", "a"], ["x/2.png", "b"], ["./x/1.png", "a"]]
        first = open_catalog("image_list", tmp_path, write_list(tmp_path, rows))
        assert first.class_names == ("a", "b")
        assert first.paths == ("x/0.png", "x/1.png", "x/2.png", "x/3.png")
        assert first.labels.tolist() == [0, 0, 1, 1]
        assert first.given_split is None
        again = open_catalog("image_list", tmp_path, write_list(tmp_path, rows[::-1]))
        assert again.content == first.content
        assert again.paths == first.paths

    def test_split_column_decides_and_counts_as_content(self, tmp_path):
        folder_of(tmp_path, a=2, b=2, c=2, d=2, e=2, f=2)
        parts = dict(zip("abcdef", ["test", "train", "val", "train", "test", "val"], strict=True))
        rows = [[f"{c}/{i}.png", c, parts[c]] for c in "abcdef" for i in range(2)]
        catalog = open_catalog("image_list", tmp_path, write_list(tmp_path, rows, ("path", "label", "split")))
        split = make_split(catalog, **SPLIT)
        assert (split.train, split.val, split.test) == ((1, 3), (2, 5), (0, 4))
        unsplit = open_catalog("image_list", tmp_path, write_list(tmp_path, [row[:2] for row in rows]))
        assert unsplit.content != catalog.content

    def test_other_column_names_are_told(self, tmp_path):
        list_file = write_list(tmp_path, [["a.png", "3"]], ("path", "class_id"))
        message = refusal(open_catalog, "image_list", tmp_path, list_file)
        assert "no column label" in message
        assert "it has: path, class_id" in message

    def test_missing_files_are_counted_and_ten_named(self, tmp_path):
        folder_of(tmp_path, a=2)
        rows = [["a/0.png", "a"], ["a/1.png", "a"]] + [[f"b/{i:02d}.png", "b"] for i in range(12)]
        message = refusal(open_catalog, "image_list", tmp_path, write_list(tmp_path, rows))
        assert "12 of 14 files do not exist" in message
        assert "b/00.png" in message
        assert "b/09.png" in message
        assert "b/10.png" not in message
        assert "and 2 more" in message

    def test_all_faults_of_a_list_come_at_once(self, tmp_path):
        folder_of(tmp_path, a=3)
        rows = [
            ["a/0.png", "a", "train"],
            ["a/./0.png", "a", "train"],
            ["", "a", "train"],
            ["a/1.png", "a", "valid"],
            ["../a/1.png", "a", "val"],
            ["a/2.png", "a", ""],
        ]
        list_file = write_list(tmp_path, rows, ("path", "label", "split"))
        message = refusal(open_catalog, "image_list", tmp_path, list_file)
        assert "line 3: 'a/./0.png' is listed twice" in message
        assert "line 4: path or label is empty" in message
        assert "line 5: split = 'valid'; choices: train, val, test" in message
        assert "line 6: '../a/1.png' leaves" in message
        assert "1 of 2 images have no split: a/2.png" in message

    def test_list_unset_absent_or_binary(self, tmp_path):
        assert "data.list_file" in refusal(open_catalog, "image_list", tmp_path)
        assert "does not exist" in refusal(open_catalog, "image_list", tmp_path, "no.csv")
        (tmp_path / "bad.csv").write_bytes(b"path,label\n\xff\xfe\x00,a\n")
        assert "UTF-8" in refusal(open_catalog, "image_list", tmp_path, "bad.csv")
        assert "lists no image" in refusal(open_catalog, "image_list", tmp_path, write_list(tmp_path, []))

    def test_byte_order_mark_and_spaces_are_no_obstacle(self, tmp_path):
        folder_of(tmp_path, a=2)
        (tmp_path / "list.csv").write_text("\ufeffpath, label\na/0.png, a\na/1.png, a\n", encoding="utf-8")
        assert open_catalog("image_list", tmp_path, "list.csv").class_names == ("a",)


class TestSplit:
    @pytest.mark.parametrize("order", ["sorted", "shuffled"])
    @pytest.mark.parametrize("num_classes", [8, 13, 81])
    def test_folds_partition_the_development_classes(self, num_classes, order):
        catalog = catalog_of(num_classes)
        settings = {**SPLIT, "order": order, "num_folds": 2 if num_classes == 8 else 3}
        search = make_split(catalog, **settings)
        development = set(search.train) | set(search.val)
        seen: list[int] = []
        for fold in range(settings["num_folds"]):
            split = make_split(catalog, **{**settings, "fold": fold})
            assert split.test == search.test  # the seal does not move with the fold
            assert set(split.train) | set(split.val) == development
            assert not set(split.train) & set(split.val)
            seen += split.val
        assert sorted(seen) == sorted(development)
        assert not development & set(search.test)
        assert development | set(search.test) == set(range(num_classes))

    def test_sizes(self):
        # 11 classes: test ceil(5.5) = 6, val ceil(0.4 * 5) = 2
        split = make_split(catalog_of(11), **{**SPLIT, "val_fraction": 0.4})
        assert (split.train, split.val, split.test) == ((0, 1, 2), (3, 4), (5, 6, 7, 8, 9, 10))
        # 0.07 * 100 is 7.000000000000001 in floating point
        assert len(make_split(catalog_of(100), **{**SPLIT, "test_fraction": 0.07}).test) == 7
        first = make_split(catalog_of(20), **{**SPLIT, "num_folds": 3, "fold": 0})
        assert first.val == (0, 1, 2, 3)  # 10 = 4 + 3 + 3

    def test_shuffled_order_is_fixed_for_ever(self):
        # printf '3/class00' | sha256sum and so on puts them in the order 3 0 2 5 4 6 1 7.
        split = make_split(catalog_of(8), **{**SPLIT, "order": "shuffled", "seed": 3})
        assert (split.train, split.val, split.test) == ((0, 3), (2, 5), (1, 4, 6, 7))
        others = {make_split(catalog_of(8), **{**SPLIT, "order": "shuffled", "seed": s}).test for s in range(20)}
        assert len(others) > 10

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"test_fraction": 0.0}, "data.split.test_fraction = 0.0 leaves an empty part"),
            ({"test_fraction": 1.0}, "data.split.test_fraction = 1.0 leaves an empty part"),
            ({"val_fraction": 0.0}, "data.split.val_fraction = 0.0 leaves an empty part"),
            ({"test_fraction": 0.95}, "the train part is empty"),
            ({"val_fraction": 0.01}, "the val part has one class"),
            ({"fold": 4}, "data.split.fold = 4 is out of range; data.split.num_folds = 4: 0 to 3"),
            ({"fold": -1}, "data.split.fold = -1 is out of range"),
            ({"fold": 1, "num_folds": 4}, "data.split.num_folds = 4 is too many"),
            ({"order": "random"}, "choices: sorted, shuffled"),
        ],
    )
    def test_refusals_name_the_key(self, change, part):
        assert part in refusal(make_split, catalog_of(10), **{**SPLIT, **change})

    def test_given_split_must_not_share_a_class(self):
        catalog = catalog_of(6, ["train", "train", "val", "val", "test", "test"])
        assert catalog.given_split is not None
        shared = Catalog(**{**vars(catalog), "given_split": ("test", *catalog.given_split[1:])})
        assert "class00 (test, train)" in refusal(make_split, shared, **SPLIT)

    def test_given_split_without_val_is_divided_and_without_test_refused(self):
        split = make_split(catalog_of(6, ["train"] * 4 + ["test"] * 2), **SPLIT)
        assert (split.train, split.val, split.test) == ((0, 1), (2, 3), (4, 5))
        message = refusal(make_split, catalog_of(4, ["train", "train", "val", "val"]), **SPLIT)
        assert "the test part is empty" in message
        assert "data.list_file" in message

    def test_given_split_with_folds_keeps_its_test_classes(self):
        catalog = catalog_of(8, ["test", "train", "val", "train", "train", "val", "train", "test"])
        folds = [make_split(catalog, **{**SPLIT, "num_folds": 3, "fold": fold}) for fold in range(3)]
        assert {split.test for split in folds} == {(0, 7)}
        assert [split.val for split in folds] == [(1, 2), (3, 4), (5, 6)]

    def test_one_image_classes_are_refused_here_too(self):
        catalog = catalog_of(6)
        short = Catalog(**{**vars(catalog), "labels": catalog.labels[:-1], "paths": catalog.paths[:-1]})
        assert "class05 (1)" in refusal(make_split, short, **SPLIT)


@pytest.mark.skipif(not (SHARED / "grocery_small").is_dir(), reason="shared/data/grocery_small is not beside the repo")
class TestGrocery:
    def test_folders(self):
        catalog = open_catalog("image_folder", SHARED / "grocery_small" / "images")
        assert len(catalog.class_names) == 81
        assert np.bincount(catalog.labels).tolist() == [20] * 81

    def test_list_with_other_columns_is_refused_with_the_cure(self):
        message = refusal(open_catalog, "image_list", SHARED / "grocery_small", "list.csv")
        assert "no column label" in message
        assert "class_name" in message

    def test_its_list_with_renamed_column_is_the_same_set(self, tmp_path):
        with open(SHARED / "grocery_small" / "list.csv", newline="") as handle:
            rows = [[row["path"], row["class_name"]] for row in csv.DictReader(handle)]
        list_file = write_list(tmp_path, rows)
        catalog = open_catalog("image_list", SHARED / "grocery_small", str(tmp_path / list_file))
        assert len(catalog.class_names) == 81
        assert len(catalog.paths) == 1620


OMNIGLOT = SHARED / "omniglot_small" / "images_background_small1.zip"


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason="shared/data/omniglot_small is not beside the repo")
def test_omniglot_characters_are_told_apart_by_their_alphabet(tmp_path):
    with zipfile.ZipFile(OMNIGLOT) as archive:
        archive.extractall(tmp_path)
    catalog = open_catalog("image_folder", tmp_path / "images_background_small1")
    assert len(catalog.class_names) == 136  # the table in its README
    assert len(catalog.paths) == 2720
    assert {"Greek/character01", "Latin/character01"} < set(catalog.class_names)
