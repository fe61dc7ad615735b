"""Losses and miners against pytorch-metric-learning: one table, ratios from the same run.

    uv run --group dev python benchmarks/losses.py                 # the whole table
    uv run --group dev python benchmarks/losses.py --batch 112 --dim 128 --only triplet
    uv run --group dev python benchmarks/losses.py --device cuda   # with CUDA events and host synchronisations

A number is the time of mining, loss and backward on one batch of four images a class, in milliseconds: ours, theirs,
their ratio, and how many times the three matrix products of one similarity matrix and its plain gradient. The two take
turns, and the fastest of several turns counts. On one thread, the default, it is the processor's time, which a machine
shared with others leaves comparable; on more threads it is the clock's.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from raydml import registry
from raydml.methods._base import Objective

IMAGES_PER_CLASS = 4
NUM_CLASSES = 512
BATCHES = (112, 128, 512, 2048)
DIMS = (128, 512)
Settings = dict[str, Any]
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row: a loss and a miner of ours, the nearest of theirs, and the largest batch they can take.

    The same but for: distance-weighted mining, where theirs lists about as many negatives an anchor as it has positives
    and ours one for each positive pair; similarities, which theirs normalise and ours take as they come (they are unit
    vectors); SNR, where ours averages over all pairs and holds the mean at zero besides.

    group: "mined" and "lifted" are what the target of three times speaks of. largest: of theirs, where a larger one
    needs more memory than a machine has (B^3 bytes and more) or minutes a step.
    """

    name: str
    loss: tuple[str, Settings]
    miner: tuple[str, Settings] | None
    theirs: Callable[[int], tuple[nn.Module, nn.Module | None]]
    group: str = "pairs"
    largest: int = 2048


def _euclidean() -> distances.LpDistance:
    return distances.LpDistance(normalize_embeddings=False)


