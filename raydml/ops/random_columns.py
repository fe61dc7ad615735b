"""Random draws without waiting for the GPU: columns in proportion to weights, and numbers below a bound.

Random numbers come from the generator's device (the trial's is on the CPU, so that a GPU and a CPU draw alike) and
travel to where they are used.
"""

import torch
from torch import Tensor

# How many numbers are drawn for one that is wanted, to be left with enough different ones. A batch of B items that has
# any triplet has at least 2 (B - 2) of them.
SURPLUS = 4


def draw_columns(weight: Tensor, generator: torch.Generator | None, num_draws: int = 1) -> Tensor:
    """Columns (B, num_draws) int64 of weights (B, M) >= 0, drawn in proportion, with replacement.

    Uses B * num_draws random numbers. A row whose weights are all 0 yields some column within 0..M-1, or 0 where there
    is no column at all.
    """
    num_rows, num_columns = weight.shape
    if num_columns == 0:
        return torch.zeros(num_rows, num_draws, dtype=torch.int64, device=weight.device)
    # In float64, because a running sum in float32 forgets what is lighter than 1e-7 of what came before.
    bounds = weight.cumsum(dim=1, dtype=torch.float64)
    share = uniform((num_rows, num_draws), weight.device, generator)
    total = bounds[:, -1:]
    # Never the total itself, after which no column follows.
    target = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(bounds, target, right=True).clamp(max=num_columns - 1)


def draw_different_columns(weight: Tensor, generator: torch.Generator | None, num_draws: int) -> Tensor:
    """Columns (B, num_draws) int64 of weights (B, M) >= 0, drawn in proportion, without replacement.

    In the order in which they were drawn, so that the first k of a row are a draw of k. Uses B * M random numbers (a
    race of exponential clocks). num_draws <= M; where a row has fewer positive weights than draws, its last draws are
    columns of weight 0.
    """
    clock = -torch.log1p(-uniform(tuple(weight.shape), weight.device, generator))
    tiny = torch.finfo(torch.float64).tiny
    return (weight.double() / clock.clamp(min=tiny)).topk(num_draws, dim=1).indices


def draw_different_numbers(bound: Tensor, generator: torch.Generator | None, num_draws: int) -> tuple[Tensor, Tensor]:
    """Different numbers (num_draws,) int64 out of 0..bound-1, each as likely as any other, and which of them count.

    bound: scalar int64 on the device, at most 2^53. The first that differ among 4 num_draws draws with replacement,
    which is an exact draw without replacement of as many as are found; the other rows are masked. All are found unless
    bound is smaller than num_draws, or hardly larger and both are small.
    """
    share = uniform((SURPLUS * num_draws,), bound.device, generator)
    drawn = torch.minimum((share * bound).long(), bound - 1).clamp(min=0)
    ordered, place = drawn.sort(stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    new = torch.empty_like(new).scatter(0, place, new)
    # The new ones first, in the order of the draws, so that which are left out has nothing to do with their size.
    kept = (~new).to(torch.uint8).argsort(stable=True)[:num_draws]
    return drawn[kept], new[kept] & (bound > 0)


def uniform(
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Random numbers in [0, 1) on the device."""
    source = device if generator is None else generator.device
    # Non-blocking only towards an accelerator: in the other direction the CPU could read before the copy has landed.
    return torch.rand(shape, dtype=dtype, device=source, generator=generator).to(
        device, non_blocking=source.type == "cpu"
    )
