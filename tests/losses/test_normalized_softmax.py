"""Normalised softmax against hand values, the authors' release and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss

from raydml.losses.normalized_softmax import NormalizedSoftmax
from tests.batches import unit_batch
from tests.golden_vectors import golden_cases, golden_facts
from tests.losses.oracles import SharedWeight, check_golden, check_library, on_the_sphere, seeded

RULE = golden_facts("classification_normsoftmax")["init_invariant"]


def test_by_hand() -> None:
    loss = NormalizedSoftmax(2, 2, temperature=0.5).double()
    with torch.no_grad():
        loss.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))  # lengths must not matter
    points = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # Logits (2, 0) for the first, (0, 4) for the second, whose own length does matter.
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(4))) / 2
    assert loss(points, torch.tensor([0, 0])).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", golden_cases("classification_normsoftmax"))
def test_release(case: dict) -> None:
    loss = NormalizedSoftmax(case["num_classes"], case["dim"], temperature=case["temperature"]).double()
    check_golden(loss, "classification_normsoftmax", case)


def test_weights_start_as_in_the_release() -> None:
    loss = seeded(NormalizedSoftmax, RULE["num_classes"], RULE["dim"])
    bound = 1 / math.sqrt(RULE["dim"])
    assert loss.temperature == RULE["default_temperature"]
    assert [key for key, _ in loss.named_parameters()] == ["weight"]  # no bias
    assert loss.weight.shape == (RULE["num_classes"], RULE["dim"])
    assert 0.99 * bound < loss.weight.abs().max().item() <= bound
    assert loss.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert loss.weight.mean().item() == pytest.approx(0, abs=bound / 50)


def test_pytorch_metric_learning() -> None:
    theirs, ours = NormalizedSoftmaxLoss(5, 6, temperature=0.1), NormalizedSoftmax(5, 6, temperature=0.1).double()
    check_library(on_the_sphere(ours), theirs, unit_batch(dim=6), SharedWeight(ours.weight, theirs.W))


def test_a_class_vector_of_length_zero_does_not_make_nan() -> None:
    loss = NormalizedSoftmax(3, 4)
    with torch.no_grad():
        loss.weight[1] = 0
    value = loss(torch.eye(3, 4), torch.tensor([0, 1, 2]))
    value.backward()
    assert value.isfinite()
    assert loss.weight.grad.isfinite().all()
