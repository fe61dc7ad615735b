"""Time of k-means beside the time of its matrix products and of an epoch: one table, one run.

    uv run --group dev python benchmarks/clustering.py                      # the whole table, on 1 thread
    uv run --group dev python benchmarks/clustering.py --threads 4 --images-per-s 900
    uv run --group dev python benchmarks/clustering.py --device cuda --images-per-s 2500

A row is one clustering of features as a network gives them: non-negative, of length 1, in overlapping groups ("groups")
or in none ("none", where the iterations end late). "product" is the time that the multiplications of all iterations
take at the rate of a large square matrix product; k-means may take less, because it stops when the objective repeats.
The fastest of several turns counts. "same" is the share of images that a clustering with the other number of threads
(1 or 2) puts into the same cluster. On a machine shared with others use `--clock cpu` with one thread.

"% of epoch" is one clustering against training on as many images, at the speed given by --images-per-s: that of
`benchmarks/train_step.py` on the same machine. The forward pass that computes the features is not included.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from raydml.ops.clustering import Clusters, KMeans, cluster

# Images, features, clusters, iterations and the largest number of points a centroid.
CASES = {
    "D&C, CUB": (5_864, 2_048, 8, 100, 10_000_000),
    "MIC, CUB": (5_864, 4_096, 30, 25, 256),
    "MIC, SOP": (59_551, 128, 50, 25, 256),
    "K = 50": (20_000, 512, 50, 20, 10_000_000),
    "NMI, SOP": (60_000, 512, 11_316, 3, 10_000_000),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def features_of(num_images: int, dim: int, num_groups: int) -> np.ndarray:
    """(N, F) float32 unit vectors; num_groups 0: no groups."""
    generator = np.random.default_rng(0)
    features = generator.standard_normal((num_images, dim), dtype=np.float32)
    if num_groups:
        centres = generator.standard_normal((num_groups, dim), dtype=np.float32)
        features += centres[generator.integers(num_groups, size=num_images)]
    np.maximum(features, 0, out=features)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def timed_s(call: Callable[[], Any], clock: Callable[[], float], device: torch.device) -> tuple[float, Any]:
    begin = clock()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin, result


def product_rate(clock: Callable[[], float], device: torch.device, side: int = 2_048) -> float:
    """Multiplications a second of one large product."""
    matrix = torch.ones(side, side, device=device)
    return side**3 / min(timed_s(lambda: matrix @ matrix, clock, device)[0] for _ in range(5))


def row_of(name: str, num_groups: int, share: float, arguments: argparse.Namespace) -> tuple[str, ...]:
    num_images, dim, num_clusters, iterations, limit = CASES[name]
    num_images, num_clusters = int(num_images * share), max(2, int(num_clusters * share))
    clock, device = CLOCKS[arguments.clock], torch.device(arguments.device)
    points, settings = features_of(num_images, dim, num_groups), KMeans(iterations, 1, limit)
    times_s, rates = [], []
    for _ in range(arguments.turns):
        found: Clusters
        spent_s, found = timed_s(lambda: cluster(points, num_clusters, settings, device), clock, device)
        times_s.append(spent_s)
        rates.append(product_rate(clock, device))
    torch.set_num_threads(2 if arguments.threads == 1 else 1)
    again = cluster(points, num_clusters, settings, device)
    torch.set_num_threads(arguments.threads)
    fitted = min(num_images, num_clusters * limit)
    product_s = (fitted * iterations + num_images) * dim * num_clusters / max(rates)
    cells = [name, "groups" if num_groups else "none", f"{num_images} x {dim}", f"{num_clusters}", f"{iterations}"]
    cells += [f"{min(times_s) * 1e3:.0f}", f"{product_s / min(times_s):.2f}"]
    cells.append(f"{np.mean(again.assignment == found.assignment):.3f}")
    if arguments.images_per_s:
        cells.append(f"{100 * min(times_s) * arguments.images_per_s / num_images:.2f}")
    return tuple(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--share", type=float, default=0.1, help="of the images and clusters of the case NMI, SOP")
    parser.add_argument("--images-per-s", type=float, default=0.0, help="of training, for the last column")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    columns = ["case", "data", "points", "K", "iterations", "ms", "product / time"]
    table = Table(*columns, "same", *(["% of epoch"] if arguments.images_per_s else []), box=None)
    for name in CASES:
        if arguments.only in name:
            for num_groups in (100, 0):
                table.add_row(*row_of(name, num_groups, arguments.share if name == "NMI, SOP" else 1.0, arguments))
    console = Console(width=140)
    console.print(table)
    versions = f"torch {torch.__version__}, faiss {faiss.__version__}"
    console.print(f"{arguments.clock} time, {arguments.threads} thread(s), {arguments.device}; {versions}")


if __name__ == "__main__":
    main()
