import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from torchvision.transforms.v2 import functional

from raydml.data import digests
from raydml.data.catalog import Catalog, DataError, ImageFile, catalog_of
from raydml.data.datasets import open_catalog
from raydml.data.digests import ImageRecord
from raydml.data.seal import TestReads
from raydml.data.splits import Split, make_split
from raydml.images import cache, pack
from raydml.images import pixels as pixels_module
from raydml.images.cache import Images, Storage, free_memory_bytes, load_development, load_test
from raydml.images.pixels import DecodedPixels, PackedPixels
from tests.images.processes import FORK, run_children

PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared" / "data" / "grocery_small" / "images"
SPLIT = {"test_fraction": 0.5, "val_fraction": 0.5, "num_folds": 2, "fold": None, "order": "sorted", "seed": 0}
NUM_CLASSES, PER_CLASS = 8, 3  # a..d development (a, b train; c, d val), e..h test


@pytest.fixture
def root(tmp_path):
    """Each image has one colour, made of its class and number: red = 20 * class, green = 50 * number."""
    folder = tmp_path / "images"
    for index, name in enumerate("abcdefgh"):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            Image.new("RGB", (12 + index, 10), (20 * index, 50 * number, 7)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(params=["cache", "memory"])
def cache_dir(request, tmp_path):
    return tmp_path / "cache" if request.param == "cache" else None


def opened(root: Path, **changes) -> tuple[Catalog, Split]:
    catalog = open_catalog("image_folder", root)
    return catalog, make_split(catalog, **{**SPLIT, **changes})


def stored(cache_dir: Path | None, on_unreadable: str = "refuse", **changes) -> Storage:
    return Storage(**{"resize_px": 8, "cache_dir": cache_dir, "on_unreadable": on_unreadable, **changes})


def development(
    root: Path, cache_dir: Path | None, on_unreadable: str = "refuse", *, fold: int | None = None, **changes
) -> tuple[Images, Images]:
    original = changes.pop("original", False)
    return load_development(*opened(root, fold=fold), stored(cache_dir, on_unreadable, **changes), original=original)


def test_images_of(root: Path, cache_dir: Path | None, reads: Path) -> Images:
    key = TestReads(reads).record(purpose="evaluate", checkpoint="x", commit="")
    return load_test(*opened(root), stored(cache_dir), key=key)


test_images_of.__test__ = False  # type: ignore[attr-defined]


def pixels_of(images: Images) -> list[np.ndarray]:
    return images.pixels.read(range(len(images.pixels)))


def colours(images: Images, channel: int) -> list[int]:
    """One channel of the colour of each image."""
    return [int(image[0, 0, channel]) for image in pixels_of(images)]


def same(left: Images, right: Images) -> bool:
    return (
        left.paths == right.paths
        and left.skipped == right.skipped
        and np.array_equal(left.labels, right.labels)
        and all(np.array_equal(a, b) for a, b in zip(pixels_of(left), pixels_of(right), strict=True))
    )


@pytest.fixture
def old_files(monkeypatch):
    """Files that were written a moment ago count as old: what was read of them is trusted at once."""
    monkeypatch.setattr(digests, "_RECENT_NS", 0)


def manifests(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.glob("*/manifest.json"))


def pack_folder(cache_dir: Path, short_px: int) -> Path:
    """The folder of the pack whose images have this short side."""
    (found,) = (
        index.parent for index in cache_dir.glob("*/*.index.npy") if int(np.load(index)[0, :2].min()) == short_px
    )
    return found


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded in this process."""
    paths: list[str] = []
    decode = pixels_module.decode

    def recording(root, path, *arguments, **settings):
        paths.append(path)
        return decode(root, path, *arguments, **settings)

    monkeypatch.setattr(pixels_module, "decode", recording)
    return paths


def files_opened(below: Path) -> list[str]:
    """Record every open() of this process below a folder, from now on to its end; for child processes."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(str(below)):
            seen.append(Path(str(arguments[0])).relative_to(below).as_posix())

    sys.addaudithook(hook)
    return seen


class TestContent:
    def test_pixels_labels_and_paths_belong_together(self, root, cache_dir):
        train, val = development(root, cache_dir)
        for images, first_class in ((train, 0), (val, 2)):
            assert isinstance(images.pixels, PackedPixels)
            assert (images.pixels.offsets % 64 == 0).all()
            assert len(set(images.pixels.offsets.tolist())) == 6
            assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
            assert images.labels.dtype == np.int64
            for pixels, label, path in zip(pixels_of(images), images.labels, images.paths, strict=True):
                index, number = first_class + int(label), int(path[2])
                assert path == f"{'abcdefgh'[index]}/{number}.png"
                assert pixels.shape == (8, int(8 * (12 + index) / 10), 3)  # its own aspect ratio
                assert (pixels == [20 * index, 50 * number, 7]).all()
                with pytest.raises(ValueError, match="read-only"):
                    pixels[0] = 0
            assert images.skipped == ()
            assert images.roles is None

    def test_a_cached_part_is_a_memory_map(self, root, tmp_path):
        """No part is copied into memory: those of two loads share the pages of the file."""
        for fold in (None, 0):
            for images in development(root, tmp_path / "cache", fold=fold):
                base = images.pixels.flat
                while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
                    base = base.base
                assert isinstance(base, np.memmap)
                assert base.mode == "r"

    @pytest.mark.parametrize("resize", ["short_side", "squash"])
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
    def test_kept_and_decoded_pixels_are_the_same_bits(self, root, tmp_path, resize, interpolation):
        generator = np.random.default_rng(0)
        exif = Image.Exif()
        exif[274] = 6  # the camera lay on its side
        for number, size in enumerate(((20, 40, 3), (3, 50, 3), (17, 16, 3))):
            noise = Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8))
            noise.save(root / "a" / f"{number}.jpg", exif=exif)
            noise.convert("LA").save(root / "c" / f"{number}.png")
        settings = {"resize": resize, "interpolation": interpolation}
        on_disk = development(root, tmp_path / "cache", **settings)
        in_memory = development(root, None, **settings)
        each_time = development(root, None, max_bytes=1, **settings)
        for disk, memory, fly in zip(on_disk, in_memory, each_time, strict=True):
            assert isinstance(fly.pixels, DecodedPixels)
            assert same(disk, memory)
            assert same(disk, fly)
            assert resize == "short_side" or {image.shape for image in pixels_of(disk)} == {(8, 8, 3)}

    def test_original_images_are_at_full_resolution_and_val_is_not(self, root, cache_dir):
        """The papers crop before they resize."""
        train, val = development(root, cache_dir, original=True)
        assert isinstance(train.pixels, DecodedPixels)
        assert [image.shape for image in pixels_of(train)] == [(10, 12, 3)] * 3 + [(10, 13, 3)] * 3
        assert colours(train, 0) == [0] * 3 + [20] * 3
        assert isinstance(val.pixels, PackedPixels)
        assert same(val, development(root, cache_dir)[1])
        scaled = development(root, cache_dir)[0]
        assert (train.paths, train.labels.tolist()) == (scaled.paths, scaled.labels.tolist())

    def test_original_images_share_the_pack_of_the_others(self, root, tmp_path, decoded):
        development(root, tmp_path / "cache", fold=0)
        decoded.clear()
        development(root, tmp_path / "cache", original=True)
        assert decoded == []

    def test_in_memory_only_val_is_kept_beside_original_images(self, root, decoded):
        development(root, None, original=True)
        assert sorted(decoded) == sorted(f"{c}/{n}.png" for c in "cd" for n in range(PER_CLASS))

    def test_roles_are_those_of_the_images(self, root, tmp_path):
        rows = [
            ImageFile(f"{c}/{n}.png", c, (root / c / f"{n}.png").stat().st_size, "train" if c < "e" else "test", role)
            for c in "abcdefgh"
            for n, role in enumerate(("query", "gallery", "gallery") if c >= "e" else ("",) * 3)
        ]
        catalog = catalog_of("inshop", root, reversed(rows))
        split = make_split(catalog, **SPLIT)
        (root / "f" / "0.png").write_bytes(b"")
        train, _ = load_development(catalog, split, stored(None))
        assert train.roles == ("",) * 6
        key = TestReads(tmp_path / "reads.jsonl").record(purpose="evaluate", checkpoint="x", commit="")
        test = load_test(catalog, split, stored(tmp_path / "cache", "skip"), key=key)
        assert test.paths[3:5] == ("f/1.png", "f/2.png")
        assert test.roles == ("query", "gallery", "gallery", "gallery", "gallery", *("query", "gallery", "gallery") * 2)

    @pytest.mark.parametrize("original", [False, True])
    def test_digits_stay_in_memory_and_are_scaled(self, tmp_path, original):
        catalog = open_catalog("digits", None)
        split = make_split(catalog, **SPLIT)
        train, val = load_development(catalog, split, stored(tmp_path / "cache"), original=original)
        assert (len(train.pixels), len(val.pixels)) == (178 + 182, 177 + 183 + 181)
        first = train.pixels.read([0])[0]
        assert first.shape == (8, 8, 3)
        assert first[0, :, 1].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # the documented first digit
        assert (np.ptp(first, axis=-1) == 0).all()
        assert np.bincount(val.labels).tolist() == [177, 183, 181]
        larger, larger_val = load_development(catalog, split, stored(None, resize_px=16), original=original)
        assert larger.pixels.read([3])[0].shape == ((8, 8, 3) if original else (16, 16, 3))
        assert larger_val.pixels.read([3])[0].shape == (16, 16, 3)
        assert not (tmp_path / "cache").exists()


