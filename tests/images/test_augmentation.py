"""Random changes of training images: the same boxes, scaling and colours as torchvision, given the same numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from torchvision import transforms as reference
from torchvision.transforms.v2 import functional

from raydml.data.catalog import DataError
from raydml.images.augmentation import (
    NUM_TRIES,
    NUM_UNIFORMS,
    Draws,
    blurred,
    centre_boxes,
    choose_boxes,
    cut_box,
    draw,
    erased_boxes,
    finish,
    jitter_factors,
    jitter_orders,
    random_crop_boxes,
    resized_crop_boxes,
    scale_one,
    scale_together,
)
from raydml.images.augmentation_settings import Augmentation, ColorJitter, Erasing, GaussianBlur
from raydml.images.preprocessing import Preprocessing

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {"mean": (104.0, 117.0, 128.0), "std": (1.0, 1.0, 1.0), "channels": "BGR", "value_range": 255.0}
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


def torchvision_box(get_params, image, place_sizes, seed, *, num_tries=NUM_TRIES):
    """A box that torchvision draws, and its uniform numbers, read from the global generator a second time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        box = [int(value) for value in get_params(image)[:4]]
        torch.manual_seed(seed)
        pairs = [(torch.rand(1).item(), torch.rand(1).item()) for _ in range(num_tries)]
    spare = [size - extent for size, extent in zip(place_sizes, box[2:], strict=True)]
    # torchvision draws a whole number; here the middle of its share of 0..1 gives it
    places = [(corner + 0.5) / (free + 1) for corner, free in zip(box[:2], spare, strict=True)]
    return box, [*(area for area, _ in pairs), *(ratio for _, ratio in pairs), *places]


def pixels(num_images, size_px=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, size_px, size_px, 3), dtype=torch.uint8, generator=generator)


def finished(images, augmentation, draws, preprocessing, memory_format=torch.contiguous_format):
    shape = (len(images), 3, *images.shape[1:3])
    out = torch.full(shape, math.nan).to(memory_format=memory_format)
    finish(images.clone(), augmentation, draws, preprocessing, out=out)
    return out


def test_a_seed_decides_and_earlier_images_do_not_depend_on_later_ones():
    few, many, other = draw(3, 7), draw(10, 7), draw(3, 8)
    for name in Draws._fields:
        values = {
            kind: Draws._asdict(draws)[name] for kind, draws in {"few": few, "many": many, "other": other}.items()
        }
        np.testing.assert_array_equal(values["few"], values["many"][:3])
        assert not (values["few"] == values["other"]).any()
        assert values["few"].dtype == np.float64
        assert (values["many"] >= 0).all()
        assert (values["many"] < 1).all()
    everything = np.concatenate([*many], axis=1)
    assert len(np.unique(everything)) == everything.size  # no number serves two purposes


def test_all_bits_of_a_seed_count():
    seeds = [5, 5 + 2**32, 5 + 2**40, 5 + 2**62]
    first = {float(draw(1, seed).flip[0, 0]) for seed in seeds}
    assert len(first) == len(seeds)


def test_flips_happen_half_the_time_over_images_and_over_seeds():
    over_images = draw(20_000, 0).flip < 0.5
    over_seeds = [draw(1, seed).flip[0, 0] < 0.5 for seed in range(3000)]
    assert abs(over_images.mean() - 0.5) < 0.015  # 4 standard deviations
    assert abs(np.mean(over_seeds) - 0.5) < 0.037


def test_switching_one_thing_on_moves_no_crop():
    draws, sizes = draw(50, 3), np.tile([60, 80], (50, 1))
    plain = Augmentation(random_resized_crop=(0.16, 1.0))
    more = Augmentation(random_resized_crop=(0.16, 1.0), flip=True, grayscale=0.2, erasing=Erasing())
    np.testing.assert_array_equal(
        choose_boxes(plain, draws, sizes, crop_px=32), choose_boxes(more, draws, sizes, crop_px=32)
    )


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
    got = resized_crop_boxes(np.tile(size, (len(pairs), 1)), uniforms, area=area, aspect_ratio=ratio)
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
    nothing = (expected[:, 2:] == size).all(axis=1)  # torchvision returns the whole image if no try fits
    got = erased_boxes(np.tile(size, (len(pairs), 1)), uniforms, area=(0.02, 0.33), aspect_ratio=(0.3, 3.3))
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
        uniforms = np.array([[0.0] * 2 * NUM_TRIES + places])
        box = random_crop_boxes(np.array([size]), uniforms, crop_px=crop_px, padding_px=padding_px)[0]
        assert torch.equal(as_tensor(cut_box(image, box)), expected)


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (34, 35), (36, 37), (39, 40), (32, 100)])
def test_centre_crops_are_torchvisions(size):
    image = noise(*size)
    box = centre_boxes(np.array([size]), crop_px=32)[0]
    assert torch.equal(as_tensor(cut_box(image, box)), reference.CenterCrop(32)(as_tensor(image)))


