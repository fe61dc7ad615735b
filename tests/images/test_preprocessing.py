import hashlib
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from raydml.images.preprocessing import (
    Preprocessing,
    PreprocessingError,
    Resizing,
    resized,
    resized_size,
    scaled,
    upright_rgb,
)
from tests.golden_vectors import golden
from tests.images.processes import run_children

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {"mean": (104.0, 117.0, 128.0), "std": (1.0, 1.0, 1.0), "channels": "BGR", "value_range": 255.0}
PLAIN, ONE = (0.0,) * 3, (1.0,) * 3


def test_normalise_by_hand():
    pixels = torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8)
    rgb = Preprocessing(1, 1, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    torch.testing.assert_close(rgb.normalise(pixels).flatten(), torch.tensor([1.0, -1.0, 0.1]))
    bgr = Preprocessing(1, 1, mean=(1.0, 2.0, 5.0), std=(1.0, 1.0, 1.0), channels="BGR", value_range=255.0)
    torch.testing.assert_close(bgr.normalise(pixels).flatten(), torch.tensor([50.0, -2.0, 250.0]))


def test_preprocessing_survives_json():
    original = Preprocessing(256, 224, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "BGR", 255.0, "squash", "lanczos")
    assert Preprocessing.from_dict(json.loads(json.dumps(original.to_dict()))) == original


SIZES = [(60, 47), (47, 60), (33, 100), (24, 24), (37, 20), (9, 72), (1, 8)]


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def by_torchvision(picture: Image.Image, size: int | list[int], interpolation: str = "bilinear") -> np.ndarray:
    """torchvision's resize of a uint8 tensor; for lanczos, which it has for PIL images alone, first along the rows."""
    kernel = functional.InterpolationMode(interpolation)
    if interpolation != "lanczos":
        tensor = functional.pil_to_tensor(picture)
        return functional.resize(tensor, size, kernel, antialias=True).permute(1, 2, 0).numpy()
    width, height = functional.resize(picture, size, kernel).size
    return np.asarray(
        functional.resize(functional.resize(picture, [picture.height, width], kernel), [height, width], kernel)
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("resize", ["short_side", "squash"])
@pytest.mark.parametrize("size", SIZES)
def test_read_is_torchvisions_resize_and_centre_crop(size, resize, interpolation):
    picture = noise(size)
    expected = by_torchvision(picture, 24 if resize == "short_side" else [24, 24], interpolation)
    cut = functional.center_crop(torch.tensor(expected).permute(2, 0, 1), [21, 21]).permute(1, 2, 0)
    preprocessing = Preprocessing(24, 21, PLAIN, ONE, resize=resize, interpolation=interpolation)
    assert np.array_equal(preprocessing.read(picture), cut)
    grey = np.asarray(picture)[..., 0]
    assert np.array_equal(preprocessing.read(grey), preprocessing.read(np.stack([grey] * 3, axis=2)))
    everything = resized(picture, Resizing(24, resize, interpolation))
    assert np.array_equal(everything, expected)
    assert everything.shape[1::-1] == resized_size(size, preprocessing.resizing)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("width", "height"), [(900, 700), (100, 5000), (700, 900), (262_145, 9)])
def test_a_large_image_is_scaled_strip_by_strip_to_the_same_pixels(width, height, interpolation):
    """More than 2 ** 18 pixels; the last one has lines that are longer than a strip."""
    picture = noise((width, height))
    found = resized(picture, Resizing(30, "squash", interpolation))
    assert np.array_equal(found, by_torchvision(picture, [30, 30], interpolation))


def test_lanczos_scales_along_the_rows_first():
    """In one call Pillow 12.3 scales the columns of this image first, and its pixels are up to 11 grey levels away."""
    steps = np.random.default_rng(0).integers(0, 2, (611, 4, 3), dtype=np.uint8) * 255
    expected = by_torchvision(Image.fromarray(steps), [6, 87], "lanczos")
    assert np.array_equal(scaled(steps, (87, 6), "lanczos"), expected)


def test_a_large_image_is_not_held_twice():
    """Pillow's own copy takes 4 bytes a pixel. In a process of its own, because its largest memory never falls."""
    picture = Image.new("RGB", (6000, 4000))

    def child(queue) -> None:
        resized(Image.new("RGB", (60, 40)), Resizing(256, "short_side", "bilinear"))  # what is imported and started
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resized(picture, Resizing(256, "short_side", "bilinear"))
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)

    ((_, grown_kib),) = run_children(child, 1)
    assert grown_kib < 12_000  # a copy of 3 bytes a pixel would take 72,000