class TestSeal:
    def test_the_interpreter_opens_no_test_file_either(self, root, tmp_path):
        """An audit hook sees every open() of a process; it cannot be removed, hence the child."""

        def child(queue) -> None:
            seen = files_opened(root)
            for fold in (None, 0, 1):
                for settings in ({}, {"original": True}, {"max_bytes": 1}):
                    for where in (tmp_path / "cache" / str(len(settings)), None):
                        for images in development(root, where, fold=fold, **settings):
                            pixels_of(images)
            queue.put(sorted({path.split("/")[0] for path in seen}))

        ((_, seen),) = run_children(child, 1)
        assert [name for name in seen if name != "."] == ["a", "b", "c", "d"]

    def test_the_development_cache_holds_no_test_image(self, root, tmp_path):
        development(root, tmp_path / "cache")
        before = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
        (pixels,) = (content for file, content in before.items() if file.suffix == ".pixels")
        assert len(pixels) == NEEDED_BYTES
        test = test_images_of(root, tmp_path / "cache", tmp_path / "reads.jsonl")
        assert test.labels.tolist() == [label for label in range(4) for _ in range(PER_CLASS)]
        assert colours(test, 0) == [red for red in (80, 100, 120, 140) for _ in range(PER_CLASS)]
        for file, content in before.items():
            assert file.read_bytes() == content  # the test images went into a folder of their own
        assert len(manifests(tmp_path / "cache")) == 2

    def test_test_images_need_a_fresh_key(self, root, tmp_path):
        catalog, split = opened(root)
        for no_key in (None, "finalize", object()):
            with pytest.raises(DataError, match="sealed"):
                load_test(catalog, split, stored(None), key=no_key)  # type: ignore[arg-type]
        key = TestReads(tmp_path / "reads.jsonl").record(purpose="evaluate", checkpoint="x", commit="")
        load_test(catalog, split, stored(None), key=key)
        with pytest.raises(DataError, match="used already"):
            load_test(catalog, split, stored(None), key=key)


