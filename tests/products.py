"""Counts matrix products, which are most of the time of a loss at large D."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class CountedProducts(TorchDispatchMode):
    """A context that counts the products of two matrices within it, those of a backward pass included."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in _PRODUCTS
        return func(*args, **(kwargs or {}))