CASES = [
    Case(
        "triplet, semi_hard",
        ("triplet", {"squared": False, "average_over": "active"}),
        ("semi_hard", {"margin": 0.2, "squared": False}),
        lambda _: (
            losses.TripletMarginLoss(0.2, distance=_euclidean()),
            miners.TripletMarginMiner(0.2, type_of_triplets="semihard", distance=_euclidean()),
        ),
        "mined",
        largest=512,
    ),
    Case(
        "triplet, hardest",
        ("triplet", {"squared": False, "average_over": "active"}),
        ("hardest", {}),
        lambda _: (losses.TripletMarginLoss(0.2, distance=_euclidean()), miners.BatchHardMiner(distance=_euclidean())),
        "mined",
    ),
    Case(
        "triplet, all",
        ("triplet", {"squared": False, "average_over": "active"}),
        None,
        lambda _: (losses.TripletMarginLoss(0.2, distance=_euclidean()), None),
        "mined",
        largest=512,
    ),
    Case(
        "margin, distance_weighted",
        ("margin", {"class_beta": False}),
        ("distance_weighted", {"variant": "mdr"}),
        lambda _: (losses.MarginLoss(0.2, nu=0, beta=1.2, learn_beta=True), miners.DistanceWeightedMiner(0.5, 1.4)),
        "mined",
    ),
    Case(
        "multi_similarity, multi_similarity",
        ("multi_similarity", {}),
        ("multi_similarity", {}),
        lambda _: (losses.MultiSimilarityLoss(2, 40, 0.5), miners.MultiSimilarityMiner(0.1)),
        "mined",
    ),
    Case(
        "contrastive, multi_similarity",
        ("contrastive", {"form": "linear", "average_over": "active"}),
        ("multi_similarity", {}),
        lambda _: (losses.ContrastiveLoss(distance=_euclidean()), miners.MultiSimilarityMiner(0.1)),
        "mined",
    ),
    Case(
        "lifted_structure, original",
        ("lifted_structure", {"variant": "original"}),
        None,
        lambda _: (losses.LiftedStructureLoss(1, 0, distance=_euclidean()), None),
        "lifted",
        largest=512,
    ),
    Case(
        "lifted_structure, generalized",
        ("lifted_structure", {"variant": "generalized"}),
        None,
        lambda _: (losses.GeneralizedLiftedStructureLoss(1, 0, distance=_euclidean()), None),
        "lifted",
    ),
    Case(
        "contrastive",
        ("contrastive", {"form": "linear", "average_over": "active"}),
        None,
        lambda _: (losses.ContrastiveLoss(distance=_euclidean()), None),
    ),
    Case(
        "snr_contrastive",
        ("snr_contrastive", {}),
        None,
        lambda _: (losses.ContrastiveLoss(0, 1, distance=distances.SNRDistance()), None),
        largest=128,
    ),
    Case("multi_similarity", ("multi_similarity", {}), None, lambda _: (losses.MultiSimilarityLoss(2, 40, 0.5), None)),
    Case("nca", ("nca", {}), None, lambda _: (losses.NCALoss(), None)),
    Case("circle", ("circle", {}), None, lambda _: (losses.CircleLoss(), None)),
    Case("nt_xent", ("nt_xent", {}), None, lambda _: (losses.NTXentLoss(), None), largest=512),
    Case("nt_xent, SupCon", ("nt_xent", {"form": "sup_con"}), None, lambda _: (losses.SupConLoss(), None)),
    Case("fast_ap", ("fast_ap", {}), None, lambda _: (losses.FastAPLoss(10), None)),
    Case("smooth_ap", ("smooth_ap", {}), None, lambda _: (losses.SmoothAPLoss(0.01), None), largest=512),
    Case(
        "normalized_softmax",
        ("normalized_softmax", {}),
        None,
        lambda dim: (losses.NormalizedSoftmaxLoss(NUM_CLASSES, dim), None),
        "proxies",
    ),
    Case("cosface", ("cosface", {}), None, lambda dim: (losses.CosFaceLoss(NUM_CLASSES, dim), None), "proxies"),
    Case("arcface", ("arcface", {}), None, lambda dim: (losses.ArcFaceLoss(NUM_CLASSES, dim), None), "proxies"),
    Case(
        "sub_center_arcface",
        ("sub_center_arcface", {}),
        None,
        lambda dim: (losses.SubCenterArcFaceLoss(num_classes=NUM_CLASSES, embedding_size=dim), None),
        "proxies",
    ),
    Case("proxy_nca", ("proxy_nca", {}), None, lambda dim: (losses.ProxyNCALoss(NUM_CLASSES, dim), None), "proxies"),
    Case(
        "proxy_anchor",
        ("proxy_anchor", {}),
        None,
        lambda dim: (losses.ProxyAnchorLoss(NUM_CLASSES, dim), None),
        "proxies",
    ),
    Case(
        "soft_triple",
        ("soft_triple", {"tau": 0.0}),  # theirs has the distances of the centres apart
        None,
        lambda dim: (losses.SoftTripleLoss(NUM_CLASSES, dim), None),
        "proxies",
    ),
]


def batch_of(num_images: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Unit embeddings half way through training: classes hang together, and overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_images) // IMAGES_PER_CLASS
    centres = torch.randn(NUM_CLASSES, dim, generator=generator)
    points = centres[labels] + torch.randn(num_images, dim, generator=generator)
    return nn.functional.normalize(points).to(device), labels.to(device)


def our_step(case: Case, dim: int, device: str) -> Step:
    torch.manual_seed(0)
    name, settings = case.loss
    loss = registry.build("losses", name, num_classes=NUM_CLASSES, embedding_dim=dim, **settings).to(device)
    miner = registry.build("miners", case.miner[0], **case.miner[1]) if case.miner else None
    generator = torch.Generator().manual_seed(0)  # on the CPU, as a trial's is
    objective = Objective(loss, miner)  # what a trial calls: loss and miner may share a matrix there

    def step(points: Tensor, labels: Tensor) -> Tensor:
        total: Tensor = objective(points, labels, generator)
        return total

    return step


def their_step(case: Case, dim: int, device: str) -> Step:
    torch.manual_seed(0)
    loss, miner = case.theirs(dim)
    loss = loss.to(device)

    def step(points: Tensor, labels: Tensor) -> Tensor:
        return loss(points, labels, None if miner is None else miner(points, labels))

    return step


def timed(step: Step, points: Tensor, labels: Tensor) -> float:
    """Milliseconds of one forward and backward."""
    points = points.detach().requires_grad_()
    if points.is_cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(points, labels).backward()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    step(points, labels).backward()
    return (clock() - begin) * 1e3


