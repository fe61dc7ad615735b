"""FastAP against hand values, a slow loop and another library."""

import pytest
import torch
from pytorch_metric_learning.losses import FastAPLoss

from raydml.losses import fast_ap
from raydml.losses.fast_ap import FastAp
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import uneven_batch
from tests.losses.oracles import check_library, pairs_of, random_kinds, value_and_gradient


def _slow(cosines: list[list[float]], kind: list[list[int]], num_bins: int) -> float:
    """Kind 1 is a positive, 2 a negative."""
    losses = []
    for row, kinds in zip(cosines, kind, strict=True):
        histograms = {1: [0.0] * (num_bins + 1), 2: [0.0] * (num_bins + 1)}
        for s, k in zip(row, kinds, strict=True):
            if k in histograms:
                for index in range(num_bins + 1):
                    histograms[k][index] += max(0.0, 1 - abs((2 - 2 * s) * num_bins / 4 - index))
        if 1 in kinds:
            precision = 0.0
            for index in range(num_bins + 1):
                positives = sum(histograms[1][: index + 1])
                both = positives + sum(histograms[2][: index + 1])
                precision += histograms[1][index] * positives / both if both else 0
            losses.append(1 - precision / kinds.count(1))
    return sum(losses) / len(losses)


def test_by_hand() -> None:
    """With one bin, distances fall on centres 0 and 4: at cosine 0.5 three quarters of an item are at 0."""
    memory = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5], [-1.0, 0.0]], dtype=torch.float64)
    positive, negative = torch.tensor([[[False, True, False]], [[True, False, True]]])
    value = FastAp(num_bins=1)(torch.tensor([[3.0, 0.0]]).double(), torch.zeros(1), Pairs(positive, negative), memory)
    # At centre 0: 0.75 positive, 1 negative; up to centre 4: 1 and 2.
    assert value.item() == pytest.approx(1 - (0.75 * 0.75 / 1.75 + 0.25 * 1 / 3), rel=1e-12)


def test_default_is_the_papers() -> None:
    assert FastAp().num_bins == 10


@pytest.mark.parametrize("num_bins", [3, 10, 25])
@pytest.mark.parametrize("seed", range(3))
def test_pytorch_metric_learning(seed: int, num_bins: int) -> None:
    check_library(FastAp(num_bins=num_bins), FastAPLoss(num_bins=num_bins), uneven_batch(seed))


def test_a_slow_loop_over_chosen_pairs_with_references() -> None:
    points, memory = uneven_batch()[0], uneven_batch(1)[0][:9]
    kind = random_kinds()
    cosine = torch.nn.functional.cosine_similarity(points[:, None], memory[None], dim=2)
    value = FastAp(num_bins=7)(points, torch.arange(14), pairs_of(kind), memory)
    assert value.item() == pytest.approx(_slow(cosine.tolist(), kind.tolist(), 7), rel=1e-12)


def test_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    points, labels = uneven_batch()
    whole = value_and_gradient(FastAp(), points, labels)
    monkeypatch.setattr(fast_ap, "MOST_NUMBERS", 3 * 14 * 14)  # three centres at a time
    for one, other in zip(value_and_gradient(FastAp(), points, labels), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_perfect_and_hopeless_rankings() -> None:
    points = torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]
    assert FastAp()(points, torch.tensor([0, 0, 1, 1])).item() == 0
    # Before the one positive come the only two negatives, or rather one with it.
    assert FastAp()(points, torch.tensor([0, 1, 0, 1])).item() == pytest.approx(1 - 1 / 3)


def test_queries_without_positives_do_not_count() -> None:
    points, labels = uneven_batch()
    pairs = all_pairs(labels)
    rows = slice(0, 12)  # the last two are alone in their classes
    some = FastAp()(points[rows], labels[rows], Pairs(*(mask[rows] for mask in pairs)), points)
    torch.testing.assert_close(FastAp()(points, labels), some, rtol=1e-12, atol=0)
