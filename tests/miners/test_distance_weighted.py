"""Distance-weighted mining: probabilities against three releases, draws against the probabilities."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from raydml.miners.distance_weighted import DistanceWeighted, negative_probabilities
from raydml.tuples import all_pairs

GOLDEN = Path(__file__).parents[1] / "golden"
DIVIDE_CONQUER = json.loads((GOLDEN / "divide_conquer_distance_weighted.json").read_text())


def _golden(name: str, case: str, separator: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        start = case + separator
        return {key.removeprefix(start): torch.from_numpy(file[key]) for key in file if key.startswith(start)}


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_probabilities_of_the_multi_similarity_release(case: str) -> None:
    golden = _golden("deep_metric_margin", case, "__")
    negative = all_pairs(golden["labels"]).negative
    found = negative_probabilities(golden["embeddings"], negative, cutoff=0.5)
    torch.testing.assert_close(found, golden["neg_probs"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_probabilities_of_the_mic_release(case: str) -> None:
    golden = _golden("mic_distance_sampling", case, "_")
    pairs = all_pairs(golden["labels"])
    found = negative_probabilities(golden["emb"], pairs.negative, cutoff=0.5)
    torch.testing.assert_close(found, golden["neg_prob"], rtol=1e-7, atol=1e-10)
    assert torch.equal(pairs.positive, golden["pos_candidates"])


@pytest.mark.parametrize("case", DIVIDE_CONQUER["hyperparameters"])
def test_probabilities_of_the_divide_and_conquer_authors(case: str) -> None:
    settings = DIVIDE_CONQUER["hyperparameters"][case]
    golden = _golden("divide_conquer_distance_weighted", case, "__")
    found = negative_probabilities(
        golden["E"],
        all_pairs(golden["labels"]).negative,
        cutoff=settings["cutoff"],
        upper_cutoff=settings["nonzero_loss_cutoff"],
    )
    torch.testing.assert_close(found, golden["prob"], **DIVIDE_CONQUER["tolerance"])


def test_by_hand_in_three_dimensions() -> None:
    """In 3 dimensions the density is proportional to d alone, so weights are 1 / max(d, cutoff)."""
    angles = torch.tensor([0.0, 0.2, 1.0, 2.0], dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin(), torch.zeros_like(angles)], dim=1)
    found = negative_probabilities(points, all_pairs(torch.arange(4)).negative, cutoff=0.5)
    weights = [1 / 0.5, 1 / (2 * math.sin(0.5)), 1 / (2 * math.sin(1.0))]  # a chord is 2 sin(angle / 2)
    assert found[0].tolist() == pytest.approx([0, *(w / sum(weights) for w in weights)], rel=1e-12)


def test_lengths_do_not_matter() -> None:
    golden = _golden("deep_metric_margin", "c0", "__")
    negative = all_pairs(golden["labels"]).negative
    lengths = torch.linspace(0.01, 100, len(negative), dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        negative_probabilities(golden["embeddings"] * lengths, negative, cutoff=0.5),
        negative_probabilities(golden["embeddings"], negative, cutoff=0.5),
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 128, 2048])
@pytest.mark.parametrize("upper_cutoff", [None, 1.4])
def test_opposite_points_give_probabilities_not_nan(upper_cutoff: float | None, dim: int) -> None:
    points = torch.zeros(5, dim)
    points[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    labels = torch.tensor([0, 0, 1, 1, 2])
    pairs = all_pairs(labels)
    found = negative_probabilities(points, pairs.negative, cutoff=0.5, upper_cutoff=upper_cutoff)
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5))
    assert not found[~pairs.negative].any()


def test_beyond_the_upper_cutoff_negatives_are_next_to_impossible() -> None:
    points = torch.eye(4)  # all at 1.414
    points[1] = torch.tensor([0.6, 0.8, 0.0, 0.0])  # 0.894 from the first
    found = negative_probabilities(points, all_pairs(torch.arange(4)).negative, cutoff=0.5, upper_cutoff=1.4)
    assert found[0, 1] > 0.9999
    assert (found[0, 2:] > 0).all()


def test_draws_follow_the_probabilities() -> None:
    golden = _golden("deep_metric_margin", "c0", "__")
    points, labels = golden["embeddings"], golden["labels"]
    generator = torch.Generator().manual_seed(0)
    draws = [DistanceWeighted()(points, labels, generator) for _ in range(1000)]
    expected = golden["neg_probs"][0]
    likely = expected > 0.006
    negatives = torch.stack([draw.negative[0] for draw in draws]).bincount(minlength=len(labels))
    assert not negatives[expected == 0].any()
    share = expected[likely] / expected[likely].sum()
    assert chisquare(negatives[likely], (share * negatives[likely].sum()).numpy()).pvalue > 1e-3
    positives = torch.stack([draw.positive[0] for draw in draws]).bincount(minlength=len(labels))
    mates = all_pairs(labels).positive[0]
    assert not positives[~mates].any()
    assert chisquare(positives[mates]).pvalue > 1e-3


def test_anchors_draw_independently() -> None:
    """Rows with the same candidates must not share their draw."""
    points = torch.eye(1, 4).repeat(64, 1)
    labels = torch.arange(64) % 2
    triplets = DistanceWeighted()(points, labels, torch.Generator().manual_seed(0))
    assert triplets.negative[::2].unique().numel() > 10
    assert triplets.positive[::2].unique().numel() > 10


def test_an_anchor_without_positives_or_negatives_is_invalid() -> None:
    points = torch.eye(5)
    triplets = DistanceWeighted()(points, torch.tensor([0, 0, 1, 2, 2]), torch.Generator().manual_seed(0))
    assert triplets.valid.tolist() == [True, True, False, True, True]
    for labels in (torch.zeros(5, dtype=torch.int64), torch.arange(5)):
        assert not DistanceWeighted()(points, labels, torch.Generator().manual_seed(0)).valid.any()


def test_one_triplet_an_anchor() -> None:
    golden = _golden("deep_metric_margin", "c0", "__")
    triplets = DistanceWeighted()(golden["embeddings"], golden["labels"], torch.Generator().manual_seed(0))
    assert triplets.anchor.tolist() == list(range(20))
