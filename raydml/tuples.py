"""What a miner hands to a loss: which pairs or triplets of the batch count.

Both types have shapes fixed by the batch, never by its content, so that making and using them needs no answer
from the GPU. Rows that must not count are masked, not removed.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Pairs of a batch as two masks; the row is the anchor.

    positive: (B, B) bool, pairs to draw together. negative: (B, B) bool, pairs to push apart.
    """

    positive: Tensor
    negative: Tensor


class Triplets(NamedTuple):
    """Triplets of a batch as index lists.

    anchor, positive, negative: (T,) int64 rows of the batch, always within it. valid: (T,) bool; a loss
    ignores the other rows, whatever they hold.
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor
    valid: Tensor


def all_pairs(labels: Tensor) -> Pairs:
    """Every ordered pair of a batch. labels: (B,) int64.

    An item is kept from being its own positive by its index, not by its similarity: exact copies of an image
    are positives of each other.
    """
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return Pairs(positive=same & ~itself, negative=~same)
