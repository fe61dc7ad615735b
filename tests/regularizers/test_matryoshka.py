"""Matryoshka against slow loops over the prefixes, and the losses that it makes for them."""

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from raydml import registry
from raydml.losses.multi_similarity import MultiSimilarity
from raydml.losses.normalized_softmax import NormalizedSoftmax
from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.ops.tuples import Pairs
from raydml.regularizers.matryoshka import Matryoshka
from tests.batches import uneven_batch
from tests.losses.oracles import value_and_gradient
from tests.products import CountedProducts

DIM = 5  # of uneven_batch


class _Pull(nn.Module):
    """Sum of (1 - s)^2 over positive pairs, of all or of the chosen ones, with products s; keeps what it was given."""

    accepts: ClassVar[tuple[str, ...]] = ("pairs",)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: Pairs | None = None) -> Tensor:
        self.given, self.tuples = embeddings.detach(), tuples
        same = (labels[:, None] == labels).triu(diagonal=1)
        chosen = same if tuples is None else tuples.positive
        return (1 - embeddings @ embeddings.T).square().masked_fill(~chosen, 0).sum()


class _Nearby(nn.Module):
    """A miner of the positive pairs whose product is above a number that depends on nothing."""

    yields = "pairs"

    def forward(self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Pairs:
        self.given, self.generator = embeddings, generator
        same = (labels[:, None] == labels).triu(diagonal=1)
        return Pairs(same & (embeddings @ embeddings.T > 0.1), torch.zeros_like(same))


def _slow(points: Tensor, labels: Tensor, dims: tuple[int, ...], above: float = -2.0) -> Tensor:
    total = points.sum() * 0
    for dim in dims:
        for i in range(len(points)):
            for j in range(i):
                one, other = points[i, :dim], points[j, :dim]
                cosine = (one * other).sum() / (one.square().sum() * other.square().sum()).sqrt()
                if labels[i] == labels[j] and cosine > above:
                    total = total + (1 - cosine) ** 2
    return total


@pytest.mark.parametrize("dims", [(2,), (1, 3), (2, 4, DIM)])
def test_against_a_slow_loop(dims: tuple[int, ...]) -> None:
    """The whole embedding in dims adds nothing: its loss is the trial's."""
    points, labels = uneven_batch()
    value, gradient = value_and_gradient(Matryoshka(DIM, _Pull, dims=dims, weight=0.7), points, labels)
    shorter = tuple(dim for dim in dims if dim < DIM)
    expected, slow_gradient = value_and_gradient(lambda leaf: 0.7 * _slow(leaf, labels, shorter), points)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-10)
    assert gradient.abs().max() > 1e-2


def test_the_miner_chooses_on_each_prefix_of_length_one() -> None:
    points, labels = uneven_batch()
    miner, generator = _Nearby(), torch.Generator()
    term = Matryoshka(DIM, _Pull, miner, dims=(2, 4))
    value, gradient = value_and_gradient(term, points, labels, generator)
    expected, slow_gradient = value_and_gradient(lambda leaf: _slow(leaf, labels, (2, 4), above=0.1), points)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-10)
    assert not torch.equal(term.losses[0].tuples.positive, term.losses[1].tuples.positive)
    assert miner.generator is generator
    assert not miner.given.requires_grad
    torch.testing.assert_close(miner.given.norm(dim=1), torch.ones(14, dtype=torch.float64))


def test_a_loss_and_a_miner_that_read_one_matrix_compute_it_once_a_prefix() -> None:
    points, labels = uneven_batch()
    miner = MultiSimilarityMiner()
    term = Matryoshka(DIM, lambda _dim: MultiSimilarity(), miner, dims=(2, 4))
    with CountedProducts() as counted:
        value = term(points, labels)
    assert counted.count == 2
    parts = [nn.functional.normalize(points[:, :dim]) for dim in (2, 4)]
    expected = sum(MultiSimilarity()(part, labels, miner(part, labels)) for part in parts)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_each_prefix_has_class_vectors_of_its_own() -> None:
    """The paper's MRL, not MRL-E: they are no slices of each other, and each learns from its prefix alone."""

    def make_loss(dim: int) -> nn.Module:
        return NormalizedSoftmax(6, dim)

    points, labels = uneven_batch()
    term = Matryoshka(DIM, make_loss, dims=(2, 4, DIM)).double()
    shapes = {key: tuple(parameter.shape) for key, parameter in term.named_parameters()}
    assert shapes == {"losses.0.weight": (6, 2), "losses.1.weight": (6, 4)}
    short, long = (loss.weight.detach() for loss in term.losses)
    assert not torch.allclose(short, long[:, :2])
    term(points, labels).backward()
    for dim, loss in zip((2, 4), term.losses, strict=True):
        vectors = loss.weight.detach().clone().requires_grad_()
        logits = nn.functional.normalize(points[:, :dim]) @ nn.functional.normalize(vectors).T / loss.temperature
        nn.functional.cross_entropy(logits, labels).backward()
        torch.testing.assert_close(loss.weight.grad, vectors.grad, rtol=1e-8, atol=1e-12)


def test_by_hand() -> None:
    points = torch.tensor([[3.0, 4.0, 7.0], [1.0, 0.0, -2.0]], dtype=torch.float64)
    # The first coordinates agree in sign; (3, 4) and (1, 0) have the cosine 0.6.
    value = Matryoshka(3, _Pull, dims=(1, 2), weight=0.5)(points, torch.tensor([0, 0]))
    assert value.item() == pytest.approx(0.5 * (0 + 0.4**2), rel=1e-12)


def test_an_empty_prefix_has_a_finite_gradient() -> None:
    points = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], requires_grad=True)
    value = Matryoshka(3, _Pull, dims=(2,))(points, torch.tensor([0, 0]))
    value.backward()
    assert math.isfinite(value.item())
    assert points.grad.isfinite().all()


def test_dims_must_rise() -> None:
    with pytest.raises(ValueError, match=r"dims = \[4, 2\]: they must rise; write \[2, 4\]"):
        Matryoshka(DIM, _Pull, dims=(4, 2))


def test_a_prefix_longer_than_the_embedding_is_refused() -> None:
    points, labels = uneven_batch()
    with pytest.raises(ValueError, match=r"dims = \[2, 6\], and embeddings have 5 dimensions"):
        Matryoshka(DIM, _Pull, dims=(2, 6))(points, labels)


def test_lists_from_a_file_are_taken() -> None:
    context: dict[str, Any] = {"embedding_dim": 128, "make_loss": _Pull, "miner": None}
    assert registry.build("regularizers", "matryoshka", **context, dims=[8, 16]).dims == (8, 16)
    assert [loss.dim for loss in registry.build("regularizers", "matryoshka", **context).losses] == [32, 64]
