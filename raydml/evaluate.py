"""From images to numbers: embed, search, score; and the same for a checkpoint by its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from raydml import checkpoint
from raydml.config import Machine, Trial, parse_trial
from raydml.data.datasets import make_split, open_catalog
from raydml.data.image_cache import Images, load_development, load_test
from raydml.data.seal import TestKey
from raydml.export import rebuild
from raydml.metrics import map_at_r, r_precision, recall_at_k
from raydml.model import Network, Preprocessing, build_network
from raydml.randomness import seed_for
from raydml.retrieval import nearest_neighbours

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Collapse: the embeddings' spread, relative to their length, is at most this (float32 resolves 6e-8) ...
_SMALLEST_RELATIVE_SPREAD = 1e-4
# ... or this share of the images have one and the same image as their nearest neighbour. One point can be nearest
# to a handful of others by chance, so that small sets say nothing.
_LARGEST_SHARE = 0.99
_SMALLEST_SET = 20


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked."""


def embed(
    network: nn.Module,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
    *,
    device: str | torch.device,
    batch_size: int,
    precision: str = "fp32",
) -> NDArray[np.float32]:
    """Images (N, S, S, 3) uint8 -> embeddings (N, D) float32 on the host, in the order given.

    The network stands on `device` already. It runs in evaluation mode without gradients, under autocast unless
    precision is fp32; every module gets the mode back that it had. `pixels` may be a memory map: one batch at a
    time is read.
    """
    if precision not in _AUTOCAST:
        raise EvaluationError(f"precision: {precision!r}; one of {', '.join(_AUTOCAST)}")
    if len(pixels) == 0 or batch_size < 1:
        raise EvaluationError(f"{len(pixels)} images in batches of {batch_size}: both must be at least 1")
    dtype, device = _AUTOCAST[precision], torch.device(device)
    embeddings: NDArray[np.float32] | None = None
    with _evaluation_mode(network), torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            # The copy makes a writable, aligned batch out of whatever the cache maps.
            batch = torch.from_numpy(np.array(pixels[start : start + batch_size])).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = network(preprocessing.for_evaluation(batch))
            rows = output.float().cpu().numpy()
            if embeddings is None:
                embeddings = np.empty((len(pixels), rows.shape[1]), dtype=np.float32)
            embeddings[start : start + len(rows)] = rows
    assert embeddings is not None
    return embeddings


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    # Module by module: frozen BatchNorm layers are in evaluation mode inside a network that trains.
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def score(
    embeddings: NDArray[np.float32], labels: NDArray[np.int64], *, recall_at: Sequence[int] = (1, 2, 4, 8)
) -> dict[str, float]:
    """Leave-one-out retrieval: every image is a query against all the others, by Euclidean distance.

    Args:
        embeddings: (N, D) float32, as the network gives them.
        labels: (N,) int64; images of one class are the ones to be found.
        recall_at: the k of Recall@k.

    Returns:
        {"recall_at_<k>": ..., "r_precision": ..., "map_at_r": ...}, fractions in [0, 1], means over queries.

    Raises EvaluationError for a k beyond the N - 1 other images, RetrievalError for NaN, MetricError where no class
    has two images. Uses as many threads as torch does.
    """
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    num_relevant = counts[inverse] - 1
    largest = max(recall_at)
    if largest > len(labels) - 1:
        raise EvaluationError(
            f"recall_at: {largest} neighbours of {len(labels)} images; each has only {len(labels) - 1} others: "
            "leave the larger k out of recall_at, or evaluate on more images"
        )
    indices, _ = nearest_neighbours(embeddings, k=max(largest, int(num_relevant.max())))
    neighbour_labels = labels[indices]
    metrics = {f"recall_at_{k}": value for k, value in recall_at_k(neighbour_labels, labels, recall_at).items()}
    metrics["r_precision"] = r_precision(neighbour_labels, labels, num_relevant)
    metrics["map_at_r"] = map_at_r(neighbour_labels, labels, num_relevant)
    return metrics


