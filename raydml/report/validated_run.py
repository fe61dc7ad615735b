"""A trained network on the validation images of its own trial: embedded, searched, and kept as numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.recipe import recipe_of
from raydml.config.trial import Machine, Trial, parse_trial
from raydml.evaluation.embed import embed
from raydml.evaluation.protocols import protocols_of
from raydml.evaluation.saved_embeddings import save_embeddings
from raydml.images.pixels import Pixels
from raydml.images.preprocessing import Preprocessing
from raydml.inference.checkpoints import load_network
from raydml.report.image_rows import LabelledImages
from raydml.report.ranked_queries import RankedQueries, rank_queries
from raydml.training.trial_images import OpenedImages, open_development


class ValidatedRun(NamedTuple):
    """The best network of a checkpoint and what it makes of the N validation images of its trial.

    embeddings: (N, D) float32. ranked: every query of these images with its nearest neighbours.
    """

    key: str
    checkpoint: Path
    trial: Trial
    preprocessing: Preprocessing
    machine: Machine
    device: str
    opened: OpenedImages
    embeddings: NDArray[np.float32]
    ranked: RankedQueries

    @property
    def name(self) -> str:
        """``confirm-001 (mic: margin, distance_weighted)``."""
        return f"{self.key} ({recipe_of(self.trial.model_dump(mode='json'))})"

    @property
    def val(self) -> LabelledImages:
        names = [self.opened.catalog.class_names[class_id] for class_id in self.opened.split.val]
        return LabelledImages(self.opened.val.pixels, self.opened.val.labels, names)

    @property
    def train(self) -> LabelledImages:
        names = [self.opened.catalog.class_names[class_id] for class_id in self.opened.split.train]
        return LabelledImages(self.opened.train.pixels, self.opened.train.labels, names)

    def embedded(
        self, network: nn.Module, pixels: Pixels, forward: Callable[[Tensor], Tensor] | None = None
    ) -> NDArray[np.float32]:
        """These images by another network of this trial, which stands on the device; see ``evaluate.embed``."""
        return embed(
            network,
            pixels,
            self.preprocessing,
            device=self.device,
            batch_size=self.machine.evaluation_batch,
            precision=self.trial.precision,
            forward=forward,
        )

    def validates_as(self, other: ValidatedRun) -> bool:
        """Whether both validate on the same images: then neither has trained on what the other is asked."""
        one, two = self.opened, other.opened
        same_classes = (one.catalog.content, one.split.val) == (two.catalog.content, two.split.val)
        return same_classes and one.val.paths == two.val.paths


def open_run(
    key: str,
    checkpoint_folder: Path,
    machine: Machine,
    device: str,
    opened: dict[str, OpenedImages],
    *,
    num_neighbours: int,
) -> ValidatedRun:
    """Embed and search the validation images of a checkpoint's trial.

    device: a torch device string. opened: images that are open already, by what they depend on; those that this run
    needs are added. num_neighbours: to be found for each query, more where its class is larger.

    Raises CheckpointError for a damaged checkpoint, DataError for images other than those of the trial, RetrievalError
    for embeddings that hold NaN.
    """
    network, preprocessing, card = load_network(checkpoint_folder)
    trial = parse_trial(card["trial"])
    images = trial.data.model_dump_json(exclude={"augmentation", "crop_px", "cache"})
    if images not in opened:
        opened[images] = open_development(trial, machine, augmented=False)
    val = opened[images].val
    if trial.channels_last:  # as in training: another layout sums in another order
        network.to(memory_format=torch.channels_last)
    embeddings = embed(
        network.to(device),
        val.pixels,
        preprocessing,
        device=device,
        batch_size=machine.evaluation_batch,
        precision=trial.precision,
    )
    ranked = rank_queries(embeddings, val.labels, val.roles, num_neighbours=num_neighbours, device=device)
    return ValidatedRun(
        key, checkpoint_folder, trial, preprocessing, machine, device, opened[images], embeddings, ranked
    )


def save_run(run: ValidatedRun, path: Path) -> Path:
    """Its validation embeddings as ``saved_embeddings`` has them."""
    val = run.opened.val
    facts = {
        "dataset": run.trial.data.name,
        "part": "val",
        "protocols": list(protocols_of(val.roles, ())),
        "recall_at": list(run.trial.recall_at),
        "checkpoint": str(run.checkpoint),
        "trial": run.key,
    }
    names = run.val.class_names
    return save_embeddings(
        path, run.embeddings, val.labels, class_names=names, paths=val.paths, roles=val.roles, facts=facts
    )
