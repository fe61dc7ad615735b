"""Loading trained networks from their checkpoints and scoring them on the classes of their own trials."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.trial import Machine, Trial, parse_trial
from raydml.data.catalog import DataError
from raydml.data.seal import TestKey
from raydml.evaluation.embed import Evaluation, device_of, embed, evaluate_embeddings, metric_spec_of
from raydml.evaluation.protocols import protocols_of
from raydml.evaluation.saved_embeddings import SavedEmbeddings, save_embeddings
from raydml.evaluation.scoring import MetricSpec
from raydml.images.cache import Images
from raydml.images.pixels import Pixels
from raydml.images.preprocessing import Preprocessing
from raydml.inference.export import load_checkpoint
from raydml.models.network import build_network
from raydml.training.parts import network_arguments
from raydml.training.randomness import seed_for
from raydml.training.trial_images import open_development, open_test, split_for


def embed_as_trained(
    trial: Trial,
    machine: Machine,
    device: str,
    preprocessing: Preprocessing,
    pixels: Pixels,
    network: nn.Module,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """Embed images (N, D) with the precision and memory layout of a trial; see `evaluation/embed.py`."""
    if trial.channels_last:  # another layout sums in another order
        network.to(memory_format=torch.channels_last)
    return embed(
        network.to(device),
        pixels,
        preprocessing,
        device=device,
        batch_size=machine.evaluation_batch,
        precision=trial.precision,
        forward=forward,
    )


def evaluate_checkpoint(
    checkpoint_folder: Path,
    part: Literal["val", "test"],
    machine: Machine,
    *,
    key: TestKey | None = None,
    device: str | None = None,
    untrained: bool = True,
    spec: MetricSpec | None = None,
    save_to: Path | None = None,
) -> Evaluation:
    """Score a checkpoint's best weights on the validation or the test classes of its own trial.

    Args:
        checkpoint_folder: a checkpoint, see checkpoint.py.
        part: "val", or "test" with a key from `TestReads.record`.
        machine: the folder of the images and the batch size.
        device: the device; None takes `machine.device` ("auto": a GPU where torch sees one).
        untrained: also score the network as the trial started from it (same seed, same pretrained weights if any),
            under the same names with the prefix `untrained_`.
        spec: the metrics to compute; None: those of the trial.
        save_to: a file for the embeddings (saved_embeddings.py), written before they are scored.

    Raises DataError for the test part without a key, and for images other than those of the trial.
    """
    if part == "test" and key is None:
        raise DataError("part: test; the test classes are sealed. Pass the key that TestReads(...).record(...) returns")
    model = load_checkpoint(checkpoint_folder)
    trial = parse_trial(model.card["trial"])
    images, class_names, protocols = _open_part(trial, part, machine, key)
    run_on = device or device_of(machine)
    spec = spec or metric_spec_of(trial)

    embed_part = partial(embed_as_trained, trial, machine, run_on, model.preprocessing, images.pixels)
    embeddings = embed_part(model.network)
    if save_to is not None:
        facts = {
            "dataset": trial.data.name,
            "part": part,
            "protocols": list(protocols),
            "recall_at": list(spec.recall_at),
            "fingerprint": model.card.get("fingerprint"),
            "seed": trial.seed,
            "checkpoint": str(checkpoint_folder),
        }
        names = tuple(class_names)
        saved = SavedEmbeddings(embeddings, images.labels, names, images.paths, images.roles, facts)
        save_embeddings(save_to, saved)
    found = evaluate_embeddings(embeddings, images.labels, images.roles, protocols, spec, run_on)
    if untrained:
        beginning = build_network(
            **network_arguments(trial), weights=trial.model.weights, seed=seed_for(trial.seed, "network_init")
        )
        start = evaluate_embeddings(
            embed_part(beginning), images.labels, images.roles, protocols, spec._replace(intervals=False), run_on
        )
        found.metrics.update({f"untrained_{name}": value for name, value in start.metrics.items()})
    return found


def _open_part(
    trial: Trial, part: str, machine: Machine, key: TestKey | None
) -> tuple[Images, list[str], tuple[str, ...]]:
    """Return the images of a part, the names of its classes and its protocols."""
    if part == "val":
        opened = open_development(trial, machine, augmented=False)
        names = [opened.catalog.class_names[number] for number in opened.split.val]
        return opened.val, names, protocols_of(opened.val.roles, ())  # declared protocols are for the test classes
    assert key is not None
    catalog, images = open_test(trial, machine, key)
    names = [catalog.class_names[number] for number in split_for(trial, catalog).test]
    return images, names, protocols_of(images.roles, catalog.protocols)
