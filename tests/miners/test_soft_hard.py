"""Soft-hard mining: candidates against the authors' code, draws against the candidates."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor

from raydml.miners.soft_hard import SoftHard
from raydml.ops.tuples import Triplets
from tests.golden_vectors import golden_case, golden_cases


def _draws(num_draws: int, points: Tensor, labels: Tensor) -> Triplets:
    """As many batches, one row each."""
    generator = torch.Generator().manual_seed(0)
    drawn = [SoftHard()(points, labels, generator) for _ in range(num_draws)]
    return Triplets(*map(torch.stack, zip(*drawn, strict=True)))


@pytest.mark.parametrize("case", golden_cases("mic_semihard_sampling"))
def test_draws_are_even_over_the_candidates_of_the_authors(case: dict) -> None:
    golden = golden_case("mic_semihard_sampling", case["case"])
    drawn = _draws(500, golden["emb"], golden["labels"])
    assert torch.equal(drawn.anchor[0], torch.arange(len(golden["labels"])))
    evenness = []
    columns = (golden[f"{kind}_candidates"] for kind in ("pos", "softhard_pos", "softhard_neg"))
    for a, (mates, positives, negatives) in enumerate(zip(*columns, strict=True)):
        assert drawn.valid[:, a].all() == mates.any()
        if not mates.any():
            continue
        for column, candidates in ((drawn.positive[:, a], positives), (drawn.negative[:, a], negatives)):
            count = column.bincount(minlength=len(mates))
            assert torch.equal(count > 0, candidates)
            evenness.append(chisquare(count[candidates]).pvalue if candidates.sum() > 1 else 1.0)
    assert len(evenness) >= 30
    assert min(evenness) > 1e-3 / len(evenness)


@pytest.mark.parametrize(
    ("points", "num_mates", "positives", "negatives"),
    [
        # From 0: positives at 1, 3, 5, negatives at 2, 4, 6. Farther than 2: 3 and 5. Nearer than 5: 2 and 4.
        ([0, 1, -3, 5, 2, -4, 6], 4, {2, 3}, {4, 5}),
        # Where none is hard, any will do.
        ([0, 1, -2, 10, 12], 3, {1, 2}, {3, 4}),
        # As far as the nearest negative is not hard.
        ([0, 1, 2, -1, 3], 3, {2}, {3}),
    ],
)
def test_by_hand(points: list[float], num_mates: int, positives: set[int], negatives: set[int]) -> None:
    labels = torch.tensor([0] * num_mates + list(range(1, len(points) - num_mates + 1)))
    drawn = _draws(60, torch.tensor(points, dtype=torch.float64)[:, None], labels)
    assert set(drawn.positive[:, 0].tolist()) == positives
    assert set(drawn.negative[:, 0].tolist()) == negatives


def test_positive_and_negative_are_drawn_independently() -> None:
    points = torch.tensor([[0.0], [3.0], [-4.0], [2.0], [-1.0]], dtype=torch.float64)
    drawn = _draws(1000, points, torch.tensor([0, 0, 0, 1, 2]))
    table = np.zeros((2, 2))
    for p, n in zip(drawn.positive[:, 0].tolist(), drawn.negative[:, 0].tolist(), strict=True):
        table[p - 1, n - 3] += 1
    assert (table > 0).all()
    assert chi2_contingency(table).pvalue > 1e-3
