"""Matryoshka: Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, Strict
from torch import Generator, Tensor, nn
from torch.nn import functional

from raydml.ops.distances import shared_measure
from raydml.regularizers._base import Regularizer


class Matryoshka(Regularizer):
    """Matryoshka: the trial's loss on prefixes too, so that the first dimensions alone are an embedding.

    With e[:d] the first d of D dimensions of the embeddings, the term is

        weight * sum over d in dims, d < D, of loss_d(e[:d] / |e[:d]|)

    The miner of the trial, where there is one, chooses anew on each prefix. The loss of all D dimensions is the trial's
    own and stands beside the term; so D in dims adds nothing, and with weight 1 the total is the sum of equation 1 in
    the paper, with all its c_m at 1.

    Each prefix has a loss of its own, made for its dimensions and started by itself: class vectors (proxies, centres)
    of d dimensions, or a boundary of the margin loss. That is the paper's MRL. Its MRL-E, where the class vectors of a
    prefix are slices of those of the whole, needs less memory and is a little worse in the paper; it is not here. The
    losses learn at the rate and with the decay of the trial's.

    What another regulariser rewrites (rho) is not rewritten for the prefixes. A prefix is of length 1 also where the
    whole embedding is not.
    """

    def __init__(
        self,
        embedding_dim: int,
        make_loss: Callable[[int], nn.Module],
        miner: nn.Module | None = None,
        *,
        dims: Annotated[
            tuple[Annotated[int, Field(ge=1)], ...],
            Strict(False),
            Field(
                min_length=1,
                description="lengths of the prefixes, in rising order, at most embedding_dim; 8, 16, ... 2048 in the "
                "paper",
            ),
        ] = (32, 64),
        weight: Annotated[
            float, Field(ge=0, description="multiplies the losses of the prefixes; 1 in the paper")
        ] = 1.0,
    ) -> None:
        super().__init__()
        if list(dims) != sorted(set(dims)):
            raise ValueError(f"dims = {list(dims)}: they must rise; write {sorted(set(dims))}")
        self.dims = tuple(dims)
        self.weight = weight
        self.losses = nn.ModuleList(make_loss(dim) for dim in dims if dim < embedding_dim)
        # In a tuple, where torch does not look for submodules: its buffers are the method's.
        self._miner = (miner,)

    def term(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
        if self.dims[-1] > points.shape[1]:
            raise ValueError(
                f"matryoshka: dims = {list(self.dims)}, and embeddings have {points.shape[1]} dimensions: leave the "
                "longer prefixes out, or raise embedding_dim"
            )
        total = points[:0].sum()
        for dim, loss in zip(self.dims, self.losses, strict=False):  # there is none for the whole embedding
            total = total + self._loss_of(functional.normalize(points[:, :dim]), labels, loss, generator)
        return self.weight * total

    def _loss_of(self, prefix: Tensor, labels: Tensor, loss: nn.Module, generator: Generator | None) -> Tensor:
        """Return the loss of a prefix (B, d) of length 1, as an objective computes it for the whole embedding."""
        (miner,) = self._miner
        if miner is None:
            alone: Tensor = loss(prefix, labels)
            return alone
        known: dict[str, Any] = {}
        mined: dict[str, Any] = {}
        measure = shared_measure(loss, miner)
        if measure is not None:
            matrix = measure(prefix, None)
            known, mined = {"matrix": matrix}, {"matrix": matrix.detach()}
        chosen: Tensor = loss(prefix, labels, miner(prefix.detach(), labels, generator, **mined), **known)
        return chosen
