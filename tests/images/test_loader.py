import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode, functional

from raydml.data.catalog import DataError
from raydml.images.augmentation import choose_boxes, draw, jitter_factors, jitter_orders, scale_one
from raydml.images.augmentation_settings import Augmentation, ColorJitter, Erasing, GaussianBlur
from raydml.images.loader import Loader, group_boxes, scale_groups
from raydml.images.pixels import PackedPixels
from raydml.images.preprocessing import Preprocessing, resized, upright_rgb

PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared" / "data" / "grocery_small" / "images"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CAFFE = {"mean": (104.0, 117.0, 128.0), "std": (1.0, 1.0, 1.0), "channels": "BGR", "value_range": 255.0}
GREY_LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "value_range": 255.0}
CPU = torch.device("cpu")
EVERYTHING = Augmentation(
    random_resized_crop=(0.2, 1.0),
    flip=True,
    color_jitter=ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, probability=0.7),
    grayscale=0.3,
    blur=GaussianBlur(sigma=(0.1, 1.0)),
    erasing=Erasing(),
)


def pack(images):
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int32).reshape(-1, 2)
    ends = np.cumsum([image.size for image in images])
    return PackedPixels(np.concatenate([image.reshape(-1) for image in images]), np.array([0, *ends[:-1]]), sizes)


