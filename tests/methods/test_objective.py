"""What an objective does with a loss, a miner and regularisers."""

import pytest
import torch
from torch import nn

from raydml.methods._base import Objective
from raydml.regularizers._base import Regularizer

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
