"""N-pair loss against hand values, two released implementations' numbers, a slow loop and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import NPairsLoss

from raydml.losses.n_pair import NPair
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_case, golden_cases
from tests.losses.oracles import check_golden, check_library
from tests.tuples import some_pairs


def _one_pair_a_class(anchors: list[int], positives: list[int], size: int) -> Pairs:
    """The paper's choice: the negatives of an anchor are the positives of the other classes."""
    positive, negative = torch.zeros(2, size, size, dtype=torch.bool)
    for a, own in zip(anchors, positives, strict=True):
        positive[a, own] = True
        for other in positives:
            negative[a, other] = other != own
    return Pairs(positive, negative)


@pytest.mark.parametrize("case", golden_cases("mic_npair"))
def test_releases(case: dict) -> None:
    golden = golden_case("mic_npair", case["case"])
    labels, size = golden["labels"], len(golden["emb"])
    if case["variant"] == "baselines":
        rows = golden["npairs"].tolist()
        pairs = _one_pair_a_class([row[0] for row in rows], [row[1] for row in rows], size)
        assert all(set(row[2:]) == set(pairs.negative[row[0]].nonzero().flatten().tolist()) for row in rows)
        check_golden(NPair(l2=case["l2"]), "mic_npair", case, pairs)
    else:
        # The benchmark: any number of anchors, all other classes' items as negatives, a penalty of its own.
        positive = torch.zeros(size, size, dtype=torch.bool)
        positive[golden["anchors"], golden["positives"]] = True
        pairs = Pairs(positive, all_pairs(labels).negative)

        def penalised(points: torch.Tensor, *rest: object) -> torch.Tensor:
            return NPair(l2=0)(points, *rest) + case["l2"] * points.norm(dim=1).mean()

        check_golden(penalised, "mic_npair", case, pairs)


def test_by_hand() -> None:
    points = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    # Both pairs have s = 2 and one negative with s = 0; the third has no positive.
    cost = math.log1p(math.exp(0 - 2))
    labels = torch.tensor([0, 0, 1])
    assert NPair(l2=0)(points, labels).item() == pytest.approx(cost, rel=1e-12)
    assert NPair(l2=0.1)(points, labels).item() == pytest.approx(cost + 0.1 * (1 + 4), rel=1e-12)


def test_chosen_pairs_against_a_slow_loop() -> None:
    points, labels = unit_batch(1)
    points = points * torch.linspace(0.5, 2, len(points), dtype=torch.float64)[:, None]
    pairs = some_pairs(labels, 0.5)
    costs, size = [], range(len(labels))
    for a in size:
        for p in size:
            if pairs.positive[a, p]:
                pulled = points[a] @ points[p]
                cost = math.log1p(sum(math.exp(points[a] @ points[n] - pulled) for n in size if pairs.negative[a, n]))
                costs.append(cost + 0.3 * (points[a] @ points[a] + points[p] @ points[p]).item())
    assert NPair(l2=0.3)(points, labels, pairs).item() == pytest.approx(sum(costs) / len(costs), rel=1e-12)


def test_pytorch_metric_learning() -> None:
    points, labels = unit_batch(2, num_rows=8)
    anchors, positives = torch.tensor([0, 5, 2, 7]), torch.tensor([4, 1, 6, 3])
    theirs = NPairsLoss()
    theirs.distance.normalize_embeddings = False
    pairs = _one_pair_a_class(anchors.tolist(), positives.tolist(), 8)
    check_library(
        lambda *batch: NPair(l2=0)(*batch, pairs),
        lambda *batch: theirs(*batch, (anchors, positives, anchors[:0], anchors[:0])),
        (points * 2, labels),
    )


def test_the_default_penalty_is_that_of_the_baselines() -> None:
    assert NPair().l2 == 0.02


def test_it_does_not_overflow() -> None:
    points = torch.tensor([[1e3, 0.0], [0.0, 1.0], [1e3, 0.0]], requires_grad=True)
    value = NPair(l2=0)(points, torch.tensor([0, 0, 1]))
    assert value.item() == pytest.approx(5e5 + math.log(2) / 2, rel=1e-5)
    value.backward()
    assert points.grad.isfinite().all()


def test_references_stand_for_the_columns() -> None:
    points, memory = torch.tensor([[1.0]]).double(), torch.tensor([[0.5], [0.2], [9.0]]).double()
    pairs = Pairs(torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]]))
    value = NPair(l2=0.1)(points, torch.tensor([0]), pairs, references=memory)
    assert value.item() == pytest.approx(math.log1p(math.exp(0.2 - 0.5)) + 0.1 * (1 + 0.25), rel=1e-6)
