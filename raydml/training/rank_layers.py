"""Layers of a backbone that see the whole batch, although each rank has only its rows of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raydml.models.backbones import ModelError
from raydml.models.network import Network
from raydml.models.timm_trunk import TimmTrunk
from raydml.ops.distances import full_precision
from raydml.training.rank_group import RankGroup

_BatchNorm = nn.modules.batchnorm._BatchNorm


def spread_over_ranks(network: Network, group: RankGroup) -> None:
    """Let a network, given a rank's rows of a batch in training, compute what it does for the whole batch.

    Its head gets the features of all rows. In the backbone, each BatchNorm takes the statistics of all rows, unless it
    is frozen, and each layer that drops at random draws for all rows, so that an image meets the same numbers as with
    one rank. Other layers of a backbone that mix images, or draw random numbers, would see a rank's rows alone; none of
    ours does. Nothing changes in evaluation, and no name in the state dict. Raises ModelError for another kind of
    BatchNorm, as a network of timm may have.
    """
    if group.num_ranks == 1:
        return
    from torchvision.ops import StochasticDepth  # slow to import

    draws: tuple[type[nn.Module], ...] = (nn.modules.dropout._DropoutNd, StochasticDepth)
    if isinstance(network.trunk, TimmTrunk):
        from timm.layers import DropPath

        draws = (*draws, DropPath)
    network.gather = group.gather
    for layer in network.trunk.modules():
        if isinstance(layer, _BatchNorm):
            is_known = type(layer).forward is _BatchNorm.forward or type(layer).__name__ == "BatchNormAct2d"
            if not is_known and not network.freeze_batch_norm:
                raise ModelError(
                    f"several ranks cannot share the statistics of {type(layer).__name__}. Cure: freeze_batch_norm: "
                    "true, or one rank (machine.gpus_per_trial: 1)"
                )
            layer.forward = partial(_normalise, layer, layer.forward, group)  # type: ignore[method-assign]
        elif isinstance(layer, draws) and (layer.drop_prob if hasattr(layer, "drop_prob") else layer.p):
            layer.forward = partial(_drop, layer, layer.forward, group)


def _drop(layer: nn.Module, forward: Callable[[Tensor], Tensor], group: RankGroup, values: Tensor) -> Tensor:
    if not layer.training:
        return forward(values)
    is_last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    num_rows, rows = group.drawn
    whole = torch.ones((num_rows, *values.shape[1:]), dtype=values.dtype, device=values.device)
    # Numbers are drawn in the order of the memory.
    whole = whole.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    return values * forward(whole)[rows]


def _normalise(layer: _BatchNorm, forward: Callable[[Tensor], Tensor], group: RankGroup, values: Tensor) -> Tensor:
    if not layer.training:
        return forward(values)
    with torch.autocast(values.device.type, enabled=False):
        output, mean, variance = _Normalise.apply(full_precision(values), layer.weight, layer.bias, layer.eps, group)
    if layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        share = layer.momentum if layer.momentum is not None else 1 / float(layer.num_batches_tracked)
        number = _number(values, group)
        layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
        layer.running_var.lerp_((variance * (number / max(number - 1, 1))).to(layer.running_var.dtype), share)
    result: Tensor = output.to(values.dtype)
    for name in ("drop", "act") if hasattr(layer, "act") else ():  # timm's BatchNormAct2d goes on with these
        result = layer.get_submodule(name)(result)
    return result


def _number(values: Tensor, group: RankGroup) -> int:
    """Return how many values of each channel the whole batch has."""
    return group.num_rows * values[0, 0].numel()


class _Normalise(torch.autograd.Function):
    """Batch normalisation (Ioffe & Szegedy, ICML 2015) of values (B, C, ...) by the statistics of all ranks.

    The mean comes first and the variance from the differences to it, which is as exact as with one rank.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: RankGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        dims, number = _all_but_channels(values), _number(values, group)
        mean = group.sum(values.sum(dims)) / number
        centred = values - _along(mean, values)
        variance = group.sum(centred.square().sum(dims)) / number
        scale = (variance + eps).rsqrt()
        standard = centred.mul_(_along(scale, values))
        ctx.save_for_backward(standard, scale, weight)
        ctx.group, ctx.number = group, number
        output = standard if weight is None else standard * _along(weight, values)
        output = output.clone() if bias is None else output + _along(bias, values)
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_of_statistics: Tensor) -> tuple[Tensor | None, ...]:
        standard, scale, weight = ctx.saved_tensors
        dims = _all_but_channels(standard)
        of_bias, of_weight = gradient.sum(dims), (gradient * standard).sum(dims)  # of the rows of this rank
        sums = ctx.group.sum(torch.stack([of_bias, of_weight])) / ctx.number
        of_values = gradient - _along(sums[0], standard) - standard * _along(sums[1], standard)
        factor = scale if weight is None else scale * weight
        of_values = of_values * _along(factor, standard)
        return of_values, None if weight is None else of_weight, None if weight is None else of_bias, None, None


def _all_but_channels(values: Tensor) -> list[int]:
    return [0, *range(2, values.ndim)]


def _along(of_channels: Tensor, values: Tensor) -> Tensor:
    return of_channels.view(1, -1, *[1] * (values.ndim - 2))
