"""The comparisons that the tests of losses share: with released numbers, with another library, with slow loops."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from raydml.ops.tuples import Pairs, TripletRanges, Triplets
from tests.golden_vectors import golden_case
from tests.tuples import as_triplets, listed, random_ranges

Tuples = Pairs | Triplets | TripletRanges | None
Mine = Callable[[Tensor, Tensor], Tuples]


class SharedWeight(NamedTuple):
    """A parameter that both libraries have: ours, theirs, and the map from the shape of theirs to the shape of ours."""

    ours: nn.Parameter
    theirs: nn.Parameter
    reshape: Callable[[Tensor], Tensor] = torch.t


def seeded(build: Callable[..., Any], *arguments: object, **settings: object) -> Any:
    """Build something from the seed 0; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(*arguments, **settings)


def cosines(point: list[float], rows: list[list[float]]) -> list[float]:
    """The cosine of a vector with each row, one product at a time."""
    products = [sum(x * w for x, w in zip(point, row, strict=True)) for row in rows]
    return [product / math.hypot(*point) / math.hypot(*row) for product, row in zip(products, rows, strict=True)]


def value_and_gradient(loss: Callable[..., Tensor], points: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """The loss and its gradient with respect to the embeddings."""
    leaf = points.detach().clone().requires_grad_()
    value = loss(leaf, *rest)
    value.backward()
    return value.detach(), leaf.grad


def check_golden(loss: Callable[..., Tensor], name: str, case: dict[str, Any], tuples: Tuples | Mine = None) -> None:
    """Compare the loss, the gradient of the embeddings and those of all parameters with a case of a golden set.

    The parameters and buffers of the loss are set to the arrays of their names. tuples: what the loss is given, or a
    function of embeddings and labels that makes it.
    """
    golden = golden_case(name, case["case"])
    key = next(key for key in ("embeddings", "emb", "E") if key in golden)
    points, labels = golden[key], golden["labels"]
    state = loss.state_dict(keep_vars=True) if isinstance(loss, nn.Module) else {}
    parameters = {part: tensor for part, tensor in state.items() if tensor.requires_grad}
    with torch.no_grad():
        for part, tensor in state.items():
            if part in golden or part in parameters:
                tensor.copy_(golden[part])
    value, gradient = value_and_gradient(loss, points, labels, tuples(points, labels) if callable(tuples) else tuples)
    torch.testing.assert_close(value, golden["loss"].to(points.dtype), **case["tolerance"])
    expected = golden["grad"] if "grad" in golden else golden[f"grad_{key}"]
    torch.testing.assert_close(gradient, expected, **case["tolerance"])
    for part, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, golden[f"grad_{part}"], **case["tolerance"])


def check_library(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    batch: tuple[Tensor, Tensor],
    weight: SharedWeight | None = None,
    *,
    rtol: float = 1e-9,
    gradient_rtol: float = 1e-9,
    gradient_atol: float = 1e-12,
) -> None:
    """Compare our loss of a batch and its gradients with those of another library."""
    if weight is not None:
        with torch.no_grad():
            weight.ours.copy_(weight.reshape(weight.theirs))
    value, gradient = value_and_gradient(ours, *batch)
    expected, their_gradient = value_and_gradient(theirs, *batch)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=0)
    torch.testing.assert_close(gradient, their_gradient, rtol=gradient_rtol, atol=gradient_atol)
    if weight is not None:
        of_theirs = weight.reshape(weight.theirs.grad)
        torch.testing.assert_close(weight.ours.grad, of_theirs, rtol=gradient_rtol, atol=gradient_atol)


def on_the_sphere(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of embeddings normalised to length 1, as libraries that normalise compute it."""
    return lambda points, *rest: loss(nn.functional.normalize(points, dim=1), *rest)


def check_triplets(
    loss: nn.Module, points: Tensor, labels: Tensor, slow: Callable[[list[tuple[int, int, int]]], float]
) -> None:
    """Compare the loss of ranges, of the same triplets as a list, and of a few of them, with a slow loop over rows.

    Ranges and list also have the same gradients, of the embeddings and of the parameters.
    """
    ranges = random_ranges(points, labels)
    rows = listed(ranges)
    assert len(rows) > 2 * len(points)
    gradients = []
    for tuples in (ranges, as_triplets(rows)):
        loss.zero_grad()
        value, gradient = value_and_gradient(loss, points, labels, tuples)
        assert value.item() == pytest.approx(slow(rows), rel=1e-12)
        gradients.append(torch.cat([gradient.flatten(), *(each.grad.flatten() for each in loss.parameters())]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    for few in (rows[:11], rows[:20]):
        assert loss(points, labels, as_triplets(few)).item() == pytest.approx(slow(few), rel=1e-12)


def random_kinds() -> Tensor:
    """Kinds of pairs (14, 9) at random: 1 a positive, 2 a negative, else neither.

    Row 3 has no pair, row 5 only positives, row 6 only negatives.
    """
    kind = torch.randint(4, (14, 9), generator=torch.Generator().manual_seed(2))
    kind[3], kind[5], kind[6] = 0, 1, 2
    return kind


def pairs_of(kind: Tensor) -> Pairs:
    return Pairs(kind == 1, kind == 2)
