import os
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from raydml.data.catalog import DataError, Groups
from raydml.data.datasets import open_catalog
from tests.data.own_images import folder_of, write_image
from tests.data.refusals import SHARED, assert_contains, refusal


@contextmanager
def as_another_user() -> Iterator[None]:
    """Run as a user whom permissions bind. The real user id stays root, so that the way back is open."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


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
        for name in ("a/0.JPG", "a/1.JPG", "b/0.JPG", "b/1.JPG"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"not a picture")
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

    def test_classes_with_one_image_are_kept_and_noted(self, tmp_path):
        catalog = open_catalog("image_folder", folder_of(tmp_path, a=2, lonely=1, single=1))
        assert catalog.labels.tolist() == [0, 0, 1, 2]
        assert "2 of 3 classes have one image: lonely, single." in catalog.notes[0]

    def test_smaller_classes_than_wished_are_left_out_and_noted(self, tmp_path):
        folder_of(tmp_path, a=3, b=2, c=1, d=4)
        whole = open_catalog("image_folder", tmp_path)
        cut = open_catalog("image_folder", tmp_path, min_images_per_class=3)
        assert (cut.class_names, np.bincount(cut.labels).tolist()) == (("a", "d"), [3, 4])
        assert "2 of 4 classes have fewer than data.min_images_per_class = 3 images" in cut.notes[0]
        assert "with 3 images: b, c" in cut.notes[0]
        assert len({whole.content, cut.content}) == 2
        with pytest.raises(DataError, match="no class has as many images; the largest has 4"):
            open_catalog("image_folder", tmp_path, min_images_per_class=5)

    def test_the_folder_above_is_the_group(self, tmp_path):
        folder_of(tmp_path, **{"fruit/apple": 2, "fruit/pear": 1, "dairy/milk": 1})
        catalog = open_catalog("image_folder", tmp_path, group="parent")
        assert catalog.groups == Groups(("dairy", "fruit", "fruit", "fruit"))
        folder_of(tmp_path, bread=1)
        message = refusal(open_catalog, "image_folder", tmp_path, group="parent")
        assert_contains(message, "data.group = 'parent': 1 class without a folder above the class folder: bread")

    def test_images_beside_sub_folders_are_refused(self, tmp_path):
        folder_of(tmp_path, **{"alphabet/a": 2, "alphabet/b": 2})
        write_image(tmp_path / "alphabet" / "stray.png")
        message = refusal(open_catalog, "image_folder", tmp_path)
        assert_contains(message, "beside sub-folders", "alphabet (1 image)")

    @pytest.mark.parametrize("classes", [{}, {"a": 2, "b": 2}])
    def test_images_without_a_class_folder_are_refused_with_both_ways_out(self, tmp_path, classes):
        folder_of(tmp_path, **classes)
        for name in ("x.jpg", "y.png"):
            write_image(tmp_path / name)
        message = refusal(open_catalog, "image_folder", tmp_path)
        assert_contains(message, "2 images directly in it, without a class folder (x.jpg, y.png)", "path,label")
        assert ("beside class folders" in message) == bool(classes)

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
        assert "1 links that lead back to a folder above them: loop;" in refusal(open_catalog, "image_folder", tmp_path)

    def test_a_class_that_is_a_dangling_link_is_not_lost(self, tmp_path):
        folder_of(tmp_path, a=2, b=2)
        (tmp_path / "c").symlink_to(tmp_path / "unmounted")
        (tmp_path / "b" / "self.png").symlink_to("self.png")
        assert "2 links that lead nowhere: c, b/self.png" in refusal(open_catalog, "image_folder", tmp_path)

    def test_links_to_folders_and_files_elsewhere_are_followed(self, tmp_path):
        folder_of(tmp_path / "disk", a=2, b=2)
        (tmp_path / "root" / "c").mkdir(parents=True)
        (tmp_path / "root" / "a").symlink_to(tmp_path / "disk" / "a")
        for index in range(2):
            (tmp_path / "root" / "c" / f"{index}.png").symlink_to(tmp_path / "disk" / "b" / f"{index}.png")
        catalog = open_catalog("image_folder", tmp_path / "root")
        assert catalog.paths == ("a/0.png", "a/1.png", "c/0.png", "c/1.png")

    def test_a_pipe_is_no_image(self, tmp_path):
        folder_of(tmp_path, a=2, b=2)
        os.mkfifo(tmp_path / "b" / "pipe.png")
        assert "b/pipe.png (Not a regular file)" in refusal(open_catalog, "image_folder", tmp_path)

    def test_folders_that_cannot_be_read_are_named_with_the_rest(self, tmp_path, monkeypatch):
        folder_of(tmp_path, a=2, locked=2)
        (tmp_path / "hollow").mkdir(mode=0o755)
        (tmp_path / "locked").chmod(0)
        tmp_path.chmod(0o755)
        monkeypatch.chdir(tmp_path)  # another user may not get through the folders above
        with as_another_user():
            message = refusal(open_catalog, "image_folder", Path())
        (tmp_path / "locked").chmod(0o755)
        unreadable = "1 files or folders that cannot be read: locked (Permission denied)"
        assert_contains(message, unreadable, "(empty class): hollow")


@pytest.mark.skipif(not (SHARED / "grocery_small").is_dir(), reason="shared/data/grocery_small is not beside the repo")
class TestGrocery:
    def test_folders(self):
        catalog = open_catalog("image_folder", SHARED / "grocery_small" / "images")
        assert len(catalog.class_names) == 81
        assert np.bincount(catalog.labels).tolist() == [20] * 81


OMNIGLOT = SHARED / "omniglot_small" / "images_background_small1.zip"


@pytest.mark.skipif(not OMNIGLOT.is_file(), reason="shared/data/omniglot_small is not beside the repo")
def test_omniglot_characters_differ_by_their_alphabet(tmp_path):
    with zipfile.ZipFile(OMNIGLOT) as archive:
        archive.extractall(tmp_path)
    catalog = open_catalog("image_folder", tmp_path / "images_background_small1")
    assert len(catalog.class_names) == 136  # the table in its README
    assert len(catalog.paths) == 2720
    assert {"Greek/character01", "Latin/character01"} < set(catalog.class_names)


class TestFormats:
    @pytest.mark.parametrize("suffix", [".HEIC", ".avif", ".jfif", ".gif", ".jp2", ".ppm"])
    def test_a_class_of_any_decoded_suffix_is_a_class(self, tmp_path, suffix):
        folder_of(tmp_path, a=2)
        for index in range(2):
            (tmp_path / "b").mkdir(exist_ok=True)
            (tmp_path / "b" / f"{index} (1){suffix}").write_bytes(b"looked at later")
        catalog = open_catalog("image_folder", tmp_path)
        assert np.bincount(catalog.labels).tolist() == [2, 2]
        assert catalog.notes == ()

    @pytest.mark.parametrize("suffix", [".cr2", ".PSD", ".svg", ".jxl", ".xyz", ".jpg_large", ""])
    def test_a_class_full_of_what_is_not_decoded_is_refused_with_the_suffix(self, tmp_path, suffix):
        folder_of(tmp_path, a=2, b=2)
        for index in range(3):
            (tmp_path / "c").mkdir(exist_ok=True)
            (tmp_path / "c" / f"photo{index}{suffix}").write_bytes(b"raw")
        message = refusal(open_catalog, "image_folder", tmp_path)
        assert_contains(message, f"c (3 {suffix.lower() or 'without a suffix'})", "convert them to JPEG or PNG")
        assert "empty class" not in message

    def test_what_is_not_decoded_beside_images_is_counted_by_suffix(self, tmp_path):
        folder_of(tmp_path, a=2, b=2)
        for name in ("a/1.CR2", "a/2.cr2", "b/1.psd", "b/9.unheard"):
            (tmp_path / name).write_bytes(b"raw")
        (note,) = open_catalog("image_folder", tmp_path).notes
        assert_contains(note, "4 files", "2 .cr2, 1 .psd, 1 .unheard", "convert them")

    def test_what_is_evidently_no_image_is_ignored(self, tmp_path):
        folder_of(tmp_path, a=2, b=2)
        others = ("a/Thumbs.db", "a/.DS_Store", "a/notes.txt", "b/IMG_1.MOV", "b/IMG_1.xmp", "desktop.ini", "LICENSE")
        for name in (*others, "list.csv", "weights.unheard"):
            (tmp_path / name).write_bytes(b"other")
        assert open_catalog("image_folder", tmp_path).notes == ()

    def test_a_root_full_of_raw_files_says_so(self, tmp_path):
        (tmp_path / "1.nef").write_bytes(b"raw")
        assert_contains(refusal(open_catalog, "image_folder", tmp_path), "no class folder", "1 .nef", "convert")


class TestOneClassForOneName:
    @pytest.mark.parametrize("parts", [("train", "val"), ("Train", "testing_set"), ("query", "gallery")])
    def test_the_same_classes_in_train_and_val_are_joined(self, tmp_path, parts):
        folder_of(tmp_path, **{f"{part}/{name}": 1 for part in parts for name in "ab"}, **{f"{parts[0]}/c": 2})
        catalog = open_catalog("image_folder", tmp_path)
        assert catalog.class_names == ("a", "b", "c")
        assert catalog.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert catalog.given_split is None
        (note,) = catalog.notes
        assert_contains(note, *parts, "2 class names in common (a, b)", "one class")

    def test_parts_inside_each_class_are_joined_too(self, tmp_path):
        folder_of(tmp_path, **{"pets/cat/train": 2, "pets/cat/val": 2, "pets/dog/train": 2})
        assert open_catalog("image_folder", tmp_path).class_names == ("pets/cat", "pets/dog")

    def test_parts_without_a_common_class_keep_their_names_and_say_so(self, tmp_path):
        folder_of(tmp_path, **{"train/a": 2, "train/b": 2, "test/c": 2})
        catalog = open_catalog("image_folder", tmp_path)
        assert catalog.class_names == ("test/c", "train/a", "train/b")
        assert_contains(catalog.notes[0], "test, train", "not taken as a split", "path,label,split")

    def test_classes_that_are_called_train_or_test_are_classes(self, tmp_path):
        folder_of(tmp_path, **{"bus": 2, "train": 2, "toys/train": 2, "toys/car": 2})
        catalog = open_catalog("image_folder", tmp_path)
        assert catalog.class_names == ("bus", "toys/car", "toys/train", "train")
        assert catalog.notes == ()

    def test_two_unicode_spellings_are_one_class(self, tmp_path):
        composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
        folder_of(tmp_path, **{composed: 1, decomposed: 2, "tee": 2})
        catalog = open_catalog("image_folder", tmp_path)
        assert catalog.class_names == (composed, "tee")
        assert catalog.labels.tolist() == [0, 0, 0, 1, 1]
        assert_contains(catalog.notes[0], "1 class name is", "Unicode spelling", composed)

    def test_a_single_spelling_is_kept_so_that_known_data_sets_keep_their_content(self, tmp_path):
        decomposed = unicodedata.normalize("NFD", "café")
        catalog = open_catalog("image_folder", folder_of(tmp_path, **{decomposed: 2, "tee": 2}))
        assert catalog.class_names == (decomposed, "tee")
        assert catalog.notes == ()

    def test_names_outside_utf_8_are_readable_and_their_files_are_found(self, tmp_path):
        folder_of(tmp_path, tee=2, x=2)
        os.rename(tmp_path / "x", os.fsencode(tmp_path) + b"/caf\xe9 \x80")
        os.rename(os.fsencode(tmp_path) + b"/caf\xe9 \x80/0.png", os.fsencode(tmp_path) + b"/caf\xe9 \x80/\xfc.png")
        folder_of(tmp_path, **{"😀 𠮷": 2})
        catalog = open_catalog("image_folder", tmp_path)
        assert catalog.class_names == ("café €", "tee", "😀 𠮷")  # Windows-1252, the encoding of western archives
        assert all((tmp_path / path).is_file() for path in catalog.paths)
        "".join(catalog.class_names).encode()  # nothing that a file or a terminal refuses


def test_what_was_found_is_described_in_a_few_words(tmp_path):
    flat = open_catalog("image_folder", folder_of(tmp_path / "flat", a=2, b=3))
    assert flat.description == "2 classes in class folders, 5 images"
    nested = open_catalog("image_folder", folder_of(tmp_path / "nested", **{"x/a": 2, "y/a": 2}))
    assert nested.description == "2 classes in nested folders, named by their paths, 4 images"
