"""Circle loss: Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020."""

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydml.losses._base import PairLoss, cosines
from raydml.ops.distances import masked_logsumexp
from raydml.ops.tuples import Pairs


class Circle(PairLoss):
    """Circle loss: the farther a similarity is from its optimum, the larger its weight.

    For anchor i with chosen positives P and negatives N and cosines s, with the weights a_p = max(0, 1 + margin - s_p)
    and a_n = max(0, s_n + margin), which are constants to the gradient:

        log(1 + sum_N exp(scale a_n (s_n - margin)) sum_P exp(-scale a_p (s_p - 1 + margin)))

    averaged over the anchors that have both a positive and a negative.

    Defaults are the paper's for fine-grained image retrieval (CUB, Cars, Stanford Online Products): margin 0.4,
    scale 80. For faces it takes margin 0.25 and scale 256, for persons 0.25 and 128.

    Embeddings are normalised here. pytorch-metric-learning's mean leaves out anchors whose loss is exactly 0; here they
    count.
    """

    def __init__(
        self,
        *,
        margin: Annotated[
            float,
            Field(
                gt=0,
                lt=1,
                description="allowed distance of positives from cosine 1, of negatives from cosine 0 (m in the paper); "
                "0.4 for fine-grained retrieval, 0.25 for faces and persons",
            ),
        ] = 0.4,
        scale: Annotated[
            float,
            Field(
                gt=0,
                description="multiplies the weighted similarities (gamma in the paper); 80 for fine-grained retrieval, "
                "256 for faces",
            ),
        ] = 80.0,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.scale = scale

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        positive, negative = pairs
        similarity = cosines(points, references)
        constant = similarity.detach()
        # A positive's weight needs no max with 0: no cosine is beyond 1 + margin.
        push = (constant + self.margin).clamp_(min=0).mul_(self.scale)
        pull = (constant - (1 + self.margin)).mul_(self.scale)
        # An anchor with one side alone has the exponent -1e30, and thereby the loss 0.
        pushed = masked_logsumexp(push * (similarity - self.margin), negative)
        pulled = masked_logsumexp(pull * (similarity - (1 - self.margin)), positive)
        anchors = (positive.any(dim=1) & negative.any(dim=1)).sum()
        return functional.softplus(pushed + pulled).sum() / anchors.clamp(min=1)
