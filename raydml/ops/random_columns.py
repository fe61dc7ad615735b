"""Random draws that do not wait for the GPU: columns in proportion to weights, and numbers below a bound.

Random numbers are drawn on the device of the generator and copied to the device where they are used. The generator of a
trial is on the CPU, so a GPU and a CPU draw the same numbers.
"""

import torch
from torch import Tensor

# Numbers drawn for each number needed, so that enough of them differ. A batch of B items with any triplet has at least
# 2 (B - 2) triplets.
SURPLUS = 4


def draw_columns(weight: Tensor, generator: torch.Generator | None, num_draws: int = 1) -> Tensor:
    """Draw columns (B, num_draws) int64 in proportion to weights (B, M) >= 0, with replacement.

    Uses B * num_draws random numbers. A row whose weights are all 0 yields any column in 0..M-1, or 0 if M is 0.
    """
    num_rows, num_columns = weight.shape
    if num_columns == 0:
        return torch.zeros(num_rows, num_draws, dtype=torch.int64, device=weight.device)
    # In float64: a running sum in float32 loses weights below 1e-7 of the sum.
    bounds = weight.cumsum(dim=1, dtype=torch.float64)
    share = uniform((num_rows, num_draws), weight.device, generator)
    total = bounds[:, -1:]
    # Less than the total, behind which there is no column.
    target = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(bounds, target, right=True).clamp(max=num_columns - 1)


def draw_different_columns(weight: Tensor, generator: torch.Generator | None, num_draws: int) -> Tensor:
    """Draw columns (B, num_draws) int64 in proportion to weights (B, M) >= 0, without replacement.

    The columns are in the order of the draws, so the first k of a row are a draw of k. Uses B * M random numbers (a
    race of exponential clocks). num_draws <= M; if a row has fewer positive weights, its last draws have weight 0.
    """
    clock = -torch.log1p(-uniform(tuple(weight.shape), weight.device, generator))
    tiny = torch.finfo(torch.float64).tiny
    return (weight.double() / clock.clamp(min=tiny)).topk(num_draws, dim=1).indices


def draw_different_numbers(bound: Tensor, generator: torch.Generator | None, num_draws: int) -> tuple[Tensor, Tensor]:
    """Draw different numbers (num_draws,) int64 from 0..bound-1, uniformly, with a mask (num_draws,) of those found.

    bound: scalar int64 on the device, at most 2^53. The first different numbers among 4 num_draws draws with
    replacement are an exact draw without replacement. All are found unless bound is smaller than num_draws, or hardly
    larger and both are small.
    """
    share = uniform((SURPLUS * num_draws,), bound.device, generator)
    drawn = torch.minimum((share * bound).long(), bound - 1).clamp(min=0)
    ordered, place = drawn.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    new = torch.empty_like(new).scatter(0, place, new)
    # New numbers first, in the order of the draws, so that the size of a number does not decide whether it is kept.
    kept = (~new).to(torch.uint8).argsort(stable=True)[:num_draws]
    return drawn[kept], new[kept] & (bound > 0)


def uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Draw random numbers in [0, 1) and copy them to the device."""
    source = device if generator is None else generator.device
    # Non-blocking only towards an accelerator: in the other direction the CPU could read before the copy is complete.
    return torch.rand(shape, dtype=dtype, device=source, generator=generator).to(
        device, non_blocking=source.type == "cpu"
    )
