"""NT-Xent: Chen et al., SimCLR, ICML 2020; SupCon: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from raydml.losses._base import PairLoss, cosines, mean_weights
from raydml.ops.distances import masked_logsumexp
from raydml.ops.tuples import Pairs


class NtXent(PairLoss):
    """NT-Xent and SupCon: cross-entropy of each positive's cosine against the anchor's other cosines.

    For anchor i with chosen positives P and negatives N and z = cosine / temperature, form "nt_xent" is the mean over
    all chosen positive pairs of

        -log( exp(z_p) / (exp(z_p) + sum_N exp(z_n)) )

    where a positive competes with the negatives alone, and form "sup_con", L_out of Khosla et al., is the mean over all
    anchors with a positive of

        mean_P -log( exp(z_p) / (sum_P exp(z) + sum_N exp(z)) )

    where it competes with the anchor's other positives too. With one positive an anchor, as in SimCLR, the two are the
    same.

    Embeddings are normalised here. SimCLR has one positive an anchor; with more, "nt_xent" agrees with
    pytorch-metric-learning. Its mean for "sup_con" leaves out anchors with a loss of exactly 0; here they count.
    """

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(gt=0, description="divides the cosines; 0.1 in both papers")] = 0.1,
        form: Annotated[
            Literal["nt_xent", "sup_con"],
            Field(
                description="compare a positive with the negatives (nt_xent, SimCLR) or with all other items (sup_con)"
            ),
        ] = "nt_xent",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.form = form

    def cost(self, points: Tensor, pairs: Pairs, references: Tensor | None) -> Tensor:
        positive, negative = pairs
        logits = cosines(points, references) / self.temperature
        rivals = negative if self.form == "nt_xent" else positive | negative
        rival = masked_logsumexp(logits, rivals)[:, None] - logits
        if self.form == "nt_xent":
            return (functional.softplus(rival) * positive).sum() / positive.sum().clamp(min=1)
        return (rival * mean_weights(positive, logits.dtype)).sum() / positive.any(dim=1).sum().clamp(min=1)
