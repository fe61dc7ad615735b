"""From images to numbers: embed, search, score; and the same for a checkpoint by its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml import checkpoint
from raydml.config import Machine, Trial, parse_trial
from raydml.data.seal import TestKey
from raydml.export import rebuild
from raydml.images.image_cache import Images
from raydml.images.pixels import Pixels, centres
from raydml.images.read_ahead import read_ahead
from raydml.metrics import map_at_r, r_precision, recall_at_k
from raydml.model import Network, build_network
from raydml.preprocessing import Preprocessing
from raydml.protocols import Search, protocols_of, searches
from raydml.randomness import seed_for
from raydml.retrieval import binary_codes, nearest_neighbours
from raydml.trial_images import open_development, open_test

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

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
    pixels: Pixels,
    preprocessing: Preprocessing,
    *,
    device: str | torch.device,
    batch_size: int,
    precision: str = "fp32",
    forward: Callable[[Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """N resized images -> embeddings (N, D) float32 on the host, in the order given.

    The network stands on `device` already. It runs in evaluation mode without gradients, under autocast unless
    precision is fp32; every module gets the mode back that it had. forward: what of the network to take instead of its
    output, a function of a batch (B, 3, crop, crop) to (B, D). The centre crops of one batch are read (or decoded)
    while the batch before is embedded.
    """
    if precision not in AUTOCAST:
        raise EvaluationError(f"precision: {precision!r}; one of {', '.join(AUTOCAST)}")
    if len(pixels) == 0 or batch_size < 1:
        raise EvaluationError(f"{len(pixels)} images in batches of {batch_size}: both must be at least 1")
    dtype, device = AUTOCAST[precision], torch.device(device)
    embeddings: NDArray[np.float32] | None = None
    starts = range(0, len(pixels), batch_size)
    calls = ((pixels, range(start, min(start + batch_size, len(pixels))), preprocessing.crop_px) for start in starts)
    with (
        _evaluation_mode(network),
        torch.inference_mode(),
        closing(read_ahead(centres, calls, num_ahead=1)) as squares_of_batches,
    ):
        for start, squares in zip(starts, squares_of_batches, strict=True):
            batch = torch.from_numpy(squares).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = (forward or network)(preprocessing.for_evaluation(batch))
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
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    recall_at: Sequence[int] = (1, 2, 4, 8),
    protocol: str = "leave_one_out",
    roles: Sequence[str] | None = None,
) -> dict[str, float]:
    """Retrieval by Euclidean distance, every query against its gallery.

    Args:
        embeddings: (N, D) float32, as the network gives them.
        labels: (N,) int64; images of one class are the ones to be found.
        recall_at: the k of Recall@k.
        protocol: who searches whom, see protocols.py; roles: "query" | "gallery" of each image, for query_gallery.

    Returns:
        {"recall_at_<k>": ..., "r_precision": ..., "map_at_r": ...}, fractions in [0, 1], means over queries (and over
        the repetitions of a protocol that draws its gallery).

    Raises EvaluationError for a k beyond the images to be found, ProtocolError for images the protocol does not fit,
    RetrievalError for NaN, MetricError where no query has an image to find. Uses as many threads as torch does.
    """
    each = [_score_one(embeddings, labels, search, recall_at) for search in searches(protocol, labels, roles)]
    return {name: float(np.mean([metrics[name] for metrics in each])) for name in each[0]}


def _score_one(
    embeddings: NDArray[np.float32], labels: NDArray[np.int64], search: Search, recall_at: Sequence[int]
) -> dict[str, float]:
    leave_one_out = search.gallery is None
    gallery = search.queries if search.gallery is None else search.gallery
    num_classes = int(labels.max()) + 1
    num_relevant = np.bincount(labels[gallery], minlength=num_classes)[labels[search.queries]] - leave_one_out
    available, largest = len(gallery) - leave_one_out, max(recall_at)
    if largest > available:
        raise EvaluationError(
            f"recall_at: {largest} neighbours, but a query has only {available} images to search: "
            "leave the larger k out of recall_at, or evaluate on more images"
        )
    k = min(max(largest, int(num_relevant.max())), available)
    whole = leave_one_out and len(search.queries) == len(labels)
    queries = embeddings if whole else embeddings[search.queries]
    indices, _ = nearest_neighbours(queries, None if leave_one_out else embeddings[gallery], k=k)
    query_labels, neighbour_labels = labels[search.queries], labels[gallery][indices]
    metrics = {f"recall_at_{k}": value for k, value in recall_at_k(neighbour_labels, query_labels, recall_at).items()}
    metrics["r_precision"] = r_precision(neighbour_labels, query_labels, num_relevant)
    metrics["map_at_r"] = map_at_r(neighbour_labels, query_labels, num_relevant)
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

    A data set with several protocols is scored by each: the first under the plain names, the others with the
    protocol's name as a prefix (`one_gallery_image_recall_at_1`). A trial with binary_codes also has the metrics of
    its embeddings' signs (`binary_recall_at_1`, `one_gallery_image_binary_recall_at_1`).

    Raises EvaluationError for the test part without a key, DataError for images other than those of the trial.
    """
    if part not in ("val", "test"):
        raise EvaluationError(f"part: {part!r}; one of val, test")
    if part == "test" and key is None:
        raise EvaluationError(
            "part: test; the test classes are sealed: pass the key that TestReads(...).record(...) returns"
        )
    network, preprocessing, card = load_network(checkpoint_folder)
    trial = parse_trial(card["trial"])
    images, protocols = _open_part(trial, part, machine, key)
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
        return score_by_all(embeddings, images, protocols, recall_at=trial.recall_at, binary=trial.binary_codes)

    metrics = metrics_of(network)
    if untrained:
        beginning = build_network(**trial.model.model_dump(), seed=seed_for(trial.seed, "network_init"))
        metrics |= {f"untrained_{name}": value for name, value in metrics_of(beginning).items()}
    return metrics


def score_by_all(
    embeddings: NDArray[np.float32],
    images: Images,
    protocols: Sequence[str],
    *,
    recall_at: Sequence[int],
    binary: bool = False,
) -> dict[str, float]:
    """``score`` by the first protocol, and by the others with their names as prefixes.

    binary: score the embeddings' signs as well, as `binary_<metric>`: by Hamming distance, ties in order of index (see
    ``retrieval.binary_codes``). Source: Zhai and Wu, BMVC 2019, whose release then returns the larger of the two
    Recall@1; here each is a number of its own.
    """
    kinds = {"": embeddings} | ({"binary_": binary_codes(embeddings)} if binary else {})
    metrics: dict[str, float] = {}
    for place, protocol in enumerate(protocols):
        for kind, rows in kinds.items():
            prefix = f"{protocol}_{kind}" if place else kind
            scores = score(rows, images.labels, recall_at=recall_at, protocol=protocol, roles=images.roles)
            metrics |= {f"{prefix}{name}": value for name, value in scores.items()}
    return metrics


def _open_part(trial: Trial, part: str, machine: Machine, key: TestKey | None) -> tuple[Images, tuple[str, ...]]:
    """The images of a part and the protocols by which they are scored."""
    if part == "val":
        images = open_development(trial, machine, augmented=False).val
        return images, protocols_of(images.roles, ())  # what a data set declares is for its test classes
    assert key is not None
    catalog, images = open_test(trial, machine, key)
    return images, protocols_of(images.roles, catalog.protocols)


def _device_of(machine: Machine) -> str:
    if machine.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return machine.device
