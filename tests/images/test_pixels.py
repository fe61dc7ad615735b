"""The pixels of many images: packed, or decoded in threads."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydml.images import pixels
from raydml.images import pixels as decoding
from raydml.images.pixels import (
    DecodedPixels,
    PackedPixels,
    UnreadableImage,
    centres,
    decode_in_order,
    open_regular,
    packed,
    read_headers,
)
from raydml.images.preprocessing import Resizing
from raydml.ops.cores import num_usable_cores

SMALL = Resizing(8, "short_side", "bilinear")


def numbered(folder: Path, num: int) -> list[str]:
    """Write `num` files: image i has (12 + i) x 10 pixels, all of the colour (i, 2 i, 3 i) modulo 256."""
    for index in range(num):
        Image.new("RGB", (12 + index, 10), (index % 256, 2 * index % 256, 3 * index % 256)).save(
            folder / f"{index:03d}.png"
        )
    return [f"{index:03d}.png" for index in range(num)]


def ragged() -> tuple[PackedPixels, list[np.ndarray]]:
    """Images of 2 x 3, 1 x 1 and 4 x 2 pixels, with gaps between them."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((2, 3), (1, 1), (4, 2))]
    flat = np.full(200, 99, dtype=np.uint8)
    for begin, image in zip((0, 64, 128), images, strict=True):
        flat[begin : begin + image.size] = image.ravel()
    return PackedPixels(flat, np.array([0, 64, 128]), np.array([[2, 3], [1, 1], [4, 2]], dtype=np.int32)), images


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 2], [], np.array([1]), np.array([], dtype=np.int64), (2,)])
def test_rows_are_read_in_order_and_cannot_be_written(rows):
    pixels, images = ragged()
    read = pixels.read(rows)
    assert len(pixels) == 3
    assert len(read) == len(rows)
    for image, row in zip(read, rows, strict=True):
        assert np.array_equal(image, images[row])
        assert np.shares_memory(image, pixels.flat)
        with pytest.raises(ValueError, match="read-only"):
            image[0, 0] = 0


def test_a_selection_of_a_selection():
    pixels, images = ragged()
    chosen = pixels.select([2, 0, 1]).select(np.array([2, 0]))
    assert len(chosen) == 2
    assert [image.shape for image in chosen.read([0, 1])] == [(1, 1, 3), (4, 2, 3)]
    assert np.array_equal(chosen.read([1])[0], images[2])
    assert np.shares_memory(chosen.read([0])[0], pixels.flat)
    assert len(pixels.select([])) == 0


def test_an_array_of_images_as_pixels():
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    for given in (images, images[::-1], images.transpose(0, 2, 1, 3)):  # also views that are not contiguous
        assert np.array_equal(np.stack(packed(given).read(range(5))), given)


def test_centres_of_images_of_any_size():
    pixels, images = ragged()
    tall_and_wide = centres(pixels, [2, 0], 2)
    assert tall_and_wide.shape == (2, 2, 2, 3)
    assert np.array_equal(tall_and_wide[0], images[2][1:3])
    assert np.array_equal(tall_and_wide[1], images[0][:, 0:2])  # half a pixel is rounded to even, as torchvision does
    tall_and_wide[:] = 0  # a copy
    assert pixels.flat.any()
    assert centres(pixels, [], 2).shape == (0, 2, 2, 3)


