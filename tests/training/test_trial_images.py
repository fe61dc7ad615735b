"""The images of a trial: every key of its configuration has its effect, with the pixels of torchvision."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from raydml.config.trial import parse_machine, parse_trial
from raydml.data.datasets import open_catalog
from raydml.images.augmentation import Draws, choose_boxes, draw
from raydml.images.augmentation_settings import Augmentation, ColorJitter, Erasing, GaussianBlur
from raydml.images.pixels import DecodedPixels
from raydml.training.trainer import Trainer
from raydml.training.trial_images import Catalogs, open_development, storage_for

SIZES = [(40, 60), (70, 50), (48, 48), (64, 96)]  # (width, height)
OTHERS = {
    "flip": True,
    "grayscale": 0.2,
    "color_jitter": {"brightness": 0.1, "contrast": 0.2, "saturation": 0.3, "hue": 0.4, "probability": 0.8},
    "blur": {"sigma": [0.5, 1.5], "probability": 0.25},
    "erasing": {"probability": 0.75, "scale": [0.1, 0.2], "ratio": [0.5, 2.0]},
}


@pytest.fixture
def machine(tmp_path):
    generator = np.random.default_rng(0)
    for label in range(6):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for number, (width, height) in enumerate(SIZES):
            coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(tmp_path / "images" / f"class{label}" / f"{number}.png")
    return parse_machine({"data_root": str(tmp_path / "images"), "cache_dir": str(tmp_path / "cache")})


def trial_of(**data):
    settings = {"name": "image_folder", "resize_px": 36, "crop_px": 32, "split": {"test_fraction": 0.33}, **data}
    return parse_trial(
        {
            "data": settings,
            "model": {"backbone": "convnet", "weights": "none", "embedding_dim": 8},
            "loss": {"name": "normalized_softmax"},
            "sampler": {"name": "uniform", "batch_size": 4},
            "recall_at": [1],
        }
    )


def test_every_setting_of_the_augmentation_arrives_in_the_loader(machine):
    resized = {"random_resized_crop": [0.3, 0.9], "aspect_ratio": [0.8, 1.5], **OTHERS}
    trainer = Trainer(trial_of(augmentation=resized), machine, device="cpu")
    assert trainer.loader.augmentation == Augmentation(
        random_resized_crop=(0.3, 0.9),
        aspect_ratio=(0.8, 1.5),
        flip=True,
        grayscale=0.2,
        color_jitter=ColorJitter(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4, probability=0.8),
        blur=GaussianBlur(sigma=(0.5, 1.5), probability=0.25),
        erasing=Erasing(probability=0.75, scale=(0.1, 0.2), ratio=(0.5, 2.0)),
    )


def test_every_setting_of_the_storage_arrives(machine):
    trial = trial_of(resize="squash", interpolation="lanczos")
    storage = storage_for(trial.data, machine.model_copy(update={"max_cache_gib": 0.5, "on_unreadable": "skip"}))
    assert (storage.resize_px, storage.resize, storage.interpolation) == (36, "squash", "lanczos")
    assert (storage.cache_dir, storage.max_bytes, storage.on_unreadable) == (machine.cache_dir, 2**29, "skip")


RECIPES = {
    "classification": {"resize": "squash", "augmentation": {"random_crop": True, "flip": True}},
    "mdr": {
        "resize": "squash",
        "interpolation": "lanczos",
        "augmentation": {"random_resized_crop": [0.16, 1.0], "flip": True},
    },
    "divide_conquer": {"cache": "off", "augmentation": {"random_resized_crop": [0.08, 1.0], "flip": True}},
    "deep_metric": {"augmentation": {"random_resized_crop": [0.16, 1.0], "flip": True}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_trainer_crops_from_the_images_its_recipe_names(machine, name):
    """Tests the source of the pixels and their scaling; the boxes are tested with the augmentation."""
    trainer = Trainer(trial_of(**RECIPES[name]), machine, device="cpu")
    rows = np.arange(8)
    (batch,) = trainer.loader.batches([rows], [5])
    draws = draw(len(rows), 5)
    pillow = {"lanczos": Image.Resampling.LANCZOS}.get(RECIPES[name].get("interpolation"), Image.Resampling.BILINEAR)
    for row, got in zip(rows, batch, strict=True):
        with Image.open(machine.data_root / trainer.train_images.paths[row]) as file:
            image = file.convert("RGB")
        if RECIPES[name].get("resize") == "squash":
            image = image.resize((36, 36), pillow)
        elif "cache" not in RECIPES[name]:
            image = v2.Resize(36, antialias=True)(image)
        size = np.array([[image.height, image.width]])
        one = Draws(*(numbers[row : row + 1] for numbers in draws))
        ((top, left, height, width),) = choose_boxes(trainer.loader.augmentation, one, size, crop_px=32).tolist()
        assert height <= image.height
        assert width <= image.width
        if name == "classification":
            assert (height, width) == (32, 32)
        crop = image.crop((left, top, left + width, top + height)).resize((32, 32), pillow)
        pixels = functional.pil_to_tensor(crop).float()
        if draws.flip[row, 0] < 0.5:
            pixels = pixels.flip(2)
        expected = functional.normalize(pixels / 255, [0.5] * 3, [0.5] * 3)
        assert (got - expected).abs().max() < 3 / 127.5  # two grey levels: Pillow rounds between its two passes


def test_cache_off_reads_the_files_for_training_and_nothing_else(machine):
    opened = open_development(trial_of(**RECIPES["divide_conquer"]), machine)
    assert isinstance(opened.train.pixels, DecodedPixels)
    assert sorted({image.shape[:2] for image in opened.train.pixels.read(range(4))}) == sorted(
        {(height, width) for width, height in SIZES}
    )
    assert min(min(image.shape[:2]) for image in opened.val.pixels.read(range(4))) == 36
    as_evaluated = open_development(trial_of(**RECIPES["divide_conquer"]), machine, augmented=False)
    assert max(min(image.shape[:2]) for image in as_evaluated.train.pixels.read(range(4))) == 36


def test_images_other_than_those_of_the_trial_are_refused_with_the_cure(machine):
    with pytest.raises(ValueError, match=r"data\.content.*hash 0123.*Cure: restore the images"):
        open_development(trial_of(content="0123"), machine)


def test_a_warning_lists_the_images_left_out(machine, caplog):
    (machine.data_root / "class0" / "0.png").write_bytes(b"")
    (machine.data_root / "class5" / "1.png").write_bytes(b"no image")
    opened = open_development(
        trial_of(split={"test_fraction": 0.33, "order": "sorted"}), machine.model_copy(update={"on_unreadable": "skip"})
    )
    assert [path for path, _ in (*opened.train.skipped, *opened.val.skipped)] == ["class0/0.png"]
    (record,) = [record for record in caplog.records if "left out" in record.message]
    assert record.message.startswith(
        "warning: 1 of 16 images cannot be read and are left out: class0/0.png: an empty file"
    )
    assert "class5" not in record.message  # it is sealed


def test_the_images_of_several_trials_are_listed_once(machine, monkeypatch):
    listings = []

    def counted(*arguments, **settings):
        listings.append(arguments)
        return open_catalog(*arguments, **settings)

    monkeypatch.setattr("raydml.training.trial_images.open_catalog", counted)
    catalogs = Catalogs(machine)
    for crop_px in (32, 36):
        Trainer(trial_of(crop_px=crop_px), machine, device="cpu", catalogs=catalogs)
    assert len(listings) == 1
