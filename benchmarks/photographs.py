"""Photographs for benchmarks, made up: as large and as costly to decode as those of CUB."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES_PER_CLASS = 20


def write_photographs(root: Path, num_images: int, *, size: tuple[int, int] = (500, 375), quality: int = 90) -> None:
    """Write JPEGs of (width, height) under root/<class>/, about 100 kB each as CUB's are: smooth shapes with grain."""

    def write(number: int) -> None:
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.integers(-14, 15, (*smooth.shape[:2], 1), dtype=np.int16)
        file = root / f"{number // IMAGES_PER_CLASS:05d}" / f"{number:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(file, quality=quality)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(num_images)))
