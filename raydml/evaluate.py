"""From images to numbers: embed, search, score; and the same for a checkpoint by its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml import checkpoint
from raydml.assembly import network_arguments
from raydml.config import Machine, Trial, parse_trial
from raydml.data.seal import TestKey
from raydml.export import rebuild
from raydml.images.image_cache import Images
from raydml.images.pixels import Pixels, centres
from raydml.images.read_ahead import read_ahead
from raydml.long_steps import tell
from raydml.model import Network, build_network
from raydml.preprocessing import Preprocessing
from raydml.protocols import described, protocols_of
from raydml.randomness import seed_for
from raydml.saved_embeddings import save_embeddings
from raydml.scoring import query_values, score_by_all, told_of
from raydml.statistics import bootstrap_interval
from raydml.trial_images import open_development, open_test, split_for

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
            tell("embedding", start + len(rows), len(pixels), "images")
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


def load_network(checkpoint_folder: Path) -> tuple[Network, Preprocessing, dict[str, Any]]:
    """The best network of a checkpoint (CPU, evaluation mode), its preprocessing and its model card.

    Raises CheckpointError for a damaged checkpoint.
    """
    card = checkpoint.load_card(checkpoint_folder)
    network, preprocessing = rebuild(card, checkpoint.load_weights(checkpoint_folder), str(checkpoint_folder))
    return network, preprocessing, card


class Wanted(NamedTuple):
    """What to measure: the k of Recall@k, codes and groups of metrics as in scoring.py, and whether with intervals."""

    recall_at: tuple[int, ...]
    codes: tuple[str, ...] = ("float",)
    groups: tuple[str, ...] = ("retrieval",)
    intervals: bool = False


class Evaluated(NamedTuple):
    """metrics by name. intervals: name -> (low, high), 95 % bootstrap over the queries, class by class, of the metrics
    of the first protocol. protocols: name -> who searched whom, in words and numbers."""

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    protocols: dict[str, str]


def wanted_by(trial: Trial) -> Wanted:
    """What a trial asks for in its configuration."""
    return Wanted(trial.recall_at, ("float", "binary") if trial.binary_codes else ("float",))


def evaluate_embeddings(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    roles: Sequence[str] | None,
    protocols: Sequence[str],
    wanted: Wanted,
    device: str = "cpu",
) -> Evaluated:
    """Score embeddings (N, D) of labels (N,) by every protocol, the first under plain names.

    A data set with several protocols is scored by each: the first under the plain names, the others with the
    protocol's name as a prefix (`one_gallery_image_recall_at_1`).
    """
    scored = score_by_all(
        embeddings,
        labels,
        roles,
        protocols,
        recall_at=wanted.recall_at,
        codes=wanted.codes,
        groups=wanted.groups,
        device=device,
    )
    intervals = {}
    if wanted.intervals and scored.queries is not None:
        classes = labels[scored.queries.rows]
        code = told_of(wanted.codes)
        prefix = "" if code == "float" else f"{code}_"
        values = {f"{prefix}{name}": of for name, of in query_values(scored.queries, wanted.recall_at).items()}
        intervals = {
            name: bootstrap_interval(of_queries, groups=classes)
            for name, of_queries in values.items()
            if name in scored.metrics and len(np.unique(classes[~np.isnan(of_queries)])) > 1
        }
    return Evaluated(scored.metrics, intervals, {name: described(name, labels, roles) for name in protocols})


def evaluate_checkpoint(
    checkpoint_folder: Path,
    part: Literal["val", "test"],
    machine: Machine,
    *,
    key: TestKey | None = None,
    device: str | None = None,
    untrained: bool = True,
    wanted: Wanted | None = None,
    save_to: Path | None = None,
) -> Evaluated:
    """Metrics of a checkpoint's best weights on the validation or the test classes of its own trial.

    Args:
        checkpoint_folder: a checkpoint, see checkpoint.py.
        part: "val", or "test" with a key from `TestReads.record`.
        machine: where the images lie and how large a batch may be.
        device: where to run; None takes `machine.device` ("auto": a GPU where torch sees one).
        untrained: also score the network as the trial started from it (same seed, same pretrained weights if any),
            under the same names with the prefix `untrained_`.
        wanted: what to measure; None: what the trial asks for.
        save_to: a file for the embeddings (saved_embeddings.py), written before they are scored.

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
    images, class_names, protocols = _open_part(trial, part, machine, key)
    run_on = device or device_of(machine)
    wanted = wanted or wanted_by(trial)

    def embeddings_of(candidate: Network) -> NDArray[np.float32]:
        if trial.channels_last:  # as in training: another layout sums in another order
            candidate.to(memory_format=torch.channels_last)
        return embed(
            candidate.to(run_on),
            images.pixels,
            preprocessing,
            device=run_on,
            batch_size=machine.evaluation_batch,
            precision=trial.precision,
        )

    embeddings = embeddings_of(network)
    if save_to is not None:
        save_embeddings(
            save_to,
            embeddings,
            images.labels,
            class_names=class_names,
            paths=images.paths,
            roles=images.roles,
            facts={
                "dataset": trial.data.name,
                "part": part,
                "protocols": list(protocols),
                "recall_at": list(wanted.recall_at),
                "fingerprint": card.get("fingerprint"),
                "seed": trial.seed,
                "checkpoint": str(checkpoint_folder),
            },
        )
    found = evaluate_embeddings(embeddings, images.labels, images.roles, protocols, wanted, run_on)
    if untrained:
        beginning = build_network(
            **network_arguments(trial), weights=trial.model.weights, seed=seed_for(trial.seed, "network_init")
        )
        start = evaluate_embeddings(
            embeddings_of(beginning),
            images.labels,
            images.roles,
            protocols,
            wanted._replace(intervals=False),
            run_on,
        )
        found.metrics.update({f"untrained_{name}": value for name, value in start.metrics.items()})
    return found


def _open_part(
    trial: Trial, part: str, machine: Machine, key: TestKey | None
) -> tuple[Images, list[str], tuple[str, ...]]:
    """The images of a part, the names of its classes, and the protocols by which they are scored."""
    if part == "val":
        opened = open_development(trial, machine, augmented=False)
        names = [opened.catalog.class_names[number] for number in opened.split.val]
        return opened.val, names, protocols_of(opened.val.roles, ())  # what is declared is for the test classes
    assert key is not None
    catalog, images = open_test(trial, machine, key)
    names = [catalog.class_names[number] for number in split_for(trial, catalog).test]
    return images, names, protocols_of(images.roles, catalog.protocols)


def device_of(machine: Machine) -> str:
    if machine.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return machine.device
