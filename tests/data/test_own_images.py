import csv
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydml.data.catalog import Catalog
from raydml.data.datasets import open_catalog
from raydml.data.splits import make_split
from tests.data.refusals import SHARED, SPLIT, assert_contains, refusal


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


def open_list(root: Path, rows: list[list[str]] | str, header: tuple[str, ...] = ("path", "label")) -> Catalog:
    """The catalog of a list, given by its rows or as the text of its file."""
    if isinstance(rows, str):
        (root / "list.csv").write_text(rows, encoding="utf-8")
        return open_catalog("image_list", root, "list.csv")
    return open_catalog("image_list", root, write_list(root, rows, header))


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

    def test_classes_with_one_image_are_named(self, tmp_path):
        message = refusal(open_catalog, "image_folder", folder_of(tmp_path, a=2, lonely=1, single=1))
        assert_contains(message, "2 of 3 classes", "lonely (1), single (1)")
        assert "a (2)" not in message

    @pytest.mark.parametrize("stray", ["stray.png", "alphabet/stray.png"])
    def test_images_beside_sub_folders_are_refused(self, tmp_path, stray):
        folder_of(tmp_path, **{"alphabet/a": 2, "alphabet/b": 2})
        write_image(tmp_path / stray)
        assert_contains(refusal(open_catalog, "image_folder", tmp_path), "beside sub-folders", "(1 images)")

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


class TestList:
    def test_rows_in_any_order_make_the_same_catalog(self, tmp_path):
        folder_of(tmp_path, x=4)
        rows = [["x/3.png", "b"], ["x/0.png", "a"], ["x/2.png", "b"], ["./x/1.png", "a"]]
        first = open_list(tmp_path, rows)
        assert first.class_names == ("a", "b")
        assert first.paths == ("x/0.png", "x/1.png", "x/2.png", "x/3.png")
        assert first.labels.tolist() == [0, 0, 1, 1]
        assert first.given_split is None
        again = open_list(tmp_path, rows[::-1])
        assert (again.content, again.paths) == (first.content, first.paths)

    def test_split_column_decides_and_counts_as_content(self, tmp_path):
        folder_of(tmp_path, a=2, b=2, c=2, d=2, e=2, f=2)
        parts = dict(zip("abcdef", ["test", "train", "val", "train", "test", "val"], strict=True))
        rows = [[f"{c}/{i}.png", c, parts[c]] for c in "abcdef" for i in range(2)]
        catalog = open_list(tmp_path, rows, ("path", "label", "split"))
        split = make_split(catalog, **SPLIT)
        assert (split.train, split.val, split.test) == ((1, 3), (2, 5), (0, 4))
        assert open_list(tmp_path, [row[:2] for row in rows]).content != catalog.content

    def test_other_column_names_are_reported(self, tmp_path):
        message = refusal(open_list, tmp_path, [["a.png", "3"]], ("path", "class_id"))
        assert_contains(message, "no column label", "it has: path, class_id")

    def test_missing_files_are_counted_and_ten_named(self, tmp_path):
        folder_of(tmp_path, a=2)
        rows = [["a/0.png", "a"], ["a/1.png", "a"]] + [[f"b/{i:02d}.png", "b"] for i in range(12)]
        message = refusal(open_list, tmp_path, rows)
        assert_contains(message, "12 of 14 files do not exist", "b/00.png", "b/09.png", "and 2 more")
        assert "b/10.png" not in message

    def test_all_faults_of_a_list_come_at_once(self, tmp_path):
        folder_of(tmp_path, a=3)
        rows = [
            *(["a/0.png", "a", "train"], ["a/./0.png", "a", "train"], ["", "a", "train"], ["a/1.png", "a", "valid"]),
            *(["../a/1.png", "a", "val"], ["a/2.png", "a", ""]),
        ]
        assert_contains(
            refusal(open_list, tmp_path, rows, ("path", "label", "split")),
            *("line 3: 'a/./0.png' is listed twice", "line 4: path or label is empty"),
            *("line 5: split = 'valid'; choices: train, val, test", "line 6: '../a/1.png' leaves"),
            "1 of 2 images have no split: a/2.png",
        )

    def test_list_unset_absent_or_binary(self, tmp_path):
        assert "data.list_file" in refusal(open_catalog, "image_list", tmp_path)
        assert "does not exist" in refusal(open_catalog, "image_list", tmp_path, "no.csv")
        (tmp_path / "bad.csv").write_bytes(b"path,label\n\xff\xfe\x00,a\n")
        assert "UTF-8" in refusal(open_catalog, "image_list", tmp_path, "bad.csv")
        assert "lists no image" in refusal(open_list, tmp_path, [])

    def test_byte_order_mark_and_spaces_are_no_obstacle(self, tmp_path):
        folder_of(tmp_path, a=2)
        assert open_list(tmp_path, "\ufeffpath, label\na/0.png, a\na/1.png, a\n").class_names == ("a",)

    def test_paths_with_blanks_commas_and_other_scripts(self, tmp_path):
        folder_of(tmp_path, **{"Über größe/κλάση 1": 2, "a,b": 2})
        rows = [[f"{c}/{i}.png", c] for c in ("Über größe/κλάση 1", "a,b") for i in range(2)]
        catalog = open_list(tmp_path, rows)
        assert catalog.class_names == ("a,b", "Über größe/κλάση 1")
        assert catalog.paths[2] == "Über größe/κλάση 1/0.png"
        assert open_catalog("image_folder", tmp_path).paths == catalog.paths

    def test_a_comma_without_quotes_is_reported(self, tmp_path):
        folder_of(tmp_path, **{"a,b": 2})
        message = refusal(open_list, tmp_path, 'path,label\n"a,b/0.png",x\na,b/1.png,x\n')
        assert "1 lines have more values than the header has columns: 3" in message

    def test_columns_of_other_names_are_passed_over_even_without_one(self, tmp_path):
        folder_of(tmp_path, a=2)
        assert open_list(tmp_path, ",path,label,colour\n0,a/0.png,x,red\n1,a/1.png,x\n").class_names == ("x",)

    def test_a_path_that_is_a_folder_or_root_itself(self, tmp_path):
        folder_of(tmp_path, a=2)
        message = refusal(open_list, tmp_path, [["a", "x"], ["a/..", "x"]])
        assert_contains(message, "a (Is a directory)", "line 3: 'a/..' leaves")


