"""The Recall@k surrogate against hand values, a slow loop and recall itself."""

import math

import pytest
import torch
from torch import Tensor

from raydml import registry
from raydml.errors import ConfigError
from raydml.losses import recall_at_k
from raydml.losses.recall_at_k import RecallAtK
from raydml.ops.tuples import all_pairs
from tests.batches import uneven_batch
from tests.losses.oracles import pairs_of, random_kinds, value_and_gradient


def _slow(
    cosine: Tensor, kind: Tensor, ks: tuple[int, ...], rank_temperature: float = 1.0, temperature: float = 0.01
) -> Tensor:
    """Kind 1 is a positive, 2 a negative. In the graph of the cosines."""
    losses = []
    for i in range(len(kind)):
        positives = [j for j in range(kind.shape[1]) if kind[i, j] == 1]
        retrieved = [j for j in range(kind.shape[1]) if kind[i, j] in (1, 2)]
        if not positives:
            continue
        ranks = []
        for j in positives:
            rank = torch.ones((), dtype=cosine.dtype)
            for other in retrieved:
                if other != j:
                    rank = rank + 1 / (1 + torch.exp(-(cosine[i, other] - cosine[i, j]) / temperature))
            ranks.append(rank)
        for k in ks:
            found = sum(1 / (1 + torch.exp(-(k - rank) / rank_temperature)) for rank in ranks)
            recall = found / min(k, len(positives))
            losses.append(1 - recall if recall < 1 else 0 * recall)
    return torch.stack(losses).mean()


def test_by_hand() -> None:
    points = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 0.5]], dtype=torch.float64)
    value = RecallAtK(ks=(1, 2), rank_temperature=2.0, temperature=0.5)(points, torch.tensor([0, 0, 1]))
    # Cosines: 0.6 of the positives; of the negatives 0 with the first and 0.8 with the second. The third has none.
    ranks = [1 + 1 / (1 + math.exp(-(cosine - 0.6) / 0.5)) for cosine in (0.0, 0.8)]
    recalls = [1 / (1 + math.exp(-(k - rank) / 2)) for rank in ranks for k in (1, 2)]
    assert value.item() == pytest.approx(1 - sum(recalls) / 4, rel=1e-12)


def test_defaults_are_the_papers() -> None:
    loss = RecallAtK()
    assert (loss.ks, loss.rank_temperature, loss.temperature) == ((1, 2, 4, 8, 16), 1.0, 0.01)


@pytest.mark.parametrize("most_differences", [2**24, 5 * 9 * 9, 4 * 9])
def test_a_slow_loop_over_chosen_pairs_with_references(most_differences: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, five anchors at a time, and four columns of one anchor at a time."""
    monkeypatch.setattr(recall_at_k, "MOST_DIFFERENCES", most_differences)
    points, memory = uneven_batch()[0], uneven_batch(1)[0][:9]
    kind = random_kinds()
    loss = RecallAtK(ks=(1, 3), rank_temperature=0.7, temperature=0.1)
    value, gradient = value_and_gradient(loss, points, torch.arange(14), pairs_of(kind), memory)

    def slow(leaf: Tensor) -> Tensor:
        cosine = torch.nn.functional.cosine_similarity(leaf[:, None], memory[None], dim=2)
        return _slow(cosine, kind, (1, 3), 0.7, 0.1)

    expected, slow_gradient = value_and_gradient(slow, points)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-10)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_the_gradient_through_both_sides_of_a_batch(temperature: float) -> None:
    points, labels = uneven_batch()
    value, gradient = value_and_gradient(RecallAtK(temperature=temperature), points, labels)
    positive, negative = all_pairs(labels)

    def slow(leaf: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(leaf)
        return _slow(unit @ unit.T, positive + 2 * negative.long(), (1, 2, 4, 8, 16), temperature=temperature)

    expected, slow_gradient = value_and_gradient(slow, points)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-10)
    assert gradient.abs().max() > 1e-3


def test_more_positives_than_k_never_count_for_more_than_all() -> None:
    """20 positives alike: each has rank 10.5, and their soft count at 16 is 19.9, of which 16 can be found."""
    points = torch.ones(21, 5, dtype=torch.float64)
    labels = torch.zeros(21, dtype=torch.int64)
    assert 20 / (1 + math.exp(-(16 - 10.5))) > 16
    assert RecallAtK(ks=(16,))(points, labels).item() == pytest.approx(0, abs=1e-12)


def test_cold_it_is_recall() -> None:
    points, labels = uneven_batch(4)
    cosine = torch.nn.functional.cosine_similarity(points[:, None], points[None], dim=2)
    recalls = []
    for i in range(12):  # the last two are alone in their classes
        order = [j for j in cosine[i].argsort(descending=True).tolist() if j != i]
        found = [bool(labels[j] == labels[i]) for j in order]
        # A rank of exactly k is half found: sigmoid(0).
        recalls += [(sum(found[: k - 1]) + found[k - 1] / 2) / min(k, sum(found)) for k in (1, 2, 5)]
    value = RecallAtK(ks=(1, 2, 5), rank_temperature=1e-3, temperature=1e-7)(points, labels)
    assert value.item() == pytest.approx(1 - sum(recalls) / 36, rel=1e-9)


def test_ks_must_rise() -> None:
    with pytest.raises(ValueError, match=r"ks = \[4, 1, 4\]: they must rise; write \[1, 4\]"):
        RecallAtK(ks=(4, 1, 4))


@pytest.mark.parametrize("ks", [[], [0, 1], [1.5], 4])
def test_other_ks_are_refused(ks: object) -> None:
    with pytest.raises(ConfigError, match=r"recall_at_k\.ks"):
        registry.build("losses", "recall_at_k", ks=ks)


def test_a_list_from_a_file_is_taken() -> None:
    assert registry.build("losses", "recall_at_k", ks=[1, 10]).ks == (1, 10)
