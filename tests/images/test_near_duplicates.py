"""Copies that were resized, compressed again or cropped a little are found, and other images are not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from raydml.data.datasets import open_catalog
from raydml.images.near_duplicates import near_duplicates

PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared" / "data" / "grocery_small" / "images"


def picture(seed, size=(160, 120)):
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


CHANGES = {
    "resized": lambda image: image.resize((97, 71), Image.Resampling.LANCZOS),
    "compressed": lambda image: image,  # saved at quality 20
    "without a margin": lambda image: image.crop((8, 6, 152, 114)),
    "without a side": lambda image: image.crop((14, 0, 160, 120)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
}


def pairs_of(catalog):
    found = near_duplicates(catalog)
    return {tuple(sorted((catalog.paths[a], catalog.paths[b]))) for a, b in zip(found.first, found.second, strict=True)}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_no_other_image(tmp_path, change):
    for label in range(3):
        (tmp_path / f"class{label}").mkdir()
        for number in range(4):
            picture(10 * label + number).save(tmp_path / f"class{label}" / f"{number}.png")
    CHANGES[change](picture(12)).save(tmp_path / "class2" / "copy.jpg", quality=20 if change == "compressed" else 90)
    catalog = open_catalog("image_folder", tmp_path)
    assert pairs_of(catalog) == {("class1/2.png", "class2/copy.jpg")}
    kinds = near_duplicates(catalog).kinds(catalog)
    assert {name: int(of.sum()) for name, of in kinds.items()} == {"of two classes": 1, "of one class": 0}


def test_unreadable_files_are_named_and_the_others_compared(tmp_path):
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        picture(1).save(tmp_path / f"class{label}" / "same.png")
        picture(2 + label).save(tmp_path / f"class{label}" / "own.png")
    (tmp_path / "class1" / "own.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    catalog = open_catalog("image_folder", tmp_path)
    assert pairs_of(catalog) == {("class0/same.png", "class1/same.png")}
    assert list(near_duplicates(catalog).unreadable) == ["class1/own.png"]


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="shared/data/grocery_small is not beside the repository")
def test_among_real_photographs_the_changed_copies_are_found(tmp_path):
    """Of 40 photographs of 8 classes, and a copy of each without 5 % of its margin, scaled and at quality 40."""
    expected = set()
    for folder in sorted(PHOTOGRAPHS.iterdir())[::10][:8]:
        for name in ("a", "b"):
            (tmp_path / f"{folder.name}-{name}").mkdir()
        for file in sorted(folder.iterdir())[::4]:
            image = Image.open(file).convert("RGB")
            image.save(tmp_path / f"{folder.name}-a" / f"{file.stem}.png")
            width, height = image.size
            inner = image.crop((width // 20, height // 20, width - width // 20, height - height // 20))
            inner.resize((200, 200)).save(tmp_path / f"{folder.name}-b" / f"{file.stem}.jpg", quality=40)
            expected.add((f"{folder.name}-a/{file.stem}.png", f"{folder.name}-b/{file.stem}.jpg"))
    found = pairs_of(open_catalog("image_folder", tmp_path))
    assert len(found & expected) >= 0.95 * len(expected), "recall"
    assert len(found - expected) <= 0.05 * len(expected), "other photographs of these classes are not copies"