def is_collapsed(embeddings: NDArray[np.float32]) -> str | None:
    """Why these embeddings (N, D) cannot tell images apart any more, in words, or None while they can.

    They hold NaN or infinity; or their spread (root mean square distance from their mean) is within 1e-4 of nothing,
    compared with their length; or more than 99 % of at least 20 images share one nearest neighbour.
    """
    if not np.isfinite(embeddings).all():
        return "the embeddings hold NaN or infinity"
    rows = embeddings.astype(np.float64)
    length = float(np.sqrt((rows**2).sum(axis=1).mean()))
    spread = float(np.sqrt(rows.var(axis=0).sum()))
    if spread <= _SMALLEST_RELATIVE_SPREAD * length:
        return f"all embeddings are the same: spread {spread:.2g} at length {length:.2g}"
    if len(rows) >= _SMALLEST_SET:
        neighbours, _ = nearest_neighbours(embeddings, k=1)
        most = int(np.bincount(neighbours[:, 0]).max())
        # The shared neighbour is not its own neighbour, hence N - 1.
        if most > _LARGEST_SHARE * (len(rows) - 1):
            return f"{most} of {len(rows)} images have the same nearest neighbour"
    return None


def load_network(checkpoint_folder: Path) -> tuple[Network, Preprocessing, dict[str, Any]]:
    """The best network of a checkpoint (CPU, evaluation mode), its preprocessing and its model card.

    Raises CheckpointError for a damaged checkpoint.
    """
    card = checkpoint.load_card(checkpoint_folder)
    network, preprocessing = rebuild(card, checkpoint.load_weights(checkpoint_folder), str(checkpoint_folder))
    return network, preprocessing, card


def evaluate_checkpoint(
    checkpoint_folder: Path,
    part: Literal["val", "test"],
    machine: Machine,
    *,
    key: TestKey | None = None,
    device: str | None = None,
    untrained: bool = True,
) -> dict[str, float]:
    """Metrics of a checkpoint's best weights on the validation or the test classes of its own trial.

    Args:
        checkpoint_folder: a checkpoint, see checkpoint.py.
        part: "val", or "test" with a key from `TestReads.record`.
        machine: where the images lie and how large a batch may be.
        device: where to run; None takes `machine.device` ("auto": a GPU where torch sees one).
        untrained: also score the network as the trial started from it (same seed, same pretrained weights if any),
            under the same names with the prefix `untrained_`.

    Raises EvaluationError for the test part without a key, or for images other than those of the trial.
    """
    if part not in ("val", "test"):
        raise EvaluationError(f"part: {part!r}; one of val, test")
    if part == "test" and key is None:
        raise EvaluationError(
            "part: test; the test classes are sealed: pass the key that TestReads(...).record(...) returns"
        )
    network, preprocessing, card = load_network(checkpoint_folder)
    trial = parse_trial(card["trial"])
    images = _open_part(trial, part, machine, key)
    run_on = device or _device_of(machine)

    def metrics_of(candidate: Network) -> dict[str, float]:
        if trial.channels_last:  # as in training: another layout sums in another order
            candidate.to(memory_format=torch.channels_last)
        embeddings = embed(
            candidate.to(run_on),
            images.pixels,
            preprocessing,
            device=run_on,
            batch_size=machine.evaluation_batch,
            precision=trial.precision,
        )
        return score(embeddings, images.labels, recall_at=trial.recall_at)

    metrics = metrics_of(network)
    if untrained:
        beginning = build_network(**trial.model.model_dump(), seed=seed_for(trial.seed, "network_init"))
        metrics |= {f"untrained_{name}": value for name, value in metrics_of(beginning).items()}
    return metrics


def _open_part(trial: Trial, part: str, machine: Machine, key: TestKey | None) -> Images:
    data = trial.data
    catalog = open_catalog(data.name, machine.data_root, data.list_file)
    if data.content and data.content != catalog.content:
        raise EvaluationError(
            f"data.content: the checkpoint was trained on images {data.content[:12]}, machine.data_root = "
            f"{machine.data_root} holds {catalog.content[:12]}; point it at the same images"
        )
    split = make_split(catalog, **data.split.model_dump())
    settings: dict[str, Any] = {
        "resize_px": data.resize_px,
        "cache_dir": machine.cache_dir,
        "on_unreadable": machine.on_unreadable,
    }
    if part == "val":
        return load_development(catalog, split, **settings)[1]
    assert key is not None
    return load_test(catalog, split, **settings, key=key)


def _device_of(machine: Machine) -> str:
    if machine.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return machine.device
