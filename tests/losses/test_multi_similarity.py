"""Multi-similarity loss against hand values, the authors' release and another library."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss

from raydml.losses.multi_similarity import MultiSimilarity
from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.ops.tuples import Pairs, all_pairs
from tests.batches import unit_batch
from tests.golden_vectors import golden_cases
from tests.losses.oracles import check_golden, check_library, on_the_sphere

# The value filter drops positives more alike than 1 - 1e-5; ours is by index (spec, section 1).
CASES = golden_cases("deep_metric_multisimilarity", lambda case: not case["requires_value_filter"])


def test_by_hand() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    value = MultiSimilarity(alpha=2, beta=40, base=0.5)(points, torch.tensor([0, 0, 1]))
    pulled = math.log1p(math.exp(-2 * (1 - 0.5))) / 2
    pushed = math.log1p(math.exp(40 * (0 - 0.5))) / 40
    pushed_twice = math.log1p(2 * math.exp(40 * (0 - 0.5))) / 40  # the third has no positive, but two negatives
    assert value.item() == pytest.approx((2 * (pulled + pushed) + pushed_twice) / 3, rel=1e-12)


def test_defaults_are_the_release() -> None:
    loss = MultiSimilarity()
    assert (loss.alpha, loss.beta, loss.base) == (2, 40, 0.5)


@pytest.mark.parametrize("case", CASES)
def test_release_with_its_miner(case: dict) -> None:
    loss = MultiSimilarity(alpha=case["alpha_scale_pos"], beta=case["beta_scale_neg"], base=case["lambda_thresh"])
    miner = MultiSimilarityMiner(epsilon=case["epsilon_mining_margin"])
    check_golden(loss, "deep_metric_multisimilarity", case, miner)


def test_pytorch_metric_learning_without_a_miner() -> None:
    settings = {"alpha": 1.5, "beta": 30.0, "base": 0.4}
    check_library(on_the_sphere(MultiSimilarity(**settings)), MultiSimilarityLoss(**settings), unit_batch())


def test_pair_weights_are_those_of_the_paper() -> None:
    """dL/ds of the general pair weighting, with the similarities of one anchor as the only free numbers."""
    alpha, beta, base = 2.0, 10.0, 0.5
    others = torch.tensor([0.9, 0.3, 0.6, -0.2], dtype=torch.float64, requires_grad=True)
    # With the anchor at (1, 0, ...) and each other on an axis of its own, s is the other's first coordinate.
    points = torch.cat([torch.eye(1, 5, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.float64)])
    points = points + torch.cat([torch.zeros(1, dtype=torch.float64), others])[:, None] * torch.eye(1, 5)
    positive, negative = torch.zeros(2, 5, 5, dtype=torch.bool)
    positive[0, 1] = positive[0, 2] = negative[0, 3] = negative[0, 4] = True
    loss = MultiSimilarity(alpha=alpha, beta=beta, base=base)
    loss(points, torch.tensor([0, 0, 0, 1, 1]), Pairs(positive, negative)).backward()
    s = others.detach().tolist()
    expected = [
        -1 / (math.exp(alpha * (s[0] - base)) + 1 + math.exp(-alpha * (s[1] - s[0]))),
        -1 / (math.exp(alpha * (s[1] - base)) + 1 + math.exp(-alpha * (s[0] - s[1]))),
        1 / (math.exp(beta * (base - s[2])) + 1 + math.exp(beta * (s[3] - s[2]))),
        1 / (math.exp(beta * (base - s[3])) + 1 + math.exp(beta * (s[2] - s[3]))),
    ]
    assert (others.grad * 5).tolist() == pytest.approx(expected, rel=1e-12)


def test_anchors_without_pairs_count_in_the_mean() -> None:
    points, labels = unit_batch()
    pairs = all_pairs(labels)
    first = torch.zeros(14, 1, dtype=torch.bool)
    first[0] = True
    one = MultiSimilarity()(points, labels, Pairs(pairs.positive & first, pairs.negative & first))
    lone = torch.cat([points, torch.zeros(14, 5, dtype=torch.float64)])
    wide = [torch.nn.functional.pad(mask & first, (0, 14, 0, 14)) for mask in pairs]
    half = MultiSimilarity()(lone, torch.cat([labels, labels]), Pairs(*wide))
    torch.testing.assert_close(half, one / 2)


def test_it_does_not_overflow() -> None:
    points = torch.tensor([[1e3, 0.0], [1e3, 0.0]], requires_grad=True)
    value = MultiSimilarity(beta=50)(points, torch.tensor([0, 1]))
    assert value.item() == pytest.approx(1e6, rel=1e-5)  # log(1 + e^x) = x for large x
    value.backward()
    assert points.grad.isfinite().all()


def test_scales_that_look_swapped_are_refused_with_reason_and_cure() -> None:
    with pytest.raises(ValueError, match=r"alpha = 40, beta = 2: .* write alpha = 2, beta = 40") as caught:
        MultiSimilarity(alpha=40, beta=2)
    assert "the softer scale" in str(caught.value)
    MultiSimilarity(alpha=2, beta=2)


def test_references_are_the_columns_of_the_pairs() -> None:
    """Rows against the whole batch as a memory are the first rows of the batch against itself."""
    points, labels = unit_batch()
    pairs = all_pairs(labels)
    some = Pairs(*(mask[:4] for mask in pairs))
    rest = torch.arange(14)[:, None] < 4
    expected = MultiSimilarity()(points, labels, Pairs(pairs.positive & rest, pairs.negative & rest)) * 14 / 4
    value = MultiSimilarity()(points[:4], labels[:4], some, points.float().double())
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert MultiSimilarity()(points[:4].float(), labels[:4], some, points).dtype == torch.float32