@pytest.mark.parametrize(("interpolation", "grey_levels"), [("bilinear", 1), ("bicubic", 1), ("lanczos", 0)])
@pytest.mark.parametrize("size", [*SIZES, (348, 348), (500, 375), (300, 500)])
def test_pixels_are_close_to_pillows(size, interpolation, grey_levels):
    """torch's weights are whole numbers of 16 bits, Pillow's of 32. Few values are so near a half that it matters."""
    picture, resizing = noise(size), Resizing(24, "squash", interpolation)
    kernel = Image.Resampling[interpolation.upper()]
    pillow = np.asarray(picture.resize((24, size[1]), kernel).resize((24, 24), kernel)).astype(int)
    difference = np.abs(resized(picture, resizing) - pillow)
    assert difference.max() <= grey_levels
    assert (difference > 0).mean() <= 0.01


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_pixels_are_the_same_on_every_processor_and_with_any_number_of_threads(capability):
    """torch has a kernel for processors with AVX2 and another one for all others, which starts threads."""
    code = (
        "import hashlib, numpy, torch\n"
        "from raydml.images.preprocessing import scaled\n"
        "pixels = numpy.random.default_rng(0).integers(0, 256, (500, 375, 3), dtype=numpy.uint8)\n"
        "sizes = [(256, 341), (256, 256), (31, 700), (1, 1)]\n"
        "for num_threads in (1, 3):\n"
        "    torch.set_num_threads(num_threads)\n"
        "    found = [scaled(pixels, size, kind).tobytes() for size in sizes for kind in ('bilinear', 'bicubic')]\n"
        "    print(torch.backends.cpu.get_cpu_capability(), hashlib.sha256(b''.join(found)).hexdigest())\n"
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 375, 3), dtype=np.uint8))
    expected = hashlib.sha256()
    for width, height in ((256, 341), (256, 256), (31, 700), (1, 1)):
        for interpolation in ("bilinear", "bicubic"):
            expected.update(by_torchvision(picture, [height, width], interpolation).tobytes())
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [found for _, found in lines] == [expected.hexdigest()] * 2, lines
    assert capability != "default" or {used for used, _ in lines} == {"DEFAULT"}


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (10, 81), (3, 25)])
def test_a_strip_is_cut_to_eight_to_one_about_its_centre(size):
    strip = noise(size)
    short, long = min(size), 8 * min(size)
    begin = round((max(size) - long) / 2)
    box = (0, begin, short, begin + long) if size[0] < size[1] else (begin, 0, begin + long, short)
    expected = by_torchvision(strip.crop(box), 24)
    short_side = Resizing(24, "short_side", "bilinear")
    assert np.array_equal(resized(strip, short_side), expected)
    assert sorted(expected.shape) == [3, 24, 192]
    assert resized_size(size, short_side) == expected.shape[1::-1]
    squashed = resized(strip, Resizing(24, "squash", "bilinear"))  # bounded as it is: nothing is cut
    assert np.array_equal(squashed, by_torchvision(strip, [24, 24]))


