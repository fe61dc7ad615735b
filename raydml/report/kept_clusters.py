"""The clusters of the training images that a checkpoint keeps, and the space in which they were found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raydml.config.trial import Trial
from raydml.methods._base import Method
from raydml.methods.divide_conquer import DivideConquer
from raydml.methods.mic import MIC
from raydml.training import checkpoint, parts


class KeptClusters(NamedTuple):
    """What a method that clusters had when the checkpoint was written, after the trial's last epoch.

    method: with the weights of that epoch, on the CPU. assignment: (N,) int64, the cluster of each training image in
    their order, below 0 for those in none. space: images (B, 3, H, W) -> (B, F), what the method clusters. space_name:
    the same in words. is_auxiliary: whether that space is an embedding of its own, beside the one that counts.
    """

    method: Method
    assignment: NDArray[np.int64]
    space: Callable[[Tensor], Tensor]
    space_name: str
    is_auxiliary: bool


def read_clusters(checkpoint_folder: Path, trial: Trial, train_labels: NDArray[np.int64]) -> KeptClusters | None:
    """The clusters in a checkpoint of Divide & Conquer or MIC; None of another method, or where none are kept.

    train_labels: (N,) of the trial's training images.

    Raises CheckpointError for a damaged checkpoint, ValueError where it was made from another number of images.
    """
    if trial.method.name not in ("divide_conquer", "mic"):
        return None
    state = checkpoint.load_state(checkpoint_folder)["method"]
    # Every weight comes from the checkpoint: none is fetched, and nothing is compiled for a few images.
    bare = trial.model_copy(update={"model": trial.model.model_copy(update={"weights": "none"}), "compile": False})
    method = parts.build_method(bare, train_labels, torch.device("cpu"))
    name = "clusters" if isinstance(method, DivideConquer) else "surrogate_labels"
    assignment = state[name].numpy().astype(np.int64)
    if len(assignment) != len(train_labels):
        raise ValueError(
            f"{checkpoint_folder} clusters {len(assignment)} training images, but there are {len(train_labels)}: some "
            "were skipped, or others are read now. Cure: the images the trial was trained on"
        )
    if not (assignment >= 0).any():
        return None
    method.load_state_dict(state)
    method.eval()
    if isinstance(method, MIC):
        return KeptClusters(method, assignment, _auxiliary_embedding(method), "the auxiliary embedding", True)
    return KeptClusters(method, assignment, _unit_features(method), "the backbone's features", False)


def _unit_features(method: Method) -> Callable[[Tensor], Tensor]:
    return lambda images: nn.functional.normalize(method.network.trunk(images).float(), dim=1)


def _auxiliary_embedding(method: MIC) -> Callable[[Tensor], Tensor]:
    return lambda images: nn.functional.normalize(method.auxiliary_head(method.network.trunk(images)).float(), dim=1)
