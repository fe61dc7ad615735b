"""Softmax against hand values and the released implementation's numbers."""

import math

import pytest
import torch

from raydml.losses.softmax import Softmax
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden, seeded


def test_by_hand() -> None:
    loss = Softmax(2, 2).double()
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        loss.bias.copy_(torch.tensor([0.0, 0.5]))
    points = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # Logits (3, 0.5) for the first, (0, 2.5) for the second.
    expected = (math.log1p(math.exp(-2.5)) + math.log1p(math.exp(2.5))) / 2
    assert loss(points, torch.tensor([0, 0])).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", golden_cases("mic_crossentropy"))
def test_release(case: dict) -> None:
    check_golden(Softmax(case["n_classes"], case["dim"]).double(), "mic_crossentropy", case)


def test_it_starts_as_a_linear_layer() -> None:
    loss, linear = seeded(Softmax, 3000, 16), seeded(torch.nn.Linear, 16, 3000)
    for ours, theirs in ((loss.weight, linear.weight), (loss.bias, linear.bias)):
        assert ours.shape == theirs.shape
        assert 0.24 < ours.abs().max().item() <= 0.25
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def test_float32_parameters_serve_float64_embeddings() -> None:
    loss = Softmax(3, 4)
    points, labels = torch.eye(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    value = loss(points, labels)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, loss.double()(points, labels))
