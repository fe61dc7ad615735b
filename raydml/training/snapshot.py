"""Copies of a trial's state that stay as they are while the trial goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Snapshots:
    """Copies states to the CPU, into the memory of the copy before where shapes, types and layouts are the same.

    Fresh memory costs several times what the copy itself does, and page-locked memory, into which a GPU copies at full
    speed, much more. A copy is valid until the next one is taken.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[Any, ...], Tensor] = {}

    def take(self, value: Any) -> Any:
        """Return a copy on the CPU of tensors inside dictionaries, lists and tuples; numpy arrays become tensors.

        Waits until a GPU has copied its part.
        """
        held: dict[tuple[Any, ...], Tensor] = {}
        copied = self._copied(value, (), held)
        self._held = held  # what the state has no longer is given back
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copied

    def _copied(self, value: Any, place: tuple[Any, ...], held: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
        if isinstance(value, Tensor):
            source = value.detach()
            buffer = self._held.get(place)
            if buffer is None or not _fits(buffer, source):
                buffer = torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
            held[place] = buffer
            return buffer.copy_(source, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copied(item, (*place, key), held) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(item, (*place, index), held) for index, item in enumerate(value))
        return value


def _fits(buffer: Tensor, source: Tensor) -> bool:
    return buffer.shape == source.shape and buffer.dtype == source.dtype and buffer.stride() == source.stride()


def copy_of(value: Any) -> Any:
    """Return a copy of a state in fresh memory, see `Snapshots.take`."""
    return Snapshots().take(value)
