"""Cross-batch memory against a slow list of what was seen, and against another library."""

import math
from typing import ClassVar

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.losses import CrossBatchMemory as TheirMemory
from torch import Tensor, nn

from raydml import registry
from raydml.losses.contrastive import Contrastive
from raydml.miners.distance_weighted import DistanceWeighted
from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.ops.tuples import Pairs, all_pairs
from raydml.regularizers.cross_batch_memory import CrossBatchMemory
from tests.batches import unit_batch
from tests.losses.oracles import value_and_gradient
from tests.products import CountedProducts

DIM = 5


class _Pull(nn.Module):
    """Sum of (1 - s)^2 over positive and s^2 over negative pairs, divided by the number of anchors."""

    accepts: ClassVar[tuple[str, ...]] = ("pairs",)

    def forward(self, embeddings: Tensor, labels: Tensor, tuples: Pairs, references: Tensor) -> Tensor:
        self.references, self.pairs = references, tuples
        products = embeddings @ references.T
        pulled = (1 - products).square().masked_fill(~tuples.positive, 0)
        pushed = products.square().masked_fill(~tuples.negative, 0)
        return (pulled + pushed).sum() / max(len(labels), 1)


def _batches(num_batches: int, batch_size: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_batches, batch_size, DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (num_batches, batch_size), generator=generator)
    return list(zip(points, labels, strict=True))


def _slow(points: Tensor, labels: Tensor, seen: list[tuple[Tensor, int]]) -> Tensor:
    """_Pull of a batch against (embedding, label) pairs, of which the last are the batch itself."""
    total = points.sum() * 0
    first_own = len(seen) - len(points)
    for i in range(len(points)):
        for j, (other, label) in enumerate(seen):
            product = (points[i] * other).sum()
            if label != labels[i]:
                total = total + product**2
            elif j != first_own + i:
                total = total + (1 - product) ** 2
    return total / len(points)


@pytest.mark.parametrize("size", [4, 9, 100])
@pytest.mark.parametrize("start_step", [0, 2])
def test_against_a_slow_list_of_what_was_seen(start_step: int, size: int) -> None:
    memory = CrossBatchMemory(DIM, _Pull(), size=size, weight=0.7, start_step=start_step).double()
    seen: list[tuple[Tensor, int]] = []
    for step, (points, labels) in enumerate(_batches(7), start=1):
        value, gradient = value_and_gradient(memory, points, labels)
        if step <= start_step:
            assert value.item() == 0
            assert not gradient.any()
            continue
        seen = [*seen, *zip(points, labels.tolist(), strict=True)][-size:]
        expected, slow_gradient = value_and_gradient(_slow, points, labels, seen)
        torch.testing.assert_close(value, 0.7 * expected)
        torch.testing.assert_close(gradient, 0.7 * slow_gradient)


def test_batches_of_changing_size() -> None:
    memory = CrossBatchMemory(DIM, _Pull(), size=8, start_step=0).double()
    seen: list[tuple[Tensor, int]] = []
    for batch_size in (3, 8, 1, 5, 2):
        points, labels = _batches(1, batch_size, seed=batch_size)[0]
        seen = [*seen, *zip(points, labels.tolist(), strict=True)][-8:]
        torch.testing.assert_close(memory(points, labels), _slow(points, labels, seen))


def test_defaults_are_the_releases() -> None:
    memory = CrossBatchMemory(DIM, _Pull())
    assert (memory.size, memory.weight, memory.start_step) == (8192, 1, 1000)


