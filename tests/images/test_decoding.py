import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raydml.images import decoding, pixels
from raydml.images.decoding import UnreadableImage, decode, decoded_bytes, open_regular, read_header
from raydml.images.pixels import DecodedPixels, decode_in_order, read_headers
from raydml.images.preprocessing import Preprocessing, Resizing

SMALL = Resizing(8, "short_side", "bilinear")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def numbered(folder: Path, num: int) -> list[str]:
    """Write `num` files: image i has (12 + i) x 10 pixels, all of the colour (i, 2 i, 3 i) modulo 256."""
    for index in range(num):
        Image.new("RGB", (12 + index, 10), (index % 256, 2 * index % 256, 3 * index % 256)).save(
            folder / f"{index:03d}.png"
        )
    return [f"{index:03d}.png" for index in range(num)]


class TestFormats:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif", "webp", "jpg"])
    def test_the_content_decides_and_not_the_name(self, tmp_path, suffix):
        """A lossless file gives its pixels, a JPEG those of Pillow, whatever its name ends in."""
        picture = noise(12, 10).quantize(64).convert("RGB")
        picture.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
        (tmp_path / f"a.{suffix}").rename(tmp_path / "a.jpeg")
        with Image.open(tmp_path / "a.jpeg") as image:
            expected = np.asarray(image.convert("RGB"))
        found = decode(tmp_path, "a.jpeg", None)
        assert np.array_equal(found, expected)
        if suffix != "jpg":
            assert np.array_equal(found, np.asarray(picture))
        assert (found.dtype, found.flags.writeable) == (np.uint8, False)
        header = read_header(tmp_path, "a.jpeg")
        assert header == (12, 10, (tmp_path / "a.jpeg").stat().st_size)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
    def test_modes(self, tmp_path, mode):
        suffix = {"CMYK": "tif"}.get(mode, "png")
        noise(12, 10).convert(mode).save(tmp_path / f"a.{suffix}")
        expected = np.asarray(noise(12, 10).convert(mode).convert("RGB"))
        assert np.array_equal(decode(tmp_path, f"a.{suffix}", None), expected)

    def test_jpegs_of_the_press_and_of_grey_cameras(self, tmp_path):
        for mode in ("CMYK", "L"):
            noise(12, 10).convert(mode).save(tmp_path / "a.jpg", quality=95)
            with Image.open(tmp_path / "a.jpg") as image:
                assert image.mode == mode
                assert np.array_equal(decode(tmp_path, "a.jpg", None), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("transparency", [3, b"\x00\x40\x80"])
    def test_palettes_with_transparency_keep_their_colours(self, tmp_path, transparency):
        picture = noise(12, 10).quantize(16)
        picture.save(tmp_path / "a.png", transparency=transparency)
        assert np.array_equal(decode(tmp_path, "a.png", None), np.asarray(picture.convert("RGB")))

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
    def test_the_first_frame_of_several(self, tmp_path, suffix):
        frames = [Image.new("RGB", (9, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
        lossless = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **lossless)
        assert (decode(tmp_path, f"a.{suffix}", None) == [255, 0, 0]).all()

    @pytest.mark.parametrize("masks", [(0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F)])
    def test_a_bmp_of_16_bits_a_pixel_has_five_or_six_a_channel_and_is_read(self, tmp_path, masks):
        def numbers(size: int, *values: int) -> bytes:
            return b"".join(value.to_bytes(size, "little") for value in values)

        header = b"BM" + numbers(4, 66 + 8, 0, 66)  # bytes of the file, nothing, where the pixels begin
        header += numbers(4, 40, 2, 2) + numbers(2, 1, 16) + numbers(4, 3, 8, 0, 0, 0, 0) + numbers(4, *masks)
        white, red = sum(masks), masks[0]
        (tmp_path / "a.bmp").write_bytes(header + numbers(2, red, red, white, red))  # the lower row comes first
        found = decode(tmp_path, "a.bmp", None)
        assert found.tolist() == [[[255] * 3, [255, 0, 0]], [[255, 0, 0], [255, 0, 0]]]

    @pytest.mark.parametrize("name", ["with blanks .png", "größe-相片-é.png", "'quoted\".png", "a\nline.png"])
    def test_names(self, tmp_path, name):
        noise(9, 8).save(tmp_path / name)
        assert np.array_equal(decode(tmp_path, name, None), np.asarray(noise(9, 8)))

    def test_a_link_to_a_file_is_followed(self, tmp_path):
        noise(9, 8).save(tmp_path / "a.png")
        (tmp_path / "b.png").symlink_to("a.png")
        assert np.array_equal(decode(tmp_path, "b.png", None), np.asarray(noise(9, 8)))

    def test_nothing_is_decoded_at_a_coarser_scale(self, tmp_path):
        """A JPEG can be decoded at 1/8 of its size at no cost, but with other pixels."""
        noise(160, 80).save(tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as image:
            expected = image.convert("RGB").resize((16, 8), Image.Resampling.BILINEAR)
        assert np.array_equal(decode(tmp_path, "a.jpg", SMALL), np.asarray(expected))


class TestSize:
    @pytest.mark.parametrize("resize", ["short_side", "squash"])
    @pytest.mark.parametrize("size", [(12, 10), (10, 12), (33, 7), (1, 300), (300, 1), (8, 8)])
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_the_bytes_are_known_from_the_header(self, tmp_path, size, resize, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        resizing = Resizing(8, resize, "bicubic")
        for suffix in ("jpg", "png", "tif", "webp"):
            noise(*size).save(tmp_path / f"a.{suffix}", exif=exif)
            pixels = decode(tmp_path, f"a.{suffix}", resizing)
            assert decoded_bytes(read_header(tmp_path, f"a.{suffix}"), resizing) == pixels.size
            height, width = pixels.shape[:2]
            assert (
                resize == "squash" or (height > width) == ((size[1] > size[0]) != (orientation == 6)) or width == height
            )

    def test_the_centre_is_the_one_that_an_exported_model_reads(self, tmp_path):
        noise(40, 23).save(tmp_path / "a.png")
        for resize in ("short_side", "squash"):
            preprocessing = Preprocessing(16, 16, (0.0,) * 3, (1.0,) * 3, resize=resize, interpolation="lanczos")
            pixels = decode(tmp_path, "a.png", Resizing(16, resize, "lanczos"))
            left = round((pixels.shape[1] - 16) / 2)
            assert np.array_equal(pixels[:, left : left + 16], preprocessing.read(tmp_path / "a.png"))

    def test_at_full_resolution_nothing_is_cut_off(self, tmp_path):
        noise(1, 300).save(tmp_path / "a.png")
        assert np.array_equal(decode(tmp_path, "a.png", None), np.asarray(noise(1, 300)))


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
        with pytest.raises(UnreadableImage, match=r"002\.png: no JPEG, PNG, GIF, BMP, TIFF or WebP by its first bytes"):
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
        monkeypatch.setattr(pixels.os, "cpu_count", lambda: 2)  # 8 threads
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
