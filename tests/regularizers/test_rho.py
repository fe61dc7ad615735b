"""Rho regularisation: which triplets are turned, how often, and what that does to a class."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raydml.ops.tuples import Triplets, all_pairs
from raydml.regularizers.rho import Rho


def _triplets(num_triplets: int = 4000) -> tuple[Triplets, Tensor]:
    """Of items 0 to 19, of 4 classes; every fifth triplet is invalid."""
    generator = torch.Generator().manual_seed(0)
    anchor = torch.randint(20, (num_triplets,), generator=generator)
    step = torch.randint(1, 5, (num_triplets,), generator=generator)
    valid = torch.arange(num_triplets) % 5 != 0
    return Triplets(anchor, (anchor + 4 * step) % 20, (anchor + 4 * step + 1) % 20, valid), torch.arange(20) % 4


def _turned(before: Triplets, after: Triplets) -> Tensor:
    return before.positive != after.positive


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.7, 1.0])
def test_as_many_are_turned_as_asked_for(probability: float) -> None:
    triplets, labels = _triplets()
    rewritten = Rho(probability=probability).rewrite(triplets, labels, torch.Generator().manual_seed(1))
    turned = _turned(triplets, rewritten)
    share = turned[triplets.valid].double().mean().item()
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 3200) ** 0.5)


def test_a_turned_triplet_pushes_the_positive_away_from_the_anchor() -> None:
    triplets, labels = _triplets()
    rewritten = Rho(probability=0.5).rewrite(triplets, labels, torch.Generator().manual_seed(1))
    turned = _turned(triplets, rewritten)
    assert turned.any()
    assert torch.equal(rewritten.anchor, triplets.anchor)
    assert torch.equal(rewritten.valid, triplets.valid)
    assert torch.equal(rewritten.positive[turned], triplets.anchor[turned])
    assert torch.equal(rewritten.negative[turned], triplets.positive[turned])
    assert all_pairs(labels).positive[rewritten.anchor, rewritten.negative][turned].all()
    for column, old in zip(rewritten, triplets, strict=True):
        assert torch.equal(column[~turned], old[~turned])
    assert not turned[~triplets.valid].any()


def test_defaults_are_the_benchmarks() -> None:
    assert Rho().probability == 0.2


def test_a_class_is_spread_out() -> None:
    """A triplet loss without rewriting draws the class together, with every triplet turned it drives it apart."""
    triplets, labels = _triplets(200)

    def spread(probability: float) -> float:
        points = torch.randn(20, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        before = torch.cdist(points, points)[all_pairs(labels).positive].mean()
        rewritten = Rho(probability=probability).rewrite(triplets, labels)
        anchor, positive, negative = (points.requires_grad_()[column] for column in rewritten[:3])
        functional.triplet_margin_loss(anchor, positive, negative, margin=5.0).backward()
        moved = points.detach() - 0.1 * points.grad
        return (torch.cdist(moved, moved)[all_pairs(labels).positive].mean() - before).item()

    assert spread(0.0) < 0 < spread(1.0)


def test_it_adds_nothing_to_the_loss_even_where_embeddings_are_not_finite() -> None:
    points = torch.full((3, 4), torch.inf, requires_grad=True)
    value = Rho()(points, torch.arange(3))
    assert value.item() == 0
    value.backward()
    assert not points.grad.any()


def test_pairs_are_refused_with_a_cure() -> None:
    labels = torch.arange(6) % 2
    with pytest.raises(ValueError, match="choose a miner that yields triplets"):
        Rho().rewrite(all_pairs(labels), labels)
