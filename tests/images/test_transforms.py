import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from raydml.data.catalog import DataError
from raydml.images import crops, transforms
from raydml.images.preprocessing import Preprocessing
from raydml.images.transforms import Augmentation, ColorJitter, Draws, Erasing, GaussianBlur
from tests.golden_vectors import golden

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {"mean": (104.0, 117.0, 128.0), "std": (1.0, 1.0, 1.0), "channels": "BGR", "value_range": 255.0}


def pixels(num_images, size_px=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, size_px, size_px, 3), dtype=torch.uint8, generator=generator)


def finished(images, augmentation, draws, preprocessing, memory_format=torch.contiguous_format):
    shape = (len(images), 3, *images.shape[1:3])
    out = torch.full(shape, math.nan).to(memory_format=memory_format)
    transforms.finish(images.clone(), augmentation, draws, preprocessing, out=out)
    return out


def evaluated(image, preprocessing):
    read = torch.from_numpy(preprocessing.read(image).copy())
    return preprocessing.for_evaluation(read[None])[0].numpy()


# --- the evaluation of the four seeds ----------------------------------------------------------------------


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


# --- draws -------------------------------------------------------------------------------------------------


def test_a_seed_decides_and_earlier_images_do_not_depend_on_later_ones():
    few, many, other = transforms.draw(3, 7), transforms.draw(10, 7), transforms.draw(3, 8)
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
    first = {float(transforms.draw(1, seed).flip[0, 0]) for seed in seeds}
    assert len(first) == len(seeds)


def test_flips_happen_half_the_time_over_images_and_over_seeds():
    over_images = transforms.draw(20_000, 0).flip < 0.5
    over_seeds = [transforms.draw(1, seed).flip[0, 0] < 0.5 for seed in range(3000)]
    assert abs(over_images.mean() - 0.5) < 0.015  # 4 standard deviations
    assert abs(np.mean(over_seeds) - 0.5) < 0.037


def test_switching_one_thing_on_moves_no_crop():
    draws, sizes = transforms.draw(50, 3), np.tile([60, 80], (50, 1))
    plain = Augmentation(random_resized_crop=(0.16, 1.0))
    more = Augmentation(random_resized_crop=(0.16, 1.0), flip=True, grayscale=0.2, erasing=Erasing())
    np.testing.assert_array_equal(
        transforms.boxes(plain, draws, sizes, crop_px=32), transforms.boxes(more, draws, sizes, crop_px=32)
    )


def test_each_kind_of_crop_is_the_one_asked_for():
    draws, sizes = transforms.draw(5, 3), np.array([[60, 80], [32, 32], [33, 90], [70, 40], [64, 64]], dtype=np.int32)
    kinds = {
        Augmentation(): crops.centre_boxes(sizes.astype(np.int64), crop_px=32),
        Augmentation(random_crop=True, padding_px=4): crops.crop_boxes(
            sizes.astype(np.int64), draws.crop, crop_px=32, padding_px=4
        ),
        Augmentation(random_resized_crop=(0.3, 0.5), aspect_ratio=(1.0, 2.0)): crops.resized_crop_boxes(
            sizes.astype(np.int64), draws.crop, area=(0.3, 0.5), aspect_ratio=(1.0, 2.0)
        ),
    }
    for augmentation, expected in kinds.items():
        np.testing.assert_array_equal(transforms.boxes(augmentation, draws, sizes, crop_px=32), expected)
    with pytest.raises(DataError, match="crop_px: 33"):
        transforms.boxes(Augmentation(), draws, sizes, crop_px=33)


