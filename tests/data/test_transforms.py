import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from raydml.data.transforms import augment, crop_and_resize, draw_crops


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(num_images: int, size_px: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num_images, size_px, size_px, 3), dtype=torch.uint8, generator=seeded(seed))


PLAIN = {"random_resized_crop_scale": None, "flip": False, "shift_px": 0}


@pytest.mark.parametrize("crop_px", [5, 16, 23])
def test_resized_crop_is_torchvisions(crop_px):
    images = random_images(40, 24)
    corner, extent = draw_crops(40, 24, (0.05, 1.0), seeded(1))
    corner[0], extent[0] = 0, 24  # the whole image
    corner[1], extent[1] = 23, 1  # one pixel
    mirrored = torch.arange(40) % 3 == 0
    got = crop_and_resize(images, corner, extent, mirrored, crop_px=crop_px)
    for index in range(40):
        channels_first = images[index].permute(2, 0, 1).float()
        (top, left), (height, width) = corner[index].tolist(), extent[index].tolist()
        expected = reference.resized_crop(
            channels_first, top, left, height, width, size=[crop_px, crop_px], antialias=False
        )
        expected = reference.horizontal_flip(expected) if mirrored[index] else expected
        torch.testing.assert_close(got[index].permute(2, 0, 1), expected, atol=1e-2, rtol=0)


def test_a_crop_of_its_own_size_is_exact():
    # 49 is a size where (x / 49) * 49 is not x in floating point
    images = random_images(6, 60)
    got = crop_and_resize(
        images, torch.full((6, 2), 7), torch.full((6, 2), 49), torch.zeros(6, dtype=torch.bool), crop_px=49
    )
    assert got.dtype == torch.float32
    assert torch.equal(got, images[:, 7:56, 7:56].float())


def test_without_options_it_is_the_centre_crop_and_draws_nothing():
    images, generator = random_images(3, 12), seeded()
    before = generator.get_state()
    assert torch.equal(augment(images, crop_px=8, generator=generator, **PLAIN), images[:, 2:10, 2:10].float())
    assert torch.equal(generator.get_state(), before)


def test_flip_mirrors_about_half_of_the_images_whole():
    images = random_images(400, 4)
    got = augment(images, crop_px=4, generator=seeded(), **{**PLAIN, "flip": True})
    same = (got == images.float()).flatten(1).all(1)
    mirrored = (got == images.flip(2).float()).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250  # 5 standard deviations


def test_shift_moves_by_whole_pixels_and_repeats_the_edge():
    images = random_images(300, 6)
    got = augment(images, crop_px=6, generator=seeded(), **{**PLAIN, "shift_px": 2})
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="replicate")
    padded = padded.permute(0, 2, 3, 1)
    places = [(dy, dx) for dy in range(5) for dx in range(5)]
    hits = torch.stack([(padded[:, y : y + 6, x : x + 6] == got).flatten(1).all(1) for y, x in places])
    assert (hits.sum(0) == 1).all()
    assert (hits.sum(1) > 0).all()  # every one of the 25 shifts occurs


def test_shift_of_the_spare_border_is_the_plain_random_crop():
    images = random_images(200, 8)
    got = augment(images, crop_px=6, generator=seeded(), **{**PLAIN, "shift_px": 1})
    places = [(top, left) for top in range(3) for left in range(3)]
    hits = torch.stack([(images[:, y : y + 6, x : x + 6].float() == got).flatten(1).all(1) for y, x in places])
    assert (hits.sum(0) == 1).all()
    assert (hits.sum(1) > 0).all()


def test_crops_are_drawn_as_torchvision_draws_them():
    size_px, num = 100, 20_000
    corner, extent = draw_crops(num, size_px, (0.2, 0.8), seeded())
    assert (corner >= 0).all()
    assert (corner + extent <= size_px).all()
    area = extent.prod(1) / size_px**2
    ratio = extent[:, 1] / extent[:, 0]
    # rounding to whole pixels moves area and ratio by up to about 2 %
    assert 0.19 < area.min() < 0.21
    assert 0.78 < area.max() < 0.82
    assert 0.73 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.37
    assert abs(ratio.double().log().mean()) < 0.01  # log-uniform: symmetric about 1
    assert abs(ratio.double().log().std() - math.log(16 / 9) / math.sqrt(12)) < 0.01
    spare = size_px - extent
    assert abs((corner / spare.clamp(min=1)).mean() - 0.5) < 0.01
    assert (corner == spare).any()  # the last place is reached


def test_a_crop_that_never_fits_is_the_whole_image():
    corner, extent = draw_crops(50, 1000, (1.0, 1.0), seeded())  # the full area fits only as a square
    assert (extent == 1000).all()
    assert (corner == 0).all()


def test_each_image_has_its_own_draw_and_the_generator_decides():
    images = random_images(1, 16).expand(8, -1, -1, -1)
    settings = {"random_resized_crop_scale": (0.2, 0.5), "flip": True, "shift_px": 1, "crop_px": 8}
    first = augment(images, generator=seeded(4), **settings)
    assert torch.equal(first, augment(images, generator=seeded(4), **settings))
    assert not torch.equal(first, augment(images, generator=seeded(5), **settings))
    assert len({bytes(image.numpy().tobytes()) for image in first}) == 8
    assert first.shape == (8, 8, 8, 3)
    assert first.min() >= 0
    assert first.max() <= 255


def test_one_image_does_not_leak_into_another():
    images = random_images(4, 16)
    settings = {"random_resized_crop_scale": (0.2, 0.5), "flip": True, "shift_px": 1, "crop_px": 8}
    changed = images.clone()
    changed[2] = 0
    difference = augment(images, generator=seeded(), **settings) != augment(changed, generator=seeded(), **settings)
    assert difference.flatten(1).any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"crop_px": 9}, "data.crop_px = 9"),
        ({"crop_px": 0}, "data.crop_px = 0"),
        ({"random_resized_crop_scale": (0.0, 1.0)}, "random_resized_crop"),
        ({"random_resized_crop_scale": (0.8, 0.5)}, "random_resized_crop"),
        ({"shift_px": -1}, "shift_px = -1"),
    ],
)
def test_impossible_settings_are_refused(change, part):
    with pytest.raises(ValueError, match=part):
        augment(random_images(2, 8), generator=seeded(), **{**PLAIN, "crop_px": 8, **change})


def test_other_tensors_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        augment(random_images(2, 8).float(), generator=seeded(), crop_px=8, **PLAIN)
    with pytest.raises(ValueError, match="uint8"):
        augment(random_images(2, 8).permute(0, 3, 1, 2), generator=seeded(), crop_px=3, **PLAIN)


@pytest.mark.gpu
def test_the_device_sees_the_same_crops():
    images = random_images(16, 32)
    settings = {"random_resized_crop_scale": (0.2, 1.0), "flip": True, "shift_px": 3, "crop_px": 24}
    on_cpu = augment(images, generator=seeded(), **settings)
    on_device = augment(images.cuda(), generator=seeded(), **settings)
    assert on_device.is_cuda
    torch.testing.assert_close(on_device.cpu(), on_cpu, atol=1e-3, rtol=0)
