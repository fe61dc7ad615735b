"""Compare the image pipeline with torchvision's ImageFolder and DataLoader, and with Pillow alone.

    uv run python benchmarks/loader.py                            # 600 generated photographs of 500 x 375, and
                                                                  # ../shared/data/grocery_small where it is there
    uv run python benchmarks/loader.py --images PATH/TO/IMAGES    # one folder a class, in place of grocery_small
    uv run python benchmarks/loader.py --only cold                # or: loaders, trials
    uv run python benchmarks/loader.py --trials 1 2 4             # how many trials run at once

A number is images a second, from files to normalised float32 batches of 64 at 224 px, in the fastest of several passes;
the compared loaders alternate. Each applies a random resized crop and a flip, or these and colour jitter. raydml's
training images are decoded once (cold: the first time on this machine, with writing the cache) and cropped from the
cache (warm); "cache: off" decodes each file every time and crops at its full resolution, as torchvision does here.
Trials at once are processes that begin together, with a thread each; torchvision's decode in the process itself. On a
machine shared with others the CPU time says more than the wall.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from photographs import write_photographs
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from raydml.data.catalog import Catalog
from raydml.data.datasets import open_catalog
from raydml.data.splits import Split, make_split
from raydml.images.augmentation_settings import Augmentation, ColorJitter
from raydml.images.cache import Images, Storage, load_development
from raydml.images.loader import Loader
from raydml.images.preprocessing import Preprocessing
from raydml.models.backbones import IMAGENET_MEAN, IMAGENET_STD

GROCERY = Path(__file__).parents[1].parent / "shared" / "data" / "grocery_small" / "images"
PARTS = ("cold", "loaders", "trials")
BATCH, RESIZE_PX, CROP_PX = 64, 256, 224
SCALE = (0.16, 1.0)
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
PREPROCESSING = Preprocessing(resize_px=RESIZE_PX, crop_px=CROP_PX, mean=IMAGENET_MEAN, std=IMAGENET_STD)


@dataclass(frozen=True)
class Recipe:
    """The same augmentation for raydml and for torchvision."""

    name: str
    ours: Augmentation
    theirs: v2.Transform


def recipes() -> list[Recipe]:
    crop = v2.RandomResizedCrop(CROP_PX, scale=SCALE, antialias=True)
    end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return [
        Recipe(
            "crop, flip",
            Augmentation(random_resized_crop=SCALE, flip=True),
            v2.Compose([crop, v2.RandomHorizontalFlip(), *end]),
        ),
        Recipe(
            "crop, flip, jitter",
            Augmentation(random_resized_crop=SCALE, flip=True, color_jitter=ColorJitter(**JITTER)),
            v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(**JITTER), *end]),
        ),
    ]


class Folder:
    """The images of one folder with the split of a trial; a few classes are sealed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.catalog: Catalog = open_catalog("image_folder", root)
        num_classes = len(self.catalog.class_names)
        settings: dict[str, Any] = {"num_folds": 2, "fold": None, "order": "sorted", "seed": 0}
        self.split: Split = make_split(
            self.catalog, test_fraction=2 / num_classes, val_fraction=2 / (num_classes - 2), **settings
        )

    def __str__(self) -> str:
        return "/".join(self.root.parts[-2:])

    def open(self, cache_dir: Path | None, *, original: bool = False) -> Images:
        """The training images."""
        storage = Storage(RESIZE_PX, cache_dir=cache_dir)
        return load_development(self.catalog, self.split, storage, original=original)[0]

    def num_development(self) -> int:
        return int(np.isin(self.catalog.labels, (*self.split.train, *self.split.val)).sum())


def our_pass(images: Images, recipe: Recipe, threads: int) -> Iterator[int]:
    """Epochs of raydml's loader, which is made once as in a trial; the number of images of each."""
    device = torch.device("cpu")
    loader = Loader(images.pixels, recipe.ours, PREPROCESSING, device=device, channels_last=False)
    generator = np.random.default_rng(0)
    while True:
        torch.set_num_threads(threads)
        order = generator.permutation(len(images.labels))
        plan = [order[start : start + BATCH] for start in range(0, len(order) - BATCH + 1, BATCH)]
        with closing(loader.batches(plan, generator.integers(0, 2**62, len(plan)))) as batches:
            yield sum(len(batch) for batch in batches)


