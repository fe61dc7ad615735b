"""Semi-hard mining against hand values, slow loops, the authors of MIC and another library."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import TripletMarginMiner
from scipy.stats import chisquare
from torch import Tensor

from raydml.miners.semi_hard import SemiHard
from raydml.ops.tuples import Triplets
from tests.batches import mining_batch
from tests.golden_vectors import golden_case, golden_cases
from tests.tuples import listed

CASES = golden_cases("mic_semihard_sampling")


def _distances(points: Tensor, squared: bool = False) -> list[list[float]]:
    root = 1 if squared else 0.5
    return [[float((x - y).square().sum()) ** root for y in points] for x in points]


def _pairs_of(labels: Tensor) -> list[tuple[int, int, list[int]]]:
    """Each ordered positive pair with the negatives of its anchor."""
    y = labels.tolist()
    items = range(len(y))
    return [(a, p, [n for n in items if y[n] != y[a]]) for a in items for p in items if y[a] == y[p] and a != p]


@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_pytorch_metric_learning(seed: int, margin: float) -> None:
    points, labels = mining_batch(seed)
    theirs = TripletMarginMiner(
        margin=margin, type_of_triplets="semihard", distance=LpDistance(normalize_embeddings=False)
    )
    expected = list(zip(*(column.tolist() for column in theirs(points, labels)), strict=True))
    ours = listed(SemiHard(margin=margin, squared=False)(points, labels))
    assert expected
    assert sorted(ours) == sorted(expected)


@pytest.mark.parametrize("squared", [False, True])
def test_all_against_a_slow_loop_at_any_length(squared: bool) -> None:
    points, labels = mining_batch(7)
    points = points * torch.linspace(0.5, 3, len(points), dtype=torch.float64)[:, None]
    d = _distances(points, squared)
    expected = [(a, p, n) for a, p, rest in _pairs_of(labels) for n in rest if d[a][p] < d[a][n] < d[a][p] + 0.7]
    assert expected
    assert sorted(listed(SemiHard(margin=0.7, squared=squared)(points, labels))) == expected


def test_squares_change_the_band() -> None:
    points, labels = mining_batch(7)
    plain, squared = (listed(SemiHard(squared=flag)(points, labels)) for flag in (False, True))
    assert set(plain) - set(squared)  # among distances beyond 1/2 a band of squares is the narrower one


def test_both_bounds_are_strict() -> None:
    points = torch.tensor([[0.0], [1.0], [-1.0], [1.25], [1.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 1])
    ranges = SemiHard(margin=0.5, squared=False)(points, labels)
    assert [n for a, p, n in listed(ranges) if (a, p) == (0, 1)] == [3]
    wider = SemiHard(margin=0.5 + 1e-9, squared=False)(points, labels)
    assert [n for a, p, n in listed(wider) if (a, p) == (0, 1)] == [3, 4]


@pytest.mark.parametrize("case", CASES)
def test_all_are_the_candidates_of_the_mic_release(case: dict) -> None:
    golden, margin = golden_case("mic_semihard_sampling", case["case"]), case["semihard_margin"]
    assert 0 < case["n_semihard_fallback"] < case["n_pairs"]  # both kinds of pairs
    found = torch.zeros_like(golden["semihard_neg_candidates"])
    for triplet in listed(SemiHard(margin=margin, squared=False)(golden["emb"], golden["labels"])):
        found[triplet] = True
    expected = golden["semihard_neg_candidates"] & ~golden["semihard_fallback"].bool()[:, :, None]
    assert found.sum() > 50
    assert torch.equal(found, expected)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_against_a_slow_loop(seed: int, squared: bool) -> None:
    points, labels = mining_batch(seed)
    d = _distances(points)
    expected, num_inside = [], 0
    for a, p, rest in _pairs_of(labels):
        beyond = [n for n in rest if d[a][n] > d[a][p]]
        num_inside += not beyond
        best = min(beyond, key=lambda n: d[a][n]) if beyond else max(rest, key=lambda n: d[a][n])
        expected.append((a, p, best))
    assert num_inside > 0
    assert listed(SemiHard(negatives="nearest", squared=squared)(points, labels)) == expected


def test_nearest_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [4.0], [0.5], [-1.0], [3.0]], dtype=torch.float64)
    found = listed(SemiHard(negatives="nearest")(points, torch.tensor([0, 0, 0, 1, 2, 2])))
    assert (0, 1, 5) in found  # at 3: the one at 1 is as far as the positive, not farther
    assert (0, 2, 5) in found  # none beyond 4: the farthest
    assert [(a, p) for a, p, _ in found] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (4, 5), (5, 4)]


def test_nearest_without_a_negative_yields_nothing() -> None:
    points, _ = mining_batch()
    assert listed(SemiHard(negatives="nearest")(points, torch.zeros(20, dtype=torch.int64))) == []


def _draws(num_draws: int, points: Tensor, labels: Tensor, **settings: object) -> Triplets:
    """As many batches, one row each."""
    miner, generator = SemiHard(negatives="random", **{"squared": False, **settings}), torch.Generator().manual_seed(0)
    return Triplets(*map(torch.stack, zip(*[miner(points, labels, generator) for _ in range(num_draws)], strict=True)))


@pytest.mark.parametrize("case", CASES)
def test_random_draws_from_the_candidates_of_the_mic_release(case: dict) -> None:
    golden, margin = golden_case("mic_semihard_sampling", case["case"]), case["semihard_margin"]
    drawn = _draws(600, golden["emb"], golden["labels"], margin=margin)
    assert torch.equal(drawn.anchor[0], torch.arange(len(golden["labels"])))
    candidates, evenness = golden["semihard_neg_candidates"], []
    for a, mates in enumerate(golden["pos_candidates"]):
        positives = drawn.positive[:, a]
        if not mates.any():
            assert not drawn.valid[:, a].any()
            continue
        assert drawn.valid[:, a].all()
        assert set(positives.tolist()) == set(mates.nonzero().flatten().tolist())
        evenness.append(chisquare(positives.bincount(minlength=len(mates))[mates]).pvalue)
        for p in mates.nonzero().flatten().tolist():
            count = drawn.negative[:, a][positives == p].bincount(minlength=len(mates))
            assert not count[~candidates[a, p]].any()
            evenness.append(chisquare(count[candidates[a, p]]).pvalue if candidates[a, p].sum() > 1 else 1.0)
    assert len(evenness) > 50
    assert min(evenness) > 1e-3 / len(evenness)


def test_random_measures_squares_where_told() -> None:
    points = torch.tensor([[0.0], [2.0], [2.4], [2.1]], dtype=torch.float64)  # 4, 5.76 and 4.41 from the first
    labels = torch.tensor([0, 0, 1, 1])
    assert set(_draws(50, points, labels, margin=0.5).negative[:, 0].tolist()) == {2, 3}
    assert set(_draws(50, points, labels, margin=0.5, squared=True).negative[:, 0].tolist()) == {3}


def test_each_choice_says_what_it_yields() -> None:
    assert SemiHard().yields == SemiHard(negatives="nearest").yields == "triplet_ranges"
    assert SemiHard(negatives="random").yields == "triplets"


def test_a_margin_that_plays_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"negatives = 'nearest', margin = 0.3.*leave margin out"):
        SemiHard(negatives="nearest", margin=0.3)
