"""Evaluation against the machine's matrix product, faiss, torch and pytorch-metric-learning: one table, one run.

    uv run --group dev python benchmarks/evaluation.py                 # the size of Stanford Online Products' test set
    uv run --group dev python benchmarks/evaluation.py --quick         # 20,000 images
    uv run --group dev python benchmarks/evaluation.py --threads 8 --device cuda

The floor is the matrix product of all queries with all images, chunk by chunk into one buffer; no search that computes
every distance is faster. "x floor" is the time in floors, "/ float" the time of a kind of codes divided by that of
floats. Ours is `scoring.score_by_all`: Recall@1, 10, 100 and 1000, R-precision and MAP@R together, exact, with ties in
order of index. The other libraries only search for the 1,001 neighbours that Recall@1000 needs. The rows are unit
vectors, the centre of a class with noise ("R@1" is the difficulty); "noise" has no classes and is the worst case,
because nearly all relevant images are behind all others.

The fastest of several turns counts; slow cases have one turn. The floor and the other libraries are timed on a share of
the queries, because each query costs them the same. The floor of k-means is the product of images and centroids times
the iterations; k-means may take less, because it stops when the objective repeats. Memory is the peak beyond the
embeddings. On a machine shared with others `--clock cpu` with one thread says more than the wall.
"""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from rich.console import Console
from rich.table import Table

from raydml.evaluation.nearness import binary_codes
from raydml.evaluation.scoring import MetricSpec, score_by_all

RECALL_AT = (1, 10, 100, 1000)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CHUNK_BYTES = 256 * 2**20
ITERATIONS = 20  # of k-means in `scoring`
SMALL = (5_924, 200)  # images and classes of the test set of CUB200-2011; AccuracyCalculator takes a minute


class Rows(NamedTuple):
    """embeddings: (N, D) float32 of length 1. labels: (N,) int64."""

    embeddings: np.ndarray
    labels: np.ndarray


class Case(NamedTuple):
    """One row of the table.

    call: runs it and returns Recall@1, or None. floor: name of the case for comparison. share: of the queries that it
    runs. once: only in the first turn.
    """

    name: str
    call: Callable[[], float | None]
    floor: str
    share: float = 1.0
    once: bool = True


