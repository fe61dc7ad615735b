"""N-pair sampling: structure against the authors of MIC and of their benchmark, draws against even frequencies."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from raydml.miners.n_pair import NPairMiner
from raydml.ops.tuples import Pairs, all_pairs
from tests.golden_vectors import golden_case, golden_cases
from tests.tuples import where

LABELS = torch.tensor([0, 1, 0, 2, 0, 1, 3])  # the fourth and the last have no positive


def _mine(labels: Tensor, seed: int = 0, **settings: object) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    return NPairMiner(**settings)(torch.zeros(len(labels), 2), labels, generator)


@pytest.mark.parametrize("case", golden_cases("mic_npair", lambda case: case["variant"] == "baselines"))
def test_rows_of_the_authors_where_the_same_pairs_are_drawn(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a class: anchor, positive, and the positives of the other classes."""
    golden = golden_case("mic_npair", case["case"])
    rows = golden["npairs"].tolist()
    chosen = torch.zeros(len(golden["labels"]), dtype=torch.float64)
    drawn = torch.zeros(len(golden["labels"]), 1, dtype=torch.int64)
    for anchor, positive, *_ in rows:
        chosen[anchor], drawn[anchor] = 1, positive
    monkeypatch.setattr("raydml.miners.n_pair.uniform", lambda *_: chosen)
    monkeypatch.setattr("raydml.miners.n_pair.draw_columns", lambda *_: drawn)
    mined = NPairMiner()(golden["emb"], golden["labels"])
    assert where(mined.positive) == {(anchor, positive) for anchor, positive, *_ in rows}
    assert where(mined.negative) == {(anchor, n) for anchor, _, *negatives in rows for n in negatives}


@pytest.mark.parametrize("case", golden_cases("mic_npair", lambda case: case["variant"] != "baselines"))
def test_rows_of_the_benchmark_where_the_same_positives_are_drawn(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_case("mic_npair", case["case"])
    assert golden["anchors"].tolist() == list(range(len(golden["labels"])))
    monkeypatch.setattr("raydml.miners.n_pair.draw_columns", lambda *_: golden["positives"][:, None])
    mined = NPairMiner(negatives="all")(golden["emb"], golden["labels"])
    assert where(mined.positive) == set(enumerate(golden["positives"].tolist()))
    assert torch.equal(mined.negative, golden["labels"][:, None] != golden["labels"])


@pytest.mark.parametrize("seed", range(10))
def test_one_pair_of_each_class_against_the_others(seed: int) -> None:
    mined = _mine(LABELS, seed)
    rows = where(mined.positive)
    assert sorted(int(LABELS[a]) for a, _ in rows) == [0, 1]
    assert all(LABELS[a] == LABELS[p] and a != p for a, p in rows)
    assert where(mined.negative) == {(a, p) for a, _ in rows for _, p in rows if LABELS[a] != LABELS[p]}


def test_all_ordered_pairs_of_a_class_are_as_likely() -> None:
    count = Counter(pair for seed in range(1200) for pair in where(_mine(LABELS, seed).positive))
    for label in (0, 1):
        pairs = [(a, p) for a, p in where(all_pairs(LABELS).positive) if LABELS[a] == label]
        assert sum(count[pair] for pair in pairs) == 1200
        assert chisquare([count[pair] for pair in pairs]).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_all_takes_every_item_with_a_positive(seed: int) -> None:
    mined = _mine(LABELS, seed, negatives="all")
    assert mined.positive.sum(dim=1).tolist() == [1, 1, 1, 0, 1, 1, 0]
    possible = all_pairs(LABELS)
    assert not (mined.positive & ~possible.positive).any()
    assert torch.equal(mined.negative, possible.negative & possible.positive.any(dim=1, keepdim=True))


def test_all_draws_positives_evenly() -> None:
    count = Counter(pair for seed in range(900) for pair in where(_mine(LABELS, seed, negatives="all").positive))
    assert chisquare([count[0, 2], count[0, 4]]).pvalue > 1e-3
    assert count[1, 5] == 900


@pytest.mark.parametrize("negatives", ["other_positives", "all"])
def test_an_anchor_without_negatives_is_left_out(negatives: str) -> None:
    for labels in (torch.zeros(4, dtype=torch.int64), torch.arange(4)):
        mined = _mine(labels, negatives=negatives)
        assert not mined.positive.any()
        assert not mined.negative.any()


def test_a_single_pair_has_no_other_positives_but_other_items() -> None:
    labels = torch.tensor([0, 0, 1, 2])
    assert not _mine(labels).positive.any()
    assert _mine(labels, negatives="all").positive.sum() == 2


def test_candidates_of_a_memory() -> None:
    """An anchor of the batch, a positive and negatives of the memory; items without candidates are passed over."""
    labels, theirs = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 1, 3])
    same = labels[:, None] == theirs
    same[1] = False
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        given = Pairs(same, labels[:, None] != theirs)
        mined = NPairMiner()(torch.zeros(4, 2), labels, generator, given, torch.zeros(6, 2))
        (first, p), (second, q) = sorted(where(mined.positive))
        assert (first, second) == (0, 2)
        assert p in (0, 1)
        assert q in (2, 3, 4)
        assert where(mined.negative) == {(0, q), (2, p)}
