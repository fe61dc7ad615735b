"""N-pair sampling: Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from raydml.miners._base import PairMiner
from raydml.ops.random_columns import draw_columns, uniform
from raydml.ops.tuples import Pairs


class NPairMiner(PairMiner):
    """One positive pair an anchor, against the positives or the items of all other classes.

    negatives = "other_positives", the paper's: each class with two items in the batch gives one ordered pair (a, p) at
    random; a is an anchor, p its positive, and the p of the other classes are its negatives.
    negatives = "all", of the 2020 benchmark (Roth et al., ICML 2020): each item with a positive is an anchor, with one
    of its positives at random and every item of another class as negative.

    An anchor without any negative is left out.
    """

    def __init__(
        self,
        *,
        negatives: Annotated[
            Literal["other_positives", "all"],
            Field(description="the positives of the other classes, as in the paper, or all items of other classes"),
        ] = "other_positives",
    ) -> None:
        super().__init__()
        self.negatives = negatives

    def choose(
        self, points: Tensor, labels: Tensor, pairs: Pairs, references: Tensor | None, generator: Generator | None
    ) -> Pairs:
        """Draw B or 2 B numbers."""
        # A row without candidates draws some column, which the mask takes out again.
        drawn = draw_columns(pairs.positive, generator)
        positive = pairs.positive & torch.zeros_like(pairs.positive).scatter(1, drawn, True)
        negative = pairs.negative & pairs.positive.any(dim=1, keepdim=True)
        if self.negatives == "other_positives":
            anchors = _one_of_each_class(pairs.positive.any(dim=1), labels, generator)[:, None]
            positive &= anchors
            negative &= anchors & positive.any(dim=0)
        return Pairs(positive & negative.any(dim=1, keepdim=True), negative)


def _one_of_each_class(eligible: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
    """(B,) bool: one eligible item of each class that has any, chosen at random."""
    priority = torch.where(eligible, uniform((len(labels),), labels.device, generator), -1)
    first = torch.where(labels[:, None] == labels, priority, -2).argmax(dim=1)
    return eligible & (first == torch.arange(len(labels), device=labels.device))
