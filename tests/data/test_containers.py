"""Images in Parquet, Arrow and tars: what is read, what is refused, and that they are then like other images."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from raydml.data import containers, digests
from raydml.data.catalog import DataError, Groups
from raydml.data.datasets import open_catalog
from raydml.data.digests import ImageRecord
from raydml.data.seal import TestReads
from raydml.data.splits import make_split
from raydml.images.cache import Storage, load_development, load_test
from tests.data.refusals import SPLIT, assert_contains, refusal

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")


def image_bytes(shade, suffix="png"):
    out = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 2 * shade, 0)).save(out, "PNG" if suffix == "png" else "JPEG")
    return out.getvalue()


def rows_of(num_classes=8, per_class=3):
    """(class number, bytes), the classes mixed as in a shuffled file."""
    rows = [(c, image_bytes(10 * c + i)) for i in range(per_class) for c in range(num_classes)]
    return rows[::-1]


INT, TEXT = pa.int64(), pa.string()
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def table(rows, label=INT, form="struct", names=None):
    images = [one for _, one in rows]
    if form == "struct":
        images = pa.array(
            [{"bytes": one, "path": None} for one in images], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        )
    else:
        images = pa.array(images, pa.binary())
    labels = [c if pa.types.is_integer(label) else CLASSES[c] for c, _ in rows]
    made = pa.table(
        {"image": images, "label": pa.array(labels, label), "place": pa.array([f"p{c % 2}" for c, _ in rows])}
    )
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return made


def write_arrow(made, file, opener=pa.ipc.new_stream):
    with opener(str(file), made.schema) as writer:
        writer.write_table(made, max_chunksize=5)


def write_tar(file, members, mode="w"):
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def samples(rows, first=0, label="cls"):
    for number, (c, image) in enumerate(rows, start=first):
        yield f"{number:04d}.png", image
        if label == "cls":
            yield f"{number:04d}.cls", CLASSES[c].encode()
        else:
            yield f"{number:04d}.json", json.dumps({"label": c, "place": f"p{c % 2}"}).encode()


def opened(root, kind, **settings):
    return open_catalog(kind, root, cache_dir=root / "cache", **settings)


def contents(catalog):
    """Class -> the bytes of its images, sorted."""
    found = {}
    for path, label in zip(catalog.paths, catalog.labels, strict=True):
        found.setdefault(catalog.class_names[label], []).append((catalog.root / path).read_bytes())
    return {name: sorted(images) for name, images in found.items()}


def expected(rows, names=CLASSES):
    found = {}
    for c, image in rows:
        found.setdefault(names[c], []).append(image)
    return {name: sorted(images) for name, images in found.items()}


ROWS = rows_of()
WRITERS = {
    "texts and bytes": lambda folder: parquet.write_table(
        table(ROWS, TEXT, "bytes"), folder / "a.parquet", row_group_size=7
    ),
    "named numbers": lambda folder: parquet.write_table(table(ROWS, names=CLASSES), folder / "a.parquet"),
    "two files": lambda folder: [
        parquet.write_table(table(part, pa.large_string()), folder / f"{number}.parquet")
        for number, part in enumerate((ROWS[:10], ROWS[10:]))
    ],
    "a dictionary": lambda folder: parquet.write_table(
        table(ROWS, pa.string()).set_column(1, "label", pa.array([CLASSES[c] for c, _ in ROWS]).dictionary_encode()),
        folder / "a.parquet",
    ),
    "a stream": lambda folder: write_arrow(table(ROWS, names=CLASSES), folder / "data-00000-of-00001.arrow"),
    "a file of Arrow": lambda folder: write_arrow(table(ROWS, names=CLASSES), folder / "a.arrow", pa.ipc.new_file),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_classes_and_bytes_are_those_that_were_written(tmp_path, name):
    WRITERS[name](tmp_path)
    (tmp_path / "cache-0123.arrow").write_bytes(b"what the datasets library leaves behind")
    catalog = opened(tmp_path, "parquet")
    assert contents(catalog) == expected(ROWS)
    assert catalog.class_names == CLASSES
    again = opened(tmp_path, "parquet")
    assert (again.content, again.paths) == (catalog.content, catalog.paths)


def test_numbers_are_classes_in_their_order_and_a_column_is_the_group(tmp_path):
    rows = [(c, image_bytes(c)) for c in (9, 10, 11, 100)]
    parquet.write_table(table(rows), tmp_path / "a.parquet")
    catalog = opened(tmp_path, "parquet", path="a.parquet", group="place")
    assert catalog.class_names == ("009", "010", "011", "100")
    assert catalog.groups == Groups(("p1", "p0", "p1", "p0"))
    assert catalog.description == "4 classes in 1 Parquet or Arrow file, 4 images"


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_with_a_range_of_numbers(tmp_path, mode):
    suffix = ".tar" if mode == "w" else ".tar.gz"
    write_tar(tmp_path / f"s-08{suffix}", samples(ROWS[:10]), mode)
    write_tar(tmp_path / f"s-09{suffix}", [(".notes.txt", b"x"), *samples(ROWS[10:20], 10)], mode)
    write_tar(tmp_path / f"s-10{suffix}", samples(ROWS[20:], 20), mode)
    catalog = (
        opened(tmp_path, "webdataset", path=f"s-{{08..10}}{suffix}") if mode == "w" else opened(tmp_path, "webdataset")
    )
    assert contents(catalog) == expected(ROWS)
    assert_contains(
        refusal(opened, tmp_path, "webdataset", path=f"s-{{08..11}}{suffix}"), "there is no", "s-11", " Cure: "
    )


def test_labels_of_a_tar_may_be_fields(tmp_path):
    write_tar(tmp_path / "a.tar", samples(ROWS, label="json"))
    catalog = opened(tmp_path, "webdataset", group="place", exclude_same="group")
    assert contents(catalog) == expected(ROWS, "01234567")
    assert catalog.groups.are_excluded
    assert catalog.groups.names[:4] == ("p0", "p0", "p0", "p1")


def test_the_test_classes_stay_sealed_and_changed_bytes_are_refused(tmp_path):
    parquet.write_table(table(ROWS, names=CLASSES), tmp_path / "a.parquet")
    catalog = opened(tmp_path, "parquet")
    split = make_split(catalog, **SPLIT)
    storage = Storage(8, cache_dir=tmp_path / "cache", record=ImageRecord(tmp_path / "record"))
    train, val = load_development(catalog, split, storage)
    shades = sorted(int(image[0, 0, 0]) for image in (*train.pixels.read(range(6)), *val.pixels.read(range(6))))
    assert shades == [10 * c + i for c in range(4) for i in range(3)]
    with pytest.raises(DataError, match="the test classes are sealed"):
        load_test(catalog, split, storage, key=None)
    key = TestReads(tmp_path / "reads.jsonl").record(purpose="test", checkpoint="x", commit="y")
    assert len(load_test(catalog, split, storage, key=key).pixels) == 12
    # The same classes, sizes and names, and another picture in one row.
    swapped = [(c, image_bytes(99)) if number == 22 else (c, image) for number, (c, image) in enumerate(ROWS)]
    assert len(swapped[22][1]) == len(ROWS[22][1])
    parquet.write_table(table(swapped, names=CLASSES), tmp_path / "a.parquet")
    other = opened(tmp_path, "parquet")
    assert other.content == catalog.content
    with pytest.raises(DataError, match="have changed since the study first opened them"):
        load_development(other, split, storage)


def test_a_damaged_image_is_refused_where_it_is_decoded(tmp_path):
    rows = [(c, image[:-30] if number == 22 else image) for number, (c, image) in enumerate(ROWS)]
    parquet.write_table(table(rows, names=CLASSES), tmp_path / "a.parquet")
    catalog = opened(tmp_path, "parquet")
    with pytest.raises(DataError, match=r"1 of 12 images .* cannot be read:\n  a.parquet/0000022.png"):
        load_development(catalog, make_split(catalog, **SPLIT), Storage(8, cache_dir=tmp_path / "cache"))


def broken(folder, name):
    """Write a file that must be refused; return its kind and settings."""
    good, file = table(ROWS, pa.string(), "bytes"), folder / "a.parquet"
    if name == "cut parquet":
        parquet.write_table(good, file)
        file.write_bytes(file.read_bytes()[:-30])
    elif name == "parquet of zeros":
        parquet.write_table(good, file, compression="none", use_dictionary=False)
        raw = bytearray(file.read_bytes())
        raw[4:400] = bytes(396)
        file.write_bytes(raw)
    elif name == "no parquet":
        file.write_bytes(b"<html>not found</html>")
    elif name == "open stream":
        write_arrow(good, folder / "a.arrow")
        (folder / "a.arrow").write_bytes((folder / "a.arrow").read_bytes()[:-8])
    elif name == "cut stream":
        write_arrow(good, folder / "a.arrow")
        (folder / "a.arrow").write_bytes((folder / "a.arrow").read_bytes()[:900])
    elif name == "lists for images":
        parquet.write_table(good.set_column(0, "image", pa.array([[1, 2]] * 24)), file)
    elif name == "paths alone":
        rows = pa.array([{"bytes": None, "path": "a.png"}] * 24, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        parquet.write_table(good.set_column(0, "image", rows), file)
    elif name == "decimal labels":
        parquet.write_table(good.set_column(1, "label", pa.array([0.5] * 24)), file)
    elif name == "a row without a label":
        parquet.write_table(good.set_column(1, "label", pa.array(["a"] * 20 + [None] * 4)), file)
    elif name == "a number without a name":
        parquet.write_table(table([*ROWS, (9, ROWS[0][1])], names=CLASSES), file)
    elif name == "numbers and texts":
        parquet.write_table(good, file)
        parquet.write_table(table(ROWS), folder / "b.parquet")
    elif name == "other columns":
        parquet.write_table(good.rename_columns(["img", "label", "place"]), file)
    else:
        members = {
            "no label": [("0.png", b"x"), ("0.pkl", pickle.dumps(5))],
            "two images": [("0.png", b"x"), ("0.left.jpg", b"x"), ("0.jpg", b"x"), ("0.cls", b"1")],
            "no image": [("0.txt", b"x"), ("0.cls", b"1")],
            "an empty label": [("0.png", b"x"), ("0.cls", b" ")],
            "no json": [("0.png", b"x"), ("0.json", b"{")],
            "a list for a label": [("0.png", b"x"), ("0.json", b'{"label": [1]}')],
            "a sample twice": [("0.png", b"x"), ("0.png", b"y"), ("0.cls", b"1")],
            "cut tar": samples(ROWS), "tar without its end": samples(ROWS), "damaged header": samples(ROWS),
        }[name]  # fmt: skip
        write_tar(folder / "a.tar", members)
        raw = bytearray((folder / "a.tar").read_bytes())
        cut = {"cut tar": len(ROWS[0][1]) // 2 + 512, "tar without its end": 4 * 1024}.get(name, len(raw))
        if name == "damaged header":
            raw[1024:1100] = b"x" * 76
        (folder / "a.tar").write_bytes(raw[:cut])
        return "webdataset"
    return "parquet"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cut parquet", ["a.parquet is damaged or truncated", "Cure: fetch or write it again"]),
        ("parquet of zeros", ["a.parquet is damaged or truncated"]),
        ("no parquet", ["a.parquet is damaged or truncated"]),
        ("open stream", ["a.arrow is damaged or truncated (the stream has no end mark)"]),
        ("cut stream", ["a.arrow is damaged or truncated"]),
        ("lists for images", ["a.parquet: column 'image' is list<", "must be the bytes of image files"]),
        ("paths alone", ["a.parquet: column 'image' has no bytes in row 0, 1,", "and 14 more (or only a path)"]),
        ("decimal labels", ["a.parquet: column 'label' is double, and must be texts or whole numbers"]),
        ("a row without a label", ["column 'label' has no value in row 20, 21, 22, 23"]),
        ("a number without a name", ["column 'label' has no value, or none of the 8 classes in row 24"]),
        ("numbers and texts", ["some labels are numbers (b.parquet/0000000.png) and some are texts (a.parquet/"]),
        ("other columns", ["a.parquet has no column image, but img, label, place. Cure: name them in data.image"]),
        ("no label", ["sample '0' has no label", "pkl may be pickled, and is never loaded"]),
        ("two images", ["sample '0' has several images (png, jpg)", "data.image, such as jpg"]),
        ("no image", ["sample '0' has no image, but txt, cls"]),
        ("an empty label", ["sample '0': its .cls is empty"]),
        ("no json", ["sample '0': its .json cannot be read"]),
        ("a list for a label", ["field 'label' is [1], and must be a text or a whole number"]),
        ("a sample twice", ["'0.png' is in it twice"]),
        ("cut tar", ["a.tar is damaged or truncated"]),
        ("tar without its end", ["a.tar is damaged or truncated (the end mark of the tar is missing)"]),
        ("damaged header", ["a.tar is damaged or truncated"]),
    ],
)
def test_refusals_name_file_column_and_cure(tmp_path, name, parts):
    kind = broken(tmp_path, name)
    assert_contains(refusal(opened, tmp_path, kind), *parts, " Cure: ")
    assert not list(tmp_path.rglob("list.json"))  # the next start reads it again


def test_one_image_of_several_can_be_chosen(tmp_path):
    rows = [(f"{c}{i}", c) for c in range(2) for i in range(2)]
    members = [
        m
        for key, c in rows
        for m in ((f"d/{key}.left.jpg", image_bytes(c)), (f"d/{key}.jpg", b"?"), (f"d/{key}.cls", b"%d" % c))
    ]
    write_tar(tmp_path / "a.tar", members)
    catalog = opened(tmp_path, "webdataset", image="left.jpg")
    assert contents(catalog) == {str(c): [image_bytes(c)] * 2 for c in range(2)}
    assert np.bincount(catalog.labels).tolist() == [2, 2]


def test_links_and_names_that_lead_outside_write_nothing_there(tmp_path):
    write_tar(tmp_path / "a.tar", [("../../evil.png", image_bytes(1)), ("../../evil.cls", b"1")])
    catalog = opened(tmp_path, "webdataset")
    assert catalog.paths == ("a.tar/0000000.png",)
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    said = refusal(opened, tmp_path, "webdataset", path="b.tar")
    assert_contains(said, "is a link, a device or sparse: refused", " Cure: ")


@pytest.mark.parametrize(
    ("members", "settings", "part"),
    [
        ([("0.png", b"x"), ("0.json", b"[1]")], {}, "its .json is list, and must be an object"),
        ([("0.png", b"x"), ("0.cls", b"\xff")], {}, "its .cls is no text in UTF-8"),
        ([("0.png", b"x"), ("0.cls", b"1" * (2**20 + 1))], {}, "member '0.cls' has 1,048,577 bytes: refused"),
        ([("0.png", b"x"), ("0.cls", b"1")], {"group": "place"}, "has no field 'place' in a .json, but none"),
        ([("0.png", b"x"), ("0.cls", b"1")], {"path": "a-{3..1}.tar"}, "{3..1} is no range of at most 100,000 rising"),
        ([("0.cls", b"1")], {}, "has no image"),
        ([], {}, "there is no image in a.tar"),
    ],
)
def test_every_refusal_of_a_tar_names_its_cure(tmp_path, members, settings, part):
    write_tar(tmp_path / "a.tar", members)
    assert_contains(refusal(opened, tmp_path, "webdataset", **settings), part, " Cure: ")


def plain_parquet(file, shade):
    """A file of six BMP of one shade each, whose size does not depend on the shade, with a fixed time."""
    images = []
    for number in range(6):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (shade + number,) * 3).save(out, "BMP")
        images.append(out.getvalue())
    file.parent.mkdir(exist_ok=True)
    made = pa.table({"image": images, "label": [*"xxyyzz"]})
    parquet.write_table(made, file, compression="none", use_dictionary=False)
    os.utime(file, (1e9, 1e9))
    return images


def test_equal_names_sizes_and_times_are_not_equal_files(tmp_path):
    cache = tmp_path / "cache"
    written = {name: plain_parquet(tmp_path / name / "train.parquet", shade) for name, shade in (("A", 10), ("B", 99))}
    assert len({(tmp_path / name / "train.parquet").stat().st_size for name in written}) == 1
    for name, images in written.items():
        catalog = open_catalog("parquet", tmp_path / name, path="train.parquet", cache_dir=cache)
        assert [(catalog.root / path).read_bytes() for path in catalog.paths] == images
    # The same place, size and time, and other bytes.
    images = plain_parquet(tmp_path / "A" / "train.parquet", 50)
    catalog = open_catalog("parquet", tmp_path / "A", path="train.parquet", cache_dir=cache)
    assert [(catalog.root / path).read_bytes() for path in catalog.paths] == images


def test_an_unchanged_source_is_read_once(tmp_path, monkeypatch):
    plain_parquet(tmp_path / "train.parquet", 10)
    monkeypatch.setattr(digests, "_RECENT_NS", 0)  # as if it had been written long ago
    read, of = [], digests._digest_of
    monkeypatch.setattr(digests, "_digest_of", lambda handle: read.append(handle.name) or of(handle))
    for _ in range(3):
        opened(tmp_path, "parquet")
    assert read == [str(tmp_path / "train.parquet")]
    (tmp_path / "train.parquet").touch()
    opened(tmp_path, "parquet")
    assert len(read) == 2


@pytest.mark.parametrize("damage", ["emptied", "longer", "removed", "list", "no list"])
def test_damaged_unpacked_images_are_unpacked_again_with_a_warning(tmp_path, caplog, damage):
    images = plain_parquet(tmp_path / "train.parquet", 10)
    folder = opened(tmp_path, "parquet").root
    file = folder / "train.parquet" / "0000003.bmp"
    if damage == "emptied":
        file.write_bytes(b"")
    elif damage == "longer":
        file.write_bytes(images[3] + b"x")
    elif damage == "removed":
        file.unlink()
    elif damage == "list":
        (folder / "list.json").write_text("[[1, 2]]")
    else:
        (folder / "list.json").unlink()
    assert not caplog.records
    catalog = opened(tmp_path, "parquet")
    assert [(catalog.root / path).read_bytes() for path in catalog.paths] == images
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (damage != "no list")
    name = "list.json" if damage == "list" else "train.parquet/0000003.bmp"
    assert all(f"1 file of unpacked images are missing or have changed ({name}" in text for text in warnings)


def test_what_fails_while_unpacking_and_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    plain_parquet(tmp_path / "train.parquet", 10)
    settings = {"path": "train.parquet", "cache_dir": cache}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(containers, "write_whole", full)  # the images are written, the list is not
        assert "No space left on device" in refusal(open_catalog, "parquet", tmp_path, **settings)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    folder = open_catalog("parquet", tmp_path, **settings).root
    left = cache / f".{folder.name}.0123.partial"
    folder.rename(left)
    assert open_catalog("parquet", tmp_path, **settings).root == folder
    assert not left.exists()


def test_images_are_on_the_disk_before_their_list(tmp_path, monkeypatch):
    plain_parquet(tmp_path / "train.parquet", 10)
    seen = []
    cache = tmp_path / "cache"
    monkeypatch.setattr(
        os, "sync", lambda: seen.append((len([*cache.rglob("*.bmp")]), len([*cache.rglob("list.json")])))
    )
    opened(tmp_path, "parquet")
    assert seen == [(6, 0)]


def test_without_a_cache_nothing_is_left_when_the_process_ends(tmp_path):
    plain_parquet(tmp_path / "train.parquet", 10)
    code = (
        "from pathlib import Path\n"
        "from raydml.data.datasets import open_catalog\n"
        f"catalog = open_catalog('parquet', Path({str(tmp_path)!r}), path='train.parquet')\n"
        "print(sum((catalog.root / path).exists() for path in catalog.paths), catalog.root)\n"
    )
    (tmp_path / "tmp").mkdir()
    given = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    number, root = done.stdout.split()
    assert number == "6"
    assert root.startswith(str(tmp_path / "tmp"))
    assert not list((tmp_path / "tmp").iterdir())
