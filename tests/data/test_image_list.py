import os
import unicodedata
from pathlib import Path

import pytest

from raydml.data.catalog import Groups
from raydml.data.datasets import open_catalog
from raydml.data.image_list import find_list
from raydml.data.splits import make_split
from tests.data.own_images import folder_of, open_list, write_image, write_list
from tests.data.refusals import SPLIT, assert_contains, refusal


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
        assert_contains(message, "no column label", "separated by commas: path, class_id")

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
            ([("a", "test", "query")] * 2, "no image of split test has the role gallery;"),
            ([("a", "val", "gallery"), ("a", "val", "gallery")], "no image of split val has the role query;"),
            (
                [*pairs_of("test", "a"), *rows_of("test", "bb")],
                "2 images of split test have no role and others have one: b/0.png, b/1.png",
            ),
        ],
    )
    def test_refusals(self, tmp_path, rows, part):
        message = refusal(self.opened, tmp_path, rows)
        assert part in message
        assert len(message.splitlines()) == 1 or "have no" not in part

    def test_roles_in_two_parts_are_judged_in_each(self, tmp_path):
        message = refusal(self.opened, tmp_path, [*pairs_of("val", "a"), *[("a", "test", "query")] * 2])
        assert "no image of split test has the role gallery;" in message
        assert "split val" not in message

    def test_classes_without_queries_or_gallery_are_noted(self, tmp_path):
        rows = [*pairs_of("test", "ab"), ("c", "test", "gallery"), ("d", "test", "query"), ("e", "test", "query")]
        notes = self.opened(tmp_path, rows).notes
        assert "1 class without a query image: c; these images are in the gallery, and wrong" in notes[0]
        assert "2 classes without a gallery image: d, e; these queries have nothing to find" in notes[1]


class TestGroups:
    def test_any_column_may_be_the_group(self, tmp_path):
        rows = [("a/0.png", "a", "hall"), ("a/1.png", "a", "door"), ("b/0.png", "b", "hall"), ("b/1.png", "b", "door")]
        for path, *_ in rows:
            write_image(tmp_path / path)
        name = write_list(tmp_path, [list(row) for row in rows], ("path", "label", "camera"))
        catalog = open_catalog("image_list", tmp_path, name, group="camera", exclude_same="group")
        assert catalog.groups == Groups(("hall", "door", "hall", "door"), are_excluded=True)
        level = open_catalog("image_list", tmp_path, name, group="camera")
        assert level.groups == Groups(("hall", "door", "hall", "door"))
        ignored = open_catalog("image_list", tmp_path, name)
        assert ignored.groups is None
        assert catalog.content == level.content != ignored.content
        message = refusal(open_catalog, "image_list", tmp_path, name, group="kamera")
        assert_contains(message, "has no column 'kamera' (data.group); line 1 has: path, label, camera")

    def test_each_image_needs_a_group(self, tmp_path):
        write_image(tmp_path / "a.png")
        name = write_list(tmp_path, [["a.png", "a", ""]], ("path", "label", "camera"))
        message = refusal(open_catalog, "image_list", tmp_path, name, group="camera")
        assert "line 2: camera is empty (data.group); give each image a group" in message


def test_a_message_names_a_bounded_number_of_lines(tmp_path):
    message = refusal(open_list, tmp_path, "path,label\n" + "/absolute.jpg,a\n" * 50)
    assert message.count("\n") <= 25
    assert_contains(message, "line 21: ", "and 30 more lines with problems")
    assert "line 22: " not in message


