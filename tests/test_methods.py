"""The contract of methods, for every method on disk, and what the plain one does with its parts."""

from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from raydml import plugins
from raydml.methods._base import Method
from raydml.model import build_network
from raydml.optimizers import GROUPS, check_every_parameter_learns
from raydml.regularizers._base import Regularizer
from raydml.samplers.samplers import ClassBalanced, Uniform

LABELS = np.repeat(np.arange(4), 6)


def network_of(normalize="l2"):
    return build_network(
        backbone="convnet",
        embedding_dim=8,
        layer_norm=False,
        normalize=normalize,
        freeze_batch_norm=False,
        weights="none",
        seed=0,
    )


def method_of(name, loss=None, miner=None, regularizers=MappingProxyType({})):
    loss = loss or plugins.build("losses", "margin", num_classes=4, embedding_dim=8)
    sampler = ClassBalanced(LABELS, classes_per_batch=2, images_per_class=3)
    parts = {"network": network_of(), "loss": loss, "miner": miner, "sampler": sampler, "regularizers": regularizers}
    return plugins.build("methods", name, **parts)


def images_of(num_images=6):
    return torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=plugins.names("methods"))
def make(request):
    return lambda: method_of(request.param)


@pytest.fixture
def method(make):
    return make()


def test_a_method_is_a_method_and_takes_the_context(method):
    assert isinstance(method, Method)
    assert type(method).__mro__[1] is Method  # inheritance one level deep


def test_a_plan_points_into_the_images_and_repeats_with_its_generator(make, method):
    plan = method.plan_epoch(np.random.default_rng(0))
    assert plan.batches
    assert all(batch.dtype == np.int64 and batch.min() >= 0 and batch.max() < len(LABELS) for batch in plan.batches)
    repeated = make().plan_epoch(np.random.default_rng(0))
    assert all(np.array_equal(a, b) for a, b in zip(plan.batches, repeated.batches, strict=True))


def test_the_loss_of_a_batch_reaches_every_parameter_and_is_finite(method):
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    loss = method.batch_loss(images_of(), labels, torch.Generator())
    assert loss.shape == ()
    assert loss.isfinite()
    loss.backward()
    without = [name for name, parameter in method.named_parameters() if parameter.grad is None]
    assert without == []


def test_calling_a_method_embeds(method):
    method.eval()
    embeddings = method(images_of())
    assert embeddings.shape == (6, 8)
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, method.embed(images_of()))
    # one image at a time gives the same: no statistics over the batch
    torch.testing.assert_close(method(images_of()[:1]), embeddings[:1])


def test_every_parameter_has_one_group(method):
    groups = method.parameter_groups()
    assert set(groups) <= set(GROUPS)
    check_every_parameter_learns(method.named_parameters(), groups)


def test_the_state_round_trips(make, method):
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1.0)
    other = make()
    other.load_state_dict(method.state_dict())
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# --- plain ---------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A loss or a miner that notes what it is given."""

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer
        self.calls = []

    def forward(self, *arguments):
        self.calls.append(arguments)
        return self.answer if self.answer is not None else arguments[0].sum()


def test_plain_gives_the_loss_what_the_miner_chose_from_detached_embeddings():
    loss, miner = Recorder(), Recorder(answer="tuples")
    method = method_of("plain", loss=loss, miner=miner)
    labels, generator = torch.arange(6), torch.Generator()
    method.batch_loss(images_of(), labels, generator)
    mined, seen_labels, seen_generator = miner.calls[0]
    embeddings, loss_labels, tuples = loss.calls[0]
    assert not mined.requires_grad
    assert embeddings.requires_grad
    assert torch.equal(mined, embeddings)
    assert seen_labels is labels
    assert loss_labels is labels
    assert seen_generator is generator
    assert tuples == "tuples"


def test_plain_without_a_miner_leaves_the_tuples_to_the_loss():
    loss = Recorder()
    method_of("plain", loss=loss).batch_loss(images_of(), torch.arange(6), torch.Generator())
    assert len(loss.calls[0]) == 2


def test_plain_computes_losses_in_float32_under_autocast():
    class Product(nn.Module):
        def forward(self, embeddings, labels):  # noqa: ARG002
            products = embeddings @ embeddings.T
            self.dtype = products.dtype
            return products.sum()

    loss = Product()
    method = method_of("plain", loss=loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = method.batch_loss(images_of(), torch.arange(6), torch.Generator())
    assert loss.dtype == torch.float32
    assert total.dtype == torch.float32


def test_plain_plans_with_its_sampler():
    sampler = Uniform(LABELS, batch_size=5)
    plain = plugins.build("methods", "plain", network=network_of(), loss=Recorder(), miner=None, sampler=sampler)
    plan = plain.plan_epoch(np.random.default_rng(3))
    expected = Uniform(LABELS, batch_size=5).plan(np.random.default_rng(3))
    assert all(np.array_equal(a, b) for a, b in zip(plan.batches, expected.batches, strict=True))
    assert len(plan.batches) == 4


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


def test_regularisers_rewrite_the_tuples_add_their_terms_and_learn_with_the_loss():
    terms = {"one": Term(0.5, "-once"), "two": Term(0.25, "-twice")}
    loss = Recorder()
    method = method_of("plain", loss=loss, miner=Recorder(answer="mined"), regularizers=terms)
    labels, generator = torch.arange(6), torch.Generator()
    total = method.batch_loss(images_of(), labels, generator)
    assert loss.calls[0][2] == "mined-once-twice"
    torch.testing.assert_close(total, loss.calls[0][0].sum() + 0.75)
    embeddings, seen_labels, seen_generator = terms["one"].calls[0]
    assert embeddings is loss.calls[0][0]
    assert embeddings.requires_grad
    assert seen_labels is labels
    assert seen_generator is generator
    assert {id(term.value) for term in terms.values()} <= {id(p) for p in method.parameter_groups()["loss"]}
    check_every_parameter_learns(method.named_parameters(), method.parameter_groups())


def test_regularisers_without_a_miner_add_their_terms():
    loss = Recorder()
    method = method_of("plain", loss=loss, regularizers={"one": Term(0.5)})
    total = method.batch_loss(images_of(), torch.arange(6), torch.Generator())
    torch.testing.assert_close(total, loss.calls[0][0].sum() + 0.5)


def test_a_method_without_answers_says_so():
    bare = Method(network_of(), Recorder(), None, Uniform(LABELS, batch_size=5))
    for question in (
        lambda: bare.plan_epoch(np.random.default_rng(0)),
        lambda: bare.batch_loss(images_of(), torch.arange(6), torch.Generator()),
        lambda: bare.embed(images_of()),
    ):
        with pytest.raises(NotImplementedError):
            question()
