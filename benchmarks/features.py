"""A head on a frozen backbone: features that are kept against the backbone in the loop, in one run.

    python benchmarks/features.py                    # 640 made-up photographs, ResNet-18 at 112 px, 10 epochs, a CPU
    python benchmarks/features.py --device cuda --backbone resnet50 --crop 224 --images 6400

Rows, in seconds: "in the loop" trains one trial whose backbone runs for every image of every epoch; "first" computes
the features of both views and trains the same trial on them; "next" is a trial that finds them. The images are decoded
before. The last lines extend this to a sweep of --trials trials, and to an epoch of 60,000 images, from the time that
an image takes in the last epoch of "next".
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from photographs import write_photographs

from raydml.config.trial import Machine, Trial, parse_machine, parse_trial
from raydml.models.network import build_network
from raydml.training.trainer import Trainer


def trial_of(backbone: str, weights: Path, crop_px: int, epochs: int, seed: int) -> Trial:
    return parse_trial(
        {
            "seed": seed,
            "epochs": epochs,
            "data": {
                "name": "image_folder",
                "resize_px": crop_px * 8 // 7,
                "crop_px": crop_px,
                "split": {"test_fraction": 0.1, "val_fraction": 0.2, "order": "sorted", "fold": 0},
                "augmentation": {"flip": True},
            },
            "model": {"backbone": backbone, "weights": str(weights), "embedding_dim": 128, "train": "head"},
            "loss": {"name": "multi_similarity"},
            "miner": {"name": "multi_similarity"},
            "sampler": {"name": "class_balanced", "classes_per_batch": 8, "images_per_class": 8},
        }
    )


def timed(trial: Trial, machine: Machine, device: str) -> tuple[float, float]:
    """Return the seconds of a whole trial, and the training time of one image in its last epoch."""
    begin = time.perf_counter()
    results = list(Trainer(trial, machine, device=device).epochs())
    return time.perf_counter() - begin, 1 / results[-1]["images_per_s"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "images", arguments.images)
        network = build_network(
            backbone=arguments.backbone, embedding_dim=8, layer_norm=False, normalize="l2", freeze_batch_norm=True,
            weights="none", seed=0,
        )  # fmt: skip
        torch.save(network.trunk.state_dict(), root / "weights.pth")
        settings = {"data_root": str(root / "images"), "cache_dir": str(root / "cache")}
        machine, without = (parse_machine({**settings, "feature_store": value}) for value in ("on", "off"))
        trials = [
            trial_of(arguments.backbone, root / "weights.pth", arguments.crop, arguments.epochs, seed)
            for seed in range(3)
        ]
        timed(trial_of(arguments.backbone, root / "weights.pth", arguments.crop, 1, 9), without, arguments.device)
        in_the_loop, _ = timed(trials[0], without, arguments.device)
        first, _ = timed(trials[0], machine, arguments.device)
        following = [timed(trial, machine, arguments.device) for trial in trials[1:]]
        then, image_s = min(following)
    num = arguments.trials
    print(f"{arguments.images} photographs, {arguments.backbone} at {arguments.crop} px, {arguments.epochs} epochs")
    for name, seconds in (("in the loop", in_the_loop), ("first", first), ("next", then)):
        print(f"{name:14} {seconds:9.2f} s   {in_the_loop / seconds:8.1f} x")
    kept, computed = first + (num - 1) * then, num * in_the_loop
    print(f"{num} trials     {kept:9.0f} s kept, {computed:.0f} s in the loop: {computed / kept:.1f} x")
    print(f"60,000 images  {60_000 * image_s:9.1f} s an epoch on kept features")


if __name__ == "__main__":
    main()
