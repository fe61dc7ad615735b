"""Margin loss against hand values, the released implementations' numbers, a slow loop and another library."""

import pytest
import torch
from pytorch_metric_learning.losses import MarginLoss
from torch import Tensor

from raydml import registry
from raydml.losses.margin import Margin
from raydml.ops.tuples import Pairs, Triplets
from tests.batches import unit_batch
from tests.golden_vectors import golden_case, golden_cases
from tests.losses.oracles import check_golden, check_triplets

EPSILON = 1e-8


def _triplets(*columns: Tensor | list[int]) -> Triplets:
    anchor, positive, negative = (torch.as_tensor(column) for column in columns)
    return Triplets(anchor, positive, negative, torch.ones_like(anchor, dtype=torch.bool))


@pytest.mark.parametrize(
    ("negative_at", "expected"),
    [
        (1.5, 0.1),  # the negative costs nothing: 0.1 over one active pair
        (1.3, 0.1),  # it costs 0.1 as well: 0.2 over TWO active pairs of the one triplet
        (1.1, 0.2),  # 0.1 + 0.3 over two
    ],
)
def test_by_hand(negative_at: float, expected: float) -> None:
    points = torch.tensor([[0.0], [1.1], [-negative_at]], dtype=torch.float64)
    loss = Margin(2, margin=0.2, beta=1.2)
    value = loss(points, torch.tensor([0, 0, 1]), _triplets([0], [1], [2]))
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_beta_is_that_of_the_anchors_class() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [1.5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    loss = Margin(2, margin=0.2).double()
    with torch.no_grad():
        loss.beta.copy_(torch.tensor([0.7, 1.4]))
    # Class 0: d_ap = 1, cost 0.5; d_an = 3, cost 0. Class 1: d_ap = 1.5, cost 0.3; d_an = 3 - 1 = 2, cost 0.
    value = loss(points, labels, _triplets([0, 2], [1, 3], [2, 1]))
    assert value.item() == pytest.approx((0.5 + 0.3) / 2, abs=1e-6)
    value.backward()
    assert loss.beta.grad.tolist() == pytest.approx([-0.5, -0.5])


def test_one_shared_beta() -> None:
    assert Margin(7, class_beta=False).beta.shape == (1,)
    assert Margin(7, beta=0.6).beta.tolist() == pytest.approx([0.6] * 7)


@pytest.mark.parametrize("case", golden_cases("divide_conquer_margin"))
def test_divide_and_conquer_release(case: dict) -> None:
    golden = golden_case("divide_conquer_margin", case["case"])
    settings = {"margin": case["margin"], "nu": case["nu"], "class_beta": case["class_specific_beta"]}
    tuples = _triplets(golden["anchor"], golden["positive"], golden["negative"])
    check_golden(Margin(case["num_classes"], **settings).double(), "divide_conquer_margin", case, tuples)


@pytest.mark.parametrize("case", golden_cases("deep_metric_margin"))
def test_multi_similarity_release(case: dict) -> None:
    golden = golden_case("deep_metric_margin", case["case"])
    constant = case["beta_constant"]
    loss = Margin(
        1 if constant else len(golden["beta"]),
        margin=case["margin"],
        beta=case["beta_value"] or 1.2,
        class_beta=not constant,
        trainable_beta=not constant,
    ).double()
    check_golden(loss, "deep_metric_margin", case, _triplets(*golden["triplets"].T))


@pytest.mark.parametrize("case", golden_cases("mic_margin"))
def test_mic_release(case: dict) -> None:
    """The count of the torch it was written for: active positive plus active negative hinges."""
    golden = golden_case("mic_margin", case["case"])
    trainable = case["beta_trainable"]
    settings = {"margin": case["margin"], "class_beta": golden["beta"].dim() > 0, "trainable_beta": trainable}
    loss = Margin(case["n_classes"], **settings).double()
    assert trainable == ("grad_beta" in golden) == any(True for _ in loss.parameters())
    check_golden(loss, "mic_margin", case, _triplets(*golden["triplets"].T))


# Not a shared beta with nu: the library does not divide that term by the count, the release does (see above).
@pytest.mark.parametrize(("class_beta", "nu"), [(True, 0.0), (True, 0.03), (False, 0.0)])
def test_pytorch_metric_learning(class_beta: bool, nu: float) -> None:
    points, labels = unit_batch()
    generator = torch.Generator().manual_seed(1)
    anchor = torch.randint(14, (60,), generator=generator)
    # Never the anchor itself: they have no epsilon under the root, and at distance 0 it is all there is.
    columns = [anchor, *((anchor + torch.randint(1, 14, (60,), generator=generator)) % 14 for _ in range(2))]
    theirs = MarginLoss(margin=0.2, nu=nu, beta=1.2, learn_beta=True, num_classes=4 if class_beta else None)
    ours = Margin(4, margin=0.2, beta=1.2, class_beta=class_beta, nu=nu)
    expected = theirs(points, labels, tuple(columns))
    torch.testing.assert_close(ours(points, labels, _triplets(*columns)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("class_beta", [True, False])
def test_all_pairs_against_a_slow_loop(class_beta: bool) -> None:
    points, labels = unit_batch(2)
    nu = 0.01
    loss = Margin(4, margin=0.25, class_beta=class_beta, nu=nu).double()
    with torch.no_grad():
        loss.beta.copy_(torch.linspace(0.9, 1.3, len(loss.beta)))
    total, count, regulariser = 0.0, 0, 0.0
    for i in range(len(labels)):
        beta = loss.beta[labels[i] if class_beta else 0].item()
        for j in range(len(labels)):
            distance = (((points[i] - points[j]) ** 2).sum().item() + EPSILON) ** 0.5
            sign = 1 if labels[i] == labels[j] else -1
            cost = max(0.0, sign * (distance - beta) + 0.25)
            if i != j:
                total, count = total + cost, count + (cost > 0)
                regulariser += beta if class_beta and sign == 1 else 0.0
    regulariser = regulariser if class_beta else beta
    assert loss(points, labels).item() == pytest.approx((total + nu * regulariser) / count, rel=1e-12)


@pytest.mark.parametrize("class_beta", [True, False])
def test_ranges_of_triplets_against_a_slow_loop(class_beta: bool) -> None:
    points, labels = unit_batch(4)
    loss = Margin(4, margin=0.25, class_beta=class_beta, nu=0.01).double()
    with torch.no_grad():
        loss.beta.copy_(torch.linspace(0.9, 1.3, len(loss.beta)))

    def slow(rows: list[tuple[int, int, int]]) -> float:
        total, count, regulariser = 0.0, 0, 0.0
        for a, p, n in rows:
            beta = loss.beta[labels[a] if class_beta else 0].item()
            near, far = (((points[a] - points[i]).square().sum().item() + EPSILON) ** 0.5 for i in (p, n))
            costs = [max(0.0, near - beta + 0.25), max(0.0, beta - far + 0.25)]
            total, count = total + sum(costs), count + sum(cost > 0 for cost in costs)
            regulariser += beta
        return (total + 0.01 * (regulariser if class_beta else beta)) / count

    check_triplets(loss, points, labels, slow)


def test_a_constant_beta_is_kept_but_not_learned() -> None:
    fixed = Margin(3, beta=0.8, trainable_beta=False)
    assert not list(fixed.parameters())
    assert fixed.state_dict()["beta"].tolist() == pytest.approx([0.8] * 3)
    points, labels = unit_batch()
    torch.testing.assert_close(
        Margin(4, beta=0.8, trainable_beta=False)(points, labels), Margin(4, beta=0.8)(points, labels)
    )


def test_a_penalty_on_a_constant_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nu = 0.1, trainable_beta = False: .* write nu: 0 or trainable_beta: true"):
        Margin(3, nu=0.1, trainable_beta=False)


def test_references_stand_for_the_columns() -> None:
    """Two anchors against a memory of three: (0, 0) is a positive pair, (1, 2) a negative one."""
    points, memory = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[1.15], [7.0], [2.05]]).double()
    positive, negative = torch.zeros(2, 2, 3, dtype=torch.bool)
    positive[0, 0] = negative[1, 2] = True
    loss = Margin(2).double()
    with torch.no_grad():
        loss.beta.copy_(torch.tensor([1.2, 1.0]))
    value = loss(points, torch.tensor([0, 1]), Pairs(positive, negative), references=memory)
    assert value.item() == pytest.approx(((1.15 - 1.2 + 0.2) + (1.0 - 1.05 + 0.2)) / 2, abs=1e-6)
    with pytest.raises(ValueError, match=r"references: .* no place in Triplets"):
        loss(points, torch.tensor([0, 1]), _triplets([0], [0], [1]), references=memory)


def test_without_an_active_pair_nu_adds_nothing() -> None:
    points = torch.tensor([[0.0], [0.1], [5.0], [5.1]], dtype=torch.float64)
    loss = Margin(2, nu=1.0)
    value = loss(points, torch.tensor([0, 0, 1, 1]), _triplets([0, 2], [1, 3], [2, 0]))
    assert value.item() == 0
    value.backward()
    assert not loss.beta.grad.any()


def test_where_embeddings_coincide_the_gradient_is_zero_not_nan() -> None:
    points = torch.zeros(3, 4, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    for tuples in (_triplets([0], [1], [2]), None):
        points.grad = None
        Margin(2, margin=1.5)(points, labels, tuples).backward()
        assert not points.grad.any()


def test_masks_choose_the_pairs() -> None:
    points = torch.tensor([[0.0], [1.1], [1.3]], dtype=torch.float64)
    positive, negative = torch.zeros(2, 3, 3, dtype=torch.bool)
    positive[0, 1] = negative[0, 2] = True
    chosen = Margin(2)(points, torch.tensor([0, 0, 1]), Pairs(positive, negative))
    assert chosen.item() == pytest.approx((0.1 + 0.1) / 2, abs=1e-6)


def test_it_is_built_by_name() -> None:
    loss = registry.build("losses", "margin", num_classes=3, embedding_dim=9, beta=1, class_beta=False)
    assert isinstance(loss, Margin)
    assert loss.beta.dtype == torch.float32