def test_copies_of_an_image_are_positives_the_anchors_own_slot_is_not() -> None:
    loss = _Pull()
    memory = CrossBatchMemory(DIM, loss, size=6, start_step=0)
    points, labels = torch.ones(2, DIM), torch.tensor([1, 1])
    memory(points, labels)
    assert loss.pairs.positive.int().tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    memory(points, labels)
    assert loss.pairs.positive.int().tolist() == [[1, 1, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert not loss.pairs.negative.any()  # what was never written is not a negative


def test_class_zero_counts_like_any_other() -> None:
    loss = _Pull()
    memory = CrossBatchMemory(DIM, loss, size=4, start_step=0)
    memory(torch.ones(2, DIM), torch.tensor([0, 0]))
    memory(torch.ones(1, DIM), torch.tensor([1]))
    assert loss.pairs.negative.tolist() == [[True, True, False, False]]


def test_what_is_remembered_has_no_gradient() -> None:
    memory = CrossBatchMemory(DIM, _Pull(), size=4, start_step=0)
    memory(torch.ones(2, DIM, requires_grad=True), torch.tensor([0, 1]))
    assert not memory.embeddings.requires_grad
    assert memory.embeddings.tolist() == [[1.0] * DIM] * 2 + [[0.0] * DIM] * 2
    assert memory.labels.tolist() == [0, 1, -1, -1]


def test_a_miner_of_pairs_chooses_among_the_memory() -> None:
    loss, miner = _Pull(), MultiSimilarityMiner(epsilon=0.3)
    memory = CrossBatchMemory(DIM, loss, miner, size=12, start_step=0).double()
    everything = CrossBatchMemory(DIM, _Pull(), size=12, start_step=0).double()
    fewer = 0
    for points, labels in _batches(4):
        everything(points, labels)
        memory(points, labels)
        candidates = everything._chosen[0].pairs
        mined = miner(points, labels, None, candidates, references=memory.embeddings)
        assert all(map(torch.equal, loss.pairs, mined))
        fewer += sum(int((old & ~new).sum()) for old, new in zip(candidates, mined, strict=True))
    assert fewer > 0


def test_a_loss_and_a_miner_of_one_measure_share_the_products_with_the_memory() -> None:
    points, labels = unit_batch(dim=DIM)
    loss, miner = registry.build("losses", "multi_similarity"), MultiSimilarityMiner()
    memory = CrossBatchMemory(DIM, loss, miner, size=len(points), start_step=0).double()
    with CountedProducts() as products:
        found = value_and_gradient(memory, points, labels)
    assert products.count == 2
    remembered = memory.embeddings  # it holds this batch alone, in order
    assert torch.equal(remembered, points)
    pairs = miner(points, labels, None, all_pairs(labels), references=remembered)
    expected = value_and_gradient(lambda leaf: loss(leaf, labels, pairs, references=remembered), points)
    assert expected[1].any()
    assert all(map(torch.equal, found, expected))


def test_a_miner_of_triplets_is_left_to_the_batch() -> None:
    points, labels = _batches(1)[0]
    alone = CrossBatchMemory(DIM, _Pull(), size=8, start_step=0)(points, labels)
    assert torch.equal(CrossBatchMemory(DIM, _Pull(), DistanceWeighted(), size=8, start_step=0)(points, labels), alone)


@pytest.mark.parametrize("form", [{}, {"positive_margin": 0.4}, {"negative_margin": 2.0}])
def test_pytorch_metric_learning(form: dict[str, float]) -> None:
    margins = {"pos_margin": form.get("positive_margin", 0.0), "neg_margin": form.get("negative_margin", 1.0)}
    loss = ContrastiveLoss(**margins, distance=LpDistance(normalize_embeddings=False))
    theirs = TheirMemory(loss, DIM, memory_size=10)
    ours = CrossBatchMemory(DIM, Contrastive(average_over="active", **form), size=10, start_step=0).double()  # type: ignore[arg-type]
    for points, labels in _batches(6):
        found, expected = (value_and_gradient(memory, points / 2, labels) for memory in (ours, theirs))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "name", [name for name in registry.names("losses") if "pairs" in registry.load("losses", name).accepts]
)
def test_no_loss_costs_anything_before_the_memory_starts(name: str) -> None:
    loss = registry.build("losses", name, num_classes=3, embedding_dim=DIM)
    memory = CrossBatchMemory(DIM, loss, size=30, start_step=1)
    values = []
    for points, labels in _batches(4, batch_size=12):
        value, gradient = value_and_gradient(memory, torch.nn.functional.normalize(points.float(), dim=1), labels)
        assert gradient.isfinite().all()
        values.append(value.item())
        if len(values) == 1:
            assert not gradient.any()
    assert values[0] == 0
    assert all(math.isfinite(value) for value in values)
    assert any(values)


def test_a_batch_that_does_not_fit_is_refused_with_a_cure() -> None:
    memory = CrossBatchMemory(DIM, _Pull(), size=3)
    with pytest.raises(ValueError, match=r"size = 3 is less than the 4 embeddings of a batch.* set size to 4"):
        memory(torch.ones(4, DIM), torch.arange(4))