class TestManyFiles:
    def test_rows_and_selections(self, tmp_path):
        pixels = DecodedPixels(tmp_path, numbered(tmp_path, 20), None)
        assert len(pixels) == 20
        for image, row in zip(pixels.read([3, 19, 3, 0]), (3, 19, 3, 0), strict=True):
            assert image.shape == (10, 12 + row, 3)
            assert (image == [row, 2 * row, 3 * row]).all()
            with pytest.raises(ValueError, match="read-only"):
                image[0] = 1
        chosen = pixels.select(np.array([5, 4, 3])).select([2, 0])
        assert [image.shape[1] for image in chosen.read(np.array([0, 1]))] == [15, 17]
        assert (len(chosen), len(pixels), pixels.read([])) == (2, 20, [])

    def test_eight_files_are_opened_at_the_same_time(self, tmp_path, monkeypatch):
        """On a network disk they wait at the same time. Each open lasts until eight have begun."""
        barrier = threading.Barrier(8)

        def opener(file: Path):
            barrier.wait(timeout=60)
            return open_regular(file)

        monkeypatch.setattr(decoding, "open_regular", opener)
        pixels = DecodedPixels(tmp_path, numbered(tmp_path, 16), SMALL)
        assert [int(image[0, 0, 0]) for image in pixels.read(range(16))] == list(range(16))

    @pytest.mark.parametrize(("num_cores", "num_threads"), [(1, 8), (12, 12), (200, 32)])
    def test_there_are_as_many_threads_as_cores_but_at_least_8_and_at_most_32(
        self, tmp_path, monkeypatch, num_cores, num_threads
    ):
        """Each open waits until as many others have begun; one thread less would wait for ever."""
        monkeypatch.setattr(decoding, "num_usable_cores", lambda: num_cores)
        barrier, begun = threading.Barrier(num_threads), []

        def opener(file: Path):
            begun.append(threading.get_ident())
            barrier.wait(timeout=60)
            return open_regular(file)

        paths = numbered(tmp_path, 2 * num_threads)
        assert len(list(decode_in_order(tmp_path, paths, SMALL, opener))) == 2 * num_threads
        assert len(set(begun)) == num_threads
        begun.clear()
        monkeypatch.setattr(decoding, "open_regular", opener)
        assert len(DecodedPixels(tmp_path, paths, SMALL).read(range(2 * num_threads))) == 2 * num_threads
        assert len(set(begun)) == num_threads

    @pytest.mark.parametrize("num_cores", [1, 3])
    def test_as_many_threads_as_cores_work_on_pixels_at_a_time(self, tmp_path, monkeypatch, num_cores):
        monkeypatch.setattr(decoding, "num_usable_cores", lambda: num_cores)
        at_work, most, lock = 0, 0, threading.Lock()
        upright = decoding.upright_rgb

        def counted(image):
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.01)
            with lock:
                at_work -= 1
            return upright(image)

        monkeypatch.setattr(decoding, "upright_rgb", counted)
        paths = numbered(tmp_path, 24)
        assert len(list(decode_in_order(tmp_path, paths, SMALL))) == 24
        assert most == num_cores
        most = 0
        DecodedPixels(tmp_path, paths, SMALL).read(range(24))
        assert most == num_cores

    @pytest.mark.parametrize("capability", ["avx2", "default"])
    def test_torch_starts_no_threads_in_the_threads_that_decode(self, tmp_path, capability):
        """Without AVX2 its kernel would start num_threads - 1 of them in each. Those that train keep theirs."""
        code = (
            "import os, sys, torch\n"
            "from pathlib import Path\n"
            "from raydml.images.pixels import DecodedPixels, decode_in_order\n"
            "from raydml.images.preprocessing import Resizing\n"
            "torch.set_num_threads(5)\n"
            "before = len(os.listdir('/proc/self/task'))\n"
            "resizing = Resizing(256, 'short_side', 'bilinear')\n"
            "pixels = DecodedPixels(Path(sys.argv[1]), sys.argv[2:], resizing)\n"
            "pixels.read(range(len(pixels)))\n"
            "print(len(os.listdir('/proc/self/task')) - before)\n"
            "during = set()\n"
            "for _ in decode_in_order(Path(sys.argv[1]), sys.argv[2:], resizing):\n"
            "    during.add(len(os.listdir('/proc/self/task')))\n"
            "print(max(during) - before)\n"
            "print(torch.get_num_threads())\n"
        )
        for index in range(64):
            Image.new("RGB", (400, 400)).save(tmp_path / f"{index}.png")
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", code, str(tmp_path), *(f"{index}.png" for index in range(64))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        of_pool, of_both, num_threads = map(int, done.stdout.split())
        allowed = min(32, max(8, num_usable_cores()))
        assert of_pool <= allowed
        assert of_both <= 2 * allowed
        assert num_threads == 5

    def test_several_threads_read_at_once(self, tmp_path):
        pixels = DecodedPixels(tmp_path, numbered(tmp_path, 12), SMALL)
        found: list[list[int]] = []

        def read() -> None:
            found.append([int(image[0, 0, 0]) for image in pixels.read(range(12))])

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert found == [list(range(12))] * 6

    def test_an_unreadable_file_is_named(self, tmp_path):
        paths = numbered(tmp_path, 4)
        (tmp_path / paths[2]).write_bytes(b"no picture at all")
        pixels = DecodedPixels(tmp_path, paths, SMALL)
        assert len(pixels.read([0, 1, 3])) == 3
        with pytest.raises(UnreadableImage, match=r"002\.png: no JPEG, PNG, WebP, .* by its first bytes"):
            pixels.read([0, 2, 1])

    def test_order_is_kept_with_reasons_in_their_places(self, tmp_path):
        paths = numbered(tmp_path, 300)
        for index in (0, 150, 299):
            (tmp_path / paths[index]).write_bytes(b"")
        for results in (list(decode_in_order(tmp_path, paths, SMALL)), list(read_headers(tmp_path, paths))):
            assert len(results) == 300
            for index, result in enumerate(results):
                if index in (0, 150, 299):
                    assert isinstance(result, UnreadableImage)
                    assert result.path == paths[index]
                elif isinstance(result, np.ndarray):
                    assert int(result[0, 0, 1]) == (2 * index) % 256
                else:
                    assert result[:2] == (12 + index, 10)

    def test_a_slow_writer_does_not_fill_the_memory(self, tmp_path, monkeypatch):
        """At most a few images a thread are decoded ahead of the consumer."""
        monkeypatch.setattr(pixels, "num_usable_cores", lambda: 2)  # 8 threads
        begun = []

        class Paths(list):
            def __iter__(self):
                for path in super().__iter__():
                    begun.append(path)
                    yield path

        images = decode_in_order(tmp_path, Paths(numbered(tmp_path, 200)), SMALL)
        for num_taken in range(1, 11):
            next(images)
            assert 8 <= len(begun) <= num_taken + 4 * 8
        images.close()
        assert len(begun) <= 10 + 4 * 8