def their_pass(root: Path, recipe: Recipe, workers: int) -> Iterator[int]:
    """Epochs of torchvision's loader with persistent workers; the number of images of each."""
    torch.set_num_threads(1)
    data = ImageFolder(str(root), transform=recipe.theirs)
    loader = DataLoader(
        data,
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    while True:
        yield sum(len(batch) for batch, _ in loader)


def pillow_pass(files: list[Path]) -> int:
    """Decode all files in one thread; the number of images."""
    for file in files:
        with Image.open(file) as image:
            image.convert("RGB")
    return len(files)


def rate(run: Callable[[], int]) -> float:
    start = time.perf_counter()
    return run() / (time.perf_counter() - start)


def cold(folder: Folder, scratch: Path, turns: int, console: Console) -> None:
    """Decode all development images into a new cache, several times; print the fastest."""
    cache, found = scratch / "cold", []
    for _ in range(turns):
        shutil.rmtree(cache, ignore_errors=True)
        start, cpu = time.perf_counter(), time.process_time()
        folder.open(cache)
        found.append((time.perf_counter() - start, time.process_time() - cpu))
    wall_s, cpu_s = (min(values) for values in zip(*found, strict=True))
    num = folder.num_development()
    disk_bytes = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    start = time.perf_counter()
    folder.open(cache)
    opening_ms = 1000 * (time.perf_counter() - start)
    files = [folder.root / path for path in folder.catalog.paths]
    pillow = max(rate(partial(pillow_pass, files)) for _ in range(turns))
    console.print(
        f"{folder}: cold, {num} images cached at {RESIZE_PX} px in {wall_s:.2f} s: [bold]{num / wall_s:.0f} images/s"
        f"[/bold], {1000 * cpu_s / num:.2f} ms of CPU an image; {disk_bytes / 1e6:.0f} MB on disk, opened again in "
        f"{opening_ms:.0f} ms. Pillow, decoding alone, 1 thread: {pillow:.0f} images/s"
    )


def compare(folder: Folder, scratch: Path, turns: int, console: Console) -> None:
    warm = folder.open(scratch / "cache")
    off = folder.open(scratch / "cache", original=True)
    console.print(f"{folder}: {len(folder.catalog.paths)} images")
    for recipe in recipes():
        theirs = {workers: their_pass(folder.root, recipe, workers) for workers in (1, 2)}
        rows: dict[str, Callable[[], int]] = {
            "torchvision, 1 worker": partial(next, theirs[1]),
            "torchvision, 2 workers": partial(next, theirs[2]),
            "raydml cache: off, 2 threads": partial(next, our_pass(off, recipe, 2)),
            "raydml warm, 1 thread": partial(next, our_pass(warm, recipe, 1)),
            "raydml warm, 2 threads": partial(next, our_pass(warm, recipe, 2)),
        }
        rates: dict[str, list[float]] = {name: [] for name in rows}
        cpu_ms: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(turns + 1):
            for name, run in rows.items():
                start, cpu = time.perf_counter(), time.process_time()
                num = run()
                rates[name].append(num / (time.perf_counter() - start))
                cpu_ms[name].append(1000 * (time.process_time() - cpu) / num)
        best = {name: max(found[1:]) for name, found in rates.items()}  # the first turn starts workers and reads files
        table = Table(
            recipe.name, "images/s", "of its turns, median", "x 1 worker", "x 2 workers", "CPU ms an image", box=None
        )
        for name, value in best.items():
            one, two = best["torchvision, 1 worker"], best["torchvision, 2 workers"]
            median = statistics.median(rates[name][1:])
            used = "" if "worker" in name else f"{min(cpu_ms[name][1:]):.2f}"  # that of the workers is not ours to see
            table.add_row(name, f"{value:.0f}", f"{median:.0f}", f"{value / one:.2f}", f"{value / two:.2f}", used)
        console.print(table)


# --- several trials at once ------------------------------------------------------------------------------------------


def trial(root: Path, cache: Path, begin: Any, passes: int) -> dict[str, float]:
    """One of several processes: open the images and read them for some epochs; all do each of it at the same time."""
    folder, recipe = Folder(root), recipes()[0]
    begin.wait()
    start, cpu = time.perf_counter(), time.process_time()
    images = folder.open(cache)
    opened_s, opened_cpu_s = time.perf_counter() - start, time.process_time() - cpu
    epochs = our_pass(images, recipe, 1)
    next(epochs)  # the pages of the cache are mapped
    begin.wait()
    warm_s, warm = timed(epochs, passes)
    begin.wait()  # all processes still hold their images
    memory = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    }
    theirs = their_pass(root, recipe, 0)
    begin.wait()
    theirs_s, theirs_num = timed(theirs, 1)
    begin.wait()
    return {
        "opened_s": opened_s,
        "opened_cpu_s": opened_cpu_s,
        "warm": warm,
        "warm_s": warm_s,
        "theirs": theirs_num,
        "theirs_s": theirs_s,
        "rss_mb": memory["Rss"] / 1000,
        "pss_mb": memory["Pss"] / 1000,
    }


