import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, ks_2samp
from torchvision.transforms import ColorJitter as ReferenceJitter
from torchvision.transforms.v2 import functional

from raydml.data.catalog import DataError
from raydml.images import colours
from raydml.images.colours import BRIGHTNESS, CONTRAST, HUE, NONE, SATURATION, ColorJitter, GaussianBlur

ADJUST = {
    BRIGHTNESS: functional.adjust_brightness,
    CONTRAST: functional.adjust_contrast,
    SATURATION: functional.adjust_saturation,
    HUE: functional.adjust_hue,
}


def pixels(num_images, size_px=20, seed=0):
    """uint8 (B, 3, H, W): noise, with grey, black, white and pure colours among it."""
    images = torch.randint(
        0, 256, (num_images, 3, size_px, size_px), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    special = [
        (0, 0, 0),
        (255, 255, 255),
        (77, 77, 77),
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (9, 9, 200),
        (200, 9, 9),
    ]
    images[:, :, 0, : len(special)] = torch.tensor(special, dtype=torch.uint8).T
    return images


def in_turn(image, factors, order):
    for operation in order:
        if operation != NONE:
            image = ADJUST[operation](image, float(factors[operation]))
    return image


def factors_for(num_images, seed=1):
    factors = np.random.default_rng(seed).uniform(0.4, 1.6, (num_images, 4))
    factors[:, HUE] = np.random.default_rng(seed).uniform(-0.5, 0.5, num_images)
    return factors


def test_every_order_of_the_four_is_torchvisions():
    orders = np.array(list(itertools.permutations(range(4))))
    images, factors = pixels(24), factors_for(24)
    got = images.float()
    colours.jitter(got, factors, orders)
    for row in range(24):
        # torchvision's floats are 0..1; a hue next to a grey turns on the last bits of its chroma
        expected = in_turn(images[row].float() / 255, factors[row], orders[row]) * 255
        torch.testing.assert_close(got[row], expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_one_operation_is_within_two_levels_of_torchvisions_uint8(operation):
    images, factors = pixels(12), factors_for(12)
    got = images.float()
    colours.jitter(got, factors, np.array([[operation, NONE, NONE, NONE]] * 12))
    for row in range(12):
        expected = ADJUST[operation](images[row], float(factors[row, operation]))
        assert (got[row] - expected.float()).abs().max() < 2


def test_images_that_are_left_out_stay_as_they_are():
    images, factors = pixels(4).float(), factors_for(4)
    before = images.clone()
    colours.jitter(images, factors, np.array([[NONE] * 4, [NONE, HUE, NONE, NONE], [NONE] * 4, [NONE] * 4]))
    assert (images != before).flatten(1).any(1).tolist() == [False, True, False, False]


def test_one_image_does_not_leak_into_another():
    factors, orders = factors_for(3), np.array(list(itertools.permutations(range(4))))[[3, 17, 8]]
    together, alone = pixels(3).float(), pixels(3).float()[1:2]
    colours.jitter(together, factors, orders)
    colours.jitter(alone, factors[1:2], orders[1:2])
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=0)


def test_factors_are_distributed_as_torchvisions():
    num, settings = 3000, {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1}
    reference = ReferenceJitter(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        drawn = [
            reference.get_params(reference.brightness, reference.contrast, reference.saturation, reference.hue)
            for _ in range(num)
        ]
    rng = np.random.default_rng(6)
    ours = colours.jitter_factors(ColorJitter(**settings), rng.random((num, 4)))
    for operation in range(4):
        assert ks_2samp(ours[:, operation], [float(values[1 + operation]) for values in drawn]).pvalue > 0.01
    orders = colours.jitter_orders(ColorJitter(**settings), rng.random((num, 2)))
    names = list(itertools.permutations(range(4)))
    counts = [[0] * 24, [0] * 24]
    for order in orders.tolist():
        counts[0][names.index(tuple(order))] += 1
    for values in drawn:
        counts[1][names.index(tuple(values[0].tolist()))] += 1
    assert chi2_contingency(counts).pvalue > 0.01
    assert min(counts[0]) > 0


def test_a_setting_of_zero_and_a_probability_leave_operations_out():
    uniforms = np.random.default_rng(0).random((2000, 2))
    orders = colours.jitter_orders(ColorJitter(brightness=0.2, hue=0.1, probability=0.3), uniforms)
    assert set(np.unique(orders)) == {NONE, BRIGHTNESS, HUE}
    jittered = (orders != NONE).sum(axis=1)
    assert set(jittered.tolist()) == {0, 2}
    assert abs((jittered == 2).mean() - 0.3) < 0.04  # 4 standard deviations
    ends = colours.jitter_factors(ColorJitter(brightness=1.5, hue=0.1), np.array([[0.0] * 4, [1.0] * 4]))
    np.testing.assert_allclose(ends, [[0, 1, 1, -0.1], [2.5, 1, 1, 0.1]])


def test_grayscale_is_torchvisions():
    images = pixels(5)
    got = images.float()
    colours.to_gray(got, np.array([1, 4]))
    for row in range(5):
        expected = functional.rgb_to_grayscale(images[row].float(), 3) if row in (1, 4) else images[row].float()
        torch.testing.assert_close(got[row], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("size_px", "radius"), [(20, 6), (20, 1), (5, 4), (2, 1)])
def test_blur_is_torchvisions(size_px, radius):
    images, sigmas = pixels(4, max(size_px, 8))[:, :, :size_px, :size_px].contiguous(), np.array([0.1, 0.7, 2.0])
    got = images.float()
    colours.blur(got, np.array([0, 2, 3]), sigmas, radius)
    assert torch.equal(got[1], images[1].float())
    for row, sigma in zip((0, 2, 3), sigmas, strict=True):
        expected = functional.gaussian_blur(images[row].float(), [2 * radius + 1] * 2, [float(sigma)] * 2)
        torch.testing.assert_close(got[row], expected, atol=1e-2, rtol=0)


def test_blur_cuts_its_radius_to_what_can_be_mirrored():
    images, sigma = pixels(1, 8).float()[:, :, :4, :4].contiguous(), np.array([2.0])
    wide, narrow = images.clone(), images.clone()
    colours.blur(wide, np.array([0]), sigma, 6)
    colours.blur(narrow, np.array([0]), sigma, 3)
    assert torch.equal(wide, narrow)
    one_pixel = images[:, :, :1, :1].contiguous()
    expected = one_pixel.clone()
    colours.blur(one_pixel, np.array([0]), sigma, 6)
    assert torch.equal(one_pixel, expected)
    assert GaussianBlur((0.1, 2.0)).radius_px == 6


def test_no_images_are_no_error():
    nothing = torch.empty(0, 3, 4, 4)
    colours.jitter(nothing, np.empty((0, 4)), np.empty((0, 4), dtype=np.int64))
    colours.to_gray(nothing, np.empty(0, dtype=np.int64))
    colours.blur(nothing, np.empty(0, dtype=np.int64), np.empty(0), 3)


@pytest.mark.parametrize(
    ("kind", "settings", "part"),
    [
        (ColorJitter, {"brightness": -0.1}, "color_jitter.brightness: -0.1"),
        (ColorJitter, {"contrast": math.inf}, "color_jitter.contrast: inf"),
        (ColorJitter, {"saturation": math.nan}, "color_jitter.saturation: nan"),
        (ColorJitter, {"hue": 0.6}, "color_jitter.hue: 0.6"),
        (ColorJitter, {"probability": 1.2}, "color_jitter.probability: 1.2"),
        (GaussianBlur, {"sigma": (0.0, 2.0)}, "blur.sigma"),
        (GaussianBlur, {"sigma": (2.0, 1.0)}, "blur.sigma"),
        (GaussianBlur, {"probability": -1}, "blur.probability: -1"),
    ],
)
def test_impossible_settings_are_refused(kind, settings, part):
    with pytest.raises(DataError, match=part):
        kind(**settings)
