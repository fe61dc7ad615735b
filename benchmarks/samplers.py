"""Samplers against a plain loop, torch and pytorch-metric-learning: the time and memory of planning an epoch.

    uv run --group dev python benchmarks/samplers.py                 # the whole table
    uv run --group dev python benchmarks/samplers.py --data sop --only identity

A row is one sampler at its default settings on labels of the size of a known data set: milliseconds and peak bytes an
image for `plan`, images in the plan, coverage and duplicates of the epoch, and how many times as long others take for
as many images: a plain Python loop (for each batch P classes of K images, by `random.sample`), torch's RandomSampler
in a BatchSampler, and pytorch-metric-learning's MPerClassSampler. The fastest of several turns counts, which is what a
machine shared with others leaves comparable; the others take theirs at one pass over the data, before and after ours.
"""

import argparse
import functools
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning.samplers import MPerClassSampler
from rich.console import Console
from rich.table import Table
from torch.utils.data import BatchSampler, RandomSampler

from raydml import registry
from raydml.samplers._cluster import ClusterGroups, ClusterRoundRobin

# Training images, classes, and the smallest and largest class made up for them.
DATA = {"sop": (59_551, 11_318, 2, 12), "cub": (5_864, 100, 41, 60)}
SAMPLERS = {name: registry.load("samplers", name) for name in registry.names("samplers")}
CLUSTER_SAMPLERS = {"cluster_groups": ClusterGroups, "cluster_round_robin": ClusterRoundRobin}
NUM_CLUSTERS = {"cluster_groups": 50, "cluster_round_robin": 8}
BATCH_SIZE, IMAGES_PER_CLASS = 112, 4  # of what is compared with
LIMIT_MS = 50.0


def labels_of(num_images: int, num_classes: int, smallest: int, largest: int) -> np.ndarray:
    """(N,) class numbers in mixed order, with class sizes in between."""
    generator = np.random.default_rng(0)
    counts = np.full(num_classes, smallest)
    while missing := num_images - int(counts.sum()):
        smaller = np.flatnonzero(counts < largest)
        counts[generator.choice(smaller, min(missing, -(-len(smaller) // 3)), replace=False)] += 1
    return generator.permutation(np.repeat(np.arange(num_classes), counts))


def planner_of(name: str, labels: np.ndarray) -> Callable[[], Any]:
    generator = np.random.default_rng(0)
    if name in SAMPLERS:
        return functools.partial(SAMPLERS[name](labels).plan, generator)
    sampler = CLUSTER_SAMPLERS[name](labels)
    sampler.assign(generator.integers(NUM_CLUSTERS[name], size=len(labels)))
    return functools.partial(sampler.plan, generator)


def others_of(labels: np.ndarray) -> list[Callable[[], Any]]:
    """What is compared with, each listing the batches of one pass over the data."""
    images: dict[int, list[int]] = {}
    for image, label in enumerate(labels.tolist()):
        images.setdefault(label, []).append(image)
    classes, generator, num_batches = sorted(images), random.Random(0), len(labels) // BATCH_SIZE

    def loop() -> list[list[int]]:
        batches = []
        for _ in range(num_batches):
            batch: list[int] = []
            for label in generator.sample(classes, BATCH_SIZE // IMAGES_PER_CLASS):
                members = images[label]
                few = len(members) < IMAGES_PER_CLASS
                draw = generator.choices if few else generator.sample
                batch += draw(members, k=IMAGES_PER_CLASS)
            batches.append(batch)
        return batches

    shuffled = BatchSampler(RandomSampler(range(len(labels))), BATCH_SIZE, drop_last=True)
    theirs = MPerClassSampler(labels, IMAGES_PER_CLASS, BATCH_SIZE, length_before_new_iter=len(labels))
    return [loop, lambda: list(shuffled), lambda: list(theirs)]


def timed_ms(plan: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    plan()
    return (time.perf_counter() - begin) * 1e3


def fastest_ms(plan: Callable[[], Any], budget_s: float, num_turns: int) -> float:
    """After one unmeasured turn: at least num_turns turns, more while the budget lasts."""
    plan()
    times_ms: list[float] = []
    begin = time.perf_counter()
    while len(times_ms) < num_turns or (len(times_ms) < 200 and time.perf_counter() - begin < budget_s):
        times_ms.append(timed_ms(plan))
    return min(times_ms)


def peak_bytes(plan: Callable[[], Any]) -> int:
    """What one plan adds at most to the memory that Python and numpy hold, the plan itself included."""
    tracemalloc.start()
    kept = plan()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del kept
    return peak


def rows_of(data: str, names: list[str], budget_s: float) -> list[tuple[str, ...]]:
    """The table's rows for one data set."""
    labels = labels_of(*DATA[data])
    num_images, others = len(labels), others_of(labels)
    before_ms = [fastest_ms(other, budget_s / 2, 1) for other in others]
    measured = []
    for name in names:
        plan = planner_of(name, labels)
        measured.append((name, fastest_ms(plan, budget_s, 3), peak_bytes(plan), plan()))
    after_ms = [fastest_ms(other, budget_s / 2, 1) for other in others]
    rows = []
    for name, ours_ms, num_bytes, epoch in measured:
        num_places = sum(len(batch) for batch in epoch.batches)
        cells = [data, name, f"{ours_ms:.1f}{' !' if ours_ms > LIMIT_MS else ''}", f"{num_bytes / num_images:.0f}"]
        cells += [str(num_places), f"{epoch.coverage:.3f}", str(epoch.num_duplicates)]
        share = num_places / num_images
        ratios = [min(pair) * share / ours_ms for pair in zip(before_ms, after_ms, strict=True)]
        rows.append((*cells, *(f"{ratio:.1f}" for ratio in ratios)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--only", default="", help="samplers whose name contains this")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for the turns of one row")
    arguments = parser.parse_args()
    columns = ("data", "sampler", "ms", "bytes an image", "images", "coverage", "duplicates")
    table = Table(*columns, "loop / ours", "torch / ours", "PML / ours", box=None)
    names = [name for name in (*SAMPLERS, *CLUSTER_SAMPLERS) if arguments.only in name]
    for data in arguments.data:
        for row in rows_of(data, names, arguments.budget):
            table.add_row(*row)
    console = Console(width=140)
    console.print(table)
    console.print(f"numpy {np.__version__}, torch {torch.__version__}; '!' marks more than {LIMIT_MS:.0f} ms")


if __name__ == "__main__":
    main()