def rows_of(num_images: int, dim: int, num_classes: int, noise: float) -> Rows:
    """noise: standard deviation around the classes' centres, whose own is 1; infinite: no classes to be seen."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(num_images) % num_classes
    embeddings = generator.standard_normal((num_images, dim), dtype=np.float32)
    if np.isfinite(noise):
        embeddings *= noise
        embeddings += generator.standard_normal((num_classes, dim), dtype=np.float32)[labels]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return Rows(embeddings, labels)


def product_alone(rows: Rows, num_queries: int, device: str) -> None:
    gallery = torch.from_numpy(rows.embeddings).to(device)
    at_once = max(1, CHUNK_BYTES // (4 * len(gallery)))
    buffer = torch.empty((at_once, len(gallery)), device=device)
    for start in range(0, num_queries, at_once):
        queries = gallery[start : min(start + at_once, num_queries)]
        torch.mm(queries, gallery.T, out=buffer[: len(queries)])


def product_of_k_means(rows: Rows, num_points: int, num_classes: int, device: str) -> None:
    points, centroids = (torch.from_numpy(rows.embeddings[:number]).to(device) for number in (num_points, num_classes))
    at_once = max(1, CHUNK_BYTES // (4 * num_classes))
    buffer = torch.empty((at_once, num_classes), device=device)
    for start in range(0, num_points, at_once):
        part = points[start : start + at_once]
        torch.mm(part, centroids.T, out=buffer[: len(part)])


def recall_of(neighbours: np.ndarray, labels: np.ndarray) -> float:
    """Recall@1 of the first queries, whose two nearest images are one of them itself."""
    own = np.arange(len(neighbours))
    nearest = np.where(neighbours[:, 0] == own, neighbours[:, 1], neighbours[:, 0])
    return float(np.mean(labels[nearest] == labels[own]))


def by_faiss(rows: Rows, num_queries: int, num_neighbours: int) -> float:
    index = faiss.IndexFlatL2(rows.embeddings.shape[1])
    index.add(rows.embeddings)
    return recall_of(index.search(rows.embeddings[:num_queries], num_neighbours)[1], rows.labels)


def by_faiss_binary(rows: Rows, num_queries: int, num_neighbours: int) -> float:
    codes = binary_codes(rows.embeddings)
    index = faiss.IndexBinaryFlat(8 * codes.shape[1])
    index.add(codes)
    return recall_of(index.search(codes[:num_queries], num_neighbours)[1], rows.labels)


def by_torch(rows: Rows, num_queries: int, num_neighbours: int, device: str) -> float:
    gallery = torch.from_numpy(rows.embeddings).to(device)
    at_once = max(1, CHUNK_BYTES // (4 * len(gallery)))
    found = []
    for start in range(0, num_queries, at_once):
        similarities = gallery[start : min(start + at_once, num_queries)] @ gallery.T
        found.append(similarities.topk(num_neighbours, dim=1).indices[:, :2].cpu().numpy())
    return recall_of(np.concatenate(found), rows.labels)


def by_accuracy_calculator(rows: Rows, device: str) -> float:
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k=RECALL_AT[-1], device=torch.device(device))
    found = calculator.get_accuracy(torch.from_numpy(rows.embeddings), torch.from_numpy(rows.labels))
    return float(found["precision_at_1"])


def by_us(rows: Rows, device: str, groups: tuple[str, ...] = ("retrieval",), codes: str = "float") -> float | None:
    spec = MetricSpec(RECALL_AT, (codes,), groups)
    found = score_by_all(rows.embeddings, rows.labels, None, ("leave_one_out",), spec, device)
    return found.metrics.get("recall_at_1" if codes == "float" else f"{codes}_recall_at_1")


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    num_images, num_classes, device = arguments.num_images, arguments.classes, arguments.device
    good = rows_of(num_images, arguments.dim, num_classes, arguments.noise)
    bad = rows_of(num_images, arguments.dim, num_classes, np.inf)
    small = rows_of(SMALL[0], arguments.dim, SMALL[1], arguments.noise)
    share = arguments.share
    part, few, neighbours = int(share * num_images), SMALL[0], RECALL_AT[-1] + 1
    k_means_share = share / (ITERATIONS + 1)  # and once to assign all images
    return [
        Case("floor: the product", lambda: product_alone(good, part, device), "", share, once=False),
        Case("ours", lambda: by_us(good, device), "floor: the product", once=False),
        Case("ours, noise", lambda: by_us(bad, device), "floor: the product"),
        Case("ours, also MAP@1000", lambda: by_us(good, device, ("retrieval", "ranking")), "floor: the product"),
        Case("faiss IndexFlatL2", lambda: by_faiss(good, part, neighbours), "floor: the product", share),
        Case("torch topk", lambda: by_torch(good, part, neighbours, device), "floor: the product", share),
        Case("ours, int8", lambda: by_us(good, device, codes="int8"), "floor: the product"),
        Case("ours, binary", lambda: by_us(good, device, codes="binary"), "floor: the product"),
        Case("faiss IndexBinaryFlat", lambda: by_faiss_binary(good, part, neighbours), "floor: the product", share),
        Case(f"floor, {few:,} images", lambda: product_alone(small, few, device), "", once=False),
        Case(f"ours, {few:,} images", lambda: by_us(small, device), f"floor, {few:,} images", once=False),
        Case("AccuracyCalculator", lambda: by_accuracy_calculator(small, device), f"floor, {few:,} images"),
        Case("floor: k-means", lambda: product_of_k_means(good, part, num_classes, device), "", k_means_share),
        Case("ours, clustering", lambda: by_us(good, device, ("clustering",)), "floor: k-means"),
    ]


def timed_s(case: Case, device: str, clock: Callable[[], float]) -> tuple[float, float | None]:
    begin = clock()
    recall = case.call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return (clock() - begin) / case.share, recall


def peak_bytes(call: Callable[[], float | None], device: str) -> int | None:
    """The peak memory of a call beyond the present use: of a GPU, or of this process on Linux; None elsewhere."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    reset.write_text("5")  # the peak counts from here
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def table_of(cases: list[Case], seconds: dict[str, float], recalls: dict[str, float | None]) -> Table:
    table = Table("what", "s", "x floor", "/ float", "R@1", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for case in cases:
        spent_s, recall = seconds[case.name], recalls[case.name]
        cells = [case.name, f"{spent_s:.2f}", f"{spent_s / seconds[case.floor]:.2f}" if case.floor else ""]
        is_coded = case.name in ("ours, binary", "ours, int8")
        cells += [f"{spent_s / seconds['ours']:.2f}" if is_coded else "", "" if recall is None else f"{recall:.4f}"]
        table.add_row(*cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=60_502)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--classes", type=int, default=11_316)
    parser.add_argument("--quick", action="store_true", help="20,000 images of 3,740 classes")
    parser.add_argument("--noise", type=float, default=2.2, help="around the classes' centres")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of ours, torch and the floors: cpu, cuda or cuda:1")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.125, help="of the queries, for the floor and the others")
    parser.add_argument("--only", default="", help="cases whose name contains this, the floors and ours")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_images, arguments.classes = 20_000, 3_740
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    always = [
        case for case in cases_of(arguments) if case.name == "ours" or not case.floor or arguments.only in case.name
    ]
    console = Console(width=120)
    ours = next(case for case in always if case.name == "ours")
    peak = peak_bytes(ours.call, arguments.device)  # and what the first call loads
    seconds: dict[str, float] = {}
    recalls: dict[str, float | None] = {}
    for turn in range(arguments.turns):
        for case in always:
            if turn == 0 or not case.once:
                spent_s, recalls[case.name] = timed_s(case, arguments.device, CLOCKS[arguments.clock])
                seconds[case.name] = min(spent_s, seconds.get(case.name, spent_s))
    console.print(table_of(always, seconds, recalls))
    memory = "an unknown amount" if peak is None else f"{peak / 2**20:.0f} MiB"
    console.print(
        f"{arguments.num_images:,} x {arguments.dim}, {arguments.classes:,} classes; ours takes {memory} at its peak"
    )
    versions = f"torch {torch.__version__}, faiss {faiss.__version__}"
    console.print(f"{arguments.threads} thread(s), {arguments.device}; {versions}")


if __name__ == "__main__":
    main()
