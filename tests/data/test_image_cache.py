import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydml.data import image_cache
from raydml.data.datasets import Catalog, DataError, Split, make_split, open_catalog
from raydml.data.image_cache import Images, load_development, load_test
from raydml.data.seal import TestReads
from raydml.model import square

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SPLIT = {"test_fraction": 0.5, "val_fraction": 0.5, "num_folds": 2, "fold": None, "order": "sorted", "seed": 0}
NUM_CLASSES, PER_CLASS = 8, 3  # a..d development (a, b train; c, d val), e..h test


@pytest.fixture
def root(tmp_path):
    """Each image is one colour that tells its class and number: red = 20 * class, green = 50 * number."""
    folder = tmp_path / "images"
    for index, name in enumerate("abcdefgh"):
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            Image.new("RGB", (12 + index, 10), (20 * index, 50 * number, 7)).save(folder / name / f"{number}.png")
    return folder


def opened(root: Path, **changes) -> tuple[Catalog, Split]:
    catalog = open_catalog("image_folder", root)
    return catalog, make_split(catalog, **{**SPLIT, **changes})


def development(root: Path, cache_dir: Path | None, on_unreadable: str = "refuse", **changes) -> tuple[Images, Images]:
    catalog, split = opened(root, **changes)
    return load_development(catalog, split, resize_px=8, cache_dir=cache_dir, on_unreadable=on_unreadable)


def test_images_of(root: Path, cache_dir: Path | None, reads: Path) -> Images:
    catalog, split = opened(root)
    key = TestReads(reads).record(purpose="evaluate", checkpoint="x", commit="")
    return load_test(catalog, split, resize_px=8, cache_dir=cache_dir, on_unreadable="refuse", key=key)


test_images_of.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def decoded(monkeypatch):
    """The paths that Pillow was asked to open."""
    paths: list[str] = []
    image_open = Image.open

    def recording(file, *args, **settings):
        paths.append(str(file))
        return image_open(file, *args, **settings)

    monkeypatch.setattr(Image, "open", recording)
    return paths


@pytest.fixture(params=["cache", "memory"])
def cache_dir(request, tmp_path):
    return tmp_path / "cache" if request.param == "cache" else None


FORK = multiprocessing.get_context("fork")


def run_children(child: Callable[..., None], num: int) -> list[tuple[int | None, Any]]:
    """Run child(queue) in so many processes: their exit codes and what each put into its queue."""
    queues = [FORK.SimpleQueue() for _ in range(num)]
    processes = [FORK.Process(target=child, args=(queue,)) for queue in queues]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode is not None, "a child hangs"
    return [(p.exitcode, None if q.empty() else q.get()) for p, q in zip(processes, queues, strict=True)]


def manifests(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.glob("*/*.json"))


class TestContent:
    def test_pixels_labels_and_paths_belong_together(self, root, cache_dir):
        train, val = development(root, cache_dir)
        for images, first_class in ((train, 0), (val, 2)):
            assert images.pixels.shape == (6, 8, 8, 3)
            assert images.pixels.dtype == np.uint8
            assert images.labels.tolist() == [0, 0, 0, 1, 1, 1]
            assert images.labels.dtype == np.int64
            for pixels, label, path in zip(images.pixels, images.labels, images.paths, strict=True):
                index, number = first_class + int(label), int(path[2])
                assert path == f"{'abcdefgh'[index]}/{number}.png"
                assert (pixels == [20 * index, 50 * number, 7]).all()
            assert images.skipped == ()
            with pytest.raises(ValueError, match="read-only"):
                images.pixels[0] = 0

    def test_a_cached_part_is_a_memory_map(self, root, tmp_path):
        for images in development(root, tmp_path / "cache", order="shuffled"):
            assert isinstance(images.pixels, np.memmap)  # a view: no part is copied into memory

    def test_modes_and_rotation_come_out_as_model_reads_them(self, root, cache_dir):
        generator = np.random.default_rng(0)
        coarse = Image.fromarray(generator.integers(0, 256, (5, 4, 3), dtype=np.uint8))
        noise = coarse.resize((20, 40), Image.Resampling.BICUBIC)
        noise.convert("1").save(root / "a" / "0.png")
        noise.convert("RGBA").save(root / "a" / "1.png")
        exif = Image.Exif()
        exif[274] = 6  # the camera lay on its side
        noise.save(root / "a" / "2.jpg", exif=exif, quality=95)
        (root / "a" / "2.png").unlink()
        train, _ = development(root, cache_dir)
        for index, path in enumerate(train.paths[:3]):
            with Image.open(root / path) as image:
                assert np.array_equal(train.pixels[index], square(image, 8))
        upright = noise.rotate(-90, expand=True).resize((16, 8), Image.Resampling.BILINEAR).crop((4, 0, 12, 8))
        assert np.abs(train.pixels[2].astype(int) - np.asarray(upright)).mean() < 6  # JPEG is not exact
        assert set(np.unique(np.ptp(train.pixels[0], axis=-1))) == {0}  # 1 bit became grey RGB

    def test_digits_stay_in_memory_and_are_scaled(self, tmp_path):
        catalog = open_catalog("digits", None)
        split = make_split(catalog, **SPLIT)
        settings = {"cache_dir": tmp_path / "cache", "on_unreadable": "refuse"}
        train, val = load_development(catalog, split, resize_px=8, **settings)
        assert train.pixels.shape == (178 + 182, 8, 8, 3)
        assert len(val.pixels) == 177 + 183 + 181
        assert train.pixels[0, 0, :, 1].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # the documented first digit
        assert (np.ptp(train.pixels, axis=-1) == 0).all()
        assert np.bincount(val.labels).tolist() == [177, 183, 181]
        larger, _ = load_development(catalog, split, resize_px=16, **settings)
        assert larger.pixels.shape == (360, 16, 16, 3)
        assert abs(larger.pixels.mean() - train.pixels.mean()) < 2
        assert not (tmp_path / "cache").exists()


class TestSeal:
    def test_development_opens_no_test_file(self, root, tmp_path, cache_dir, decoded):
        for name in "efgh":
            for file in (root / name).iterdir():
                file.write_bytes(b"no picture at all")
        development(root, cache_dir)
        assert sorted(decoded) == sorted(str(root / c / f"{n}.png") for c in "abcd" for n in range(PER_CLASS))
        with pytest.raises(DataError, match="12 of 12 images"):
            test_images_of(root, cache_dir, tmp_path / "reads.jsonl")

    def test_the_interpreter_opens_no_test_file_either(self, root, tmp_path):
        """An audit hook sees every open() of the process, whoever makes it; it cannot be removed, hence the child."""

        def child(queue) -> None:
            seen = set()

            def hook(event: str, arguments: tuple) -> None:
                if event == "open" and str(arguments[0]).startswith(str(root)):
                    seen.add(Path(str(arguments[0])).relative_to(root).parts[0])

            sys.addaudithook(hook)
            for fold in (None, 0, 1):
                for where in (tmp_path / "cache", None):
                    for images in development(root, where, fold=fold):
                        images.pixels.sum()
            queue.put(sorted(seen))

        ((_, seen),) = run_children(child, 1)
        assert seen == ["a", "b", "c", "d"]

    def test_the_development_cache_holds_no_test_image(self, root, tmp_path):
        development(root, tmp_path / "cache")
        before = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
        test = test_images_of(root, tmp_path / "cache", tmp_path / "reads.jsonl")
        assert test.labels.tolist() == [label for label in range(4) for _ in range(PER_CLASS)]
        assert set(test.pixels[:, 0, 0, 0].tolist()) == {80, 100, 120, 140}  # red = 20 * class, e to h
        for file, content in before.items():
            assert file.read_bytes() == content  # the test images went into a folder of their own
        for manifest in manifests(tmp_path / "cache"):
            classes = {name for part in json.loads(manifest.read_text())["classes"] for name in part}
            assert classes in ({*"abcd"}, {*"efgh"})

    def test_test_images_need_a_fresh_key(self, root, tmp_path):
        catalog, split = opened(root)
        settings = {"resize_px": 8, "cache_dir": None, "on_unreadable": "refuse"}
        for no_key in (None, "finalize", object()):
            with pytest.raises(DataError, match="sealed"):
                load_test(catalog, split, key=no_key, **settings)  # type: ignore[arg-type]
        key = TestReads(tmp_path / "reads.jsonl").record(purpose="evaluate", checkpoint="x", commit="")
        load_test(catalog, split, key=key, **settings)
        with pytest.raises(DataError, match="used already"):
            load_test(catalog, split, key=key, **settings)


