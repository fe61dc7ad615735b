"""The embedding norm penalty against hand values and the sources' own forms."""

from typing import Literal

import pytest
import torch

from raydml import registry
from raydml.errors import ConfigError
from raydml.regularizers.embedding_norm import EmbeddingNorm

LABELS = torch.tensor([0, 0])


@pytest.mark.parametrize(("power", "expected"), [(1, 0.1 * (5 + 10) / 2), (2, 0.1 * (25 + 100) / 2)])
def test_by_hand(power: Literal[1, 2], expected: float) -> None:
    points = torch.tensor([[3.0, 4.0], [0.0, -10.0]], dtype=torch.float64, requires_grad=True)
    value = EmbeddingNorm(weight=0.1, power=power)(points, LABELS)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    # d|e| / de is the direction, d|e|^2 / de twice the vector; two items share the weight.
    slope = [[0.6, 0.8], [0.0, -1.0]] if power == 1 else [[6.0, 8.0], [0.0, -20.0]]
    torch.testing.assert_close(points.grad, 0.05 * torch.tensor(slope, dtype=torch.float64))


def test_defaults_are_the_benchmarks() -> None:
    points = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert EmbeddingNorm()(points, LABELS).item() == pytest.approx(0.005 * 3.5)


def test_the_form_of_the_baselines() -> None:
    """0.02 times the mean over pairs of |e_a|^2 + |e_p|^2, every item in one pair."""
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = [(0, 3), (1, 4), (2, 5)]
    expected = 0.02 * sum((points[a] ** 2).sum() + (points[p] ** 2).sum() for a, p in pairs) / 3
    value = EmbeddingNorm(weight=0.04, power=2)(points, torch.arange(6) % 3)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("power", [1, 2])
def test_at_the_origin_the_gradient_is_zero(power: Literal[1, 2]) -> None:
    points = torch.zeros(3, 4, requires_grad=True)
    EmbeddingNorm(power=power)(points, LABELS).backward()
    assert not points.grad.any()


@pytest.mark.parametrize("settings", [{"power": 3}, {"weight": -0.1}, {"power": "2"}])
def test_other_powers_and_negative_weights_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        registry.build("regularizers", "embedding_norm", **settings)
