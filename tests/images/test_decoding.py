"""Decoding of files: pixels, or a reason why there are none, without a crash, a wait, a warning or much memory."""

import base64
import io
import math
import os
import random
import resource
import shutil
import struct
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.v2 import functional

from raydml.data.catalog import DataError
from raydml.data.formats import DECODED_FORMATS
from raydml.images import pixels as decoding
from raydml.images.pixels import MAX_PIXELS, UnreadableImage, decode, decoded_bytes, read_header
from raydml.images.preprocessing import Preprocessing, Resizing
from tests.images.processes import run_children

# 16 x 8 pixels, the left half (200, 30, 30) and the right half (30, 30, 200), to be shown turned by 90 degrees
# clockwise: written by pillow-heif, whose encoder is no part of this installation.
TURNED_HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWl4AAAAAG1pZjFoZWl4bWlhZgAAAcltZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAA"
    "AAAERAAAIAAQAAAAAB7QABAAAAAAAAAI4AAgAAAAACewABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVp"
    "bmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABCGlwcnAAAADnaXBjbwAAAHdodmNDAQQIAAAAnjgAAAAAHvAA/P/4+AAADwNgAAEAF0"
    "ABDAH//wQIAAADAJ44AAADAAAeugJAYQABACpCAQEECAAAAwCeOAAAAwAAHpAEECCy3VXTXNwENBgQAAADAZAAAAMAEIBiAAEACEQBwXMYMBiQ"
    "AAAAE2NvbHJuY2x4AAEADQAGgAAAABRpc3BlAAAAAAAAAEAAAABAAAAAKGNsYXAAAAAQAAAAAQAAAAgAAAAB////0AAAAAL////IAAAAAgAAAB"
    "BwaXhpAAAAAAMICAgAAAAJaXJvdAMAAAAZaXBtYQAAAAAAAAABAAEGgQIDBYSGAAAAGmlyZWYAAAAAAAAADmNkc2MAAgABAAEAAAC6bWRhdAAA"
    "AIooAa8GMhrY0IDxkSguXt7i///yyXoe/tv833WrvvhJn/9iaXWg5iwY8PBPhSsnSHPw8rmKRIvo+WsaXZP5NFvzfB2wVIbLSiGJnW1ypnxVNw"
    "Jkbf5su7Cy2L3VX2Ka7U4QNRbY2w1e/c8OpICWX9MZkiK+V5OxZVPoaKBXFQuyceh/LLwJabuJdsAAAAAGRXhpZgAATU0AKgAAAAgAAQESAAMA"
    "AAABAAYAAAAAAAA="
)
SMALL = Resizing(8, "short_side", "bilinear")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


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

    @pytest.mark.parametrize("kind", sorted(set(DECODED_FORMATS) - {"HEIC"}))
    def test_every_suffix_of_the_table_that_pillow_writes_is_decoded_as_pillow_decodes_it(self, tmp_path, kind):
        Image.init()
        written = [suffix for suffix in DECODED_FORMATS[kind] if Image.EXTENSION.get(suffix) in Image.SAVE]
        assert written
        for suffix in written:
            noise(12, 10).convert("1" if suffix == ".pbm" else "RGB").save(tmp_path / f"a{suffix}")
            with Image.open(tmp_path / f"a{suffix}") as image:
                assert np.array_equal(decode(tmp_path, f"a{suffix}", None), np.asarray(image.convert("RGB")))

    @pytest.mark.parametrize("brand", [b"heix", b"mif1"])
    def test_a_telephones_heic_is_decoded_and_turned(self, tmp_path, brand):
        (tmp_path / "IMG_1.HEIC").write_bytes(TURNED_HEIC.replace(b"ftypheix", b"ftyp" + brand))
        found = decode(tmp_path, "IMG_1.HEIC", None).astype(int)
        assert found.shape == (16, 8, 3)
        assert np.abs(found[:7] - [200, 30, 30]).max() <= 4  # lossy
        assert np.abs(found[9:] - [30, 30, 200]).max() <= 4
        assert read_header(tmp_path, "IMG_1.HEIC")[:2] in ((8, 16), (16, 8))

    def test_heic_cut_off_has_a_reason(self, tmp_path):
        for num_bytes in (30, 200, len(TURNED_HEIC) - 40):
            (tmp_path / "a.heic").write_bytes(TURNED_HEIC[:num_bytes])
            with pytest.raises(UnreadableImage):
                decode(tmp_path, "a.heic", None)

    def test_an_undecoded_suffix_is_explained(self, tmp_path):
        (tmp_path / "a.cr2").write_bytes(b"II*\0 but no TIFF"[:3] + b"raw")
        with pytest.raises(UnreadableImage, match=r"\.cr2 is raw data of a camera\); convert it to JPEG or PNG"):
            decode(tmp_path, "a.cr2", None)

    @pytest.mark.parametrize("suffix", [".jp2", ".j2k", ".sgi", ".pgm", ".png", ".tif"])
    def test_sixteen_bits_a_channel_are_refused_in_every_format(self, tmp_path, suffix):
        grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
        if suffix == ".sgi":  # magic, no compression, 2 bytes a channel, 3 dimensions, 8 x 8 pixels of 3 channels
            header = struct.pack(">hbbHHHHll", 474, 0, 2, 3, 8, 8, 3, 0, 65535).ljust(512, b"\0")
            (tmp_path / "a.sgi").write_bytes(header + grey.astype(">u2").tobytes() * 3)
        else:
            Image.fromarray(grey).save(tmp_path / f"a{suffix}")
        with pytest.raises(UnreadableImage, match="not 8 bits a channel"):
            decode(tmp_path, f"a{suffix}", None)

    def test_sixteen_bits_a_channel_of_colour_in_jpeg_2000(self, tmp_path):
        noise(8, 8).save(tmp_path / "a.jp2")
        raw = bytearray((tmp_path / "a.jp2").read_bytes())
        raw[raw.index(b"\xff\x4f\xff\x51") + 42] = 15  # Ssiz: one less than the bits of a channel
        (tmp_path / "a.jp2").write_bytes(bytes(raw))
        with pytest.raises(UnreadableImage, match="RGB of 16 bits"):
            decode(tmp_path, "a.jp2", None)

    def test_what_is_written_beside_the_pixels_of_a_png_is_no_fault(self, tmp_path):
        texts = PngInfo()
        texts.add_text("comment", "x" * 3_000_000, zip=True)
        texts.add_itxt("history", "y" * 3_000_000, zip=True)
        noise(9, 8).save(tmp_path / "a.png", pnginfo=texts, icc_profile=bytes(20_000_000))
        assert np.array_equal(decode(tmp_path, "a.png", None), np.asarray(noise(9, 8)))

    def test_jpegs_of_the_press_and_of_grey_cameras(self, tmp_path):
        for mode in ("CMYK", "L"):
            noise(12, 10).convert(mode).save(tmp_path / "a.jpg", quality=95)
            with Image.open(tmp_path / "a.jpg") as image:
                assert image.mode == mode
                assert np.array_equal(decode(tmp_path, "a.jpg", None), np.asarray(image.convert("RGB")))

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
    def test_names_and_links(self, tmp_path, name):
        noise(9, 8).save(tmp_path / name)
        (tmp_path / "link.png").symlink_to(name)
        assert np.array_equal(decode(tmp_path, "link.png", None), np.asarray(noise(9, 8)))
        assert np.array_equal(decode(tmp_path, name, None), np.asarray(noise(9, 8)))

    def test_nothing_is_decoded_at_a_coarser_scale(self, tmp_path):
        """A JPEG can be decoded at 1/8 of its size at no cost, but with other pixels."""
        noise(160, 80).save(tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as image:
            expected = functional.resize(functional.pil_to_tensor(image.convert("RGB")), 8, antialias=True)
        assert np.array_equal(decode(tmp_path, "a.jpg", SMALL), expected.permute(1, 2, 0))


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


def photo(suffix: str = "jpg", size: tuple[int, int] = (64, 48)) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("P" if suffix == "gif" else "RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(
        content, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **({} if suffix == "gif" else {"exif": exif})
    )
    return content.getvalue()


def png(width: int, height: int, lines: bytes, *, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG with this header, whatever the lines of its pixels are. colour: 2 for RGB, as in the specification."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def reason(root: Path, name: str) -> str:
    with pytest.raises(UnreadableImage) as caught:
        decode(root, name, SMALL)
    assert str(caught.value) == f"{name}: {caught.value.reason}"
    assert "\n" not in caught.value.reason
    assert str(root) not in caught.value.reason  # the same on every machine
    assert isinstance(caught.value, DataError)
    return caught.value.reason


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file (0 bytes)"),
        (
            b"not a picture\n",
            "no JPEG, PNG, WebP, GIF, AVIF, HEIC, JPEG 2000, TIFF, BMP, PPM, TGA, SGI, PCX or QOI by its first bytes",
        ),
        (b"<html><body>404 Not Found</body></html>", "no JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG, PNG"),  # no Ghostscript is started
        (b"RIFF\x24\0\0\0WAVEfmt ", "no JPEG, PNG"),
        (b"\xff\xd8\xff", "SyntaxError"),
        (photo("jpg")[:700], "truncated"),
        (photo("png")[:3000], "truncated"),
        (photo("png")[:40], "SyntaxError"),
        (photo("gif")[:900], "truncated"),
        (photo("tif")[:-900], ""),
        (photo("webp")[:900], ""),
        (photo("bmp")[:900], "truncated"),
    ],
)
def test_damaged_content(tmp_path, content, expected):
    (tmp_path / "a.jpg").write_bytes(content)
    assert expected in reason(tmp_path, "a.jpg")


