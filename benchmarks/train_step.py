"""The trainer against a bare loop of the same network and loss, its batch already on the device: one table, one run.

    python benchmarks/train_step.py                     # on a CPU: small networks
    python benchmarks/train_step.py --device cuda       # ResNet-50 at 224 px in bf16, channels_last

Needs torch, torchvision, numpy and pydantic, and nothing else: neither Ray nor MLflow nor faiss nor the benchmarks'
other libraries.

A number is images a second. "trainer" is the whole of a training step: planned batch, crops from the cache,
augmentation, forward, loss, backward, optimiser. "bare" repeats forward, loss, backward and optimiser on one batch
that lies on the device. "papers" (with --papers, on by default on a GPU) is a loop in fp32 whose DataLoader decodes,
crops and normalises image by image, with a worker for every core. They take turns of a few steps; the median counts.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from photographs import write_photographs
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from raydml.config.trial import Trial, parse_machine, parse_trial
from raydml.evaluation.embed import AUTOCAST
from raydml.models.backbones import IMAGENET_MEAN, IMAGENET_STD
from raydml.training.trainer import Trainer

CPU_CASES: dict[str, dict[str, Any]] = {
    "convnet 56 px": {"backbone": "convnet", "resize_px": 64, "crop_px": 56, "batch": 64},
    "resnet18 112 px": {"backbone": "resnet18", "resize_px": 128, "crop_px": 112, "batch": 32},
}
GPU_CASES: dict[str, dict[str, Any]] = {
    "resnet50 224 px bf16": {
        "backbone": "resnet50",
        "resize_px": 256,
        "crop_px": 224,
        "batch": 128,
        "precision": "bf16",
        "channels_last": True,
    }
}


def trial_of(case: dict[str, Any]) -> Trial:
    images_per_class = 4
    return parse_trial(
        {
            "epochs": 1000,
            "data": {
                "name": "image_folder",
                "resize_px": case["resize_px"],
                "crop_px": case["crop_px"],
                "split": {"test_fraction": 0.1, "val_fraction": 0.1, "order": "sorted"},
                "augmentation": {"random_resized_crop": [0.16, 1.0], "flip": True},
            },
            "model": {"backbone": case["backbone"], "weights": "none", "embedding_dim": 128},
            "loss": {"name": "multi_similarity"},
            "miner": {"name": "multi_similarity"},
            "sampler": {
                "name": "class_balanced",
                "classes_per_batch": case["batch"] // images_per_class,
                "images_per_class": images_per_class,
                "batches_per_epoch": 100_000 // case["batch"],
            },
            "precision": case.get("precision", "fp32"),
            "channels_last": case.get("channels_last", False),
        }
    )


def trainer_turn(trainer: Trainer) -> Callable[[int], int]:
    steps = trainer.steps()

    def turn(num_steps: int) -> int:
        for _ in range(num_steps):
            assert next(steps) is None, "the epoch is shorter than the measurement"
        return num_steps

    return turn


def bare_step(trainer: Trainer) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Forward, loss, backward and optimiser for images and labels, in the trial's precision and with nothing else."""
    method, device = trainer.method, trainer.device
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    dtype, generator = AUTOCAST[trainer.trial.precision], torch.Generator()

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            embeddings = method.network(images)
        loss = method.objective(embeddings, labels, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def bare_turn(trainer: Trainer) -> Callable[[int], int]:
    """The same network, loss, precision and optimiser on one batch on the device."""
    trial, device = trainer.trial, trainer.device
    batch = trial.sampler.classes_per_batch * trial.sampler.images_per_class
    images = torch.randn(batch, 3, trial.data.crop_px, trial.data.crop_px, device=device)
    if trial.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) // trial.sampler.images_per_class
    step = bare_step(trainer)

    def turn(num_steps: int) -> int:
        for _ in range(num_steps):
            step(images, labels)
        return num_steps

    return turn


def papers_turn(trainer: Trainer, root: Path, workers: int) -> Callable[[int], int]:
    """fp32, contiguous, and a DataLoader that decodes and augments image by image: as the published systems do it."""
    trial, device = trainer.trial, trainer.device
    batch = trial.sampler.classes_per_batch * trial.sampler.images_per_class
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(trial.data.crop_px, scale=(0.16, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(root), transform=transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )
    step = bare_step(trainer)

    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def turn(num_steps: int) -> int:
        for _ in range(num_steps):
            images, labels = (part.to(device, non_blocking=True) for part in next(batches))
            step(images, labels)
        return num_steps

    return turn


def rates_in_turns(
    turns: dict[str, Callable[[int], int]], batch: int, *, num_turns: int, num_steps: int, device: torch.device
) -> dict[str, float]:
    """Images a second of each, the median of its turns."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(num_turns + 1):
        for name, turn in turns.items():
            _wait_for(device)
            start = time.perf_counter()
            turn(num_steps)
            _wait_for(device)
            if number:  # the first turn warms up
                found[name].append(num_steps * batch / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in found.items()}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads, of the trainer and of the bare loop")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="in a turn")
    parser.add_argument("--images", type=int, default=1600, help="photographs to make up, 20 a class")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="of the DataLoader of --papers")
    parser.add_argument("--papers", action=argparse.BooleanOptionalAction, default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    papers = device.type == "cuda" if arguments.papers is None else arguments.papers
    cases = GPU_CASES if device.type == "cuda" else CPU_CASES
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{arguments.threads} CPU threads"
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {where}")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "images"
        write_photographs(root, arguments.images)
        machine = parse_machine(
            {"data_root": str(root), "cache_dir": f"{scratch}/cache", "cpus_per_trial": arguments.threads}
        )
        for name, case in cases.items():
            trainer = Trainer(trial_of(case), machine, device=arguments.device)
            bare = Trainer(trial_of(case), machine, device=arguments.device)
            bare.method.train()
            turns = {"trainer": trainer_turn(trainer), "bare": bare_turn(bare)}
            if papers:
                plain = Trainer(
                    trial_of({**case, "precision": "fp32", "channels_last": False}), machine, device=arguments.device
                )
                plain.method.train()
                turns["papers"] = papers_turn(plain, root, arguments.workers)
            rates = rates_in_turns(
                turns, case["batch"], num_turns=arguments.turns, num_steps=arguments.steps, device=device
            )
            shares = f"trainer / bare {rates['trainer'] / rates['bare']:.3f}"
            if papers:
                shares += f"   trainer / papers {rates['trainer'] / rates['papers']:.2f}"
            print(f"{name:24}", *(f"{key} {value:8.1f}/s" for key, value in rates.items()), shares, sep="   ")


if __name__ == "__main__":
    main()
