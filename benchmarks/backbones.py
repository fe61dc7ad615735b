"""What of a pretrained network should learn? The parts, and a small network from nothing, with equal time each.

    python benchmarks/backbones.py grocery IMAGES --weights tf_efficientnet_lite0.safetensors --cpu-s 300 --seeds 3
    python benchmarks/backbones.py omniglot IMAGES --weights tf_efficientnet_lite0.safetensors --cpu-s 300 --seeds 3

IMAGES: a folder with one folder a class; the last half of the classes by name is the test. Arms: the features as they
are (zero-shot), a head on them, the last blocks, all blocks, and a small ConvNet without pretrained weights.

Each arm has the same time of one processor core, for each seed: random configurations of its space are trained one
after the other until the time is used up, the features that a head needs included. Validation MAP@R chooses
configuration and epoch. The test classes are read once for each arm and seed; a seed is also a fold of the development
classes. The table has the mean over the seeds with the 95 % interval of Student's t. --only ARM runs one arm.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydml.config.trial import Trial, parse_machine, parse_trial
from raydml.data.seal import TestReads
from raydml.inference.evaluate import evaluate_checkpoint
from raydml.training.trainer import Trainer

T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # degrees of freedom -> quantile of Student's t
BACKBONE = "timm:tf_efficientnet_lite0"
SIZES = {
    "grocery": {"resize_px": 256, "crop_px": 224, "interpolation": "bicubic"},
    "omniglot": {"resize_px": 112, "crop_px": 112, "interpolation": "bicubic"},
}
SMALL_SIZES = {"resize_px": 64, "crop_px": 56}
TEST_FRACTIONS = {"grocery": 40 / 81, "omniglot": 0.5}  # of grocery_small the classes 41 to 80
MIRRORS = {"grocery": True, "omniglot": False}  # a mirrored letter is another one


def draws(arm: str, dataset: str, weights: Path, seed: int) -> Iterator[dict[str, Any]]:
    """Yield configurations of an arm without end; of any two arms with equal seeds the shared numbers are equal."""
    generator = np.random.default_rng(seed)
    mirrored = MIRRORS[dataset]
    while True:
        head_rate, trunk_share = 10 ** generator.uniform(-4, -2.5), 10 ** generator.uniform(-2, 0)
        loss = [
            {"loss": {"name": "multi_similarity"}, "miner": {"name": "multi_similarity"}},
            {"loss": {"name": "normalized_softmax", "temperature": float(generator.choice([0.05, 0.1]))}},
        ][generator.integers(2)]
        crop = [[0.3, 1.0], [0.6, 1.0]][generator.integers(2)]
        model: dict[str, Any] = {"backbone": BACKBONE, "weights": str(weights), "embedding_dim": None}
        optimizer: dict[str, Any] = {"name": "adamw", "learning_rate": float(head_rate), "weight_decay": 1e-4}
        augmentation: dict[str, Any] = {"random_resized_crop": crop, "flip": mirrored}
        sizes, epochs = SIZES[dataset], 2
        if arm == "head":
            augmentation, epochs = {"flip": mirrored}, 30
            model["train"] = "head"
        elif arm == "convnet":
            model = {"backbone": "convnet", "weights": "none", "embedding_dim": 128}
            optimizer["learning_rate"] = float(head_rate * 3)
            sizes, epochs = SMALL_SIZES, 30
        else:
            # Without a projection a trial starts from the features as they are.
            model |= {"projection": "none", "train": {"last_blocks": 2} if arm == "last blocks" else "all"}
            optimizer["learning_rate"] = float(head_rate * trunk_share)
            if loss["loss"]["name"] == "normalized_softmax":
                optimizer["loss_learning_rate"] = float(head_rate)
        yield {
            "seed": seed,
            "epochs": epochs,
            "data": {
                "name": "image_folder",
                **sizes,
                "split": {
                    "order": "sorted",
                    "test_fraction": TEST_FRACTIONS[dataset],
                    "val_fraction": 0.25,
                    "num_folds": 4,
                    "fold": seed,
                },
                "augmentation": augmentation,
            },
            "model": model,
            **loss,
            "sampler": {"name": "class_balanced", "classes_per_batch": 8, "images_per_class": 4},
            "optimizer": optimizer,
            "schedule": {"name": "cosine"},
            "recall_at": [1],
        }


def best_of(
    arm: str, dataset: str, images: Path, weights: Path, seed: int, cpu_s: float, folder: Path
) -> dict[str, Any]:
    """Search for cpu_s seconds of this process; return the test metrics of what validation chose."""
    machine = parse_machine({"data_root": str(images), "cache_dir": str(folder / "cache"), "evaluation_batch": 64})
    zero_shot = arm == "zero-shot"
    begin, best, num_trials, num_epochs = time.process_time(), -1.0, 0, 0
    for configuration in draws("last blocks" if zero_shot else arm, dataset, weights, seed):
        trial: Trial = parse_trial(configuration)
        trainer = Trainer(trial, machine, device="cpu")
        num_trials += 1
        if zero_shot:
            trainer.save(folder / "best")
            break
        for result in trainer.epochs():
            num_epochs += 1
            if result.get("val_map_at_r", -1.0) > best:
                best = result["val_map_at_r"]
                trainer.save(folder / "best")
                chosen = {"epoch": result["epoch"], "configuration": configuration}
            if time.process_time() - begin > cpu_s:
                break
        if time.process_time() - begin > cpu_s:
            break
    used_s = time.process_time() - begin
    key = TestReads(folder / "test_reads.jsonl").record(
        purpose="benchmark", checkpoint=folder / "best", commit="benchmark"
    )
    found = evaluate_checkpoint(folder / "best", "test", machine, key=key, device="cpu", untrained=False)
    return {
        "arm": arm, "seed": seed, "recall_at_1": found.metrics["recall_at_1"], "map_at_r": found.metrics["map_at_r"],
        "val_map_at_r": best, "trials": num_trials, "epochs": num_epochs, "cpu_s": used_s,
        "chosen": None if zero_shot else chosen,
    }  # fmt: skip


def interval(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    """Print a line for each arm and seed, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=SIZES)
    parser.add_argument("images", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--cpu-s", type=float, default=300.0)
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 5))
    parser.add_argument("--only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arms = ["zero-shot", "head", "last blocks", "all", "convnet"]
    rows: list[dict[str, Any]] = []
    for arm in [arguments.only] if arguments.only else arms:
        for seed in range(1 if arm == "zero-shot" else arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                row = best_of(
                    arm, arguments.dataset, arguments.images, arguments.weights, seed, arguments.cpu_s, Path(folder)
                )
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(f"\n{'arm':12} {'R@1':>16} {'MAP@R':>16} {'trials':>7} {'epochs':>7} {'CPU s':>7}")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        means = [statistics.fmean(row[name] for row in own) for name in ("trials", "epochs", "cpu_s")]
        metrics = [interval([row[name] for row in own]) for name in ("recall_at_1", "map_at_r")]
        print(f"{arm:12} {metrics[0]:>16} {metrics[1]:>16} {means[0]:7.1f} {means[1]:7.1f} {means[2]:7.0f}")


if __name__ == "__main__":
    main()