@pytest.mark.parametrize("size", [(20_000, 20_000), (MAX_PIXELS // 4 + 1, 4), (13_000, 13_000)])
def test_a_bomb_is_refused_from_its_header(tmp_path, size):
    """At 13,000 x 13,000 Pillow only warns."""
    (tmp_path / "bomb.png").write_bytes(png(*size, b"\0"))
    assert (tmp_path / "bomb.png").stat().st_size < 100
    assert (
        reason(tmp_path, "bomb.png")
        == f"{size[0]:,} x {size[1]:,} pixels are more than 89,478,485; scale the file down"
    )
    with pytest.raises(UnreadableImage, match="scale the file down"):
        read_header(tmp_path, "bomb.png")


def test_bombs_take_no_memory_and_give_no_warning(tmp_path):
    """In a process of its own, because the largest memory of a process never falls."""
    for name, size in (("bomb.png", (20_000, 20_000)), ("warned_of.png", (12_000, 12_000))):
        (tmp_path / name).write_bytes(png(*size, b"\0"))

    def child(queue) -> None:
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = [reason(tmp_path, name) for name in ("bomb.png", "warned_of.png")]
        queue.put((found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib))

    ((_, (found, grown_kib)),) = run_children(child, 1)
    assert all("scale the file down" in text for text in found)
    assert grown_kib < 20_000  # the smaller one would take 432 MB


def test_the_largest_size_allowed_is_only_missing_its_pixels(tmp_path):
    side = math.isqrt(MAX_PIXELS)
    (tmp_path / "large.png").write_bytes(png(side, side, b"\0"))
    assert read_header(tmp_path, "large.png")[:2] == (side, side)
    assert "truncated" in reason(tmp_path, "large.png")


def test_a_line_too_long_for_pillow_is_refused(tmp_path):
    """Pillow would raise MemoryError, as for a healthy file on a machine without free memory."""
    (tmp_path / "line.png").write_bytes(png(MAX_PIXELS, 1, b"\0"))
    assert reason(tmp_path, "line.png") == "a side of 89,478,485 pixels is longer than 1,000,000; scale the file down"


DEEP = np.linspace(0, 65_535, 80).reshape(8, 10)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_a_channel(tmp_path, channels):
    """Pillow would make grey of 40,000 white, and read the upper byte of colours."""
    lines = b"".join(b"\0" + np.full((10, channels), 40_000, dtype=">u2").tobytes() for _ in range(8))
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    (tmp_path / "deep.png").write_bytes(png(10, 8, lines, bits=16, colour=colour))
    with Image.open(tmp_path / "deep.png") as image:  # Pillow itself finds nothing wrong with the file
        image.load()
    assert "are not 8 bits a channel; convert the file" in reason(tmp_path, "deep.png")


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
@pytest.mark.parametrize("compression", [None, "tiff_deflate"])
def test_tiff_of_more_than_8_bits(tmp_path, kind, compression):
    Image.fromarray(DEEP.astype(kind)).save(tmp_path / "deep.tif", compression=compression)
    assert "are not 8 bits a channel; convert the file" in reason(tmp_path, "deep.tif")


def test_a_tiff_whose_colours_are_16_bits_deep(tmp_path):
    """Written by hand: Pillow reads such files and cannot write them."""
    pixels = np.full((8, 10, 3), 40_000, dtype="<u2").tobytes()
    facts = [(256, 10), (257, 8), (258, 134), (259, 1), (262, 2), (273, 140), (277, 3), (278, 8), (279, len(pixels))]
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, value) for tag, value in facts
    )
    content = struct.pack("<2sHIH", b"II", 42, 8, len(facts)) + entries + bytes(4)
    content = content.ljust(134, b"\0") + struct.pack("<HHH", 16, 16, 16) + pixels
    (tmp_path / "deep.tif").write_bytes(content)
    with Image.open(tmp_path / "deep.tif") as image:
        assert (image.mode, image.size) == ("RGB", (10, 8))
        image.load()
    assert "16" in reason(tmp_path, "deep.tif")


class TestNoFile:
    @pytest.mark.parametrize(
        ("make", "expected"),
        [
            (lambda _: None, "FileNotFoundError: [Errno 2] No such file or directory"),
            (lambda file: file.symlink_to("nowhere.jpg"), "No such file"),
            (lambda file: file.symlink_to("a.jpg"), "symbolic links"),
            (Path.mkdir, "IsADirectoryError"),
            (os.mkfifo, "OSError: not a regular file"),  # without waiting for a writer
            (lambda file: file.symlink_to("/dev/zero"), "OSError: not a regular file"),
        ],
        ids=["absent", "link to nothing", "link to itself", "folder", "pipe", "device"],
    )
    def test_what_is_no_file(self, tmp_path, make, expected):
        make(tmp_path / "a.jpg")
        assert expected in reason(tmp_path, "a.jpg")

    def test_no_permission(self):
        """As another user if this one is root, who may read every file."""
        folder = Path(tempfile.mkdtemp())  # not below tmp_path, which is closed to other users
        try:
            (folder / "a.jpg").write_bytes(photo())
            (folder / "a.jpg").chmod(0)
            folder.chmod(0o755)

            def child(queue) -> None:
                if os.getuid() == 0:
                    os.setuid(65534)
                queue.put(reason(folder, "a.jpg"))

            assert run_children(child, 1) == [(0, "PermissionError: [Errno 13] Permission denied: 'a.jpg'")]
        finally:
            shutil.rmtree(folder)

    def test_a_disk_that_fails(self, tmp_path):
        def failing(file: Path):
            raise OSError(5, "Input/output error", str(file))

        with pytest.raises(UnreadableImage, match=r"a\.jpg: OSError: \[Errno 5\] Input/output error: 'a\.jpg'"):
            decode(tmp_path, "a.jpg", SMALL, failing)

    def test_too_many_open_files_are_not_the_files_fault(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(photo())
        used = len(os.listdir("/dev/fd"))
        old = resource.getrlimit(resource.RLIMIT_NOFILE)
        held = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, old[1]))
            with pytest.raises(OSError, match="Too many open files"):  # noqa: PT012
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            with pytest.raises(DataError, match=r"raise the limit of open files \(ulimit -n\)") as caught:
                decode(tmp_path, "a.jpg", SMALL)
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, old)
        assert not isinstance(caught.value, UnreadableImage)