# --- from pixels to the network's input --------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("numbers", [IMAGENET, CAFFE], ids=["rgb", "bgr"])
def test_without_augmentation_it_is_the_normalisation_bit_for_bit(memory_format, numbers):
    images, preprocessing = pixels(4), Preprocessing(12, 12, **numbers)
    got = finished(images, Augmentation(), transforms.draw(4, 0), preprocessing, memory_format)
    assert torch.equal(got, preprocessing.normalise(images))
    assert got.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_everything_at_once_is_torchvisions_in_the_stated_order(memory_format):
    """One image at a time by hand: flip, grayscale, jitter, blur, normalisation, erasing; all drawn from one row."""
    augmentation = Augmentation(
        flip=True,
        grayscale=0.4,
        color_jitter=ColorJitter(0.4, 0.3, 0.2, 0.1, probability=0.8),
        blur=GaussianBlur((0.5, 1.5), probability=0.5),
        erasing=Erasing(0.5, (0.1, 0.3), (0.5, 2.0)),
    )
    images, draws, preprocessing = pixels(24, 16), transforms.draw(24, 1), Preprocessing(16, 16, **IMAGENET)
    got = finished(images, augmentation, draws, preprocessing, memory_format)
    orders = transforms.colours.jitter_orders(augmentation.color_jitter, draws.orders)
    low, high = np.array([0.6, 0.7, 0.8, -0.1]), np.array([1.4, 1.3, 1.2, 0.1])
    adjust = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    erased = crops.erased_boxes(np.full((24, 2), 16), draws.erasing[:, 1:], area=(0.1, 0.3), aspect_ratio=(0.5, 2.0))
    for row in range(24):
        image = images[row].permute(2, 0, 1).float() / 255
        if draws.flip[row, 0] < 0.5:
            image = functional.horizontal_flip(image)
        if draws.grayscale[row, 0] < 0.4:
            image = functional.rgb_to_grayscale(image, 3)
        for operation in orders[row] if draws.orders[row, 0] < 0.8 else []:
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
    images, draws = pixels(4), transforms.draw(4, 2)
    rgb = finished(images, augmentation, draws, Preprocessing(12, 12, (0, 0, 0), (1, 1, 1), value_range=255.0))
    bgr = finished(images, augmentation, draws, Preprocessing(12, 12, **CAFFE))
    torch.testing.assert_close(bgr, rgb.flip(1) - torch.tensor(CAFFE["mean"]).view(1, 3, 1, 1))


def test_no_images_are_no_error():
    augmentation = Augmentation(flip=True, grayscale=0.5, color_jitter=ColorJitter(0.1), erasing=Erasing())
    assert finished(pixels(0), augmentation, transforms.draw(0, 0), Preprocessing(12, 12, **IMAGENET)).shape[0] == 0


def test_a_file_is_evaluated_as_its_pixels_are(tmp_path):
    Image.fromarray(pixels(1, 40)[0].numpy()).save(tmp_path / "a.png")
    preprocessing = Preprocessing(32, 24, **IMAGENET)
    np.testing.assert_array_equal(
        evaluated(tmp_path / "a.png", preprocessing), evaluated(pixels(1, 40)[0].numpy(), preprocessing)
    )


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"random_resized_crop": (0.0, 1.0)}, r"random_resized_crop: \(0.0, 1.0\)"),
        ({"random_resized_crop": (0.8, 0.5)}, r"random_resized_crop: \(0.8, 0.5\)"),
        ({"random_resized_crop": (0.8, 1.5)}, r"random_resized_crop: \(0.8, 1.5\)"),
        ({"random_resized_crop": (0.1, 1.0), "aspect_ratio": (0.0, 1.0)}, "aspect_ratio"),
        ({"random_resized_crop": (0.1, 1.0), "aspect_ratio": (1.0, math.nan)}, "aspect_ratio"),
        ({"aspect_ratio": (0.5, 2.0)}, "no effect without random_resized_crop"),
        ({"random_resized_crop": (0.1, 1.0), "random_crop": True}, "exclude each other"),
        ({"random_crop": True, "padding_px": -1}, "padding_px: -1"),
        ({"padding_px": 4}, "no effect without random_crop"),
        ({"grayscale": 1.1}, "grayscale: 1.1"),
    ],
)
def test_impossible_settings_are_refused(settings, part):
    with pytest.raises(DataError, match=part):
        Augmentation(**settings)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"probability": 2}, "erasing.probability"),
        ({"scale": (0.5, 0.2)}, "erasing.scale"),
        ({"ratio": (0, 1)}, "ratio"),
    ],
)
def test_impossible_erasing_is_refused(settings, part):
    with pytest.raises(DataError, match=part):
        Erasing(**settings)
