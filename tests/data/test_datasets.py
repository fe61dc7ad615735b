import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from raydml.data.catalog import (
    WITHOUT_FILES,
    ImageEntry,
    ImageFile,
    catalog_of,
    digests_of_files,
    find_files,
    is_hidden,
)
from raydml.data.datasets import DATASETS, digit_images, open_catalog
from raydml.data.miniatures import build
from raydml.data.splits import make_split
from tests.data.refusals import SPLIT, assert_contains, refusal


class TestDigits:
    def test_catalog_is_scikit_learns(self):
        catalog = open_catalog("digits", None)
        # 178 zeros ... 180 nines: the counts in scikit-learn's description of the data set
        assert np.bincount(catalog.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert catalog.class_names == tuple("0123456789")
        assert len(set(catalog.paths)) == 1797

    def test_pixels_fill_the_byte(self):
        images, labels = digit_images()
        assert (images.dtype, images.shape) == (np.uint8, (1797, 8, 8))
        # the first digit is the zero printed in scikit-learn's documentation: row 0 is 0 0 5 13 9 1 0 0
        assert labels[0] == 0
        assert images[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
        assert images.max() == 255

    def test_they_are_what_scikit_learn_reads(self):
        (images, labels), bunch = digit_images(), load_digits()
        np.testing.assert_array_equal(images, np.rint(bunch.images * (255 / 16)))
        np.testing.assert_array_equal(labels, bunch.target)

    def test_sorted_halves_seal_five_to_nine(self):
        split = make_split(open_catalog("digits", None), **SPLIT)
        assert (split.test, split.train, split.val) == ((5, 6, 7, 8, 9), (0, 1), (2, 3, 4))
        assert split.to_dict() == {"train": [0, 1], "val": [2, 3, 4], "test": [5, 6, 7, 8, 9]}

    def test_wrong_name_gets_the_nearest(self):
        message = refusal(open_catalog, "digit", None)
        assert_contains(message, "'digit'", "did you mean 'digits'?", "image_folder")

    @pytest.mark.parametrize("name", sorted(set(DATASETS) - set(WITHOUT_FILES)))
    def test_all_others_need_a_root_that_is_a_folder(self, tmp_path, name):
        assert "needs machine.data_root" in refusal(open_catalog, name, None)
        (tmp_path / "file").write_text("")
        assert "is not a folder" in refusal(open_catalog, name, tmp_path / "file")


class TestCatalog:
    ROWS = (
        ImageFile("b/1.jpg", "b", 5, "test", "query"),
        ImageFile("a/2.jpg", "a", 6, "train"),
        ImageFile("b/0.jpg", "b", 7, "test", "gallery"),
    )

    def test_rows_are_sorted_by_class_and_path(self, tmp_path):
        catalog = catalog_of("x", tmp_path, self.ROWS, protocols=("query_gallery",), notes=("a note",))
        assert catalog.paths == ("a/2.jpg", "b/0.jpg", "b/1.jpg")
        assert catalog.labels.tolist() == [0, 1, 1]
        assert (catalog.given_split, catalog.roles) == (("train", "test", "test"), ("", "gallery", "query"))
        assert (catalog.protocols, catalog.notes) == (("query_gallery",), ("a note",))
        assert not catalog.labels.flags.writeable

    @pytest.mark.parametrize(
        ("field", "value"),
        [("path", "b/9.jpg"), ("class_name", "c"), ("num_bytes", 8), ("part", "val"), ("role", "gallery")],
    )
    def test_what_counts_as_content(self, tmp_path, field, value):
        content = catalog_of("x", tmp_path, self.ROWS).content
        changed = [self.ROWS[0]._replace(**{field: value}), *self.ROWS[1:]]
        assert catalog_of("x", tmp_path, changed).content != content
        assert catalog_of("y", tmp_path / "z", self.ROWS[::-1], notes=("n",)).content == content

    def test_files_are_found_in_order_and_the_others_named(self, tmp_path):
        entries = []
        for index in range(200):  # several chunks
            entries.append(ImageEntry(f"{index:03d}.jpg", str(index % 7), "train", ""))
            if index % 50:
                (tmp_path / f"{index:03d}.jpg").write_bytes(b"x" * index)
        (tmp_path / "loop.jpg").symlink_to("loop.jpg")
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "link.jpg").symlink_to("001.jpg")
        others = ["loop.jpg", "folder.jpg", "link.jpg", "a" * 300, "nul\0.jpg", "001.jpg/x.jpg"]
        rows, missing = find_files(tmp_path, [*entries, *(ImageEntry(path, "0") for path in others)])
        assert [row.num_bytes for row in rows] == [i for i in range(200) if i % 50] + [1]
        assert [row.class_name for row in rows[:3]] == ["1", "2", "3"]
        assert missing[:4] == ["000.jpg", "050.jpg", "100.jpg", "150.jpg"]
        assert len(missing) == 4 + 5
        assert "folder.jpg (Is a directory)" in missing
        assert any(text.startswith("'loop.jpg' (Too many") for text in missing)
        assert find_files(tmp_path, []) == ([], [])

    def test_what_desktops_leave_behind(self):
        names = (".DS_Store", "._x.jpg", "__MACOSX", "_x.jpg", "x.jpg")
        assert [name for name in names if is_hidden(name)] == [".DS_Store", "._x.jpg", "__MACOSX"]


class TestBenchmarksByName:
    def test_protocols(self, tmp_path):
        assert open_catalog("inshop", build("inshop", tmp_path / "i")).protocols == ("query_gallery",)
        vehicles = open_catalog("vehicleid_medium", build("vehicleid", tmp_path / "v"))
        assert vehicles.protocols == ("leave_one_out", "one_gallery_image")
        assert open_catalog("cub200", build("cub200", tmp_path / "c")).protocols == ("leave_one_out",)

    def test_the_given_split_is_used(self, tmp_path):
        split = make_split(open_catalog("cub200", build("cub200", tmp_path, classes_per_part=6)), **SPLIT)
        assert (split.train, split.val, split.test) == ((0, 1, 2), (3, 4, 5), (6, 7, 8, 9, 10, 11))

    def test_vehicle_sets_share_the_training_classes(self, tmp_path):
        folder = build("vehicleid", tmp_path)
        trains = []
        for name in ("vehicleid_small", "vehicleid_medium", "vehicleid_large"):
            catalog = open_catalog(name, folder)
            pairs = zip(catalog.paths, catalog.given_split, strict=True)
            trains.append({path for path, part in pairs if part == "train"})
        assert trains[0] == trains[1] == trains[2]
        assert len(trains[0]) == 12


def test_a_file_has_the_digest_of_its_content_and_none_where_it_cannot_be_read(tmp_path):
    root = build("image_folder", tmp_path / "images")
    catalog = open_catalog("image_folder", root)
    gone, first = catalog.paths[-1], catalog.paths[0]
    (root / gone).unlink()
    digests = digests_of_files(catalog)
    assert sorted(set(catalog.paths) - set(digests)) == [gone]
    assert digests[first] == hashlib.sha256((root / first).read_bytes()).hexdigest()[:16]
    assert digests_of_files(open_catalog("digits", None)) == {}, "drawn images have no files"