class TestUnreadable:
    def damage(self, root: Path) -> None:
        (root / "a" / "1.png").write_bytes(b"no picture at all")
        whole = (root / "d" / "2.png").read_bytes()
        (root / "d" / "2.png").write_bytes(whole[: len(whole) - 25])  # its header is whole
        (root / "f" / "0.png").write_bytes(b"a damaged test image")

    def test_refusal_names_every_file_and_the_cure(self, root, cache_dir):
        self.damage(root)
        with pytest.raises(DataError) as caught:
            development(root, cache_dir)
        message = str(caught.value)
        assert "2 of 12 images" in message
        assert "a/1.png: no JPEG, PNG, " in message
        assert "d/2.png: " in message
        assert "--set machine.on_unreadable=skip" in message
        assert "f/0.png" not in message
        assert cache_dir is None or [file.name for file in cache_dir.glob("*/*")] == ["lock"]

    @pytest.mark.parametrize("settings", [{}, {"max_bytes": 1}, {"original": True}, {"original": True, "max_bytes": 1}])
    def test_skipping_leaves_them_out_and_lists_them(self, root, cache_dir, settings):
        self.damage(root)
        for _ in range(2):  # the second time from the cache
            train, val = development(root, cache_dir, "skip", **settings)
            assert train.paths == ("a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png")
            assert train.labels.tolist() == [0, 0, 1, 1, 1]
            assert colours(train, 1) == [0, 100, 0, 50, 100]  # green = 50 * number
            assert val.paths[-1] == "d/1.png"
            assert colours(val, 0) == [40, 40, 40, 60, 60]  # red = 20 * class
            assert [path for path, _ in train.skipped] == ["a/1.png"]
            assert [path for path, _ in val.skipped] == ["d/2.png"]

    def test_without_a_cache_a_broken_tail_is_refused_when_it_is_read(self, root):
        """Only decoding finds the damage, and nothing is decoded beforehand where nothing is kept."""
        whole = (root / "d" / "2.png").read_bytes()
        (root / "d" / "2.png").write_bytes(whole[: len(whole) - 25])
        _, val = development(root, None, max_bytes=1)
        assert len(val.pixels.read([0, 4])) == 2
        with pytest.raises(DataError, match=r"d/2\.png: "):
            val.pixels.read([5])
        (root / "d" / "1.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"1 of 12 images(.|\n)*d/1.png: an empty file"):
            development(root, None, max_bytes=1)

    def test_a_cache_with_gaps_does_not_satisfy_refuse(self, root, tmp_path, decoded):
        self.damage(root)
        development(root, tmp_path / "cache", "skip")
        decoded.clear()
        with pytest.raises(DataError, match="2 of 12 images"):
            development(root, tmp_path / "cache", "refuse")
        assert decoded == []  # the skipped files are in the manifest
        development(root, tmp_path / "cache", "skip")
        assert decoded == []

    def test_a_repaired_image_comes_back(self, root, tmp_path):
        good = (root / "a" / "1.png").read_bytes()
        (root / "a" / "1.png").write_bytes(b"x" * len(good))  # of the same size: only the time differs
        train, _ = development(root, tmp_path / "cache", "skip")
        assert len(train.pixels) == 5
        (root / "a" / "1.png").write_bytes(good)
        train, _ = development(root, tmp_path / "cache", "skip")
        assert len(train.pixels) == 6
        assert train.skipped == ()

    def test_an_image_skipped_for_a_passing_reason_comes_back(self, root, tmp_path):
        """A failure of the disk or a missing permission may pass; neither changes size or time of the file."""
        catalog, split = opened(root)
        (root / "a" / "1.png").rename(tmp_path / "elsewhere.png")
        train, _ = load_development(catalog, split, stored(tmp_path / "cache", "skip"))
        assert [path for path, _ in train.skipped] == ["a/1.png"]
        assert "FileNotFoundError" in train.skipped[0][1]
        (tmp_path / "elsewhere.png").rename(root / "a" / "1.png")
        train, _ = load_development(catalog, split, stored(tmp_path / "cache", "skip"))
        assert (len(train.pixels), train.skipped) == (6, ())

    @pytest.mark.parametrize("settings", [{}, {"max_bytes": 1}, {"original": True}])
    def test_a_class_must_keep_one(self, root, cache_dir, settings):
        (root / "b" / "0.png").write_bytes(b"")
        (root / "b" / "2.png").write_bytes(b"")
        train, _ = development(root, cache_dir, "skip", **settings)
        assert np.bincount(train.labels).tolist() == [3, 1]
        (root / "b" / "1.png").write_bytes(b"")
        if cache_dir is not None:
            shutil.rmtree(cache_dir)
        with pytest.raises(DataError, match=r"no image left after skipping unreadable ones: b\."):
            development(root, cache_dir, "skip", **settings)

    def test_a_class_of_one_image_from_the_start_may_stay(self, root, cache_dir):
        """Benchmarks have such classes; one that loses its only image is refused."""
        rows = [ImageFile(f"{c}/{n}.png", c, 1) for c in "abcdefgh" for n in range(1 if c == "a" else 3)]
        catalog = catalog_of("sop", root, rows)
        split = make_split(catalog, **SPLIT)
        (root / "b" / "0.png").write_bytes(b"")
        train, _ = load_development(catalog, split, stored(cache_dir, "skip"))
        assert train.labels.tolist() == [0, 1, 1]
        (root / "a" / "0.png").write_bytes(b"")
        if cache_dir is not None:
            shutil.rmtree(cache_dir)
        with pytest.raises(DataError, match=r"ones: a\."):
            load_development(catalog, split, stored(cache_dir, "skip"))

    def test_a_file_that_grows_between_header_and_pixels_is_skipped(self, root, cache_dir, monkeypatch):
        """Its place was reserved for the smaller image; nothing is written over its neighbours."""
        decode = pack.decode_in_order

        def grown(*arguments):
            good = (root / "a" / "1.png").read_bytes()
            Image.new("RGB", (40, 10), (1, 2, 3)).save(root / "a" / "1.png")
            yield from decode(*arguments)
            (root / "a" / "1.png").write_bytes(good)  # whole again when the new pack is opened

        monkeypatch.setattr(pack, "decode_in_order", grown)
        train, _ = development(root, cache_dir, "skip")
        assert train.skipped == (("a/1.png", "the file changed while it was read"),)
        assert colours(train, 1) == [0, 100, 0, 50, 100]


class TestPack:
    def test_each_file_is_decoded_once_for_all_folds(self, root, tmp_path, decoded):
        expected = {fold: development(root, None, fold=fold) for fold in (None, 0, 1)}
        decoded.clear()
        for _ in range(2):
            for fold, parts in expected.items():
                for got, wanted in zip(development(root, tmp_path / "cache", fold=fold), parts, strict=True):
                    assert same(got, wanted)
        assert len(decoded) == len(set(decoded)) == 12
        assert len(manifests(tmp_path / "cache")) == 1
        assert len(list((tmp_path / "cache").glob("*/*.pixels"))) == 1  # folds cost no disk

    @pytest.mark.usefixtures("old_files")
    def test_a_warm_start_opens_no_image(self, root, tmp_path):
        def child(queue) -> None:
            seen = files_opened(root)
            catalog, split = opened(root)
            seen.clear()  # folders may have been opened to list them
            train, val = load_development(catalog, split, stored(tmp_path / "cache"))
            queue.put((seen, colours(train, 0), colours(val, 0)))

        development(root, tmp_path / "cache")
        assert run_children(child, 1) == [(0, ([], [0] * 3 + [20] * 3, [40] * 3 + [60] * 3))]

    def test_other_settings_and_other_roots_have_packs_of_their_own(self, root, tmp_path):
        for changes in ({}, {"resize_px": 4}, {"resize": "squash"}, {"interpolation": "bicubic"}):
            development(root, tmp_path / "cache", **changes)
        twin = tmp_path / "twin"
        shutil.copytree(root, twin)
        assert open_catalog("image_folder", twin).content == opened(root)[0].content
        development(twin, tmp_path / "cache")
        development(root, tmp_path / "cache", fold=1)
        assert len(manifests(tmp_path / "cache")) == 5

    def test_other_development_classes_have_a_pack_of_their_own(self, root, tmp_path):
        development(root, tmp_path / "cache")
        catalog, split = opened(root, test_fraction=0.25)
        train, val = load_development(catalog, split, stored(tmp_path / "cache"))
        assert colours(train, 0)[::3] + colours(val, 0)[::3] == [0, 20, 40, 60, 80, 100]
        assert len(manifests(tmp_path / "cache")) == 2

    DAMAGES: ClassVar[dict[str, Callable[[Path, Path, Path], object]]] = {
        "no manifest": lambda manifest, *_: manifest.unlink(),
        "half a manifest": lambda manifest, *_: manifest.write_text(manifest.read_text()[:40]),
        "odd manifest": lambda manifest, *_: manifest.write_text("[]"),
        "other format": lambda manifest, *_: manifest.write_text(
            manifest.read_text().replace('"format": 3', '"format": 2')
        ),
        "short": lambda _, pixels, __: os.truncate(pixels, pixels.stat().st_size - 1),
        "long": lambda _, pixels, __: os.truncate(pixels, pixels.stat().st_size + 64),
        "empty": lambda _, pixels, __: os.truncate(pixels, 0),
        "no pixels": lambda _, pixels, __: pixels.unlink(),
        "no index": lambda *files: files[2].unlink(),
        "half an index": lambda *files: os.truncate(files[2], 100),
        "other index": lambda *files: np.save(files[2], np.load(files[2])[:-1]),
        "an image less": lambda _, pixels, index: (
            os.truncate(pixels, pixels.stat().st_size - -(-8 * 12 * 3 // 64) * 64),  # d/2.png, 8 x 12 pixels
            np.save(index, np.load(index)[:-1]),
        ),
    }

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_pack_is_made_anew(self, root, tmp_path, decoded, damage):
        expected = development(root, tmp_path / "cache")[0]
        (manifest,) = manifests(tmp_path / "cache")
        (pixels,), (index,) = manifest.parent.glob("*.pixels"), manifest.parent.glob("*.index.npy")
        kept = [image.copy() for image in pixels_of(expected)]
        before = [file.read_bytes() for file in (manifest, pixels, index)]
        self.DAMAGES[damage](manifest, pixels, index)
        assert [file.read_bytes() if file.exists() else None for file in (manifest, pixels, index)] != before
        (manifest.parent / "0badc0de.pixels").write_bytes(b"of a killed writer")
        decoded.clear()
        again, _ = development(root, tmp_path / "cache")
        assert all(np.array_equal(a, b) for a, b in zip(pixels_of(again), kept, strict=True))
        assert len(decoded) == 12
        assert sorted(file.suffix for file in manifest.parent.iterdir()) == ["", ".json", ".npy", ".npz", ".pixels"]

    @pytest.mark.parametrize("differs", ["time", "size"])
    def test_an_edited_image_is_noticed(self, root, tmp_path, differs):
        """The new pack replaces the old one, which stays readable where it is open."""
        file = root / "a" / "0.bmp"
        Image.new("RGB", (12, 10), (0, 0, 7)).save(file)
        before = file.stat()
        old, _ = development(root, tmp_path / "cache")
        size = (12, 10) if differs == "time" else (24, 20)  # a BMP is not compressed
        Image.new("RGB", size, (255, 255, 254)).save(file)
        os.utime(file, ns=(1, 1) if differs == "time" else (before.st_atime_ns, before.st_mtime_ns))
        new, _ = development(root, tmp_path / "cache")
        assert (pixels_of(new)[0] == [255, 255, 254]).all()
        assert (pixels_of(old)[0] == [0, 0, 7]).all()
        assert len(list((tmp_path / "cache").glob("*/*.pixels"))) == 1

    def test_changed_test_images_do_not_change_the_pack(self, root, tmp_path, decoded):
        """Another list of test images (VehicleID has three) shares the pack of the same training images."""
        development(root, tmp_path / "cache")
        shutil.rmtree(root / "h")
        Image.new("RGB", (99, 10)).save(root / "e" / "0.png")
        decoded.clear()
        catalog = open_catalog("image_folder", root)
        train, _ = load_development(catalog, Split((0, 1), (2, 3), (4, 5, 6)), stored(tmp_path / "cache"))
        assert colours(train, 1) == [0, 50, 100] * 2
        assert decoded == []

    def test_a_whole_pack_in_a_folder_that_cannot_be_written(self, root):
        """A cache made beforehand, mounted read-only; as another user, since root may write everywhere."""
        shared = Path(tempfile.mkdtemp())  # other users cannot enter tmp_path
        root = root.rename(shared / "images")
        catalog, split = opened(root)
        try:
            load_development(catalog, split, stored(shared / "cache"))
            before = sorted((str(file), file.stat().st_mtime_ns) for file in shared.rglob("*"))
            for file in (shared, *shared.rglob("*")):
                file.chmod(0o555 if file.is_dir() else 0o444)

            def child(queue) -> None:
                if os.getuid() == 0:
                    os.setuid(65534)
                with pytest.raises(PermissionError):
                    (shared / "cache" / "x").write_bytes(b"")
                with pytest.raises(DataError, match=r"machine.cache_dir = .* cannot be used: .*Permission denied"):
                    load_development(catalog, split, stored(shared / "cache", resize_px=4))
                train, val = load_development(catalog, split, stored(shared / "cache"))
                queue.put((colours(train, 0), colours(val, 1)))

            assert run_children(child, 1) == [(0, ([0] * 3 + [20] * 3, [0, 50, 100] * 2))]
            assert sorted((str(file), file.stat().st_mtime_ns) for file in shared.rglob("*")) == before
        finally:
            for folder in (shared, *(path for path in shared.rglob("*") if path.is_dir())):
                folder.chmod(0o755)
            shutil.rmtree(shared)


class TestBytes:
    """Images whose bytes change while path, class and size stay; the digests are those of hashlib on the files."""

    def test_what_was_read_is_recorded_and_read_again_after_a_write_alone(self, root, tmp_path, monkeypatch):
        monkeypatch.setattr(digests, "_RECENT_NS", 0)
        record = ImageRecord(tmp_path / "record")
        development(root, tmp_path / "cache", record=record)
        (file,) = record.folder.iterdir()
        with np.load(file) as saved:
            rows, of_bytes = saved["rows"].tolist(), [bytes(one).hex() for one in saved["digests"]]
        assert rows == list(range(12))  # the classes a to d; e to h are sealed
        paths = opened(root)[0].paths
        assert of_bytes == [hashlib.sha256((root / paths[row]).read_bytes()).hexdigest()[:32] for row in rows]
        read: list[str] = []
        read_one = digests._read_one
        monkeypatch.setattr(digests, "_read_one", lambda file: read.append(file.name) or read_one(file))
        os.utime(root / "a" / "1.png", ns=(1, 1))  # as by a copy: another time, the same bytes
        for expected in (["1.png"], ["1.png"]):  # the second time nothing is read: the new stamp was kept
            development(root, tmp_path / "cache", record=record, on_changed="refuse")
            assert read == expected

    @pytest.mark.usefixtures("old_files")
    @pytest.mark.parametrize("kept", ["packed", "decoded at each reading", "another machine"])
    def test_exchanged_pictures_are_refused_and_accepted_once_they_are_back(self, root, tmp_path, kept):
        """The two files are of one size, and have each other's times: path, class, size and time show nothing."""
        settings = {"max_bytes": 1} if kept == "decoded at each reading" else {}
        record = ImageRecord(tmp_path / "record")
        one, two = root / "a" / "0.png", root / "b" / "0.png"
        two.write_bytes(one.read_bytes()[:-4] + b"same")  # the checksum of a PNG's last chunk is not looked at
        before = opened(root)[0].content
        development(root, tmp_path / "cache", record=record, **settings)
        contents, times = [file.read_bytes() for file in (one, two)], [file.stat().st_mtime_ns for file in (one, two)]
        place = tmp_path / ("elsewhere" if kept == "another machine" else "cache")

        def write(first: bytes, second: bytes) -> None:
            for file, content, time_ns in zip((one, two), (first, second), times, strict=True):
                file.write_bytes(content)
                os.utime(file, ns=(time_ns, time_ns))

        write(*reversed(contents))
        assert opened(root)[0].content == before
        if kept != "another machine":  # known without a record, too
            with pytest.raises(DataError, match="2 of 12 images"):
                development(root, place, on_changed="refuse", **settings)
        with pytest.raises(DataError) as refused:
            development(root, place, record=record, **settings)
        assert "the contents of 2 of 12 images" in str(refused.value)
        assert "a/0.png, b/0.png. Results" in str(refused.value)
        development(root, place, **settings)  # a new study takes them as they are
        write(*contents)
        development(root, place, record=record, on_changed="accept", **settings)

    def test_a_missing_image_and_a_missing_folder_are_named(self, root, cache_dir):
        catalog, split = opened(root)
        if cache_dir is not None:
            load_development(catalog, split, stored(cache_dir))
            (root / "c" / "1.png").rename(root / "c" / "hidden")
            with pytest.raises(DataError, match=r"1 of 12 images under .* cannot be found any more: c/1.png\. Cure"):
                load_development(catalog, split, stored(cache_dir))
            (root / "c" / "hidden").rename(root / "c" / "1.png")
            load_development(catalog, split, stored(cache_dir))
            root.rename(root.with_name("unmounted"))
            with pytest.raises(DataError, match=r"folder of the images, .*/images, .*No such file.*mounted"):
                load_development(catalog, split, stored(cache_dir))

    @pytest.mark.parametrize("seen", ["at the opening", "at the reading"])
    def test_changed_pixels_of_a_pack_are_replaced_with_a_warning(self, root, tmp_path, caplog, monkeypatch, seen):
        before = [image.copy() for image in pixels_of(development(root, tmp_path / "cache")[0])]
        (file,) = (tmp_path / "cache").glob("*/*.pixels")
        whole = bytearray(file.read_bytes())
        status = file.stat()
        file.write_bytes(whole[:300] + bytes(byte ^ 255 for byte in whole[300:305]) + whole[305:])
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        if seen == "at the reading":  # as if the disk had lost the bytes: nothing was written
            monkeypatch.setattr(pack, "stamp_of_file", lambda _: np.array([*digests._stamp_of(status)]))
        pack._checked.clear()  # as in a new process
        again, _ = development(root, tmp_path / "cache")
        for _ in range(2):
            assert all(np.array_equal(a, b) for a, b in zip(pixels_of(again), before, strict=True))
        (record,) = caplog.records
        assert "damaged" in record.message
        monkeypatch.undo()
        development(root, tmp_path / "cache")
        (file,) = (tmp_path / "cache").glob("*/*.pixels")
        assert file.read_bytes() == whole

    def test_a_pack_of_an_older_version_is_made_anew(self, root, tmp_path, decoded, caplog):
        development(root, tmp_path / "cache")
        (manifest,) = manifests(tmp_path / "cache")
        facts = json.loads(manifest.read_text())
        for name in ("sources", "sum", "index_crc32"):
            del facts[name]
        manifest.write_text(json.dumps({**facts, "modified": "0123", "content": "0123"}))
        decoded.clear()
        development(root, tmp_path / "cache")
        assert len(decoded) == 12
        assert not caplog.records

    def test_a_damaged_record_is_named_with_its_cure(self, root, tmp_path):
        record = ImageRecord(tmp_path / "record")
        development(root, tmp_path / "cache", record=record)
        (file,) = record.folder.iterdir()
        whole = file.read_bytes()
        for content in (whole[:100], whole[:-300] + bytes(100) + whole[-200:], b""):
            file.write_bytes(content)
            with pytest.raises(DataError, match=r"record/[0-9a-f-]*\.npz, .* is damaged\. Cure: delete it"):
                development(root, tmp_path / "cache", record=record)
        file.unlink()
        development(root, tmp_path / "cache", record=record)
        assert file.read_bytes() == whole


def needed_bytes(short_px: int) -> int:
    """Bytes of the pixels of the 12 images, each (12 + class) x 10, every one beginning at a multiple of 64."""
    return sum(-(-short_px * int(short_px * (12 + c) / 10) * 3 // 64) * 64 * PER_CLASS for c in range(4))


NEEDED_BYTES = needed_bytes(8)


class TestSpace:
    @pytest.mark.parametrize("missing", [0, 1])
    def test_the_limit_is_exact(self, root, cache_dir, caplog, missing):
        train, val = development(root, cache_dir, max_bytes=NEEDED_BYTES - missing)
        assert isinstance(train.pixels, DecodedPixels if missing else PackedPixels)
        assert bool(caplog.records) == bool(missing)
        assert same(train, development(root, None)[0])
        assert same(val, development(root, None)[1])
        if cache_dir is not None:
            assert len(list(cache_dir.glob("*/*.pixels"))) == 1 - missing

    def test_packs_used_longest_ago_are_removed_and_stay_readable(self, root, tmp_path):
        cache = tmp_path / "cache"

        def resize_of_packs() -> list[int]:
            shapes = [np.load(index)[0, :2].min() for index in cache.glob("*/*.index.npy")]
            return sorted(int(short_px) for short_px in shapes)

        eight, _ = development(root, cache)
        development(root, cache, resize_px=4)
        os.utime(pack_folder(cache, 8) / "manifest.json", ns=(0, 0))
        development(root, cache)
        assert (pack_folder(cache, 8) / "manifest.json").stat().st_mtime_ns > 0  # used a moment ago
        taken = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        development(root, cache, resize_px=5, max_bytes=taken + 10**6)
        assert resize_of_packs() == [4, 5, 8]
        for used_s, short_px in enumerate((4, 5, 8)):  # the clock of files may be too coarse
            os.utime(pack_folder(cache, short_px) / "manifest.json", ns=(0, used_s * 10**9))
        of_eight = sum(file.stat().st_size for file in cache.rglob("*") if file.parent == pack_folder(cache, 8))
        development(root, cache, resize_px=6, max_bytes=of_eight + needed_bytes(6) + needed_bytes(5) - 1)
        assert resize_of_packs() == [6, 8]
        development(root, cache, resize_px=7, max_bytes=needed_bytes(7))
        assert resize_of_packs() == [7]
        assert same(eight, development(root, None)[0])  # a removed pack stays readable where it is open
        development(root, cache, resize_px=9, max_bytes=1)  # exceeds the limit by itself: nothing is removed for it
        assert resize_of_packs() == [7]

    def test_a_pack_that_is_being_written_is_not_removed(self, root, tmp_path):
        cache = tmp_path / "cache"
        development(root, cache)
        (manifest,) = manifests(cache)
        with FileLock(manifest.parent / "lock"):
            development(root, cache, resize_px=4, max_bytes=NEEDED_BYTES)
        assert len(manifests(cache)) == 2

    def test_a_full_disk_is_reported_before_writing(self, root, tmp_path, monkeypatch, caplog):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        written = []
        monkeypatch.setattr(cache, "write_pack", lambda *_: written.append(1))
        train, _ = development(root, tmp_path / "cache")
        assert colours(train, 1) == [0, 50, 100] * 2
        assert written == []
        (record,) = caplog.records
        assert (record.levelno, record.name) == (logging.WARNING, "raydml")
        assert "12 images at data.resize_px = 8 need 0.000 GiB, but machine.cache_dir = " in record.message
        assert "has 0.000 GiB free. They are not kept: every trial decodes each image again" in record.message
        assert record.message.endswith("Cure: free space there or name another folder, or lower data.resize_px")
        assert not list((tmp_path / "cache").rglob("*.pixels"))

    def test_half_of_the_free_memory_is_the_limit(self, root, monkeypatch, caplog):
        for free_bytes, kind in ((2 * NEEDED_BYTES, PackedPixels), (2 * NEEDED_BYTES - 1, DecodedPixels)):
            monkeypatch.setattr(cache, "free_memory_bytes", lambda free_bytes=free_bytes: free_bytes)
            assert isinstance(development(root, None)[0].pixels, kind)
        (record,) = caplog.records
        assert "half of the free memory is 0.000 GiB" in record.message
        assert "Cure: set machine.cache_dir to a folder on a local disk" in record.message

    def test_free_memory_is_that_of_the_machine_and_of_the_container(self, tmp_path):
        (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemFree:  100 kB\nMemAvailable:    500 kB\n")
        assert free_memory_bytes(tmp_path, tmp_path) == 500 * 1024
        (tmp_path / "memory.current").write_text("1000\n")
        for limit, expected in (("max\n", 512_000), ("900000\n", 512_000), ("3000\n", 2000), ("500\n", 0)):
            (tmp_path / "memory.max").write_text(limit)
            assert free_memory_bytes(tmp_path, tmp_path) == expected
        assert free_memory_bytes(tmp_path / "not linux", tmp_path / "not linux") > 2**20
        assert free_memory_bytes() > 2**20

    def test_a_disk_that_fills_up_while_writing(self, root, tmp_path):
        """A limit of the process makes a write in the middle of the pack fail, as a full disk does."""

        def child(queue) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (NEEDED_BYTES // 2, resource.RLIM_INFINITY))
            try:
                development(root, tmp_path / "cache")
            except DataError as error:
                queue.put(str(error))

        ((_, message),) = run_children(child, 1)
        assert "machine.cache_dir = " in message
        assert "cannot be used: [Errno 27] File too large" in message
        assert "give a writable folder with enough space on a local disk" in message
        assert [file.name for file in (tmp_path / "cache").glob("*/*")] == ["lock"]
        development(root, tmp_path / "cache")

    def test_a_cache_that_cannot_be_written_is_refused(self, root, tmp_path):
        (tmp_path / "cache").write_text("a file, not a folder")
        with pytest.raises(DataError, match=r"machine.cache_dir = .* cannot be used"):
            development(root, tmp_path / "cache")


class TestProcesses:
    @pytest.mark.usefixtures("old_files")
    def test_four_processes_at_once_decode_once(self, root, tmp_path):
        """Each file is opened twice: for its header and for its pixels."""
        barrier = FORK.Barrier(4)
        expected = sum(int(image.sum()) for images in development(root, None) for image in pixels_of(images))

        def child(queue) -> None:
            decode = pixels_module.decode

            def slow(*arguments, **settings):
                time.sleep(0.05)
                return decode(*arguments, **settings)

            pixels_module.decode = slow
            seen = files_opened(root)
            catalog, split = opened(root)
            seen.clear()  # folders may have been opened to list them
            barrier.wait(timeout=60)
            parts = load_development(catalog, split, stored(tmp_path / "cache"))
            queue.put((len(seen), sum(int(image.sum()) for images in parts for image in pixels_of(images))))

        results = run_children(child, 4)
        assert [code for code, _ in results] == [0] * 4
        assert sorted(opens for _, (opens, _) in results)[:3] == [0, 0, 0]
        # open() with an opener is seen twice, as open() and as os.open()
        assert max(opens for _, (opens, _) in results) in (2 * 12, 4 * 12)
        assert {total for _, (_, total) in results} == {expected}

    def test_a_waiting_process_logs_it_and_takes_over_from_a_killed_writer(self, root, tmp_path, monkeypatch, caplog):
        """The writer is killed with half of its pack written, while this process waits for it."""
        started = FORK.Event()

        def child() -> None:
            def stuck(*_arguments):
                yield np.zeros((100, 120, 3), dtype=np.uint8)
                yield np.zeros((100, 120, 3), dtype=np.uint8)
                started.set()
                time.sleep(600)

            pack.decode_in_order = stuck
            development(root, tmp_path / "cache", resize_px=100)

        writer = FORK.Process(target=child)
        writer.start()
        assert started.wait(timeout=60)
        (folder,) = (tmp_path / "cache").iterdir()
        assert list(folder.glob("*.pixels"))
        assert not (folder / "manifest.json").exists()
        messages = []

        def gib(num_bytes: int) -> str:
            messages.append(num_bytes)
            if len(messages) == 3:
                os.kill(writer.pid, signal.SIGKILL)
                writer.join(timeout=60)
            return f"{num_bytes} bytes"

        monkeypatch.setattr(cache, "_gib", gib)
        monkeypatch.setattr(cache, "WAIT_MESSAGE_EVERY_S", 0.05)
        caplog.set_level(logging.INFO, "raydml")
        train, _ = development(root, tmp_path / "cache", resize_px=100)
        assert writer.exitcode == -signal.SIGKILL
        assert same(train, development(root, None, resize_px=100)[0])
        assert sorted(file.suffix for file in folder.iterdir()) == ["", ".json", ".npy", ".npz", ".pixels"]
        waiting = [record.message for record in caplog.records if "waiting" in record.message]
        assert waiting == [f"waiting: another process decodes these images ({messages[0]} bytes so far)"] * 3
        assert 2 * 36_000 <= messages[0] <= 2 * 36_032  # two images of 100 x 120; the last padding may be in a buffer

    @pytest.mark.parametrize("moment", ["pixels", "index", "sources", "manifest"])
    def test_a_writer_killed_at_any_moment_does_not_block_the_next(self, root, tmp_path, moment):
        def child(_queue) -> None:
            def die(*_):
                os.kill(os.getpid(), signal.SIGKILL)

            if moment == "pixels":
                os.fsync = die
            elif moment == "index":
                np.save = die
            else:
                replace, name = os.replace, {"sources": "sources.npz", "manifest": "manifest.json"}[moment]
                os.replace = lambda aside, path: die() if str(path).endswith(name) else replace(aside, path)
            development(root, tmp_path / "cache")

        assert run_children(child, 1) == [(-signal.SIGKILL, None)]
        assert list((tmp_path / "cache").glob("*/*.pixels"))
        assert not manifests(tmp_path / "cache")
        train, _ = development(root, tmp_path / "cache")  # the lock ended with its holder
        assert colours(train, 1) == [0, 50, 100] * 2
        assert len(list((tmp_path / "cache").glob("*/*"))) == 5

    def test_remains_of_a_killed_writer_do_not_fill_the_disk(self, root, tmp_path, monkeypatch):
        development(root, tmp_path / "cache")
        (manifest,) = manifests(tmp_path / "cache")
        manifest.unlink()
        (manifest.parent / "dead.pixels").write_bytes(bytes(10**6))
        usage = namedtuple("usage", "total used free")

        def disk_usage(_folder: Path):
            free = 3 * 2**20 if not (manifest.parent / "dead.pixels").exists() else 0
            return usage(2**30, 0, free)

        monkeypatch.setattr(cache.shutil, "disk_usage", disk_usage)
        assert isinstance(development(root, tmp_path / "cache")[0].pixels, PackedPixels)

    @pytest.mark.parametrize(
        ("settings", "steps"),
        [({}, ["reading headers", "decoding"]), ({"max_bytes": 1}, ["reading headers", "checking images"])],
    )
    def test_every_pass_over_the_files_reports_its_progress_under_its_own_name(
        self, root, cache_dir, reported, settings, steps
    ):
        development(root, cache_dir, "skip", **settings)
        assert reported == [(step, done, 12, "images") for step in steps for done in range(1, 13)]


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="shared/data/grocery_small is not beside the repository")
def test_photographs_are_read_as_by_torchvision_and_nearly_as_by_pillow(cache_dir):
    catalog = open_catalog("image_folder", PHOTOGRAPHS)
    split = make_split(catalog, **{**SPLIT, "test_fraction": 0.9, "order": "shuffled"})
    train, val = load_development(catalog, split, stored(cache_dir, resize_px=32))
    assert len(train.pixels) + len(val.pixels) == 20 * 8  # 81 classes, ceil(72.9) = 73 of them test
    assert np.bincount(val.labels).tolist() == [20] * 4
    for images in (train, val):
        for index in range(0, len(images.paths), 7):
            found = images.pixels.read([index])[0]
            with Image.open(PHOTOGRAPHS / images.paths[index]) as file:
                photo = file.convert("RGB")
            expected = functional.resize(functional.pil_to_tensor(photo), 32, antialias=True)
            assert np.array_equal(found, expected.permute(1, 2, 0))
            size = tuple(int(32 * side / min(photo.size)) for side in photo.size)
            assert np.abs(found - np.asarray(photo.resize(size, Image.Resampling.BILINEAR)).astype(int)).max() <= 1