def scene(height, width, seed):
    """Blocks of colour and a little noise: edges and flat parts, as in a photograph."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    return np.clip(blocks + rng.integers(-10, 11, blocks.shape), 0, 255).astype(np.uint8)


def scenes(shortest=60):
    return [scene(shortest + 7 * (seed % 3), shortest + 11 * (seed % 4), seed) for seed in range(8)]


def loading(pixels, augmentation, preprocessing, *, channels_last=False, prefetch=2, device=CPU):
    return Loader(pixels, augmentation, preprocessing, device=device, channels_last=channels_last, prefetch=prefetch)


def batches(settings, plan, seeds, pixels=None, **machine):
    augmentation, preprocessing = settings
    made = loading(pixels or pack(scenes()), augmentation, preprocessing, **machine)
    return [batch.clone() for batch in made.batches(plan, seeds)]


def by_torchvision(image, box, size_px, interpolation):
    """Cut and scale an array as the published systems do: bilinear on tensors, lanczos on PIL images."""
    if interpolation == "lanczos":
        cropped = functional.crop(Image.fromarray(image), *box)
        rows_first = functional.resize(cropped, [box[2], size_px], InterpolationMode.LANCZOS)
        return functional.pil_to_tensor(functional.resize(rows_first, [size_px, size_px], InterpolationMode.LANCZOS))
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    mode = InterpolationMode(interpolation)
    return functional.resized_crop(tensor, *box, size=[size_px, size_px], interpolation=mode, antialias=True)


FAMILIES = {
    "classification": (Augmentation(random_crop=True, flip=True), Preprocessing(64, 56, **IMAGENET, resize="squash")),
    "mdr": (
        Augmentation(random_resized_crop=(0.16, 1.0), flip=True),
        Preprocessing(64, 56, **CAFFE, resize="squash", interpolation="lanczos"),
    ),
    "divide_and_conquer": (Augmentation(random_resized_crop=(0.08, 1.0), flip=True), Preprocessing(64, 56, **IMAGENET)),
    "mic_auxiliary": (Augmentation(random_resized_crop=(0.08, 1.0)), Preprocessing(64, 56, **IMAGENET)),
    "deep_metric": (Augmentation(random_resized_crop=(0.16, 1.0), flip=True), Preprocessing(64, 56, **CAFFE)),
    "benchmark_2020_adv": (
        Augmentation(
            random_resized_crop=(0.08, 1.0),
            flip=True,
            grayscale=0.2,
            color_jitter=ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
        ),
        Preprocessing(64, 56, **IMAGENET),
    ),
}
FROM_THE_ORIGINAL = ("divide_and_conquer", "mic_auxiliary", "benchmark_2020_adv")
ADJUST = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_pipelines_of_the_published_systems_are_torchvisions(family, channels_last):
    augmentation, preprocessing = FAMILIES[family]
    images = scenes(90)
    if family not in FROM_THE_ORIGINAL:
        images = [resized(Image.fromarray(image), preprocessing.resizing) for image in images]
    draws = draw(8, 21)
    sizes = np.array([image.shape[:2] for image in images])
    boxes = choose_boxes(augmentation, draws, sizes, crop_px=56).tolist()
    (got,) = batches(FAMILIES[family], [np.arange(8)], [21], pack(images), channels_last=channels_last)
    for row, image in enumerate(images):
        expected = by_torchvision(image, boxes[row], 56, preprocessing.interpolation)
        if family != "mic_auxiliary" and draws.flip[row, 0] < 0.5:
            expected = functional.horizontal_flip(expected)
        expected = expected.float() / 255
        if augmentation.grayscale and draws.grayscale[row, 0] < 0.2:
            expected = functional.rgb_to_grayscale(expected, 3)
        if augmentation.color_jitter is not None:
            factors = jitter_factors(augmentation.color_jitter, draws.factors)[row]
            for operation in jitter_orders(augmentation.color_jitter, draws.orders)[row]:
                expected = ADJUST[operation](expected, float(factors[operation]))
        if preprocessing.channels == "BGR":
            expected = expected.flip(0) * 255 - torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)
        else:
            expected = functional.normalize(expected, list(IMAGENET["mean"]), list(IMAGENET["std"]))
        torch.testing.assert_close(got[row], expected, atol=2e-3 if augmentation.color_jitter else 1e-4, rtol=1e-5)
    assert (draws.flip < 0.5).any()
    assert (draws.grayscale < 0.2).any()


def test_without_augmentation_it_is_the_evaluation():
    images, preprocessing = np.stack([scene(64, 70, seed) for seed in range(5)]), Preprocessing(64, 56, **IMAGENET)
    (got,) = batches((Augmentation(), preprocessing), [np.arange(5)], [0], pack(images))
    assert torch.equal(got, preprocessing.for_evaluation(torch.from_numpy(images)))


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason=f"needs the photographs in {PHOTOGRAPHS}")
def test_crops_from_the_cache_are_close_to_crops_from_the_original():
    """Nearer than two crops of the original that lie one pixel of the cache apart.

    Both roundings of a box to whole pixels move it by up to half of one, and the cache was interpolated once already.
    Measured on 24 photographs of 348 x 348 px, in grey levels: 4.6 (the worst one 7.8), against 8.1 for crops one pixel
    apart and 51 for crops of other draws.
    """
    paths = sorted(PHOTOGRAPHS.rglob("*.jpg"))[::68]
    assert len(paths) >= 20
    originals = [np.asarray(upright_rgb(Image.open(path))) for path in paths]
    settings = (Augmentation(random_resized_crop=(0.16, 1.0)), Preprocessing(256, 224, **GREY_LEVELS))
    cached = [resized(Image.fromarray(image), settings[1].resizing) for image in originals]
    plan = [np.arange(len(paths))]
    (from_original,), (from_cache,), (others,) = (
        batches(settings, plan, [seed], pack(images)) for images, seed in ((originals, 3), (cached, 3), (cached, 4))
    )
    boxes = choose_boxes(
        settings[0], draw(len(paths), 3), np.array([image.shape[:2] for image in originals]), crop_px=224
    )
    shifts = []
    for image, (top, left, height, width), here in zip(originals, boxes.tolist(), from_original, strict=True):
        pixel = round(min(image.shape[:2]) / 256)
        beside = by_torchvision(image, (top + pixel, left + pixel, height, width), 224, "bilinear")
        shifts.append(float((beside - here).abs().mean()))
    difference = (from_original - from_cache).abs().mean(dim=(1, 2, 3))
    assert difference.mean() < 0.75 * np.mean(shifts)
    assert difference.max() < 12
    assert (from_original - others).abs().mean() > 8 * difference.mean()


def test_neither_prefetch_nor_memory_format_decide_a_batch():
    plan, seeds = [np.array([3, 1, 1, 5, 0, 7]), np.array([2, 6]), np.array([4, 4, 4])], [9, 2**40, 9]
    settings = (EVERYTHING, Preprocessing(60, 48, **IMAGENET))
    expected = batches(settings, plan, seeds)
    for machine in ({"prefetch": 1}, {"prefetch": 50}):
        for got, want in zip(batches(settings, plan, seeds, **machine), expected, strict=True):
            assert torch.equal(got, want)
    for got, want in zip(batches(settings, plan, seeds, channels_last=True), expected, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, want)
    assert not loader_threads()
    assert [batch.shape for batch in expected] == [(6, 3, 48, 48), (2, 3, 48, 48), (3, 3, 48, 48)]
    assert expected[0].is_contiguous()
    assert not torch.equal(expected[2][0], expected[2][1])  # one image three times, three draws


def test_every_image_of_a_large_batch_has_its_own_draw():
    """200 images of 48 px are finished in several chunks, each with its own rows of the draws."""
    image, preprocessing = scene(48, 48, 0), Preprocessing(48, 48, **GREY_LEVELS)
    (got,) = batches((Augmentation(flip=True), preprocessing), [np.zeros(200, dtype=np.int64)], [5], pack([image]))
    plain = torch.from_numpy(image).permute(2, 0, 1).float()
    for row, uniform in enumerate(draw(200, 5).flip[:, 0]):
        assert torch.equal(got[row], plain.flip(2) if uniform < 0.5 else plain)


def test_a_run_resumed_in_the_middle_of_an_epoch_sees_the_same_batches():
    plan = [np.random.default_rng(batch).integers(0, 8, 4) for batch in range(6)]
    seeds = np.random.default_rng(0).integers(0, 2**63, 6)
    settings = (EVERYTHING, Preprocessing(60, 48, **IMAGENET))
    whole, rest = batches(settings, plan, seeds), batches(settings, plan[4:], seeds[4:])
    assert all(torch.equal(got, want) for got, want in zip(rest, whole[4:], strict=True))


def test_a_batch_without_flip_is_not_mirrored_and_otherwise_the_same():
    image, preprocessing = scene(48, 48, 0), Preprocessing(48, 48, **GREY_LEVELS)
    augmentation = Augmentation(flip=True, random_resized_crop=(0.5, 1.0))
    made = loading(pack([image]), augmentation, preprocessing)
    plan = [np.zeros(20, dtype=np.int64)] * 2
    still, mirrored = (batch.clone() for batch in made.batches(plan, [5, 5], np.array([False, True])))
    (never,) = batches((augmentation.model_copy(update={"flip": False}), preprocessing), plan[:1], [5], pack([image]))
    assert torch.equal(still, never)
    for row, uniform in enumerate(draw(20, 5).flip[:, 0]):
        assert torch.equal(mirrored[row], still[row].flip(2) if uniform < 0.5 else still[row])


def test_on_a_cpu_the_next_batch_takes_the_memory_of_the_last():
    made = loading(pack(scenes()), EVERYTHING, Preprocessing(60, 48, **IMAGENET))
    places = {batch.data_ptr() for batch in made.batches([np.arange(8), np.arange(4), np.arange(8)], [0, 1, 2])}
    assert len(places) == 1


@pytest.mark.parametrize("num_images", [0, 1])
def test_batches_of_one_image_and_of_none(num_images):
    (got,) = batches((EVERYTHING, Preprocessing(60, 48, **IMAGENET)), [np.arange(num_images)], [0])
    assert got.shape == (num_images, 3, 48, 48)
    assert got.isfinite().all()
    for crop in (Augmentation(), Augmentation(random_crop=True)):
        assert batches((crop, Preprocessing(60, 48, **IMAGENET)), [np.arange(num_images)], [0])[0].shape == got.shape
    assert batches((EVERYTHING, Preprocessing(60, 48, **IMAGENET)), [], []) == []


def test_tiny_images_are_enlarged():
    images = [np.full((1, 1, 3), 200, dtype=np.uint8), scene(1, 30, 0), scene(30, 1, 1)]
    augmentation = Augmentation(random_resized_crop=(0.08, 1.0))
    (got,) = batches((augmentation, Preprocessing(60, 48, **GREY_LEVELS)), [np.arange(3)], [0], pack(images))
    assert (got[0] == 200).all()


class Breaking:
    """Pixels of which one image cannot be read; counts the readings."""

    def __init__(self, pixels, broken):
        self.pixels, self.broken, self.num_reads = pixels, broken, 0

    def __len__(self):
        return len(self.pixels)

    def read(self, rows):
        self.num_reads += 1
        if self.broken in rows:
            raise DataError(f"image {self.broken} is damaged")
        return self.pixels.read(rows)

    def select(self, rows):
        raise NotImplementedError


def loader_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("raydml-")]


def test_an_error_is_raised_at_its_batch_and_ends_the_threads():
    pixels = Breaking(pack(scenes()), broken=5)
    made = loading(pixels, EVERYTHING, Preprocessing(60, 48, **IMAGENET))
    iterator = made.batches([np.array([row]) for row in (0, 1, 5, 2)], [0, 1, 2, 3])
    assert next(iterator).shape == next(iterator).shape
    assert loader_threads()
    with pytest.raises(DataError, match="image 5 is damaged"):
        next(iterator)
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(iterator)


def test_no_more_batches_than_prefetch_are_read_ahead_and_closing_ends_the_thread():
    pixels, ahead = Breaking(pack(scenes()), broken=None), threading.Event()
    read = pixels.read

    def counted(rows):
        images = read(rows)
        if pixels.num_reads == 4:
            ahead.set()
        return images

    pixels.read = counted
    made = loading(pixels, EVERYTHING, Preprocessing(60, 48, **IMAGENET), prefetch=3)
    iterator = made.batches([np.arange(2)] * 100, range(100))
    next(iterator)
    assert ahead.wait(timeout=60)  # without another next()
    iterator.close()
    assert not loader_threads()
    assert pixels.num_reads == 4


@pytest.mark.parametrize("max_bytes", [1, 40_000, 1 << 30])
@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos"])
def test_boxes_scaled_in_groups_are_those_scaled_alone(max_bytes, interpolation):
    boxes = [scene(*size, seed) for seed, size in enumerate([(30, 40), (90, 20), (48, 48), (5, 5), (60, 70), (1, 9)])]
    groups = group_boxes(boxes, max_bytes=max_bytes, pinned=False)
    assert sorted(torch.cat([group.rows for group in groups]).tolist()) == list(range(6))
    assert all(group.pixels.numel() <= max_bytes or len(group.rows) == 1 for group in groups)
    assert len(groups) == {1: 6, 40_000: 3, 1 << 30: 1}[max_bytes]
    got = scale_groups(groups, 6, 48, interpolation, CPU)
    for row, box in enumerate(boxes):
        difference = (got[row].int() - scale_one(box, 48, interpolation).int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).float().mean() <= 0.003


def test_no_boxes_make_no_groups():
    assert group_boxes([], max_bytes=1000, pinned=False) == []
    assert scale_groups([], 0, 8, "bilinear", CPU).shape == (0, 8, 8, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_sees_the_same_batches(family):
    plan, seeds = [np.arange(8), np.arange(3)], [1, 2]
    pixels = pack(scenes(90) if family in FROM_THE_ORIGINAL else [scene(64, 64, seed) for seed in range(8)])
    device = torch.device("cuda:0")
    on_cpu = batches(FAMILIES[family], plan, seeds, pixels, channels_last=True)
    on_device = batches(FAMILIES[family], plan, seeds, pixels, channels_last=True, device=device)
    scale = 1.0 if FAMILIES[family][1].channels == "BGR" else 1 / 255 / 0.224
    for got, want in zip(on_device, on_cpu, strict=True):
        assert got.is_cuda
        assert got.is_contiguous(memory_format=torch.channels_last)
        difference = (got.cpu() - want).abs() / scale
        assert (difference < 1.1).float().mean() > 0.995  # a hue next to a grey may turn on one grey level
