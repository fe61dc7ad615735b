"""An epoch of training between its first batch and its last: what it plans, and what it has counted so far."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydml.samplers._epoch_plan import EpochPlan


class EpochUnderWay:
    """An epoch of which some batches are trained: its plan, the seed of each batch, the sums that its result needs.

    clustering: what the method said of the clustering before it, with its time.
    """

    def __init__(
        self, plan: EpochPlan, seeds: np.ndarray, device: torch.device, clustering: Mapping[str, float]
    ) -> None:
        self.plan, self.seeds, self.clustering = plan, seeds, dict(clustering)
        self.position = 0
        self.seconds = 0.0
        # The host reads these once, after the last batch: reading each would make the device wait for it.
        self.loss_sum = torch.zeros((), device=device)
        self.norm_sum = torch.zeros((), device=device)

    def add(self, loss: Tensor, norm: Tensor, *, seconds: float) -> None:
        """Count one more trained batch."""
        self.loss_sum += loss
        self.norm_sum += norm
        self.seconds += seconds
        self.position += 1

    def result(self) -> dict[str, float]:
        """What the epoch says about its training, all batches done. Waits for the device; asked once."""
        num_batches = len(self.plan.batches)
        num_images = sum(len(indices) for indices in self.plan.batches)
        start = time.perf_counter()
        loss_sum, norm_sum = self.loss_sum.item(), self.norm_sum.item()
        self.seconds += time.perf_counter() - start  # a GPU may have had batches to train still
        return {
            "train_loss": loss_sum / num_batches,
            "gradient_norm": norm_sum / num_batches,
            "sampler_coverage": self.plan.coverage,
            "sampler_duplicates": self.plan.num_duplicates,
            "images_per_s": num_images / self.seconds,
            **self.clustering,
        }

    def to_dict(self) -> dict[str, Any]:
        """Arrays, tensors and plain values."""
        return {**vars(self), "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], device: torch.device) -> "EpochUnderWay":
        """The inverse of to_dict, its arrays as tensors."""
        epoch = cls(EpochPlan.from_dict(values["plan"]), values["seeds"].numpy(), device, values["clustering"])
        epoch.position, epoch.seconds = values["position"], values["seconds"]
        epoch.loss_sum, epoch.norm_sum = values["loss_sum"].to(device), values["norm_sum"].to(device)
        return epoch