def test_no_descriptor_stays_open(tmp_path):
    (tmp_path / "good.jpg").write_bytes(photo())
    (tmp_path / "half.jpg").write_bytes(photo()[:700])
    (tmp_path / "text.jpg").write_bytes(b"text")
    os.mkfifo(tmp_path / "pipe.jpg")
    before = len(os.listdir("/dev/fd"))
    for name in ("half.jpg", "text.jpg", "pipe.jpg"):
        reason(tmp_path, name)
    decode(tmp_path, "good.jpg", SMALL)
    read_header(tmp_path, "good.jpg")
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's own, about broken EXIF blocks
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_broken_bytes_give_pixels_or_a_reason_and_nothing_else(tmp_path, suffix, monkeypatch):
    """600 files with a few bytes overwritten, half of them near the beginning; a small image keeps the test fast."""
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10**6)
    draw = random.Random(suffix)
    content = photo(suffix, (20, 16))
    outcomes = {"pixels": 0, "reason": 0}
    for _ in range(600):
        broken = bytearray(content)
        end = len(broken) if draw.random() < 0.5 else 120
        for _ in range(draw.choice((1, 2, 8))):
            broken[draw.randrange(2, end)] = draw.randrange(256)
        if draw.random() < 0.2:
            del broken[draw.randrange(len(broken)) :]
        (tmp_path / "a").write_bytes(broken)
        try:
            pixels = decode(tmp_path, "a", SMALL)
            assert (min(pixels.shape[:2]), pixels.shape[2], pixels.dtype) == (8, 3, np.uint8)
            assert max(pixels.shape) <= 64
            outcomes["pixels"] += 1
        except UnreadableImage:
            outcomes["reason"] += 1
    assert min(outcomes.values()) > 0, outcomes  # a PNG has checksums of everything
