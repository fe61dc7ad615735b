import pytest

from raydml.data.class_names import join_parts, join_spellings, readable


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["train/a", "val/a"], ["a"]),
        (["training_set/a", "test_set/a"], ["a"]),
        (["x/seg_train/a", "x/seg_test/a"], ["x/a"]),
        (["a/train2", "a/valset"], ["a"]),
        (["train/a", "val/b"], ["train/a", "val/b"]),
        (["red/a", "blue/a"], ["blue/a", "red/a"]),
        (["train", "test"], ["test", "train"]),
        (["train1/a", "test1/a"], ["a"]),
        (["probe/a", "gallery/a"], ["a"]),
        (["trainers/a", "tests of eyes/a"], ["tests of eyes/a", "trainers/a"]),
    ],
)
def test_parts(names, classes):
    found, notes = join_parts(names)
    assert set(found) == set(names)
    assert sorted(set(found.values())) == classes
    assert bool(notes) == (len(classes) < len(names) or names == ["train/a", "val/b"])


@pytest.mark.parametrize("parts", [("probe1", "probe2"), ("train1", "train2"), ("probe", "dev")])
def test_folders_that_may_be_classes_are_not_joined(parts):
    names = [f"{part}/left" for part in parts]
    found, (note,) = join_parts(names)
    assert found == {name: name for name in names}
    assert "have class names in common (left) and are not taken as a split" in note


def test_spellings_of_three_kinds_are_one_class():
    latin = "caf\udce9"  # the byte of Windows-1252 in a file name
    found, (note,) = join_spellings(["café", "cafe\u0301", latin, "tea"])
    assert found == {"café": "café", "cafe\u0301": "café", latin: "café", "tea": "tea"}
    assert "1 class name is written in more than one Unicode spelling" in note
    assert join_spellings(["cafe\u0301", "tea"]) == ({"cafe\u0301": "cafe\u0301", "tea": "tea"}, [])


def test_bytes_outside_utf_8_are_read_as_windows_1252():
    # The table of Windows-1252 at unicode.org: 0x80 is the euro sign, 0x93 a quotation mark, 0x81 is undefined.
    assert readable("\udc80 \udc93 \udce9\udc81 größe 😀") == "€ “ é\x81 größe 😀"
