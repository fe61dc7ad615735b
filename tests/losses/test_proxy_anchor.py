"""Proxy-Anchor against hand values, a slow loop and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import ProxyAnchorLoss

from raydml.losses.proxy_anchor import ProxyAnchor
from tests.batches import proxy_batch
from tests.losses.oracles import SharedWeight, check_library, cosines, seeded


def test_by_hand() -> None:
    loss = ProxyAnchor(3, 2, alpha=2, delta=0.25).double()
    with torch.no_grad():
        loss.proxies.copy_(torch.tensor([[4.0, 0.0], [0.0, 0.1], [-1.0, 0.0]]))  # lengths must not matter
    points = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # Cosines of both items, of class 0: (1, 0, -1) and (0, 1, 0). One proxy of three is present.
    pulled = math.log(1 + math.exp(-2 * (1 - 0.25)) + math.exp(-2 * (0 - 0.25)))
    pushed = [math.log(1 + sum(math.exp(2 * (s + 0.25)) for s in others)) for others in ([], [0, 1], [-1, 0])]
    assert loss(points, torch.tensor([0, 0])).item() == pytest.approx(pulled + sum(pushed) / 3, rel=1e-12)


def test_against_a_slow_loop() -> None:
    points, labels = proxy_batch()
    loss = ProxyAnchor(7, 6, alpha=5, delta=0.2).double()
    pulled, pushed, present = 0.0, 0.0, 0
    for c, proxy in enumerate(loss.proxies.tolist()):
        closeness = list(zip(cosines(proxy, points.tolist()), labels.tolist(), strict=True))
        own = [cosine for cosine, label in closeness if label == c]
        others = [cosine for cosine, label in closeness if label != c]
        present += bool(own)
        pulled += math.log(1 + sum(math.exp(-5 * (cosine - 0.2)) for cosine in own))
        pushed += math.log(1 + sum(math.exp(5 * (cosine + 0.2)) for cosine in others))
    assert present == 5
    assert loss(points, labels).item() == pytest.approx(pulled / 5 + pushed / 7, rel=1e-12)


def test_defaults_are_the_papers() -> None:
    loss = ProxyAnchor(3, 4)
    assert (loss.alpha, loss.delta) == (32, 0.1)


@pytest.mark.parametrize("settings", [{}, {"alpha": 16.0}, {"delta": 0.3}, {"delta": 0.0}])
def test_pytorch_metric_learning(settings: dict[str, float]) -> None:
    named = {"delta": "margin"}
    theirs = ProxyAnchorLoss(7, 6, **{named.get(key, key): value for key, value in settings.items()})
    ours = ProxyAnchor(7, 6, **settings).double()
    check_library(ours, theirs, proxy_batch(1), SharedWeight(ours.proxies, theirs.proxies, torch.Tensor.clone))


def test_it_does_not_overflow() -> None:
    points = torch.eye(3, 4, requires_grad=True)
    value = ProxyAnchor(3, 4, alpha=1e4)(points, torch.tensor([0, 1, 2]))
    value.backward()
    assert value.isfinite()
    assert points.grad.isfinite().all()


def test_proxies_start_by_the_he_rule_over_the_classes() -> None:
    proxies = seeded(ProxyAnchor, 3000, 16).proxies
    theirs = seeded(torch.nn.init.kaiming_normal_, torch.empty(3000, 16), mode="fan_out")
    assert proxies.shape == (3000, 16)
    assert proxies.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert proxies.abs().max().item() > 3 * theirs.std().item()  # not uniform
