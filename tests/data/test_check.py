import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydml.data.benchmarks import BENCHMARKS
from raydml.data.catalog import DataError
from raydml.data.check import check_benchmark
from raydml.data.miniatures import build, draw
from raydml.images.pixels import fault_of
from tests.data.layouts import EVERY_LAYOUT, edit
from tests.data.refusals import LISTS, assert_contains, needs_real_lists


def wrong(report) -> list[str]:
    return [line for line in report.lines if line.startswith("WRONG")]


def other_faults(report) -> list[str]:
    """What is wrong beside the counts, which no miniature can have."""
    return [line for line in wrong(report) if "published are" not in line]


def faults_of(name: str, folder: Path) -> list[str]:
    """The faults that a check with decoding finds, beside the counts."""
    return other_faults(check_benchmark(name, folder, fault_of=fault_of))


def write_bomb(file: Path, width_px: int, height_px: int) -> None:
    """A PNG of a few bytes whose header states very many pixels."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


class TestMiniatures:
    @pytest.mark.parametrize(("name", "layout"), EVERY_LAYOUT)
    def test_only_the_counts_are_wrong(self, tmp_path, name, layout):
        folder = build(name, tmp_path, layout=layout)
        report = check_benchmark(name, tmp_path, fault_of=fault_of)
        assert not report.ok
        assert other_faults(report) == []
        assert len(wrong(report)) == len(BENCHMARKS[name].counts)
        num_images = {"inshop": 24, "vehicleid": 48}.get(name, 24)
        assert f"all {num_images} images were decoded" in report.lines
        assert any(line.startswith(f"all {num_images} listed images exist") for line in report.lines)
        assert report.lines[0] == f"{BENCHMARKS[name].title} in {folder}"

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_the_report_states_which_counts_were_confirmed(self, tmp_path, name):
        lines = wrong(check_benchmark(name, build(name, tmp_path)))
        stated = {
            "train": "counted in the real lists" if name in ("cub200", "cars196") else "no real file has confirmed"
        }
        if name == "vehicleid":
            stated |= {"test_800": "counted in", "test_2400": "no real file", "img2vid": "counted in"}
        for part, evidence in stated.items():
            assert any(line.startswith(f"WRONG {part}: ") and evidence in line for line in lines)

    def test_everything_wrong_comes_at_once(self, tmp_path):
        folder = build("sop", tmp_path)
        images = sorted((folder / "bicycle_final").iterdir())
        images[0].unlink()
        images[1].write_bytes(b"")
        images[2].write_bytes(images[2].read_bytes()[:300])
        images[3].write_bytes(b"<html>not found</html>")
        draw(folder / "chair_final" / "stray.JPG", 1, 1, 8)
        faults = faults_of("sop", folder)
        assert len(faults) == 4
        assert f"1 of 24 listed images are missing: bicycle_final/{images[0].name}" in faults[0]
        assert f"1 of 24 listed images are of zero bytes: bicycle_final/{images[1].name}" in faults[1]
        assert "1 images are in no list: chair_final/stray.JPG" in faults[2]
        no_image = f"{images[3].name} (no JPEG, PNG, WebP, "
        assert_contains(faults[3], "2 of 22 images cannot be decoded", f"{images[2].name} (OSError: ", no_image)
        assert str(tmp_path) not in faults[3]

    def test_without_decoding_a_damaged_image_passes(self, tmp_path):
        folder = build("sop", tmp_path)
        next((folder / "chair_final").iterdir()).write_bytes(b"no image")
        calls = []
        report = check_benchmark("sop", folder, progress=lambda done, total: calls.append((done, total)))
        assert other_faults(report) == []
        assert "the images were not decoded" in report.lines
        assert calls == []

    @pytest.mark.parametrize("size_px", [(10_000, 10_000), (60_000, 60_000)])
    def test_decompression_bombs(self, tmp_path, size_px):
        """Pillow warns of the first and refuses the second; here both are wrong, and neither is expanded."""
        folder = build("cub200", tmp_path)
        write_bomb(folder / "images" / "101.White_Pelican" / "White_Pelican_0000_101.jpg", *size_px)
        (fault,) = faults_of("cub200", folder)
        assert f"White_Pelican_0000_101.jpg ({size_px[0]:,} x {size_px[1]:,} pixels are more than 89,478,485" in fault

    @pytest.mark.parametrize("keep", [0.3, 0.9, -2])
    def test_truncated_files(self, tmp_path, keep):
        folder = build("cub200", tmp_path, size_px=64)
        file = folder / "images" / "101.White_Pelican" / "White_Pelican_0000_101.jpg"
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content)) if keep > 0 else int(keep) - 40])
        (fault,) = faults_of("cub200", folder)
        assert "1 of 24 images cannot be decoded" in fault

    def test_hidden_files_and_other_suffixes_are_no_extra_images(self, tmp_path):
        folder = build("sop", tmp_path)
        for name in ("chair_final/._1.JPG", ".cache/x.jpg", "__MACOSX/a/x.jpg", "chair_final/notes.txt", "readme.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        (folder / "chair_final" / "loop").symlink_to(folder)
        assert faults_of("sop", folder) == []

    def test_images_in_linked_folders_count(self, tmp_path):
        folder = build("sop", tmp_path / "sop")
        (folder / "chair_final").rename(tmp_path / "elsewhere")
        (folder / "chair_final").symlink_to(tmp_path / "elsewhere")
        draw(tmp_path / "elsewhere" / "x.jpg", 0, 0, 8)
        assert "1 images are in no list: chair_final/x.jpg" in faults_of("sop", folder)[0]

    def test_the_other_layout_of_cars_beside_it_is_no_fault(self, tmp_path):
        build("cars196", tmp_path, layout="csv")
        build("cars196", tmp_path, layout="merged")
        report = check_benchmark("cars196", tmp_path, fault_of=fault_of)
        assert other_faults(report) == []
        assert "all 24 images were decoded" in report.lines

    def test_progress_ends_at_the_number_of_images(self, tmp_path):
        folder = build("sop", tmp_path, classes_per_part=10, images_per_class=10, size_px=4)
        calls = []
        check_benchmark("sop", folder, progress=lambda done, total: calls.append((done, total)), fault_of=fault_of)
        assert calls == [(64, 200), (128, 200), (192, 200), (200, 200)]

    def test_an_interrupted_check_leaves_the_rest_undecoded(self, tmp_path):
        folder = build("sop", tmp_path, classes_per_part=40, images_per_class=40, size_px=4)
        seen = []

        def stop(_done: int, _total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            check_benchmark("sop", folder, progress=stop, fault_of=lambda *file: seen.append(file) or fault_of(*file))
        assert 64 <= len(seen) < 3200

    def test_a_name_that_is_none(self, tmp_path):
        with pytest.raises(DataError, match=r"choices: cub200, .*did you mean 'vehicleid'"):
            check_benchmark("vehicle", tmp_path, fault_of=fault_of)

    @pytest.mark.parametrize("name", list(BENCHMARKS))
    def test_nothing_there(self, tmp_path, name):
        for root in (tmp_path, tmp_path / "nowhere"):
            report = check_benchmark(name, root, fault_of=fault_of)
            assert not report.ok
            assert BENCHMARKS[name].markers[0] in report.lines[0]

    def test_lists_without_images(self, tmp_path):
        folder = build("cars196", tmp_path, layout="csv")
        for place in ("cars_train", "cars_test"):
            for file in (folder / place).iterdir():
                file.unlink()
            (folder / place).rmdir()
        (fault,) = faults_of("cars196", folder)
        assert fault.startswith("WRONG 24 of 24 listed images are missing: ")
        assert fault.endswith("and 14 more")

    def test_a_list_that_cannot_be_read(self, tmp_path):
        folder = build("sop", tmp_path)
        (folder / "Ebay_test.txt").write_text("nonsense")
        (fault,) = wrong(check_benchmark("sop", folder, fault_of=fault_of))
        assert "Ebay_test.txt: line 1 is 'nonsense'" in fault


class TestBoundingBoxes:
    @pytest.mark.parametrize(
        ("old", "new", "part"),
        [
            ("\n3 1.0 2.0 ", "\n3 1.0 .2.0 ", "the box as decimal numbers; 1 do not: line 3: '3 1.0 .2.0"),
            ("\n3 1.0 2.0 ", "\n3 1.0 nan ", "line 3: '3 1.0 nan"),
            ("\n3 1.0 2.0 ", "\n3 1.0 ", "5 columns"),
            ("\n3 1.0 2.0 ", "\n99 1.0 2.0 ", "has other images"),
            ("\n3 1.0 2.0 15.0 14.0", "", "has other images (23) than images.txt (24)"),
        ],
    )
    def test_read_strictly_where_there_are_any(self, tmp_path, old, new, part):
        folder = build("cub200", tmp_path)
        edit(folder / "bounding_boxes.txt", old, new)
        (fault,) = other_faults(check_benchmark("cub200", folder))
        assert part in fault
        (folder / "bounding_boxes.txt").unlink()
        assert other_faults(check_benchmark("cub200", folder)) == []


class TestVehicleid:
    @pytest.mark.parametrize(
        ("file", "old", "new", "pattern", "sizes"),
        [
            (
                *("train_test_split/train_list.txt", " 30\n", " 18515\n"),
                *(r"WRONG test_(\d+): 1 vehicles are also in train_list\.txt: 18515", ["800", "1600", "2400"]),
            ),
            (  # each test list has this image
                *("attribute/img2vid.txt", "0279029 23781", "0279029 23780"),
                r"WRONG test_(\d+): 1 images have another vehicle in .*: image/0279029\.jpg",
                ["800", "1600", "2400"],
            ),
            (
                *("train_test_split/test_list_800.txt", "0279029 23781\n", "0279029 23781\n0279029 23781\n"),
                *(r".*test_(\d+): 1 images of.*more than once.*", ["800"]),
            ),
        ],
        ids=["a vehicle in train and test", "another vehicle in img2vid", "listed twice"],
    )
    def test_faults_name_the_list(self, tmp_path, file, old, new, pattern, sizes):
        folder = build("vehicleid", tmp_path)
        edit(folder / file, old, new)
        lines = check_benchmark("vehicleid", folder).lines
        assert [found[1] for line in lines if (found := re.fullmatch(pattern, line))] == sizes

    def test_lists_with_other_images_of_a_vehicle(self, tmp_path):
        folder = build("vehicleid", tmp_path)
        edit(folder / "train_test_split" / "test_list_1600.txt", "0279029 23781\n", "")
        faults = [line for line in check_benchmark("vehicleid", folder).lines if "other images" in line]
        pairs = ("test_800 and test_1600", "test_1600 and test_2400")
        assert faults == [f"WRONG {pair}: 1 vehicles have other images: 23781" for pair in pairs]

    def test_images_in_no_list_are_usual(self, tmp_path):
        folder = build("vehicleid", tmp_path)
        draw(folder / "image" / "9999999.jpg", 0, 0, 8)
        assert "1 images are in no list, as is usual for vehicleid" in check_benchmark("vehicleid", folder).lines

    def test_lists_that_are_absent_are_reported_and_only_train_is_needed(self, tmp_path):
        lists = tmp_path / "train_test_split"
        build("vehicleid", tmp_path)
        (lists / "test_list_1600.txt").unlink()
        lines = check_benchmark("vehicleid", tmp_path).lines
        assert f"test_1600: there is no {lists / 'test_list_1600.txt'}; it was not checked" in lines
        (lists / "train_list.txt").unlink()
        assert f"WRONG train: there is no {lists / 'train_list.txt'}" in check_benchmark("vehicleid", tmp_path).lines
        for size in (800, 2400):
            (lists / f"test_list_{size}.txt").unlink()
        build("vehicleid", tmp_path / "other")
        (tmp_path / "other" / "train_test_split" / "train_list.txt").rename(lists / "train_list.txt")
        assert "WRONG none of the test lists can be used" in check_benchmark("vehicleid", tmp_path).lines


@needs_real_lists
class TestLookAlikes:
    def test_birds_from_the_web(self):
        report = check_benchmark("cub200", LISTS / "cub200_lookalike_web9788")
        assert not report.ok
        faults = wrong(report)
        assert faults[0].startswith("WRONG train: 4,864 images of 100 classes, published are 5,864 of 100")
        assert faults[1].startswith("WRONG test: 4,924 images of 100 classes, published are 5,924 of 100")
        assert "another data set in its format" in faults[0]
        assert_contains(faults[2], "bounding_boxes.txt", "9,788 do not: line 1: '1 0.0 .0.0 240.0 187.0'")

    def test_shoes(self):
        report = check_benchmark("sop", LISTS / "sop_lookalike_shoes")
        assert not report.ok
        assert "train: 9,131 images of 2,051 classes, published are 59,551 of 11,318" in wrong(report)[0]
        assert "test: 9,091 images of 2,050 classes, published are 60,502 of 11,316" in wrong(report)[1]

    def test_half_of_vehicleid(self, tmp_path):
        for real, place in {
            "train_partial_49999.txt": "train_test_split/train_list.txt",
            "test_list_800.txt": "train_test_split/test_list_800.txt",
            "img2vid.txt": "attribute/img2vid.txt",
        }.items():
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).symlink_to(LISTS / "vehicleid" / real)
        report = check_benchmark("vehicleid", tmp_path)
        for part, count in {"test_800": "6,493 images of 800", "img2vid": "221,567 images of 26,328"}.items():
            assert f"{part}: {count} classes, as published (counted in the real lists)" in report.lines
        faults = wrong(report)
        assert len(faults) == 2
        assert faults[0].startswith("WRONG train: 49,999 images of 5,055 classes, published are 113,346 of 13,164 or")
        assert faults[1].startswith("WRONG 56,492 of 56,492 listed images are missing")


def full_size(root: Path, name: str, paths: list[str]) -> Path:
    """The real lists of a benchmark with one small picture under each of its names."""
    one = root / "one.jpg"
    draw(one, 1, 1, 8)
    folder = root / name
    for path in paths:
        file = folder / path
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
        os.link(one, file)
    for file in (LISTS / name).iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def real_paths(name: str) -> list[str]:
    """Read here in a line each, not with the readers under test."""
    if name == "cub200":
        return ["images/" + line.split()[1] for line in (LISTS / name / "images.txt").read_text().splitlines()]
    return [
        f"cars_{part}/{line.split(',')[0]}"
        for part in ("train", "test")
        for line in (LISTS / name / f"anno_{part}.csv").read_text().splitlines()
    ]


@needs_real_lists
@pytest.mark.parametrize(("name", "counts"), [("cub200", (5864, 5924, 100)), ("cars196", (8054, 8131, 98))])
def test_full_size(tmp_path, name, counts):
    paths = real_paths(name)
    folder = full_size(tmp_path, name, paths)
    report = check_benchmark(name, folder, fault_of=fault_of)
    assert report.ok, report.lines
    assert wrong(report) == []
    assert report.lines[1].startswith(f"train: {counts[0]:,} images of {counts[2]} classes, as published (counted")
    assert report.lines[2].startswith(f"test: {counts[1]:,} images of {counts[2]} classes, as published (counted")
    assert f"all {sum(counts[:2]):,} images were decoded" in report.lines
    victim = folder / paths[777]
    victim.unlink()
    report = check_benchmark(name, folder)
    assert wrong(report) == [f"WRONG 1 of {len(paths):,} listed images are missing: {paths[777]}"]
    assert not report.ok
    victim.write_bytes((tmp_path / "one.jpg").read_bytes()[:-100])
    report = check_benchmark(name, folder, fault_of=fault_of)
    (fault,) = wrong(report)
    assert re.match(rf"WRONG 1 of {len(paths):,} images cannot be decoded: {re.escape(paths[777])} \(OSError: ", fault)
    assert not report.ok
    victim.unlink()
    os.link(tmp_path / "one.jpg", victim)
    os.link(tmp_path / "one.jpg", victim.with_name("one_too_many.jpg"))
    report = check_benchmark(name, folder)
    assert wrong(report) == [f"WRONG 1 images are in no list: {Path(paths[777]).parent}/one_too_many.jpg"]
    assert not report.ok


def test_the_class_of_a_miniature_is_visible_in_its_picture(tmp_path):
    """What others train on: the nearest mean colour of another picture is of the same class."""
    folder = build("cub200", tmp_path, classes_per_part=3, images_per_class=4)
    means = {}
    for file in folder.glob("images/*/*.jpg"):
        with Image.open(file) as image:
            means[file] = [
                sum(band) / len(band) for band in zip(*np.asarray(image).reshape(-1, 3).tolist(), strict=True)
            ]
    for file, mean in means.items():
        others = (other for other in means if other != file)
        nearest = min(others, key=lambda other: sum((a - b) ** 2 for a, b in zip(mean, means[other], strict=True)))
        assert nearest.parent == file.parent