class TestDialects:
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_separators_encodings_and_line_ends(self, tmp_path, separator, encoding):
        folder_of(tmp_path, a=2)
        text = f"label{separator}path{separator}split\n" + "".join(
            f"größe{separator}a/{index}.png{separator}train\n" for index in range(2)
        )
        (tmp_path / "l.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
        catalog = open_catalog("image_list", tmp_path, "l.csv")
        assert catalog.class_names == ("größe",)
        assert catalog.given_split == ("train", "train")
        assert catalog.description == "1 class in the list l.csv, 2 images"

    def test_excels_line_about_the_separator(self, tmp_path):
        folder_of(tmp_path, a=2)
        assert open_list(tmp_path, "sep=;\npath;label\na/0.png;x, y\na/1.png;x, y\n").class_names == ("x, y",)
        assert "line 3: path or label is empty" in refusal(open_list, tmp_path, "sep=;\npath;label\n;x\n")

    def test_labels_are_kept_as_they_are(self, tmp_path):
        labels = ["007", "7", "NA", "null", "1e3", "True", "-0"]
        folder_of(tmp_path, a=2 * len(labels))
        rows = [[f"a/{index}.png", labels[index // 2]] for index in range(2 * len(labels))]
        assert set(open_list(tmp_path, rows).class_names) == set(labels)

    def test_backslashes_of_windows(self, tmp_path):
        folder_of(tmp_path, **{"a/b": 2})
        catalog = open_list(tmp_path, [["a\\b\\0.png", "x"], [".\\a\\b\\1.png", "x"]])
        assert catalog.paths == ("a/b/0.png", "a/b/1.png")
        write_image(tmp_path / "c\\d.png")  # a name of this system
        write_image(tmp_path / "c" / "d.png")
        assert open_list(tmp_path, [["c\\d.png", "x"], ["a/b/0.png", "x"]]).paths == ("a/b/0.png", "c\\d.png")
        assert "do not exist" in refusal(open_list, tmp_path, [["..\\x.png", "x"]])

    def test_one_file_in_two_spellings_is_listed_twice(self, tmp_path):
        folder_of(tmp_path, a=2)
        message = refusal(open_list, tmp_path, [["a/0.png", "x"], ["a\\0.png", "x"], ["a/1.png", "x"]])
        assert_contains(message, "listed twice", "a/0.png")

    def test_paths_and_labels_in_two_unicode_spellings(self, tmp_path):
        composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
        folder_of(tmp_path, **{decomposed: 2})
        catalog = open_list(tmp_path, [[f"{composed}/0.png", composed], [f"{composed}/1.png", decomposed]])
        assert catalog.class_names == (composed,)
        assert catalog.paths == (f"{decomposed}/0.png", f"{decomposed}/1.png")
        assert "Unicode spelling" in catalog.notes[0]

    def test_a_list_of_names_outside_utf_8(self, tmp_path):
        """As `ls` writes it where the files have such names, and as Excel does where they are in UTF-8."""
        folder_of(tmp_path, größe=1)
        os.rename(tmp_path / "größe" / "0.png", os.fsencode(tmp_path / "größe") + b"/\xfc.png")
        write_image(tmp_path / "größe" / "ä.png")
        lines = [b"path,label", "größe/".encode() + b"\xfc.png,gr\xfcn", b"gr\xf6\xdfe/\xe4.png,gr\xfcn"]
        (tmp_path / "l.csv").write_bytes(b"\n".join(lines))
        catalog = open_catalog("image_list", tmp_path, "l.csv")
        assert catalog.class_names == ("grün",)
        assert len(catalog.paths) == 2

    @pytest.mark.parametrize("header", ["path,label,label", "label,path,path", "path;label;label"])
    def test_a_column_twice_is_refused(self, tmp_path, header):
        message = refusal(open_list, tmp_path, header + "\na/0.png,x,y\n")
        assert_contains(message, "line 1", "twice", "rename one")

    @pytest.mark.parametrize("num_more", [0, 10_000])
    @pytest.mark.parametrize("place", ["path", "other"])
    def test_an_open_quote_names_its_line(self, tmp_path, num_more, place):
        lines = ["path,label,other"] + [f"a/{index}.png,x,y" for index in range(20 + num_more)]
        lines[14] = '"a/13.png,x,y' if place == "path" else 'a/13.png,x,"y'
        assert_contains(refusal(open_list, tmp_path, "\n".join(lines)), "line 15: a double quote opens", "close it")

    def test_a_quote_that_a_later_quote_closes_names_its_line_as_well(self, tmp_path):
        text = 'path,label\na/0.png,x\n"a/1.png,x\na/2.png,x\n"a/3.png",x\n'
        assert "line 3: a double quote opens" in refusal(open_list, tmp_path, text)
        text = 'path,label\na/0.png,x\n"a/1.png,x\na/2.png",x\n'
        assert "line 3: a double quote opens" in refusal(open_list, tmp_path, text)

    def test_line_breaks_in_other_columns_are_fine(self, tmp_path):
        folder_of(tmp_path, a=2)
        text = 'path,label,remark\na/0.png,x,"two\nlines"\na/1.png,x,""\n'
        assert len(open_list(tmp_path, text).paths) == 2
        assert "line 4: path or label is empty" in refusal(open_list, tmp_path, text.replace("a/1.png", ""))

    def test_what_no_suffix_of_the_list_can_be_decoded_is_refused_before_the_test_images_are_opened(self, tmp_path):
        folder_of(tmp_path, a=2)
        (tmp_path / "a" / "2.CR2").write_bytes(b"raw")
        message = refusal(open_list, tmp_path, [[f"a/{name}", "x"] for name in ("0.png", "1.png", "2.CR2")])
        assert_contains(message, "1 .cr2", "a/2.CR2 in line 4", "convert")

    def test_missing_files_have_their_lines(self, tmp_path):
        folder_of(tmp_path, a=2)
        message = refusal(open_list, tmp_path, [["a/0.png", "x"], ["a/7.png", "x"], ["a/1.png", "x"]])
        assert "a/7.png in line 3" in message

    def test_a_list_below_the_home_folder(self, tmp_path, monkeypatch):
        folder_of(tmp_path, a=2)
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "l.csv").write_text("path,label\na/0.png,x\na/1.png,x\n")
        assert len(open_catalog("image_list", tmp_path, "~/l.csv").paths) == 2


def test_the_only_list_of_a_folder_is_found(tmp_path):
    assert find_list(tmp_path) is None
    (tmp_path / "prices.csv").write_text("item;price\na;1\n")
    (tmp_path / "photos.csv").write_text("\ufefflabel;path\nx;a/0.png\n", encoding="utf-8")
    assert find_list(tmp_path) == "photos.csv"
    folder_of(tmp_path, a=2)
    assert "the list photos.csv is not used" in open_catalog("image_folder", tmp_path).notes[0]
    (tmp_path / "other.tsv").write_text("path\tlabel\n")
    assert find_list(tmp_path) is None


def test_a_file_that_cannot_be_read_is_no_list_and_old_line_ends_are_read(tmp_path, caplog, monkeypatch):
    (tmp_path / "mac.csv").write_bytes(b"path,label\ra/0.png,x\r")
    (tmp_path / "broken.csv").write_bytes(b'path,"label\nx,y\n')
    (tmp_path / "nul.csv").write_bytes(b"pa\0th,label\n")
    (tmp_path / "locked.csv").write_text("path,label\n")

    def open_or_refuse(file, *arguments, **named):
        if Path(file).name == "locked.csv":
            raise PermissionError(13, "Permission denied", str(file))
        return open(file, *arguments, **named)

    monkeypatch.setattr("raydml.data.image_list.open", open_or_refuse, raising=False)
    assert find_list(tmp_path) == "mac.csv"
    for name, why in (("broken.csv", "a double quote opens here"), ("locked.csv", "Permission denied")):
        assert f"{tmp_path / name} cannot be read and is not taken as a list of images" in caplog.text
        assert why in caplog.text
