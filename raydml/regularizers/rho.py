"""Rho regularisation: Roth et al., Revisiting Training Strategies and Generalization Performance in DML, ICML 2020."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor

from raydml.ops.random_columns import uniform
from raydml.ops.tuples import Triplets
from raydml.regularizers._base import Regularizer, Tuples


class Rho(Regularizer):
    """Rho: reverse some triplets, so that embeddings keep using many directions.

    Each valid triplet (a, p, n) becomes, with the given probability, (a, a, p): the anchor is its own positive, and
    what was to come nearer is pushed away. That spreads the singular values of the embeddings (a lower rho in the
    paper's terms), at some cost in compactness of the classes. Adds no term to the loss.

    The rewritten triplets are on purpose not triplets by their labels. Triplets of one anchor are drawn independently;
    the benchmark, whose miner gives each anchor one triplet, draws once an anchor, which is the same. Its miner draws
    the pushed-away item anew from the anchor's class; here it is the positive that the miner chose.
    """

    rewrites: ClassVar[tuple[str, ...]] = ("triplets",)

    def __init__(
        self,
        *,
        probability: Annotated[
            float,
            Field(
                ge=0,
                le=1,
                description="probability of rewriting a triplet; 0.2 in the benchmark's code, 0.15 (SOP) to 0.4 (CUB) "
                "in its runs",
            ),
        ] = 0.2,
    ) -> None:
        super().__init__()
        self.probability = probability

    def rewrite(self, tuples: Tuples, labels: Tensor, generator: Generator | None = None) -> Tuples:
        """Draw one number a triplet; the generator may be on any device."""
        if not isinstance(tuples, Triplets):
            raise ValueError("rho rewrites triplets: choose a miner that yields triplets")
        share = uniform((len(tuples.valid),), tuples.valid.device, generator, torch.float32)
        turned = tuples.valid & (share < self.probability)
        return tuples._replace(
            positive=torch.where(turned, tuples.anchor, tuples.positive),
            negative=torch.where(turned, tuples.positive, tuples.negative),
        )
