"""Proxy-NCA against hand values, the released implementation's numbers and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import ProxyNCALoss

from raydml.losses.proxy_nca import ProxyNCA
from tests.batches import proxy_batch
from tests.golden_vectors import golden_cases
from tests.losses.oracles import SharedWeight, check_golden, check_library, seeded


def test_by_hand() -> None:
    loss = ProxyNCA(3, 2, scale=2).double()
    with torch.no_grad():
        loss.proxies.copy_(torch.tensor([[0.1, 0.0], [0.0, 7.0], [-1.0, 0.0]]))  # lengths must not matter
    points = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    # Squared distances between vectors of length 2: 0 to the first proxy, 8 to the second, 16 to the third.
    near, far = (loss(points, torch.tensor([label])).item() for label in (0, 2))
    assert near == pytest.approx(0 + math.log(math.exp(-8) + math.exp(-16)), rel=1e-12)
    assert far == pytest.approx(16 + math.log(math.exp(-0) + math.exp(-8)), rel=1e-12)


@pytest.mark.parametrize("case", golden_cases("mic_proxynca"))
def test_release(case: dict) -> None:
    loss = ProxyNCA(case["num_proxies"], case["embedding_dim"]).double()
    assert loss.scale == case["scale"]
    check_golden(loss, "mic_proxynca", case)


@pytest.mark.parametrize("scale", [3.0, 1.5])
def test_pytorch_metric_learning(scale: float) -> None:
    """Theirs has the own proxy in the sum: an item's loss there is log(1 + exp(its loss here))."""
    points, labels = proxy_batch()
    theirs, ours = ProxyNCALoss(5, 6, softmax_scale=scale**2), ProxyNCA(5, 6, scale=scale).double()

    def each(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([ours(points[i : i + 1], labels[i : i + 1]) for i in range(13)])

    torch.testing.assert_close(ours(points, labels), each(points, labels).mean())
    weight = SharedWeight(ours.proxies, theirs.proxies, torch.Tensor.clone)
    check_library(lambda *batch: each(*batch).exp().log1p().mean(), theirs, (points, labels), weight)


def test_proxies_start_normal_with_deviation_an_eighth() -> None:
    proxies = seeded(ProxyNCA, 3000, 16).proxies
    assert proxies.shape == (3000, 16)
    assert proxies.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert proxies.abs().max().item() > 3 / 8  # not uniform


def test_a_single_class_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="num_classes = 1 leaves none: train on two classes"):
        ProxyNCA(1, 4)