BOTH = ("query", "gallery")


def rows_of(split: str, classes: str) -> list[tuple[str, str, str]]:
    """(class, split, no role), one image for each letter."""
    return [(name, split, "") for name in classes]


def pairs_of(split: str, classes: str) -> list[tuple[str, str, str]]:
    """(class, split, role): a query and a gallery image of each class."""
    return [(name, split, role) for name in classes for role in BOTH]


class TestRoles:
    HEADER = ("path", "label", "split", "role")

    def opened(self, tmp_path, rows):
        """rows: (class, split, role), one image each."""
        lines, number = [], {}
        for label, *others in rows:
            number[label] = number.get(label, -1) + 1
            path = f"{label}/{number[label]}.png"
            write_image(tmp_path / path)
            lines.append([path, label, *others])
        return open_list(tmp_path, lines, self.HEADER)

    @pytest.mark.parametrize(
        ("rows", "roles", "protocol"),
        [
            ([*rows_of("train", "aabb"), *pairs_of("test", "cd")], ("",) * 4 + BOTH * 2, "query_gallery"),
            (pairs_of("", "abcd"), BOTH * 4, "query_gallery"),
            ([*pairs_of("val", "ab"), *rows_of("test", "ccdd")], BOTH * 2 + ("",) * 4, "leave_one_out"),
            (rows_of("", "aabb"), None, "leave_one_out"),
        ],
        ids=["test part", "no split, any class may be tested", "val alone", "none"],
    )
    def test_roles_choose_the_protocol(self, tmp_path, rows, roles, protocol):
        catalog = self.opened(tmp_path, rows)
        assert (catalog.roles, catalog.protocols) == (roles, (protocol,))
        assert (catalog.given_split is None) == (not rows[0][1])

    @pytest.mark.parametrize(
        ("rows", "part"),
        [
            ([("a", "test", "probe"), ("a", "test", "")], "line 2: role = 'probe'; choices: query, gallery"),
            ([("a", "train", "query"), ("a", "train", "gallery")], "line 2: role = 'query' with split = 'train'"),
            ([("a", "test", "query")] * 2, "1 classes of split test have no gallery image: a;"),
            ([("a", "val", "gallery"), ("a", "val", "gallery")], "1 classes of split val have no query image: a;"),
            (
                [*pairs_of("test", "a"), *rows_of("test", "bb")],
                "2 images of split test have no role and others have one: b/0.png, b/1.png",
            ),
            ([*pairs_of("", "a"), *[("b", "", "query")] * 2], "1 classes have no"),
        ],
    )
    def test_refusals(self, tmp_path, rows, part):
        message = refusal(self.opened, tmp_path, rows)
        assert part in message
        assert len(message.splitlines()) == 1 or "have no" not in part

    def test_a_class_with_roles_in_two_parts_is_judged_in_each(self, tmp_path):
        message = refusal(self.opened, tmp_path, [*pairs_of("val", "a"), *[("a", "test", "query")] * 2])
        assert "1 classes of split test have no gallery image: a;" in message
        assert "split val" not in message


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


def test_a_message_names_a_bounded_number_of_lines(tmp_path):
    message = refusal(open_list, tmp_path, "path,label\n" + "/absolute.jpg,a\n" * 50)
    assert message.count("\n") <= 25
    assert_contains(message, "line 21: ", "and 30 more lines with problems")
    assert "line 22: " not in message
