"""What an objective does with a loss, a miner and regularisers."""

import pytest
import torch
from torch import nn

from raydml import registry
from raydml.methods._base import Objective
from raydml.ops.distances import shared_measure
from raydml.regularizers._base import Regularizer
from tests.products import CountedProducts

LABELS = torch.arange(6)


class Recorder(nn.Module):
    """A loss or a miner that notes what it is given."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer
        self.calls = []

    def forward(self, *arguments):
        self.calls.append(arguments)
        return self.answer if self.answer is not None else arguments[0].sum()


class Term(Regularizer):
    """A regulariser with a parameter, that notes its calls."""

    def __init__(self, value, suffix=""):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.suffix = suffix
        self.calls = []

    def forward(self, *arguments):
        self.calls.append(arguments)
        return self.value

    def rewrite(self, tuples, labels, generator=None):  # noqa: ARG002
        return tuples + self.suffix


@pytest.fixture
def embeddings():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_the_loss_gets_what_the_miner_chose_from_detached_embeddings(embeddings):
    loss, miner, generator = Recorder(), Recorder(answer="tuples"), torch.Generator()
    Objective(loss, miner)(embeddings, LABELS, generator)
    mined, seen_labels, seen_generator = miner.calls[0]
    got, loss_labels, tuples = loss.calls[0]
    assert not mined.requires_grad
    assert torch.equal(mined, embeddings)
    assert got is embeddings
    assert seen_labels is LABELS
    assert loss_labels is LABELS
    assert seen_generator is generator
    assert tuples == "tuples"


def test_without_a_miner_the_tuples_are_left_to_the_loss(embeddings):
    loss = Recorder()
    Objective(loss)(embeddings, LABELS, torch.Generator())
    assert len(loss.calls[0]) == 2


def test_losses_are_computed_in_float32_under_autocast(embeddings):
    class Product(nn.Module):
        def forward(self, embeddings, labels):  # noqa: ARG002
            products = embeddings @ embeddings.T
            self.dtype = products.dtype
            return products.sum()

    loss = Product()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = Objective(loss)(embeddings, LABELS, torch.Generator())
    assert loss.dtype == torch.float32
    assert total.dtype == torch.float32


def test_regularisers_rewrite_the_tuples_and_add_their_terms(embeddings):
    terms = {"one": Term(0.5, "-once"), "two": Term(0.25, "-twice")}
    loss, generator = Recorder(), torch.Generator()
    objective = Objective(loss, Recorder(answer="mined"), terms)
    total = objective(embeddings, LABELS, generator)
    assert loss.calls[0][2] == "mined-once-twice"
    torch.testing.assert_close(total, embeddings.sum() + 0.75)
    got, seen_labels, seen_generator = terms["one"].calls[0]
    assert got is embeddings
    assert seen_labels is LABELS
    assert seen_generator is generator
    assert {id(term.value) for term in terms.values()} <= {id(p) for p in objective.parameters()}


def test_regularisers_without_a_miner_add_their_terms(embeddings):
    total = Objective(Recorder(), regularizers={"one": Term(0.5)})(embeddings, LABELS, torch.Generator())
    torch.testing.assert_close(total, embeddings.sum() + 0.5)


PAIRS_OF_ONE_MEASURE = [
    (loss, loss_settings, miner, miner_settings)
    for loss, loss_settings in [
        ("multi_similarity", {}),
        ("weight", {}),
        ("binomial_deviance", {}),
        ("hard_mining", {}),
        ("contrastive", {"form": "similarity"}),
    ]
    for miner, miner_settings in [("multi_similarity", {}), ("deep_metric_semi_hard", {}), ("inverse_gaussian", {})]
] + [
    ("triplet", {"squared": squared}, "semi_hard", {"squared": squared, "negatives": negatives})
    for squared in (True, False)
    for negatives in ("all", "nearest")
]


def _batch():
    generator = torch.Generator().manual_seed(1)
    return nn.functional.normalize(torch.randn(24, 8, generator=generator)), torch.arange(24) % 6


def _result(step, points):
    leaf = points.clone().requires_grad_()
    value = step(leaf)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("case", PAIRS_OF_ONE_MEASURE, ids=lambda case: " ".join(map(str, case)))
def test_a_loss_and_a_miner_of_one_measure_share_its_matrix_and_nothing_else_changes(case):
    points, labels = _batch()
    loss = registry.build("losses", case[0], **case[1])
    miner = registry.build("miners", case[2], **case[3])

    def apart(leaf):
        return loss(leaf, labels, miner(leaf.detach(), labels, torch.Generator().manual_seed(2)))

    def together(leaf):
        return Objective(loss, miner)(leaf, labels, torch.Generator().manual_seed(2))

    with CountedProducts() as alone:
        expected = _result(apart, points)
    with CountedProducts() as shared:
        found = _result(together, points)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))
    assert expected[1].any()
    assert (alone.count, shared.count) == (3, 2)


@pytest.mark.parametrize(
    ("loss", "miner"),
    [
        (("contrastive", {}), ("multi_similarity", {})),  # distances, similarities
        (("triplet", {"squared": False}), ("semi_hard", {})),  # distances, squares
        (("triplet", {}), ("semi_hard", {"negatives": "random"})),  # listed triplets: differences are exact
        (("multi_similarity", {}), ("all", {"tuples": "pairs"})),  # a miner that reads no matrix
        (("margin", {}), ("semi_hard", {})),  # a loss that reads none
    ],
)
def test_others_share_none(loss, miner):
    points, labels = _batch()
    built = registry.build("losses", loss[0], num_classes=6, embedding_dim=8, **loss[1])
    chooser = registry.build("miners", miner[0], **miner[1])
    assert shared_measure(built, chooser) is None
    tuples = chooser(points, labels, torch.Generator().manual_seed(2))
    found = Objective(built, chooser)(points, labels, torch.Generator().manual_seed(2))
    assert torch.equal(found, built(points, labels, tuples))


def test_a_shared_matrix_is_in_float32_under_autocast():
    points, labels = _batch()
    objective = Objective(registry.build("losses", "multi_similarity"), registry.build("miners", "multi_similarity"))
    expected = objective(points, labels, torch.Generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective(points, labels, torch.Generator()), expected)
    half = objective(points.bfloat16(), labels, torch.Generator())
    assert half.dtype == torch.float32
    assert torch.equal(half, objective(points.bfloat16().float(), labels, torch.Generator()))
