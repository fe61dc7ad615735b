"""Gradient caching: a batch goes through the backbone in chunks, and the gradient is that of the whole batch.

The chunks are embedded one after the other and nothing of them is kept but their features. Head, miner, loss and
regularisers see the features of the whole batch, and the gradient flows back to them. Each chunk then goes through the
backbone a second time, with the same random numbers, and takes its part of that gradient backwards. So the memory for
activations is that of one chunk, and the time about 4/3 of a step. Gao et al., "Scaling Deep Contrastive Learning Batch
Size under Memory Limited Setup", RepL4NLP 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydml.models.backbones import ModelError
from raydml.models.network import Network
from raydml.training.randomness import seeded
from raydml.training.rank_group import RankGroup


def train_in_chunks(network: Network, size: int, group: RankGroup) -> None:
    """Let a network send at most so many images at a time through its trunk in training; see the module.

    The gradient of every parameter is that of the whole batch, but for rounding. Layers that drop at random draw anew
    for each chunk, so their numbers differ from those without chunks. A chunk is a part of the whole batch, of which a
    rank has some rows or none: the random numbers of an image are the same with any number of ranks.

    Raises ModelError for a trunk that takes statistics of its images: those of a chunk are not those of the batch.
    """
    found = [name for name, module in network.trunk.named_modules() if _takes_statistics(module)]
    if found:
        raise ModelError(
            f"chunk_size: {size}; the backbone takes statistics of its batch ({found[0]}), which those of a chunk are "
            "not. Cure: model.freeze_batch_norm: true, or chunk_size: null"
        )
    network.chunked = _Chunks(network.trunk, size, group)


def _takes_statistics(module: nn.Module) -> bool:
    """Return whether a layer normalises by statistics of its images in the mode in which it is."""
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    if is_norm and module.running_var is None:
        return True
    return module.training and (is_norm or isinstance(getattr(module, "running_var", None), Tensor))


class _Chunks:
    """Images (B, 3, H, W), this rank's rows of a batch -> features (B, F)."""

    def __init__(self, trunk: nn.Module, size: int, group: RankGroup) -> None:
        self.trunk, self.size, self.group = trunk, size, group

    def __call__(self, images: Tensor) -> Tensor:
        num_rows = self.group.num_rows if self.group.num_ranks > 1 else len(images)
        if num_rows <= self.size:
            features: Tensor = self.trunk(images)
            return features
        starts = range(0, num_rows, self.size)
        with torch.random.fork_rng(devices=[]):  # what comes after, such as dropout in the head, draws as without
            seeds = torch.randint(2**62, (len(starts),)).tolist()
        own = self.group.rows(num_rows)
        parts = []
        for start, seed in zip(starts, seeds, strict=True):
            chunk = range(start, min(start + self.size, num_rows))
            mine = range(max(own.start, chunk.start), min(own.stop, chunk.stop))
            if mine:
                rows = slice(mine.start - chunk.start, mine.stop - chunk.start)
                inputs = images[mine.start - own.start : mine.stop - own.start], seed, len(chunk), rows
                # Without a gradient, or with a frozen trunk, nothing would be computed again.
                run_again = torch.is_grad_enabled()
                parts.append(
                    checkpoint(self._run, *inputs, use_reentrant=False, preserve_rng_state=False)
                    if run_again
                    else self._run(*inputs)
                )
        return torch.cat(parts)

    def _run(self, images: Tensor, seed: int, num_rows: int, rows: slice) -> Tensor:
        """Return the features of a part of a chunk, with the random numbers of that chunk whenever it is called.

        num_rows: of the chunk. rows: where the images are in it.
        """
        with seeded(seed, images.device), self.group.drawing_for(num_rows, rows):
            features: Tensor = self.trunk(images)
        return features