def test_areas_ratios_and_places_are_distributed_as_torchvisions():
    size, num, area = (300, 400), 4000, (0.2, 0.6)
    image = torch.zeros(1, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        theirs = np.array([reference.RandomResizedCrop.get_params(image, list(area), list(RATIOS)) for _ in range(num)])
    uniforms = np.random.default_rng(12).random((num, NUM_UNIFORMS))
    ours = resized_crop_boxes(np.tile(size, (num, 1)), uniforms, area=area, aspect_ratio=RATIOS)
    for name, value in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "log ratio": lambda box: np.log(box[:, 3] / box[:, 2]),
        "top": lambda box: box[:, 0] / (size[0] - box[:, 2] + 1),
        "left": lambda box: box[:, 1] / (size[1] - box[:, 3] + 1),
    }.items():
        assert ks_2samp(value(ours), value(theirs)).pvalue > 0.01, name


def test_the_same_numbers_give_the_same_part_of_an_image_and_of_its_scaled_copy():
    uniforms = np.random.default_rng(0).random((500, NUM_UNIFORMS))
    settings = {"area": (0.16, 1.0), "aspect_ratio": RATIOS}
    small, large = (
        resized_crop_boxes(np.tile(size, (500, 1)), uniforms, **settings) / np.tile(size, 2)
        for size in ((256, 320), (2560, 3200))
    )
    close = np.abs(small - large).max(axis=1) < 1.5 / 256  # half a pixel of rounding, twice, and the floor of the place
    assert close.mean() > 0.99  # a try may fit in one size only, by its rounding


@pytest.mark.parametrize(
    "box",
    [
        *((0, 0, 12, 14), (2, 3, 5, 6), (11, 13, 1, 1)),
        *((-3, 2, 6, 4), (5, 5, 20, 3), (-9, -9, 4, 4), (30, 30, 5, 5), (-5, -5, 30, 30)),
    ],
)
def test_a_cut_is_a_contiguous_copy_and_repeats_edge_pixels_beyond_the_image(box):
    image, around = noise(12, 14), 40
    image.flags.writeable = False
    wide = np.pad(image, ((around, around), (around, around), (0, 0)), mode="edge")
    top, left, height, width = box
    got = cut_box(image, box)
    np.testing.assert_array_equal(got, wide[top + around :, left + around :][:height, :width])
    assert got.flags.c_contiguous
    assert got.flags.writeable  # torch warns of read-only arrays
    assert not np.shares_memory(got, image)


def test_an_image_smaller_than_its_crop_is_refused_with_the_cure():
    sizes, uniforms = np.array([[40, 40], [20, 30]]), np.zeros((2, NUM_UNIFORMS))
    with pytest.raises(DataError, match=r"30 x 20 px.*crop_px: 32.*padding_px of 6"):
        centre_boxes(sizes, crop_px=32)
    with pytest.raises(DataError, match=r"30 x 20 px \(padding_px: 5\)"):
        random_crop_boxes(sizes, uniforms, crop_px=32, padding_px=5)
    assert random_crop_boxes(sizes, uniforms, crop_px=32, padding_px=6)[1].tolist() == [-6, -6, 32, 32]


def test_a_fallback_box_is_never_empty():
    never = np.full((1, NUM_UNIFORMS), 0.5)
    box = resized_crop_boxes(np.array([[1, 1]]), never, area=(1, 1), aspect_ratio=(4.0, 9.0))
    assert box.tolist() == [[0, 0, 1, 1]]
    assert math.isclose(never.mean(), 0.5)


def test_the_settings_choose_the_kind_of_crop():
    draws, sizes = draw(5, 3), np.array([[60, 80], [32, 32], [33, 90], [70, 40], [64, 64]], dtype=np.int32)
    kinds = {
        Augmentation(): centre_boxes(sizes.astype(np.int64), crop_px=32),
        Augmentation(random_crop=True, padding_px=4): random_crop_boxes(
            sizes.astype(np.int64), draws.crop, crop_px=32, padding_px=4
        ),
        Augmentation(random_resized_crop=(0.3, 0.5), aspect_ratio=(1.0, 2.0)): resized_crop_boxes(
            sizes.astype(np.int64), draws.crop, area=(0.3, 0.5), aspect_ratio=(1.0, 2.0)
        ),
    }
    for augmentation, expected in kinds.items():
        np.testing.assert_array_equal(choose_boxes(augmentation, draws, sizes, crop_px=32), expected)
    with pytest.raises(DataError, match="crop_px: 33"):
        choose_boxes(Augmentation(), draws, sizes, crop_px=33)


@pytest.mark.parametrize("size", [(230, 201), (201, 230), (60, 90), (500, 448), (1, 1), (1, 300), (700, 2)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_scaling_one_image_is_torchvisions_bit_for_bit(size, interpolation):
    for image in (noise(*size), photo(*size)):
        got = scale_one(image, 224, interpolation)
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
    batch = torch.full((len(images), 80, 80, 3), 77, dtype=torch.uint8)  # pixels beyond an image must not matter
    for row, image in enumerate(images):
        batch[row, : image.shape[0], : image.shape[1]] = torch.from_numpy(image)
    got = scale_together(batch, np.array([image.shape[:2] for image in images]), size_px, interpolation)
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
            assert difference.max() <= 2  # torch and Pillow differ from each other by as much
            assert (difference > 1).mean() <= 0.003
        if image.shape[:2] == (size_px, size_px):
            np.testing.assert_array_equal(got[row].numpy(), image)


def test_lanczos_scales_along_the_rows_first():
    """A step from black to white that overshoots along the rows and is clipped there, before the columns are scaled."""
    image = photo(300, 100)
    columns_first = Image.fromarray(image).resize((100, 224), Image.Resampling.LANCZOS)
    wrong = np.asarray(columns_first.resize((224, 224), Image.Resampling.LANCZOS)).astype(int)
    together = scale_together(torch.from_numpy(image)[None], np.array([[300, 100]]), 224, "lanczos")[0].numpy()
    got = scale_one(image, 224, "lanczos").numpy().astype(int)
    assert np.abs(got - together).max() <= 2
    assert np.abs(got - wrong).max() > 10


def test_scaling_together_does_not_change_under_autocast():
    """bf16 has 8 bits: a product in it would be off by a grey level or more nearly everywhere."""
    images = torch.from_numpy(np.stack([photo(90, 90), noise(90, 90)]))
    sizes = np.full((2, 2), 90)
    expected = scale_together(images, sizes, 56, "bicubic")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scale_together(images, sizes, 56, "bicubic"), expected)


def test_an_image_of_the_right_size_is_not_changed():
    image = noise(24, 24)
    for interpolation in INTERPOLATIONS:
        np.testing.assert_array_equal(scale_one(image, 24, interpolation).numpy(), image)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("numbers", [IMAGENET, CAFFE], ids=["rgb", "bgr"])
def test_without_augmentation_it_is_the_normalisation_bit_for_bit(memory_format, numbers):
    images, preprocessing = pixels(4), Preprocessing(12, 12, **numbers)
    got = finished(images, Augmentation(), draw(4, 0), preprocessing, memory_format)
    assert torch.equal(got, preprocessing.normalise(images))
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_everything_at_once_is_torchvisions_in_the_stated_order(memory_format):
    """Image by image: flip, grayscale, jitter, blur, normalisation, erasing, with the numbers of one row."""
    augmentation = Augmentation(
        flip=True,
        grayscale=0.4,
        color_jitter=ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1, probability=0.8),
        blur=GaussianBlur(sigma=(0.5, 1.5), probability=0.5),
        erasing=Erasing(probability=0.5, scale=(0.1, 0.3), ratio=(0.5, 2.0)),
    )
    images, draws, preprocessing = pixels(24, 16), draw(24, 1), Preprocessing(16, 16, **IMAGENET)
    got = finished(images, augmentation, draws, preprocessing, memory_format)
    orders = jitter_orders(augmentation.color_jitter, draws.orders)
    low, high = np.array([0.6, 0.7, 0.8, -0.1]), np.array([1.4, 1.3, 1.2, 0.1])
    adjust = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    erased = erased_boxes(np.full((24, 2), 16), draws.erasing[:, 1:], area=(0.1, 0.3), aspect_ratio=(0.5, 2.0))
    for row in range(24):
        image = images[row].permute(2, 0, 1).float() / 255
        if draws.flip[row, 0] < 0.5:
            image = functional.horizontal_flip(image)
        if draws.grayscale[row, 0] < 0.4:
            image = functional.rgb_to_grayscale(image, 3)
        assert bool(orders[row]) == (draws.orders[row, 0] < 0.8)
        for operation in orders[row]:
            image = adjust[operation](
                image, float(low[operation] + (high - low)[operation] * draws.factors[row, operation])
            )
        if draws.blur[row, 0] < 0.5:
            image = functional.gaussian_blur(image, [11, 11], [0.5 + draws.blur[row, 1]] * 2)
        image = functional.normalize(image, list(IMAGENET["mean"]), list(IMAGENET["std"]))
        if draws.erasing[row, 0] < 0.5:
            image = functional.erase(image, *erased[row].tolist(), torch.zeros(1))
        torch.testing.assert_close(got[row], image, atol=2e-3, rtol=0)


