import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms as reference
from torchvision.transforms.v2 import functional

from raydml.data.catalog import DataError
from raydml.images import crops

RATIOS = (3 / 4, 4 / 3)
SIZES = [(256, 256), (256, 341), (480, 256), (31, 57), (3, 3), (1, 1), (1, 40), (40, 1), (2000, 90)]
INTERPOLATIONS = ["bilinear", "bicubic", "lanczos"]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(height, width, seed=0):
    """Smooth shapes with sharp edges, full black and full white: where kernels overshoot and are clipped."""
    coarse = np.random.default_rng(seed).choice([0, 90, 255], (height // 7 + 1, width // 7 + 1, 3)).astype(np.uint8)
    return coarse.repeat(7, axis=0).repeat(7, axis=1)[:height, :width].copy()


def as_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1)


def torchvision_box(get_params, image, place_sizes, seed, *, num_tries=crops.NUM_TRIES):
    """A box torchvision draws, and the uniform numbers behind it: its global generator is read a second time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        box = [int(value) for value in get_params(image)[:4]]
        torch.manual_seed(seed)
        pairs = [(torch.rand(1).item(), torch.rand(1).item()) for _ in range(num_tries)]
    spare = [size - extent for size, extent in zip(place_sizes, box[2:], strict=True)]
    # torchvision draws a whole number; the middle of its share of 0..1 stands for it
    places = [(corner + 0.5) / (free + 1) for corner, free in zip(box[:2], spare, strict=True)]
    return box, [*(area for area, _ in pairs), *(ratio for _, ratio in pairs), *places]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("area", "ratio"), [((0.08, 1.0), RATIOS), ((0.16, 1.0), RATIOS), ((0.9, 1.0), (0.2, 0.5))])
def test_resized_crops_are_torchvisions(size, area, ratio):
    image = torch.zeros(3, *size)
    pairs = [
        torchvision_box(
            lambda image: reference.RandomResizedCrop.get_params(image, list(area), list(ratio)), image, size, seed
        )
        for seed in range(60)
    ]
    expected, uniforms = (np.array(values) for values in zip(*pairs, strict=True))
    got = crops.resized_crop_boxes(np.tile(size, (len(pairs), 1)), uniforms, area=area, aspect_ratio=ratio)
    expected[:, 2:] = np.maximum(expected[:, 2:], 1)  # torchvision's may be empty, and then cannot be scaled
    empty = (expected[:, 2:] == 1).any(axis=1)
    np.testing.assert_array_equal(got[~empty], expected[~empty])
    np.testing.assert_array_equal(got[empty, 2:], expected[empty, 2:])


@pytest.mark.parametrize("size", [(224, 224), (20, 31), (2, 2), (1, 1)])
def test_erased_boxes_are_torchvisions(size):
    image = torch.zeros(3, *size)

    def get_params(image):
        top, left, height, width, _ = reference.RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])
        return top, left, height, width

    pairs = [torchvision_box(get_params, image, size, seed) for seed in range(60)]
    expected, uniforms = (np.array(values) for values in zip(*pairs, strict=True))
    nothing = (expected[:, 2:] == size).all(axis=1)  # torchvision's way to say that no try fitted
    got = crops.erased_boxes(np.tile(size, (len(pairs), 1)), uniforms, area=(0.02, 0.33), aspect_ratio=(0.3, 3.3))
    np.testing.assert_array_equal(got[~nothing], expected[~nothing])
    assert (got[nothing] == 0).all()
    assert not nothing.all()


@pytest.mark.parametrize(("size", "padding_px"), [((40, 50), 0), ((40, 50), 6), ((32, 32), 0), ((20, 9), 12)])
def test_random_crops_are_torchvisions(size, padding_px):
    image, crop_px = noise(*size), 32
    transform = reference.RandomCrop(crop_px, padding=padding_px, padding_mode="edge")
    for seed in range(30):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = transform(as_tensor(image))
            torch.manual_seed(seed)
            spare = [side + 2 * padding_px - crop_px for side in size]
            corner = [torch.randint(0, free + 1, (1,)).item() if any(spare) else 0 for free in spare]
        places = [(place + 0.5) / (free + 1) for place, free in zip(corner, spare, strict=True)]
        uniforms = np.array([[0.0] * 2 * crops.NUM_TRIES + places])
        box = crops.crop_boxes(np.array([size]), uniforms, crop_px=crop_px, padding_px=padding_px)[0]
        assert torch.equal(as_tensor(crops.cut(image, box)), expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (34, 35), (36, 37), (39, 40), (32, 100)])
def test_centre_crops_are_torchvisions(size):
    image = noise(*size)
    box = crops.centre_boxes(np.array([size]), crop_px=32)[0]
    assert torch.equal(as_tensor(crops.cut(image, box)), reference.CenterCrop(32)(as_tensor(image)))


def test_areas_ratios_and_places_are_distributed_as_torchvisions():
    size, num, area = (300, 400), 4000, (0.2, 0.6)
    image = torch.zeros(1, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        theirs = np.array([reference.RandomResizedCrop.get_params(image, list(area), list(RATIOS)) for _ in range(num)])
    uniforms = np.random.default_rng(12).random((num, crops.NUM_UNIFORMS))
    ours = crops.resized_crop_boxes(np.tile(size, (num, 1)), uniforms, area=area, aspect_ratio=RATIOS)
    for name, value in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "log ratio": lambda box: np.log(box[:, 3] / box[:, 2]),
        "top": lambda box: box[:, 0] / (size[0] - box[:, 2] + 1),
        "left": lambda box: box[:, 1] / (size[1] - box[:, 3] + 1),
    }.items():
        assert ks_2samp(value(ours), value(theirs)).pvalue > 0.01, name


def test_the_same_numbers_give_the_same_part_of_an_image_and_of_its_scaled_copy():
    uniforms = np.random.default_rng(0).random((500, crops.NUM_UNIFORMS))
    settings = {"area": (0.16, 1.0), "aspect_ratio": RATIOS}
    small, large = (
        crops.resized_crop_boxes(np.tile(size, (500, 1)), uniforms, **settings) / np.tile(size, 2)
        for size in ((256, 320), (2560, 3200))
    )
    close = np.abs(small - large).max(axis=1) < 1.5 / 256  # half a pixel of rounding, twice, and the floor of the place
    assert close.mean() > 0.99  # a try may fit in one size only, by its rounding


@pytest.mark.parametrize("box", [(-3, 2, 6, 4), (5, 5, 20, 3), (-9, -9, 4, 4), (30, 30, 5, 5), (-5, -5, 30, 30)])
def test_beyond_the_image_edge_pixels_are_repeated(box):
    image, around = noise(12, 14), 40
    wide = np.pad(image, ((around, around), (around, around), (0, 0)), mode="edge")
    top, left, height, width = box
    expected = wide[top + around : top + around + height, left + around : left + around + width]
    np.testing.assert_array_equal(crops.cut(image, box), expected)


@pytest.mark.parametrize("box", [(0, 0, 12, 14), (2, 3, 5, 6), (11, 13, 1, 1)])
def test_a_cut_is_a_contiguous_copy(box):
    image = noise(12, 14)
    image.flags.writeable = False
    top, left, height, width = box
    got = crops.cut(image, box)
    np.testing.assert_array_equal(got, image[top : top + height, left : left + width])
    assert got.flags.c_contiguous
    assert got.flags.writeable  # torch warns about what is not
    assert not np.shares_memory(got, image)


def test_an_image_smaller_than_its_crop_is_refused_with_the_cure():
    sizes, uniforms = np.array([[40, 40], [20, 30]]), np.zeros((2, crops.NUM_UNIFORMS))
    with pytest.raises(DataError, match=r"30 x 20 px.*crop_px: 32.*padding_px of 6"):
        crops.centre_boxes(sizes, crop_px=32)
    with pytest.raises(DataError, match=r"30 x 20 px \(padding_px: 5\)"):
        crops.crop_boxes(sizes, uniforms, crop_px=32, padding_px=5)
    assert crops.crop_boxes(sizes, uniforms, crop_px=32, padding_px=6)[1].tolist() == [-6, -6, 32, 32]


@pytest.mark.parametrize("size", [(230, 201), (201, 230), (60, 90), (500, 448), (1, 1), (1, 300), (700, 2)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_scaling_one_image_is_torchvisions_bit_for_bit(size, interpolation):
    for image in (noise(*size), photo(*size)):
        got = crops.scaled(image, 224, interpolation)
        if interpolation == "lanczos":
            if size[0] > 224 > size[1]:
                continue  # Pillow 13 may scale the columns of these first; see the next test
            lanczos = functional.InterpolationMode.LANCZOS
            whole = [0, 0, *size]
            expected = functional.resized_crop(Image.fromarray(image), *whole, size=[224, 224], interpolation=lanczos)
            np.testing.assert_array_equal(got.numpy(), np.asarray(expected))
        else:
            mode = functional.InterpolationMode(interpolation)
            expected = functional.resized_crop(
                as_tensor(image), 0, 0, *size, size=[224, 224], interpolation=mode, antialias=True
            )
            assert torch.equal(got, expected.permute(1, 2, 0))
        assert got.dtype == torch.uint8


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size_px", [1, 20, 56])
def test_scaling_together_is_within_a_grey_level_of_pillow_and_torch(interpolation, size_px):
    sizes = [(60, 80), (56, 56), (30, 41), (80, 33), (1, 1), (1, 80), (2, 3), (79, 80), (20, 20)]
    images = [maker(*size, seed=seed) for seed, size in enumerate(sizes) for maker in (noise, photo)]
    batch = torch.full((len(images), 80, 80, 3), 77, dtype=torch.uint8)  # what lies beyond an image must not matter
    for row, image in enumerate(images):
        batch[row, : image.shape[0], : image.shape[1]] = torch.from_numpy(image)
    got = crops.scaled_together(batch, np.array([image.shape[:2] for image in images]), size_px, interpolation)
    assert got.shape == (len(images), size_px, size_px, 3)
    assert got.dtype == torch.uint8
    for row, image in enumerate(images):
        kernel = Image.Resampling[interpolation.upper()]
        rows_first = Image.fromarray(image).resize((size_px, image.shape[0]), kernel)
        pillow = np.asarray(rows_first.resize((size_px, size_px), kernel))
        references = [pillow]
        if interpolation != "lanczos":
            references.append(
                functional.resize(
                    as_tensor(image), [size_px, size_px], functional.InterpolationMode(interpolation), antialias=True
                )
                .permute(1, 2, 0)
                .numpy()
            )
        for reference_pixels in references:
            difference = np.abs(got[row].numpy().astype(int) - reference_pixels)
            assert difference.max() <= 2  # torch and Pillow are that far from each other, too
            assert (difference > 1).mean() <= 0.003
        if image.shape[:2] == (size_px, size_px):
            np.testing.assert_array_equal(got[row].numpy(), image)


def test_lanczos_scales_along_the_rows_first():
    """A step from black to white that overshoots along the rows and is clipped there, before the columns are scaled."""
    image = photo(300, 100)
    columns_first = Image.fromarray(image).resize((100, 224), Image.Resampling.LANCZOS)
    wrong = np.asarray(columns_first.resize((224, 224), Image.Resampling.LANCZOS)).astype(int)
    together = crops.scaled_together(torch.from_numpy(image)[None], np.array([[300, 100]]), 224, "lanczos")[0].numpy()
    got = crops.scaled(image, 224, "lanczos").numpy().astype(int)
    assert np.abs(got - together).max() <= 2
    assert np.abs(got - wrong).max() > 10


def test_scaling_together_outlives_autocast():
    """bf16 has 8 bits: a product in it would be off by a grey level or more nearly everywhere."""
    images = torch.from_numpy(np.stack([photo(90, 90), noise(90, 90)]))
    sizes = np.full((2, 2), 90)
    expected = crops.scaled_together(images, sizes, 56, "bicubic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(crops.scaled_together(images, sizes, 56, "bicubic"), expected)


def test_an_image_of_the_size_asked_for_is_not_touched():
    image = noise(24, 24)
    for interpolation in INTERPOLATIONS:
        np.testing.assert_array_equal(crops.scaled(image, 24, interpolation).numpy(), image)


def test_no_images_are_no_error():
    sizes, uniforms = np.empty((0, 2), dtype=np.int64), np.empty((0, crops.NUM_UNIFORMS))
    assert crops.resized_crop_boxes(sizes, uniforms, area=(0.1, 1), aspect_ratio=RATIOS).shape == (0, 4)
    assert crops.crop_boxes(sizes, uniforms, crop_px=8, padding_px=0).shape == (0, 4)
    assert crops.centre_boxes(sizes, crop_px=8).shape == (0, 4)
    assert crops.erased_boxes(sizes, uniforms, area=(0.1, 1), aspect_ratio=RATIOS).shape == (0, 4)


def test_a_fallback_box_is_never_empty():
    never = np.full((1, crops.NUM_UNIFORMS), 0.5)
    box = crops.resized_crop_boxes(np.array([[1, 1]]), never, area=(1, 1), aspect_ratio=(4.0, 9.0))
    assert box.tolist() == [[0, 0, 1, 1]]
    assert math.isclose(never.mean(), 0.5)
