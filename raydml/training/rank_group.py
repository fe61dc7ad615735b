"""The ranks of a trial: processes that train one model together, each on its rows of every batch.

Each rank sends its rows of a batch through the backbone. The features of all ranks are gathered, with gradient, and
everything behind them (head, miner, loss, regularisers, what methods add) sees the whole batch on every rank, exactly
as with one. The gradient of a rank's own features flows back through its backbone, whose gradients are summed.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

Value = TypeVar("Value")
#: How long a rank waits for another one. It does not wait for one that has died: see `RankProcesses`.
_WAIT = datetime.timedelta(days=1)


class RankGroup:
    """The ranks of a trial, as one of them sees them. All methods are called by all ranks, in the same order.

    rank: the number of this process, from 0; rank 0 is the process of the trial itself. num_ranks: with 1, each method
    returns what it gets. `join` makes a group of several.

    num_rows: the images in the batch that is trained; set it before the batch goes through the network.
    """

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.num_rows = 0
        self._drawn: tuple[int, slice] | None = None

    @classmethod
    def join(cls, rank: int, num_ranks: int, file: str, backend: str) -> RankGroup:
        """Return the group once all ranks have joined it. It is torch's default group of this process until `leave`.

        file: through which the ranks find each other, on a disk that they share. backend: of torch.distributed.
        """
        store = distributed.FileStore(file, num_ranks)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=_WAIT)
        return cls(rank, num_ranks)

    def leave(self) -> None:
        """End this process's part in the group; the other ranks may have ended."""
        if self.num_ranks == 1 or not distributed.is_initialized():
            return
        if "nccl" in distributed.get_backend_config():
            distributed.distributed_c10d._abort_process_group()  # the usual end waits for sums that never come
        else:
            distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, whose results, checkpoints and decisions are those of the trial."""
        return self.rank == 0

    def rows(self, num_rows: int) -> slice:
        """Return this rank's part of so many rows: neighbours, as many as on every other rank or one more."""
        return _rows_of(self.rank, num_rows, self.num_ranks)

    @property
    def drawn(self) -> tuple[int, slice]:
        """For how many images a layer draws random numbers, and which of them this rank's images take."""
        return self._drawn or (self.num_rows, self.rows(self.num_rows))

    @contextmanager
    def drawing_for(self, num_rows: int, rows: slice) -> Iterator[None]:
        """Set `drawn` inside the block: for a part of the batch."""
        before, self._drawn = self._drawn, (num_rows, rows)
        try:
            yield
        finally:
            self._drawn = before

    def gather(self, features: Tensor) -> Tensor:
        """Return the features (num_rows, F) of the whole batch, in its order. features: those of this rank's rows.

        The loss of the whole batch is computed on every rank, so the gradient of a rank's own rows is complete there.
        """
        if self.num_ranks == 1:
            return features
        gathered: Tensor = _Gather.apply(features, self)
        return gathered

    def joined(self, part: NDArray[np.float32], num_rows: int) -> NDArray[np.float32]:
        """Return all rows of an array, given this rank's `rows` of it."""
        if self.num_ranks == 1:
            return part
        return _all_rows(torch.from_numpy(part), num_rows, self.num_ranks).numpy()

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the values of all ranks, without a gradient."""
        if self.num_ranks > 1:
            values = values.contiguous()
            distributed.all_reduce(values)
        return values

    def sum_gradients(self, of_rows: Iterable[Tensor], of_batch: Iterable[Tensor]) -> None:
        """Make the gradients of all parameters those of the whole batch, the same to the last bit on every rank.

        of_rows: parameters in front of `gather`; their gradients, of each rank's rows, are summed. of_batch: those
        behind it; their gradients are of the whole batch already, and those of rank 0 count.
        """
        if self.num_ranks == 1:
            return
        partial = [parameter.grad for parameter in of_rows if parameter.grad is not None]
        whole = [parameter.grad for parameter in of_batch if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in [*partial, *whole]])
        if not self.is_first:
            flat[sum(gradient.numel() for gradient in partial) :] = 0
        distributed.all_reduce(flat)
        for gradient, values in zip(
            [*partial, *whole], flat.split([each.numel() for each in [*partial, *whole]]), strict=True
        ):
            gradient.copy_(values.view(gradient.shape))

    def from_first(self, make: Callable[[], Value]) -> Value:
        """Return what ``make()`` returns on rank 0, on every rank; it is called there alone."""
        if self.num_ranks == 1:
            return make()
        values: list[Any] = [make() if self.is_first else None]
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
        value: Value = values[0]
        return value

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors, in place, with those of rank 0."""
        if self.num_ranks > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)


def _rows_of(rank: int, num_rows: int, num_ranks: int) -> slice:
    return slice(rank * num_rows // num_ranks, (rank + 1) * num_rows // num_ranks)


def _all_rows(part: Tensor, num_rows: int, num_ranks: int) -> Tensor:
    sizes = [rows.stop - rows.start for rows in (_rows_of(rank, num_rows, num_ranks) for rank in range(num_ranks))]
    padded = part.new_zeros((max(sizes), *part.shape[1:]))  # all ranks send as many
    padded[: len(part)] = part
    received = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(received, padded)
    return torch.cat([rows[:size] for rows, size in zip(received, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, group: RankGroup) -> Tensor:
        ctx.rows = group.rows(group.num_rows)
        return _all_rows(features, group.num_rows, group.num_ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.rows], None
