"""Random triplets against the whole population of the authors' release."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from raydml.miners.random import Random
from tests.golden_vectors import golden_case, golden_cases
from tests.tuples import every_triplet, listed


def _draw(labels: Tensor, generator: torch.Generator) -> list[tuple[int, ...]]:
    return listed(Random()(torch.zeros(len(labels), 2), labels, generator))


@pytest.mark.parametrize("case", golden_cases("mic_random_sampling"))
def test_every_triplet_of_the_release_is_as_likely_and_none_comes_twice(case: dict) -> None:
    golden = golden_case("mic_random_sampling", case["case"])
    labels, population = golden["labels"], {tuple(row) for row in golden["all_triplets_sorted"].tolist()}
    assert len(population) == case["n_all"]
    assert len(labels) == case["n_drawn_per_batch"]
    generator = torch.Generator().manual_seed(0)
    count: Counter[tuple[int, ...]] = Counter()
    for _ in range(1500):
        drawn = _draw(labels, generator)
        assert len(drawn) == len(set(drawn)) <= len(labels)
        count.update(drawn)
    assert count.keys() == population
    assert chisquare(list(count.values())).pvalue > 1e-3
    assert count.total() > 0.999 * 1500 * len(labels)


def test_unequal_classes_in_any_order() -> None:
    labels = torch.tensor([3, 0, 3, 5, 0, 3, 0, 0])
    population = set(every_triplet(labels))
    generator, count = torch.Generator().manual_seed(0), Counter()
    for _ in range(1500):
        count.update(_draw(labels, generator))
    assert count.keys() == population
    assert chisquare(list(count.values())).pvalue > 1e-3


def test_a_batch_with_few_triplets_yields_each_once() -> None:
    labels = torch.tensor([0, 0, 1])
    for seed in range(20):
        drawn = _draw(labels, torch.Generator().manual_seed(seed))
        assert len(drawn) == len(set(drawn))
        assert set(drawn) <= {(0, 1, 2), (1, 0, 2)}


def test_a_large_batch_is_full() -> None:
    labels = torch.arange(2048) // 4
    triplets = Random()(torch.zeros(2048, 2), labels, torch.Generator().manual_seed(0))
    assert triplets.valid.all()
    assert len(set(listed(triplets))) == 2048
    assert (labels[triplets.anchor] == labels[triplets.positive]).all()
    assert (labels[triplets.anchor] != labels[triplets.negative]).all()
    assert (triplets.anchor != triplets.positive).all()


def test_a_batch_without_triplets_yields_none() -> None:
    for labels in (torch.zeros(5, dtype=torch.int64), torch.arange(5)):
        assert _draw(labels, torch.Generator().manual_seed(0)) == []