def test_sizes_are_symmetric_bounded_and_hold_the_crop():
    generator = np.random.default_rng(0)
    drawn = np.exp(generator.uniform(0, np.log(4000), (5000, 2))).astype(int).tolist()  # as many slim images as square
    for (width, height), resize_px in zip(drawn, generator.integers(1, 301, 5000).tolist(), strict=True):
        resizing = Resizing(resize_px, "short_side", "bilinear")
        size = resized_size((width, height), resizing)
        assert size[::-1] == resized_size((height, width), resizing)
        assert min(size) == resize_px, (width, height)
        assert max(size) <= 8 * resize_px, (width, height)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_every_rotation_is_applied_once(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise((5, 3)).save(tmp_path / f"turned.{suffix}", exif=exif)
    with Image.open(tmp_path / f"turned.{suffix}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    with Image.open(tmp_path / f"turned.{suffix}") as image:
        upright = upright_rgb(image)
    assert np.array_equal(upright, expected)
    assert upright.size == ((3, 5) if orientation in (5, 6, 7, 8) else (5, 3))
    assert np.array_equal(upright_rgb(upright), expected)
    read = Preprocessing(3, 3, PLAIN, ONE).read(tmp_path / f"turned.{suffix}")
    assert np.array_equal(read, expected[1:4] if expected.shape[0] == 5 else expected[:, 1:4])


def test_a_rotation_behind_the_pixels_of_a_png_is_applied(tmp_path):
    """The PNG specification allows the EXIF block before and behind the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((5, 3)).save(tmp_path / "before.png", exif=exif)
    content = (tmp_path / "before.png").read_bytes()
    begin = content.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(content[begin : begin + 4], "big")
    at = content.index(b"IEND") - 4
    (tmp_path / "behind.png").write_bytes(content[:begin] + content[end:at] + content[begin:end] + content[at:])
    with Image.open(tmp_path / "behind.png") as image:
        assert np.array_equal(upright_rgb(image), np.asarray(noise((5, 3)).transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # Pillow warns once
@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*\0"])
def test_a_broken_exif_block_turns_nothing(tmp_path, block):
    noise((5, 3)).save(tmp_path / "odd.png", exif=block)
    with Image.open(tmp_path / "odd.png") as image:
        assert np.array_equal(upright_rgb(image), np.asarray(noise((5, 3))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_8_bit_mode_becomes_rgb_as_pillow_converts_it(mode):
    picture = noise((6, 4)).convert(mode)
    assert np.array_equal(upright_rgb(picture), np.asarray(picture.convert("RGB")))
    assert upright_rgb(picture).mode == "RGB"


def test_transparency_is_dropped_and_not_blended():
    grey_alpha = Image.fromarray(np.array([[[200, 0], [10, 128]]], dtype=np.uint8), mode=None)
    assert np.asarray(upright_rgb(grey_alpha)).tolist() == [[[200] * 3, [10] * 3]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\x80"):
        palette.info["transparency"] = transparency
        assert np.asarray(upright_rgb(palette)).tolist() == [[[1, 2, 3], [40, 50, 60]]]


def test_settings_that_cannot_be_are_refused():
    for changes, message in (
        ({"crop_px": 25}, "crop_px: 25 does not fit into resize_px: 24"),
        ({"channels": "GBR"}, "channels: 'GBR'; one of RGB, BGR"),
        ({"resize": "long_side"}, "resize: 'long_side'; one of short_side, squash"),
        ({"interpolation": "nearest"}, "interpolation: 'nearest'; one of"),
    ):
        with pytest.raises(PreprocessingError, match=message):
            Preprocessing(**{"resize_px": 24, "crop_px": 24, "mean": PLAIN, "std": ONE, **changes})
    with pytest.raises(PreprocessingError, match="float64"):
        Preprocessing(5, 5, PLAIN, ONE).read(np.zeros((4, 4, 3)))
    for empty in (np.zeros((0, 4, 3), dtype=np.uint8), Image.new("L", (4, 0))):
        with pytest.raises(PreprocessingError, match="no pixels"):
            Preprocessing(5, 5, PLAIN, ONE).read(empty)


@pytest.mark.parametrize("crop_px", [6, 7, 8])
def test_for_evaluation_is_torchvisions_centre_crop(crop_px):
    pixels = torch.randint(0, 256, (1, 9, 9, 3), dtype=torch.uint8)
    ours = Preprocessing(9, crop_px, mean=(0.0,) * 3, std=(1.0,) * 3, value_range=255.0).for_evaluation(pixels)
    theirs = torchvision.transforms.CenterCrop(crop_px)(pixels.permute(0, 3, 1, 2)).float()
    torch.testing.assert_close(ours, theirs)


def test_constants_made_while_evaluating_serve_training():
    preprocessing = Preprocessing(3, 3, mean=(0.125,) * 3, std=(1.0,) * 3)
    pixels = torch.zeros(1, 3, 3, 3, dtype=torch.uint8)
    with torch.inference_mode():
        preprocessing.normalise(pixels)
    scaled = torch.ones(1, 3, 3, 3, requires_grad=True)
    preprocessing.normalise(scaled).square().sum().backward()
    assert scaled.grad is not None


def evaluated(image, preprocessing):
    read = torch.from_numpy(preprocessing.read(image).copy())
    return preprocessing.for_evaluation(read[None])[0].numpy()


def test_classification_evaluation_is_the_reference_codes():
    arrays, facts = golden("classification_eval_transform")
    preprocessing = Preprocessing(256, 224, **IMAGENET, resize="squash")
    for case in facts["cases"]:
        name = case["case"]
        if "img_seed" in case:
            noise = np.random.RandomState(case["img_seed"])
            image = noise.randint(0, 256, case["img_shape"]).astype(np.uint8)
        else:
            image = arrays[f"{name}__image"]
        got = evaluated(image, preprocessing)
        channels, rows, columns = arrays[f"{name}__idx"].T
        tolerance = case["tolerance"]
        np.testing.assert_allclose(got[channels, rows, columns], arrays[f"{name}__values"], atol=tolerance)
        np.testing.assert_allclose(got.mean(axis=(1, 2)), arrays[f"{name}__channel_mean"], atol=tolerance)


def test_deep_metric_evaluation_is_the_reference_codes():
    arrays, facts = golden("deep_metric_transform")
    for case in facts["cases"]:
        preprocessing = Preprocessing(case["origin_width"], case["width"], **CAFFE)
        got = evaluated(arrays[f"{case['case']}__image"], preprocessing)
        np.testing.assert_allclose(got, arrays[f"{case['case']}__center_crop"], atol=case["tolerance"])


def test_divide_and_conquer_evaluation_is_the_reference_codes():
    arrays, _ = golden("divide_conquer_transform")
    got = evaluated(arrays["image"], Preprocessing(256, 224, **IMAGENET))
    np.testing.assert_allclose(got[:, ::8, ::8], arrays["out_stride8"], atol=0.03)
    np.testing.assert_allclose(got.mean(axis=(1, 2)), arrays["out_mean"], atol=0.003)


@pytest.mark.parametrize(("name", "numbers", "atol"), [("bninception", CAFFE, 1.5), ("resnet", IMAGENET, 0.03)])
def test_mdr_evaluation_is_the_reference_codes(name, numbers, atol):
    arrays, _ = golden("mdr_transform")
    preprocessing = Preprocessing(256, 224, **numbers, resize="squash", interpolation="lanczos")
    got = evaluated(arrays["image"], preprocessing)
    np.testing.assert_allclose(got[:, ::8, ::8], arrays[f"{name}__out_stride8"], atol=atol)
    np.testing.assert_allclose(got.mean(axis=(1, 2)), arrays[f"{name}__mean"], atol=atol / 10)


def test_a_file_is_evaluated_as_its_pixels_are(tmp_path):
    noise((40, 40)).save(tmp_path / "a.png")
    preprocessing = Preprocessing(32, 24, **IMAGENET)
    np.testing.assert_array_equal(
        evaluated(tmp_path / "a.png", preprocessing), evaluated(np.asarray(noise((40, 40))), preprocessing)
    )