def products(points: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001 - called like a loss
    """The floor: the (B, B) similarities forward and backward, with nothing done to them."""
    return (points @ points.T).sum()


def fastest_in_turns(steps: list[Step], points: Tensor, labels: Tensor, budget_s: float) -> list[float]:
    """The fastest of each, after one unmeasured turn; at least three turns, then as many as the budget holds."""
    for step in steps:
        timed(step, points, labels)
    best = [float("inf")] * len(steps)
    begin, turn = time.perf_counter(), 0
    while turn < 3 or (turn < 200 and time.perf_counter() - begin < budget_s):
        best = [min(old, timed(step, points, labels)) for old, step in zip(best, steps, strict=True)]
        turn += 1
    return best


def num_synchronisations(step: Step, points: Tensor, labels: Tensor) -> int:
    """How often the host waited for the GPU in one step."""
    with warnings.catch_warnings(record=True) as caught, _sync_warnings():
        warnings.simplefilter("always")
        step(points.detach().requires_grad_(), labels).backward()
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextlib.contextmanager
def _sync_warnings() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_mib(index: int, num_images: int, dim: int) -> float:
    """What one step of ours adds to the peak of resident memory, in MiB; call it in a process of its own."""
    points, labels = batch_of(num_images, dim, "cpu")
    step = our_step(CASES[index], dim, "cpu")
    timed(step, *batch_of(16, dim, "cpu"))  # libraries load at their first use
    before = _peak_kib()
    timed(step, points, labels)
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """Of this process as Linux counts it; ru_maxrss begins with the peak of the process that started it."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dim", type=int, nargs="+", default=DIMS)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--group", nargs="+", default=["mined", "lifted", "pairs", "proxies"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for the turns of one row")
    parser.add_argument("--memory", action="store_true", help="peak memory of our step at the largest batch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    table = Table("group", "loss, miner", "B", "D", "ours ms", "PML ms", "PML / ours", "ours / 3 GEMM", box=None)
    if device != "cpu":
        table.add_column("host syncs")
    ratios: dict[str, list[float]] = {}
    cases = [case for case in CASES if arguments.only in case.name and case.group in arguments.group]
    for case in cases:
        for num_images in arguments.batch:
            for dim in arguments.dim:
                points, labels = batch_of(num_images, dim, device)
                steps = [our_step(case, dim, device), products]
                compared = num_images <= case.largest
                if compared:
                    steps.append(their_step(case, dim, device))
                ours, floor, *theirs = fastest_in_turns(steps, points, labels, arguments.budget)
                ratio = theirs[0] / ours if compared else None
                if ratio is not None:
                    ratios.setdefault(case.group, []).append(ratio)
                row = [case.group, case.name, str(num_images), str(dim), f"{ours:.2f}"]
                row += [f"{theirs[0]:.2f}", f"{ratio:.2f}"] if compared else ["too large", "-"]
                row.append(f"{ours / floor:.1f}")
                if device != "cpu":
                    row.append(str(num_synchronisations(steps[0], points, labels)))
                table.add_row(*row)
                print(*row, sep="\t", file=sys.stderr, flush=True)
    console = Console(width=140)
    console.print(table)
    where = (
        torch.cuda.get_device_name()
        if device != "cpu"
        else f"{arguments.threads} CPU threads, {'processor' if arguments.threads == 1 else 'clock'} time"
    )
    console.print(f"torch {torch.__version__}, {where}")
    hard = ratios.get("mined", []) + ratios.get("lifted", [])
    for name, values in {
        **ratios,
        "mined and lifted": hard,
        "all": [ratio for group in ratios.values() for ratio in group],
    }.items():
        if values:
            console.print(
                f"{name}: median {statistics.median(values):.2f}, least {min(values):.2f}, rows {len(values)}"
            )
    if arguments.memory:
        context = multiprocessing.get_context("spawn")
        for case in cases:
            with context.Pool(1) as pool:
                mib = pool.apply(peak_mib, (CASES.index(case), max(arguments.batch), max(arguments.dim)))
            console.print(f"peak of {case.name} at B = {max(arguments.batch)}, D = {max(arguments.dim)}: {mib:.0f} MiB")


if __name__ == "__main__":
    main()
