"""Distance-weighted mining: probabilities against three releases, draws against the probabilities."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from raydml.miners.distance_weighted import DistanceWeighted
from raydml.ops.tuples import all_pairs
from tests.golden_vectors import golden_case, golden_cases
from tests.tuples import listed

MULTI_SIMILARITY = golden_cases("deep_metric_margin")
DIVIDE_CONQUER = golden_cases("divide_conquer_distance_weighted")
MDR = golden_cases("mdr_distance_weighted")
VARIANTS = ["wu", "divide_conquer", "mdr"]


def _probabilities(miner: DistanceWeighted, points: Tensor, labels: Tensor) -> Tensor:
    weight = miner.weights(points, all_pairs(labels).negative)
    return weight / weight.sum(dim=1, keepdim=True)


def _fit(count: Tensor, probability: Tensor) -> float:
    """How well counts fit probabilities: the p-value of a chi-squared test, rare columns taken together."""
    likely = probability > 10 / count.sum()
    observed = torch.cat([count[likely], count[~likely].sum()[None]]).double()
    expected = torch.cat([probability[likely], probability[~likely].sum()[None]]).double()
    some = expected > 0
    assert not observed[~some].any()
    return chisquare(observed[some], expected[some] / expected.sum() * count.sum()).pvalue


@pytest.mark.parametrize("case", MULTI_SIMILARITY)
def test_probabilities_of_the_multi_similarity_release(case: dict) -> None:
    golden = golden_case("deep_metric_margin", case["case"])
    found = _probabilities(DistanceWeighted(cutoff=case["cutoff"]), golden["embeddings"], golden["labels"])
    torch.testing.assert_close(found, golden["neg_probs"], **case["tolerance"])


@pytest.mark.parametrize("case", golden_cases("mic_distance_sampling"))
def test_probabilities_of_the_mic_release(case: dict) -> None:
    golden = golden_case("mic_distance_sampling", case["case"])
    found = _probabilities(DistanceWeighted(cutoff=0.5), golden["emb"], golden["labels"])
    torch.testing.assert_close(found, golden["neg_prob"], **case["tolerance"])
    assert torch.equal(all_pairs(golden["labels"]).positive, golden["pos_candidates"])


@pytest.mark.parametrize("case", DIVIDE_CONQUER)
def test_weights_of_the_divide_and_conquer_authors(case: dict) -> None:
    golden = golden_case("divide_conquer_distance_weighted", case["case"])
    cutoffs = {"cutoff": case["cutoff"], "upper_cutoff": case["nonzero_loss_cutoff"]}
    miner = DistanceWeighted(variant="divide_conquer", **cutoffs)
    weight = miner.weights(golden["E"], all_pairs(golden["labels"]).negative)
    torch.testing.assert_close(weight, golden["weights"], **case["tolerance"])
    found = _probabilities(miner, golden["E"], golden["labels"])
    torch.testing.assert_close(found, golden["prob"], **case["tolerance"])


@pytest.mark.parametrize("case", MDR)
def test_probabilities_of_the_mdr_release(case: dict) -> None:
    """Also of float64 embeddings: float32 underflow is part of the method."""
    golden = golden_case("mdr_distance_weighted", case["case"])
    miner = DistanceWeighted(variant="mdr", cutoff=case["cut_off"], upper_cutoff=case["nonzero_loss_cutoff"])
    even = golden["uniform_fallback_float32"].bool()
    negative = all_pairs(golden["labels"]).negative
    for points in (golden["E"], golden["E"].double()):
        found = _probabilities(miner, points, golden["labels"])
        torch.testing.assert_close(found, golden["prob_float32"], **case["tolerance"])
        assert torch.equal(miner.weights(points, negative)[even], negative[even].float())
        assert (found[~even] != negative[~even] / negative[~even].sum(dim=1, keepdim=True)).any(dim=1).all()


def test_the_goldens_underflow_in_some_rows_and_in_others_not() -> None:
    names = [parameters.values[0]["case"] for parameters in MDR]
    even = [golden_case("mdr_distance_weighted", case)["uniform_fallback_float32"] for case in names]
    assert 10 < torch.cat(even).sum() < len(torch.cat(even)) - 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_cutoffs_are_those_of_the_releases(variant: str) -> None:
    miner = DistanceWeighted(variant=variant)
    assert miner.cutoff == 0.5
    assert miner.upper_cutoff == (None if variant == "wu" else 1.4)
    assert DistanceWeighted(variant=variant, upper_cutoff=1.2).upper_cutoff == 1.2


def test_by_hand_in_three_dimensions() -> None:
    """In 3 dimensions the density is proportional to d alone, so weights are 1 / max(d, cutoff)."""
    angles = torch.tensor([0.0, 0.2, 1.0, 2.0], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin(), torch.zeros_like(angles)], dim=1)
    labels = torch.arange(4)
    chords = [1 / 0.5, 1 / (2 * math.sin(0.5)), 1 / (2 * math.sin(1.0))]  # a chord is 2 sin(angle / 2)
    found = _probabilities(DistanceWeighted(), points, labels)
    assert found[0].tolist() == pytest.approx([0, *(w / sum(chords) for w in chords)], rel=1e-12)
    wide = [1 / 1.0, 1 / 1.0, 1 / (2 * math.sin(1.0))]
    found = _probabilities(DistanceWeighted(cutoff=1.0), points, labels)
    assert found[0].tolist() == pytest.approx([0, *(w / sum(wide) for w in wide)], rel=1e-12)
    # The greatest weight is 2; the last is beyond the upper cutoff.
    weight = DistanceWeighted(variant="divide_conquer").weights(points, all_pairs(labels).negative)
    assert weight[0].tolist() == pytest.approx([0, 1 + 1e-9, chords[1] / 2 + 1e-9, 1e-6], rel=1e-12)
    weight = DistanceWeighted(variant="mdr").weights(points, all_pairs(labels).negative)
    assert weight[0].tolist() == pytest.approx([0, 1, chords[1] / 2, 0], rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lengths_do_not_matter(variant: str) -> None:
    golden = golden_case("deep_metric_margin", MULTI_SIMILARITY[0].id)
    lengths = torch.linspace(0.01, 100, len(golden["labels"]), dtype=torch.float64)[:, None]
    miner = DistanceWeighted(variant=variant)
    torch.testing.assert_close(
        _probabilities(miner, golden["embeddings"] * lengths, golden["labels"]),
        _probabilities(miner, golden["embeddings"], golden["labels"]),
        rtol=1e-9 if variant == "wu" else 1e-4,
        atol=0,
    )


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 128, 2048])
@pytest.mark.parametrize("upper_cutoff", [None, 1.4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opposite_points_give_weights_not_nan(variant: str, upper_cutoff: float | None, dim: int) -> None:
    points = torch.zeros(5, dim)
    points[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    labels = torch.tensor([0, 0, 1, 1, 2])
    found = _probabilities(DistanceWeighted(variant=variant, upper_cutoff=upper_cutoff), points, labels)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5))
    assert not found[~all_pairs(labels).negative].any()


@pytest.mark.parametrize(("variant", "beyond"), [("wu", 0), ("divide_conquer", 1e-6), ("mdr", 0)])
def test_beyond_the_upper_cutoff_negatives_are_next_to_impossible(variant: str, beyond: float) -> None:
    points = torch.eye(4)  # all at 1.414
    points[1] = torch.tensor([0.6, 0.8, 0.0, 0.0])  # 0.894 from the first
    miner = DistanceWeighted(variant=variant, upper_cutoff=1.4)
    weight = miner.weights(points, all_pairs(torch.arange(4)).negative)
    assert weight[0, 1] > 0.5
    assert weight[0, 2:].tolist() == pytest.approx([beyond, beyond])
    # The third has none before the cutoff and draws from all evenly.
    assert weight[2, 0] == weight[2, 1] == weight[2, 3] > 0


def test_draws_follow_the_probabilities() -> None:
    golden = golden_case("deep_metric_margin", MULTI_SIMILARITY[0].id)
    points, labels = golden["embeddings"], golden["labels"]
    generator = torch.Generator().manual_seed(0)
    draws = [DistanceWeighted()(points, labels, generator) for _ in range(1000)]
    negatives = torch.stack([draw.negative[0] for draw in draws]).bincount(minlength=len(labels))
    assert _fit(negatives, golden["neg_probs"][0]) > 1e-3
    positives = torch.stack([draw.positive[0] for draw in draws]).bincount(minlength=len(labels))
    mates = all_pairs(labels).positive[0]
    assert _fit(positives, mates / mates.sum()) > 1e-3


def test_anchors_draw_independently() -> None:
    """Rows with the same candidates must not share their draw."""
    points = torch.eye(1, 4).repeat(64, 1)
    labels = torch.arange(64) % 2
    triplets = DistanceWeighted()(points, labels, torch.Generator().manual_seed(0))
    assert triplets.negative[::2].unique().numel() > 10
    assert triplets.positive[::2].unique().numel() > 10


def test_one_triplet_an_anchor() -> None:
    golden = golden_case("deep_metric_margin", MULTI_SIMILARITY[0].id)
    triplets = DistanceWeighted()(golden["embeddings"], golden["labels"], torch.Generator().manual_seed(0))
    assert triplets.anchor.tolist() == list(range(len(golden["labels"])))


@pytest.mark.parametrize("case", MDR)
def test_mdr_gives_every_positive_pair_one_negative_in_the_order_of_the_release(case: dict) -> None:
    golden = golden_case("mdr_distance_weighted", case["case"])
    generator = torch.Generator().manual_seed(0)
    triplets = DistanceWeighted(variant="mdr")(golden["E"], golden["labels"], generator)
    found = listed(triplets)
    pairs = list(zip(golden["anchor"].tolist(), golden["positive"].tolist(), strict=True))
    assert [(a, p) for a, p, _ in found] == pairs
    assert all(golden["labels"][a] != golden["labels"][n] for a, _, n in found)


def test_mdr_draws_follow_the_probabilities_independently() -> None:
    golden = golden_case("mdr_distance_weighted", "d8")
    points, labels = golden["E"], golden["labels"]
    generator = torch.Generator().manual_seed(0)
    draws = [DistanceWeighted(variant="mdr")(points, labels, generator) for _ in range(500)]
    negative = torch.stack([draw.negative[draw.valid & (draw.anchor == draw.anchor[draw.valid][0])] for draw in draws])
    anchor = int(golden["anchor"][0])
    assert negative.shape[1] == int(all_pairs(labels).positive[anchor].sum()) > 1
    for column in negative.T:
        assert _fit(column.bincount(minlength=len(labels)), golden["prob_float32"][anchor]) > 1e-3
    assert 0 < (negative[:, 0] == negative[:, 1]).sum() < 500  # the same negative can come again


@pytest.mark.parametrize("case", DIVIDE_CONQUER)
def test_divide_conquer_draws_as_many_different_negatives_as_the_release(case: dict) -> None:
    golden = golden_case("divide_conquer_distance_weighted", case["case"])
    labels, k = golden["labels"], int(golden["num_neg"])
    generator = torch.Generator().manual_seed(0)
    found = listed(DistanceWeighted(variant="divide_conquer")(golden["E"], labels, generator))
    positive = all_pairs(labels).positive
    for a in range(len(labels)):
        negatives = [n for anchor, _, n in found if anchor == a]
        assert len(negatives) == len(set(negatives)) == (k if positive[a].any() else 0)
        positives = [p for anchor, p, _ in found if anchor == a]
        if positive[a].sum() == k:
            assert sorted(positives) == positive[a].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("labels", "k"),
    [
        ([0, 0, 0, 0, 1, 2], 2),  # mean 2, and 2 items outside of the largest class
        ([0, 0, 0, 1, 1, 1], 2),
        ([0, 0, 0, 0, 0, 1], 1),  # mean 3.3, and 1 item outside of the largest class
        ([0, 0, 1, 2, 3, 4], 1),  # mean 1/3, but at least 1
        ([0, 0, 0, 1, 1, 2, 2, 3], 1),  # mean 10/8
        ([0, 0, 0, 0, 1, 1, 2, 2], 2),  # mean 2
        ([0, 0, 0, 1, 1, 1, 2, 2], 2),  # mean 14/8
        ([0, 0, 0, 1, 1, 2], 1),  # mean 8/6
        ([0, 0, 0, 1], 1),  # mean 1.5 is rounded up, but 1 item is outside of the largest class
        ([0, 0, 0, 1, 1, 1, 2, 3], 2),  # mean 1.5 is rounded up
        ([0, 0, 0, 0], 0),
        ([0, 1], 0),
    ],
)
def test_number_of_negatives_of_divide_conquer(labels: list[int], k: int) -> None:
    points = torch.eye(len(labels))
    generator = torch.Generator().manual_seed(0)
    found = listed(DistanceWeighted(variant="divide_conquer")(points, torch.tensor(labels), generator))
    lonely = [a for a, label in enumerate(labels) if labels.count(label) == 1]
    expected = [a for a in range(len(labels)) if a not in lonely for _ in range(k)]
    assert [a for a, _, _ in found] == expected


def test_divide_conquer_draws_follow_the_weights() -> None:
    golden = golden_case("divide_conquer_distance_weighted", "d16")
    points, labels = golden["E"], golden["labels"]
    generator, size = torch.Generator().manual_seed(0), len(labels)
    draws = [DistanceWeighted(variant="divide_conquer")(points, labels, generator) for _ in range(400)]
    first = torch.stack([draw.negative.view(size, -1)[:, 0] for draw in draws])
    evenness = [_fit(first[:, a].bincount(minlength=size), golden["prob"][a]) for a in range(size)]
    assert min(evenness) > 1e-3 / size


def test_divide_conquer_draws_positives_again_where_their_number_differs() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])  # k = 2: 3 positives in the first class, 1 in the others
    generator = torch.Generator().manual_seed(0)
    miner = DistanceWeighted(variant="divide_conquer")
    drawn = torch.zeros(8, 8)
    for _ in range(400):
        for a, p, _ in listed(miner(torch.eye(8), labels, generator)):
            drawn[a, p] += 1
    assert torch.equal(drawn > 0, all_pairs(labels).positive)
    assert drawn[4, 5] == drawn[7, 6] == 800
    assert chisquare(drawn[0, 1:4]).pvalue > 1e-3