def test_bgr_colours_are_changed_as_rgb_and_then_swapped():
    augmentation = Augmentation(color_jitter=ColorJitter(hue=0.3, saturation=0.5))
    images, draws = pixels(4), draw(4, 2)
    rgb = finished(images, augmentation, draws, Preprocessing(12, 12, (0, 0, 0), (1, 1, 1), value_range=255.0))
    bgr = finished(images, augmentation, draws, Preprocessing(12, 12, **CAFFE))
    torch.testing.assert_close(bgr, rgb.flip(1) - torch.tensor(CAFFE["mean"]).view(1, 3, 1, 1))


def test_factors_are_distributed_as_torchvisions():
    num, settings = 3000, {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1}
    theirs = reference.ColorJitter(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        drawn = [
            theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(num)
        ]
    rng = np.random.default_rng(6)
    ours = jitter_factors(ColorJitter(**settings), rng.random((num, 4)))
    for operation in range(4):
        assert ks_2samp(ours[:, operation], [float(values[1 + operation]) for values in drawn]).pvalue > 0.01
    orders = jitter_orders(ColorJitter(**settings), rng.random((num, 2)))
    names = list(itertools.permutations(range(4)))
    counts = [[0] * 24, [0] * 24]
    for order in orders:
        counts[0][names.index(tuple(order))] += 1
    for values in drawn:
        counts[1][names.index(tuple(values[0].tolist()))] += 1
    assert chi2_contingency(counts).pvalue > 0.01
    assert min(counts[0]) > 0


def test_a_setting_of_zero_and_a_probability_leave_operations_out():
    uniforms = np.random.default_rng(0).random((2000, 2))
    orders = jitter_orders(ColorJitter(brightness=0.2, hue=0.1, probability=0.3), uniforms)
    assert {tuple(order) for order in orders} == {(), (0, 3), (3, 0)}
    assert abs(np.mean([bool(order) for order in orders]) - 0.3) < 0.04  # 4 standard deviations
    ends = jitter_factors(ColorJitter(brightness=1.5, hue=0.1), np.array([[0.0] * 4, [1.0] * 4]))
    np.testing.assert_allclose(ends, [[0, 1, 1, -0.1], [2.5, 1, 1, 0.1]])


@pytest.mark.parametrize(("size_px", "kernel_px"), [(20, 13), (4, 7), (2, 3), (1, 1)])
def test_the_kernel_of_a_blur_reaches_three_sigmas_or_as_far_as_can_be_mirrored(size_px, kernel_px):
    image = pixels(1, size_px)[0].permute(2, 0, 1).float() / 255
    got = blurred(image, GaussianBlur(sigma=(0.1, 2.0)), 0.5)
    torch.testing.assert_close(got, functional.gaussian_blur(image, [kernel_px] * 2, [1.05] * 2))
