"""Cross-batch memory: Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from raydml.ops.distances import shared_measure
from raydml.ops.tuples import Pairs
from raydml.regularizers._base import Regularizer

NEVER = -1  # the label of a slot that nothing was written to


class CrossBatchMemory(Regularizer):
    """Cross-batch memory (XBM): the trial's loss once more, against embeddings of the last batches.

    Keeps the last `size` embeddings and labels that the network gave, without gradient. Each step the batch is written
    first, over the oldest, then

        weight * loss(batch as anchors, memory as the other side)

    over all pairs with the memory, or, where the trial's miner yields pairs, over those of them that it chooses. The
    loss of the batch alone is computed beside it, as always.

    Nothing is remembered in the first start_step steps, in which embeddings drift fast: the term is 0 then, and the
    memory begins to fill after, as in the authors' release. Departures: an anchor is kept from being its own positive
    by its slot, not by "similarity < 1 - 1e-5"; the memory is a ring, where the release overwrites its last rows when a
    batch does not fit; its test for a full memory looks for a label other than 0, ours counts class 0 like any other.
    """

    needs_pairs: ClassVar[bool] = True

    embeddings: Tensor
    labels: Tensor
    num_steps: Tensor
    num_written: Tensor

    def __init__(
        self,
        embedding_dim: int,
        loss: nn.Module,
        miner: nn.Module | None = None,
        *,
        size: Annotated[
            int, Field(ge=1, description="number of embeddings in the memory; 8192 is the release's default")
        ] = 8192,
        weight: Annotated[float, Field(ge=0, description="multiplies the loss; 1 in the release")] = 1.0,
        start_step: Annotated[
            int,
            Field(
                ge=0, description="steps before the memory fills; 1000 in the release's sample file, 2000 its default"
            ),
        ] = 1000,
    ) -> None:
        super().__init__()
        self.size = size
        self.weight = weight
        self.start_step = start_step
        # In a tuple, where torch does not look for submodules: their parameters are the method's.
        self._chosen = (loss, miner if getattr(miner, "yields", None) == "pairs" else None)
        self._measure = shared_measure(*self._chosen)
        self.register_buffer("embeddings", torch.zeros(size, embedding_dim))
        self.register_buffer("labels", torch.full((size,), NEVER))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_written", torch.zeros((), dtype=torch.int64))

    def term(self, points: Tensor, labels: Tensor, generator: Generator | None) -> Tensor:
        if len(labels) > self.size:
            raise ValueError(
                f"cross_batch_memory: size = {self.size} is less than the {len(labels)} embeddings of a batch, which "
                f"the memory holds first of all: set size to {len(labels)} at least"
            )
        loss, miner = self._chosen
        slots = self._write(points.detach(), labels)
        pairs = self._pairs(labels, slots)
        references = self.embeddings.to(points.dtype)
        known = {}
        if miner is not None:
            mined = {}
            if self._measure is not None:
                matrix = self._measure(points, references)
                known, mined = {"matrix": matrix}, {"matrix": matrix.detach()}
            pairs = miner(points.detach(), labels, generator, pairs, references=references, **mined)
        term: Tensor = loss(points, labels, pairs, references=references, **known)
        return self.weight * term

    @torch.no_grad()
    def _write(self, points: Tensor, labels: Tensor) -> Tensor:
        """Write the batch over the oldest slots and return where: (B,) int64. Before start_step the label is NEVER."""
        self.num_steps += 1
        started = self.num_steps > self.start_step
        slots = (self.num_written + torch.arange(len(labels), device=labels.device)) % self.size
        # Out of place: the last step's memory may still be needed for its gradients.
        self.embeddings = self.embeddings.index_copy(0, slots, points.to(self.embeddings.dtype))
        self.labels = self.labels.index_copy(0, slots, torch.where(started, labels, NEVER))
        self.num_written += len(labels)
        return slots

    def _pairs(self, labels: Tensor, slots: Tensor) -> Pairs:
        """Masks (B, size) of all pairs of the batch with the memory, without an anchor's own slot."""
        same = labels[:, None] == self.labels
        return Pairs(positive=same.scatter(1, slots[:, None], False), negative=~same & (self.labels != NEVER))
