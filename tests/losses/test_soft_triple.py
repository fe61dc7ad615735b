"""SoftTriple against hand values, a slow loop and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, SoftTripleLoss
from pytorch_metric_learning.regularizers import SparseCentersRegularizer

from raydml.losses.soft_triple import SoftTriple
from tests.batches import proxy_batch, random_points
from tests.losses.oracles import SharedWeight, check_library, cosines, seeded


def _unit(row: list[float]) -> list[float]:
    return [x / math.hypot(*row) for x in row]


def test_by_hand() -> None:
    loss = SoftTriple(2, 2, num_centers=2, scale=3, gamma=0.5, margin=0.1, tau=0.4).double()
    with torch.no_grad():
        # Class 0 at 0 and 90 degrees, class 1 twice at 180; lengths must not matter.
        loss.centers.copy_(torch.tensor([[[2.0, 0.0], [0.0, 0.1]], [[-1.0, 0.0], [-3.0, 0.0]]]))
    value = loss(torch.tensor([[5.0, 0.0]], dtype=torch.float64), torch.tensor([0])).item()
    own = math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0 / 0.5)) * 1  # cosines 1 and 0
    classification = math.log1p(math.exp(3 * -1 - 3 * (own - 0.1)))
    spread = (math.sqrt(2) + 0) / (2 * 2 * 1)
    # The epsilon under the root: sqrt(2 + 1e-5), and sqrt(1e-5) for the two equal centres.
    assert value == pytest.approx(classification + 0.4 * spread, abs=0.4 * math.sqrt(1e-5) / 4 + 1e-6)
    assert value > classification + 0.4 * spread


def test_against_a_slow_loop() -> None:
    points, labels = proxy_batch()
    loss = SoftTriple(5, 6, num_centers=3, scale=7, gamma=0.3, margin=0.05, tau=0.6).double()
    centers = [[_unit(row) for row in rows] for rows in loss.centers.tolist()]
    total = 0.0
    for point, label in zip(map(_unit, points.tolist()), labels.tolist(), strict=True):
        logits = []
        for c in range(5):
            closeness = cosines(point, centers[c])
            weights = [math.exp(cosine / 0.3) for cosine in closeness]
            soft = sum(w * cosine for w, cosine in zip(weights, closeness, strict=True)) / sum(weights)
            logits.append(7 * (soft - 0.05 * (c == label)))
        total += math.log(sum(math.exp(logit) for logit in logits)) - logits[label]
    spread = sum(
        math.sqrt(math.dist(rows[k], rows[j]) ** 2 + 1e-5) for rows in centers for k in range(3) for j in range(k)
    )
    assert loss(points, labels).item() == pytest.approx(total / 13 + 0.6 * spread / (5 * 3 * 2), rel=1e-12)


def test_defaults_are_the_papers() -> None:
    loss = SoftTriple(3, 4)
    assert loss.centers.shape == (3, 10, 4)
    assert (loss.scale, loss.gamma, loss.margin, loss.tau) == (20, 0.1, 0.01, 0.2)


@pytest.mark.parametrize(
    "settings", [{}, {"num_centers": 3}, {"scale": 5.0}, {"gamma": 1.0}, {"margin": 0.5}, {"margin": 0.0}]
)
def test_pytorch_metric_learning_without_the_regulariser(settings: dict[str, float]) -> None:
    named = {"num_centers": "centers_per_class", "scale": "la"}
    theirs = SoftTripleLoss(5, 6, **{named.get(key, key): value for key, value in settings.items()})
    ours = SoftTriple(5, 6, tau=0.0, **settings).double()  # type: ignore[arg-type]
    weight = SharedWeight(ours.centers, theirs.fc, lambda centers: centers.T.unflatten(0, (5, -1)))
    check_library(ours, theirs, proxy_batch(1), weight)


def test_pytorch_metric_learnings_regulariser() -> None:
    """Theirs adds another small number under the root: equal where no two centres are close."""
    points, labels = proxy_batch(2)
    settings = {"weight_regularizer": SparseCentersRegularizer(5, 4), "weight_reg_weight": 0.7}
    theirs = seeded(SoftTripleLoss, 5, 6, centers_per_class=4, **settings)
    ours = SoftTriple(5, 6, num_centers=4, tau=0.7).double()
    with torch.no_grad():
        ours.centers.copy_(theirs.fc.T.unflatten(0, (5, -1)))
    value, expected = ours(points, labels), theirs(points, labels)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.centers.grad.flatten(end_dim=1), theirs.fc.grad.T, rtol=1e-4, atol=1e-7)


def test_with_one_center_it_is_a_softmax_of_cosines() -> None:
    points, labels = proxy_batch()
    ours = SoftTriple(5, 6, num_centers=1, margin=0.0).double()
    theirs = NormalizedSoftmaxLoss(5, 6, temperature=1 / 20)
    with torch.no_grad():
        theirs.W.copy_(ours.centers[:, 0].T)
    torch.testing.assert_close(ours(points, labels), theirs(torch.nn.functional.normalize(points), labels))


@pytest.mark.parametrize(("num_centers", "together"), [(1, True), (10, False)])
def test_a_class_gathers_at_one_center_and_need_not_at_ten(num_centers: int, together: bool) -> None:
    """Four items of a class may stay with a centre each where there are ten: the loss allows it, as the paper means."""
    points, labels = random_points(16, seed=5).requires_grad_(), torch.arange(16) % 4
    loss = seeded(SoftTriple, 4, 8, num_centers=num_centers).double()
    optimizer = torch.optim.Adam([points, *loss.parameters()], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(points, labels).backward()
        optimizer.step()
    unit = torch.nn.functional.normalize(points.detach(), dim=1)
    nearest = torch.cdist(unit, unit).fill_diagonal_(math.inf).argmin(dim=1)
    assert torch.equal(labels[nearest], labels) == together


def test_equal_centers_have_finite_gradients() -> None:
    loss = SoftTriple(3, 4, num_centers=3)
    with torch.no_grad():
        loss.centers.copy_(loss.centers[:, :1].expand(-1, 3, -1))
    loss(torch.eye(3, 4), torch.tensor([0, 1, 2])).backward()
    assert loss.centers.grad.isfinite().all()


def test_an_empty_batch_costs_nothing() -> None:
    loss = SoftTriple(3, 4)
    value = loss(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert not loss.centers.grad.any()


def test_centers_start_as_in_the_release() -> None:
    centers = seeded(SoftTriple, 200, 16).centers
    theirs = seeded(torch.nn.init.kaiming_uniform_, torch.empty(16, 200 * 10), a=math.sqrt(5))
    assert centers.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert centers.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)