class TestUnreadable:
    def damage(self, root: Path) -> None:
        (root / "a" / "1.png").write_bytes(b"no picture at all")
        whole = (root / "d" / "2.png").read_bytes()
        (root / "d" / "2.png").write_bytes(whole[: len(whole) - 25])
        (root / "f" / "0.png").write_bytes(b"a test image: not our business")

    def test_refusal_names_every_file_and_the_cure(self, root, cache_dir):
        self.damage(root)
        with pytest.raises(DataError) as caught:
            development(root, cache_dir)
        message = str(caught.value)
        assert "2 of 12 images" in message
        assert "a/1.png: UnidentifiedImageError: cannot identify image file" in message
        assert "d/2.png: " in message
        assert "machine.on_unreadable: skip" in message
        assert "f/0.png" not in message
        assert cache_dir is None or not [
            *cache_dir.glob("*/*.json"),
            *cache_dir.glob("*/*.npy*"),
            *cache_dir.glob("*/*.part"),
        ]

    def test_skipping_leaves_them_out_and_lists_them(self, root, cache_dir):
        self.damage(root)
        for _ in range(2):  # the second time from the cache
            train, val = development(root, cache_dir, "skip")
            assert train.paths == ("a/0.png", "a/2.png", "b/0.png", "b/1.png", "b/2.png")
            assert train.labels.tolist() == [0, 0, 1, 1, 1]
            assert train.pixels[:, 0, 0, 1].tolist() == [0, 100, 0, 50, 100]  # green = 50 * number
            assert val.paths[-1] == "d/1.png"
            assert val.pixels[:, 0, 0, 0].tolist() == [40, 40, 40, 60, 60]  # red = 20 * class
            assert [path for path, _ in train.skipped] == ["a/1.png"]
            assert [path for path, _ in val.skipped] == ["d/2.png"]

    def test_a_cache_with_gaps_does_not_satisfy_refuse(self, root, tmp_path):
        self.damage(root)
        development(root, tmp_path / "cache", "skip")
        with pytest.raises(DataError, match="2 of 12 images"):
            development(root, tmp_path / "cache", "refuse")
        development(root, tmp_path / "cache", "skip")

    def test_a_repaired_image_comes_back(self, root, tmp_path):
        good = (root / "a" / "1.png").read_bytes()
        (root / "a" / "1.png").write_bytes(b"x" * len(good))  # of the same size: only the time tells
        train, _ = development(root, tmp_path / "cache", "skip")
        assert len(train.pixels) == 5
        (root / "a" / "1.png").write_bytes(good)
        train, _ = development(root, tmp_path / "cache", "skip")
        assert len(train.pixels) == 6
        assert train.skipped == ()

    def test_a_class_must_keep_two(self, root, cache_dir):
        (root / "b" / "0.png").write_bytes(b"")
        (root / "b" / "2.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"left after skipping unreadable ones: b \(1\)"):
            development(root, cache_dir, "skip")

    def test_sixteen_bits_are_refused_and_not_cut_off(self, root, cache_dir):
        deep = np.full((10, 12), 40_000, dtype=np.uint16)
        Image.fromarray(deep).save(root / "a" / "0.png")
        with pytest.raises(DataError, match=r"a/0.png: pixels of mode I.* not 8 bits"):
            development(root, cache_dir)

    def test_settings_are_checked(self, root):
        with pytest.raises(DataError, match=r"machine.on_unreadable = 'ignore'; choices: refuse, skip"):
            development(root, None, "ignore")
        catalog, split = opened(root)
        with pytest.raises(DataError, match=r"data.resize_px = 0"):
            load_development(catalog, split, resize_px=0, cache_dir=None, on_unreadable="skip")


class TestCache:
    def test_each_file_is_decoded_once_for_all_folds(self, root, tmp_path, decoded):
        expected = {fold: development(root, None, fold=fold) for fold in (None, 0, 1)}
        decoded.clear()
        for _ in range(2):
            for fold, parts in expected.items():
                for got, wanted in zip(development(root, tmp_path / "cache", fold=fold), parts, strict=True):
                    assert np.array_equal(got.pixels, wanted.pixels)
                    assert np.array_equal(got.labels, wanted.labels)
                    assert got.paths == wanted.paths
        assert len(decoded) == len(set(decoded)) == 12
        assert len(manifests(tmp_path / "cache")) == 2  # fold 1 is the search split: c, d are val in both

    def test_folds_copy_gaps_too(self, root, tmp_path):
        (root / "a" / "1.png").write_bytes(b"")
        development(root, tmp_path / "cache", "skip")
        train, val = development(root, tmp_path / "cache", "skip", fold=0)
        assert [path for path, _ in val.skipped] == ["a/1.png"]
        assert train.skipped == ()
        assert val.pixels[:, 0, 0, 1].tolist() == [0, 100, 0, 50, 100]

    def test_other_sizes_and_other_roots_have_packs_of_their_own(self, root, tmp_path):
        catalog, split = opened(root)
        for size_px in (8, 4):
            train, _ = load_development(
                catalog, split, resize_px=size_px, cache_dir=tmp_path / "cache", on_unreadable="refuse"
            )
            assert train.pixels.shape[1:] == (size_px, size_px, 3)
        twin = tmp_path / "twin"
        shutil.copytree(root, twin)
        assert open_catalog("image_folder", twin).content == catalog.content
        development(twin, tmp_path / "cache")
        assert len(manifests(tmp_path / "cache")) == 3

    @pytest.mark.parametrize(
        "harm", ["no manifest", "half a manifest", "odd manifest", "short", "empty", "no pixels", "other shape"]
    )
    def test_a_damaged_pack_is_made_anew(self, root, tmp_path, decoded, harm):
        expected = development(root, tmp_path / "cache")[0].pixels.copy()
        (manifest,) = manifests(tmp_path / "cache")
        (pixels,) = manifest.parent.glob("*.npy")
        if harm == "no manifest":  # killed between the two renames
            manifest.unlink()
        elif harm == "half a manifest":
            manifest.write_text(manifest.read_text()[:40])
        elif harm == "odd manifest":
            manifest.write_text("[]")
        elif harm == "short":
            os.truncate(pixels, pixels.stat().st_size - 1)
        elif harm == "empty":
            os.truncate(pixels, 0)
        elif harm == "no pixels":
            pixels.unlink()
        else:
            np.save(pixels, np.zeros((12 * 8, 8, 3), dtype=np.uint8))
        (manifest.parent / f"{manifest.stem}-0badc0de.part").write_bytes(b"of a killed writer")
        decoded.clear()
        assert np.array_equal(development(root, tmp_path / "cache")[0].pixels, expected)
        assert len(decoded) == 12
        assert sorted(file.suffix for file in manifest.parent.iterdir()) == ["", ".json", ".npy"]

    def test_an_edited_image_is_noticed(self, root, tmp_path):
        Image.new("RGB", (12, 10), (0, 0, 7)).save(root / "a" / "0.bmp")  # not compressed: the size tells nothing
        old = development(root, tmp_path / "cache")[0].pixels
        Image.new("RGB", (12, 10), (255, 255, 254)).save(root / "a" / "0.bmp")
        os.utime(root / "a" / "0.bmp", ns=(1, 1))
        new = development(root, tmp_path / "cache")[0].pixels
        assert (new[0] == [255, 255, 254]).all()
        assert (old[0] == [0, 0, 7]).all()  # who has the old pack open keeps it

    def test_a_full_disk_is_told_before_writing(self, root, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(DataError, match=r"machine.cache_dir = .* GB free, but 12 images of 8 x 8 pixels need"):
            development(root, tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.npy*"))

    def test_a_cache_that_cannot_be_written_is_told(self, root, tmp_path):
        (tmp_path / "cache").write_text("a file, not a folder")
        with pytest.raises(DataError, match=r"machine.cache_dir = .* cannot be used"):
            development(root, tmp_path / "cache")

    def test_three_processes_at_once_decode_once(self, root, tmp_path):
        barrier = FORK.Barrier(3)

        def child(queue) -> None:
            image_open, opened, replace, renamed = Image.open, [], os.replace, []

            def slow(file):
                opened.append(file)
                time.sleep(0.05)
                return image_open(file)

            def counted(*paths):
                renamed.append(paths)
                replace(*paths)

            Image.open, os.replace = slow, counted
            barrier.wait(timeout=60)
            train, val = development(root, tmp_path / "cache")
            queue.put((len(opened), len(renamed), int(train.pixels.sum()) + int(val.pixels.sum())))

        results = [result for _, result in run_children(child, 3)]
        assert sorted(result[:2] for result in results) == [(0, 0), (0, 0), (12, 2)]  # pixels and manifest
        expected = sum(int(images.pixels.sum()) for images in development(root, None))
        assert {total for *_, total in results} == {expected}

    def test_a_killed_builder_leaves_nothing_in_the_way(self, root, tmp_path):
        def child(_queue) -> None:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is renamed
            development(root, tmp_path / "cache")

        assert run_children(child, 1) == [(-signal.SIGKILL, None)]
        assert list((tmp_path / "cache").rglob("*.part"))
        train, _ = development(root, tmp_path / "cache")  # the lock died with its holder
        assert len(train.pixels) == 6
        assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.skipif(not (SHARED / "grocery_small").is_dir(), reason="shared/data/grocery_small is not beside the repo")
def test_real_photographs(tmp_path):
    catalog = open_catalog("image_folder", SHARED / "grocery_small" / "images")
    split = make_split(catalog, **{**SPLIT, "test_fraction": 0.9, "order": "shuffled"})
    train, val = load_development(catalog, split, resize_px=32, cache_dir=tmp_path / "cache", on_unreadable="refuse")
    assert len(train.pixels) + len(val.pixels) == 20 * 8  # 81 classes, ceil(72.9) = 73 of them test
    assert np.bincount(val.labels).tolist() == [20] * 4
    for images in (train, val):
        index = len(images.paths) // 2
        with Image.open(SHARED / "grocery_small" / "images" / images.paths[index]) as photo:
            assert np.array_equal(images.pixels[index], square(photo, 32))
        assert images.pixels.std() > 20
