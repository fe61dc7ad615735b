"""One seed, split by purpose into generators that are passed around and saved; no global seed anywhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# The position of a purpose is its key: new ones are added at the end, or every old number changes.
PURPOSES = ("network_init", "loss_init", "sampler", "augmentation", "mining", "layers")


def seed_for(seed: int, purpose: str) -> int:
    """Return a seed in 0..2**63 - 1 for one purpose; purposes are independent streams (numpy's SeedSequence)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose),))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Randomness:
    """The generators of one trial, all on the CPU, so that a CPU and a GPU draw the same numbers.

    sampler: numpy; augmentation and mining: torch; layers: torch, seeds the layers that draw from torch's global state
    (dropout, stochastic depth).
    """

    def __init__(self, seed: int) -> None:
        self.sampler = np.random.default_rng(seed_for(seed, "sampler"))
        self.augmentation = torch.Generator().manual_seed(seed_for(seed, "augmentation"))
        self.mining = torch.Generator().manual_seed(seed_for(seed, "mining"))
        self.layers = torch.Generator().manual_seed(seed_for(seed, "layers"))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every generator: tensors and plain values."""
        return {
            "sampler": dict(self.sampler.bit_generator.state),
            "augmentation": self.augmentation.get_state(),
            "mining": self.mining.get_state(),
            "layers": self.layers.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set every generator to its saved state."""
        self.sampler.bit_generator.state = state["sampler"]
        self.augmentation.set_state(state["augmentation"])
        self.mining.set_state(state["mining"])
        self.layers.set_state(state["layers"])

    def batch_seeds(self, num_batches: int) -> np.ndarray:
        """Return the seeds of the augmentation of the next batches, (num_batches,) int64.

        Each batch has its own, so that it is the same when it is prepared ahead and when it is prepared again after a
        restart.
        """
        return torch.randint(2**62, (num_batches,), generator=self.augmentation).numpy()

    @contextmanager
    def seeded_layers(self, device: torch.device) -> Iterator[None]:
        """Seed torch's global generators from ``layers`` inside the block, and restore them after it."""
        with seeded(int(torch.randint(2**62, (), generator=self.layers)), device):
            yield


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, of the CPU and of the device, inside the block, and restore them after it."""
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield
