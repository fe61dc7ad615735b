"""SNR loss: Yuan et al., Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning, CVPR 2019."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from raydml.losses._base import TripletLoss, Tuples, both_sides, mean_cost, pair_squares
from raydml.ops.distances import SMALLEST_SQUARE
from raydml.ops.tuples import counts, per_tuple


class SNRContrastive(TripletLoss):
    """Contrastive loss on the noise of a pair relative to the signal of its anchor.

    The distance of x from an anchor a is the inverse ratio of signal to noise, with variances over the D coordinates
    of one embedding:

        d(a, x) = var(a - x) / var(a)

    A positive pair costs max(0, d - positive_margin), a negative pair max(0, negative_margin - d); the loss is the mean
    over the chosen positive pairs plus the mean over the chosen negative pairs, each 0 where there is none.
    average_over: "active" leaves out pairs that cost nothing, as pytorch-metric-learning does.

    The variance does not depend on the mean of an embedding, so the paper holds that mean at zero: the loss adds
    zero_mean times the mean over the batch of |sum over the coordinates of x|, unless no pair is left. The
    default weight is that of the ICML 2020 benchmark, the margins are those of pytorch-metric-learning. The SNR loss of
    the benchmark differs: hinges of triplets, margin 0.2, without the penalty where the miner is distance-weighted.

    Embeddings are used as they come. Departure: an anchor whose variance is zero has no signal, hence no distance, and
    is left out with its pairs, where the releases divide by zero.
    """

    def __init__(
        self,
        *,
        positive_margin: Annotated[
            float, Field(ge=0, description="ratio up to which a positive costs nothing; 0 in pytorch-metric-learning")
        ] = 0.0,
        negative_margin: Annotated[
            float, Field(gt=0, description="ratio beyond which a negative costs nothing; 1 in pytorch-metric-learning")
        ] = 1.0,
        zero_mean: Annotated[
            float,
            Field(ge=0, description="weight of the penalty on an embedding's mean; 0.005 in the ICML 2020 benchmark"),
        ] = 0.005,
        average_over: Annotated[
            Literal["all", "active"],
            Field(description="the pairs to average over: all chosen ones, or only those with a cost"),
        ] = "all",
    ) -> None:
        super().__init__()
        if positive_margin > negative_margin:
            raise ValueError(
                f"positive_margin = {positive_margin}, negative_margin = {negative_margin}: positives must come "
                "nearer than negatives; write a positive_margin below the negative_margin"
            )
        self.positive_margin = positive_margin
        self.negative_margin = negative_margin
        self.zero_mean = zero_mean
        self.average_over = average_over

    def cost(self, points: Tensor, labels: Tensor, tuples: Tuples, references: Tensor | None) -> Tensor:
        # Without its own mean, an embedding's squared length is D times its variance, a difference's likewise.
        centred = points - points.mean(dim=1, keepdim=True)
        if references is not None:
            references = references - references.mean(dim=1, keepdim=True)
        to_positive, to_negative = both_sides(pair_squares(centred, tuples, references), tuples)
        signal = centred.square().sum(dim=1)
        # Relative to the length: the rounding error of equal coordinates is no signal.
        has_signal = per_tuple(signal > SMALLEST_SQUARE * (1 + points.square().sum(dim=1)), tuples)
        signal = per_tuple(signal, tuples)
        per_signal = signal.masked_fill(~has_signal, 1).reciprocal()
        num_positive, num_negative = counts(tuples)
        pulled = (to_positive * per_signal - self.positive_margin).clamp(min=0)
        pushed = (self.negative_margin - to_negative * per_signal).clamp(min=0)
        active_only = self.average_over == "active"
        loss = mean_cost(pulled, num_positive * has_signal, active_only) + mean_cost(
            pushed, num_negative * has_signal, active_only
        )
        if self.zero_mean > 0:
            penalty = points.sum(dim=1).abs().sum() / max(len(labels), 1)
            loss = loss + self.zero_mean * penalty * (num_positive.any() | num_negative.any())
        return loss