def timed(epochs: Iterator[int], passes: int) -> tuple[float, int]:
    """Seconds and images of some epochs."""
    start = time.perf_counter()
    num = sum(next(epochs) for _ in range(passes))
    return time.perf_counter() - start, num


def together(folder: Folder, scratch: Path, counts: list[int], console: Console) -> None:
    table = Table(
        "trials", "cold: until the last has its images, s", "images/s",
        "decoding, CPU s of all", "warm, images/s of all", "torchvision, images/s of all", "RSS of each, MB",
        "PSS of each, MB", "PSS of all, MB", box=None,
    )  # fmt: skip
    console.print(f"{folder}: trials at once")
    context = multiprocessing.get_context("spawn")
    for count in counts:
        with context.Manager() as manager, context.Pool(count) as pool:
            begin = manager.Barrier(count)
            cache = scratch / f"cache-of-{count}"
            jobs = [pool.apply_async(trial, (folder.root, cache, begin, 2)) for _ in range(count)]
            found = [job.get(timeout=1800) for job in jobs]
        opened_s = max(one["opened_s"] for one in found)
        table.add_row(
            str(count),
            f"{opened_s:.2f}",
            f"{folder.num_development() / opened_s:.0f}",
            f"{sum(one['opened_cpu_s'] for one in found):.2f}",
            f"{sum(one['warm'] for one in found) / max(one['warm_s'] for one in found):.0f}",
            f"{sum(one['theirs'] for one in found) / max(one['theirs_s'] for one in found):.0f}",
            f"{statistics.mean(one['rss_mb'] for one in found):.0f}",
            f"{statistics.mean(one['pss_mb'] for one in found):.0f}",
            f"{sum(one['pss_mb'] for one in found):.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grocery = [GROCERY] if GROCERY.is_dir() else []
    parser.add_argument("--images", type=Path, nargs="*", default=grocery, help="folders of images, one folder a class")
    parser.add_argument("--generated", type=int, default=600, help="the number of generated photographs; 0 for none")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--trials", type=int, nargs="*", default=[1, 2, 4], help="the numbers of trials at once")
    parser.add_argument(
        "--only", choices=("cold", "loaders", "trials"), nargs="*", default=("cold", "loaders", "trials")
    )
    arguments = parser.parse_args()
    console = Console(width=170, highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        roots = [*arguments.images]
        if arguments.generated:
            roots.append(Path(scratch) / "photographs")
            write_photographs(roots[-1], arguments.generated)
        for number, root in enumerate(roots):
            folder, place = Folder(root.resolve()), Path(scratch) / str(number)
            if "cold" in arguments.only:
                cold(folder, place, arguments.turns, console)
            if "loaders" in arguments.only:
                compare(folder, place, arguments.turns, console)
            if "trials" in arguments.only:
                together(folder, place, arguments.trials, console)
    console.print(f"torch {torch.__version__}, {os.cpu_count()} CPU cores, batches of {BATCH} at {CROP_PX} px")


if __name__ == "__main__":
    main()
