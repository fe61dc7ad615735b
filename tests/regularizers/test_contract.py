"""What every regulariser on disk must hold. A regulariser joins by having a file; so does its own test file."""

import copy
import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raydml import registry
from raydml.models.network import Head, Network
from raydml.ops.distances import euclidean
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs, all_triplets
from raydml.regularizers._base import Regularizer
from tests.batches import BATCHES, DIM, random_points, random_triplets
from tests.tuples import empty_kinds

NUM_CLASSES, FEATURE_DIM = 6, 5
REGULARIZERS = registry.names("regularizers")
HERE = Path(__file__).parents[1]

# Settings with which a regulariser has something to say from the first step on.
AT_WORK: dict[str, dict[str, Any]] = {
    "cross_batch_memory": {"size": 20, "start_step": 0},
    "matryoshka": {"dims": [2, 5]},
}


class _Pull(nn.Module):
    """A loss with a parameter that takes pairs, smooth in everything."""

    accepts: ClassVar[tuple[str, ...]] = ("pairs",)

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(
        self, embeddings: Tensor, labels: Tensor, tuples: Pairs | None = None, references: Tensor | None = None
    ) -> Tensor:
        pairs = all_pairs(labels) if tuples is None else tuples
        products = embeddings @ (embeddings if references is None else references).T
        cost = torch.where(pairs.positive, (1 - products).square(), torch.where(pairs.negative, products.square(), 0))
        return self.factor.to(cost.dtype) * cost.sum() / max(len(labels), 1)


def _surroundings() -> dict[str, Any]:
    head = Head(FEATURE_DIM, DIM, layer_norm=False, normalize="l2")
    network = Network(nn.Identity(), head, freeze_batch_norm=False)
    return {
        "num_classes": NUM_CLASSES,
        "embedding_dim": DIM,
        "network": network,
        "loss": _Pull(),
        "make_loss": lambda _dim: _Pull(),
        "miner": registry.build("miners", "multi_similarity"),
    }


def _build(name: str, **replaced: Any) -> Regularizer:
    """At work; the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return registry.build("regularizers", name, **{**_surroundings(), **AT_WORK.get(name, {}), **replaced})


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# What one keeps of earlier batches, or of this one, is a constant to its gradient: its own tests say what that is.
KEEPS_NOTHING = [name for name in REGULARIZERS if not list(_build(name).buffers())]


def _all_kinds(points: Tensor, labels: Tensor) -> dict[str, Pairs | Triplets | TripletRanges]:
    pairs = all_pairs(labels)
    ranges = all_triplets(euclidean(points.detach()), pairs)
    return {"pairs": pairs, "triplets": random_triplets(labels, num_triplets=300), "triplet_ranges": ranges}


def test_there_are_regularizers() -> None:
    assert REGULARIZERS
    assert KEEPS_NOTHING


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_has_a_test_file_of_its_own(name: str) -> None:
    path = HERE / "regularizers" / f"test_{name}.py"
    assert path.is_file(), f"raydml/regularizers/{name}.py has no {path.relative_to(HERE.parent)}"
    assert "def test_" in path.read_text()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_is_a_regularizer_that_says_what_it_does(name: str) -> None:
    cls = registry.load("regularizers", name)
    assert issubclass(cls, Regularizer)
    assert set(cls.rewrites) <= {"pairs", "triplets", "triplet_ranges"}
    assert list(inspect.signature(cls.forward).parameters) == ["self", "embeddings", "labels", "generator"]
    assert list(inspect.signature(cls.rewrite).parameters) == ["self", "tuples", "labels", "generator"]
    assert 20 <= len(registry.describe("regularizers", name)) <= 100
    source = inspect.getdoc(importlib.import_module(cls.__module__)).splitlines()[0]  # type: ignore[union-attr]
    assert source.endswith(".")
    for key, field in registry.settings_model("regularizers", name).model_fields.items():
        assert field.description, key


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_is_finite_with_finite_gradients(name: str) -> None:
    """On every batch, in every precision; all failures in one message."""
    failures = []
    for precision, (batch, (points, labels)) in itertools.product(
        ("float32", "float64", "bfloat16", "autocast"), BATCHES.items()
    ):
        dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
        width = torch.float64 if precision == "float64" else torch.float32
        regularizer = _build(name).to(width)
        for step in range(3):  # what it keeps may go wrong later than the first value
            regularizer.zero_grad()
            embeddings = points.to(dtype, copy=True).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
                value = regularizer(embeddings, labels, _generator())
            value.backward()
            parameters = list(regularizer.parameters())
            found = [embeddings.grad] if embeddings.grad is not None else []
            found += [value, *regularizer.state_dict().values(), *(p.grad for p in parameters if p.grad is not None)]
            whole = all(parameter.grad is not None for parameter in parameters)
            if not (whole and all(x.isfinite().all() for x in found) and value.shape == () and value.dtype == width):
                failures.append(f"{precision}, {batch}, step {step}: {value}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_good_batch_after_each_bad_one_is_finite(name: str) -> None:
    regularizer = _build(name)
    for points, labels in BATCHES.values():
        for embeddings, given in ((points, labels), BATCHES["balanced"]):
            leaf = embeddings.float().requires_grad_()
            value = regularizer(leaf, given, _generator())
            value.backward()
            assert value.isfinite()
            assert leaf.grad is None or leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_float64_embeddings_give_float64_whatever_it_keeps(name: str) -> None:
    points, labels = BATCHES["balanced"]
    value = _build(name)(points.clone().requires_grad_(), labels, _generator())
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, _build(name).double()(points, labels, _generator()), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_autocast_does_not_change_the_number(name: str) -> None:
    points, labels = BATCHES["balanced"]
    plain = _build(name)(points.float(), labels, _generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_build(name)(points.float(), labels, _generator()), plain)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_an_empty_batch_costs_nothing_and_leaves_no_trace(name: str) -> None:
    regularizer, untouched = _build(name), _build(name)
    embeddings = torch.zeros(0, DIM, requires_grad=True)
    value = regularizer(embeddings, torch.zeros(0, dtype=torch.int64), _generator())
    assert value.item() == 0
    assert value.requires_grad
    value.backward()
    assert not any(parameter.grad.any() for parameter in regularizer.parameters())
    points, labels = BATCHES["balanced"]
    assert torch.equal(regularizer(points, labels, _generator()), untouched(points, labels, _generator()))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_what_belongs_to_the_method_is_not_in_its_state(name: str) -> None:
    """The network, the loss and the miner are the method's: twice in a state, they would be learnt twice."""
    around = _surroundings()
    regularizer = _build(name, **around)
    others = {id(p) for part in ("network", "loss", "miner") for p in around[part].parameters()}
    assert not others & {id(parameter) for parameter in regularizer.parameters()}
    parts = {id(around[part]) for part in ("network", "loss", "miner")}
    assert not parts & {id(module) for module in regularizer.modules()}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_copy_of_the_whole_is_a_whole(name: str) -> None:
    """In a deep copy of a method, the copied regulariser belongs to the copied network and loss."""
    around = _surroundings()
    whole = nn.ModuleDict({"network": around["network"], "loss": around["loss"], "it": _build(name, **around)})
    other = copy.deepcopy(whole)
    points, labels = BATCHES["balanced"]
    expected = whole["it"](points, labels, _generator()).item()
    with torch.no_grad():
        for part in ("network", "loss"):
            for parameter in whole[part].parameters():
                parameter.mul_(3)
    assert other["it"](points, labels, _generator()).item() == expected


@pytest.mark.parametrize("name", KEEPS_NOTHING)
def test_gradients_are_those_of_the_value(name: str) -> None:
    """With respect to embeddings, its own parameters, and those of the network and the loss."""
    around = _surroundings()
    whole = nn.ModuleDict({"network": around["network"], "loss": around["loss"], "it": _build(name, **around)}).double()
    points, labels = BATCHES["unbalanced"]
    keys = [key for key, _ in whole.named_parameters()]

    def value(embeddings: Tensor, *parameters: Tensor) -> Tensor:
        forward = _Forward(whole)
        named = {f"whole.{key}": parameter for key, parameter in zip(keys, parameters, strict=True)}
        return torch.func.functional_call(forward, named, (embeddings, labels)) + 0 * embeddings.sum()

    leaves = [points.clone(), *(parameter.detach().clone() for parameter in whole.parameters())]
    assert torch.autograd.gradcheck(value, [leaf.requires_grad_() for leaf in leaves])


class _Forward(nn.Module):
    """A whole that is called as its regulariser."""

    def __init__(self, whole: nn.ModuleDict) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.whole["it"](embeddings, labels, _generator())


@pytest.mark.parametrize("name", REGULARIZERS)
def test_two_steps_may_wait_for_their_gradients(name: str) -> None:
    """What it keeps must not be changed under a step whose gradients are still to come."""
    points, labels = random_points(10).float(), torch.arange(10) % 3  # of the type that it keeps, hence without a copy
    one, other = (points[rows].clone().requires_grad_() for rows in (slice(0, 5), slice(5, 10)))
    at_once = _build(name)
    (at_once(one, labels[:5], _generator()) + at_once(other, labels[5:], _generator())).backward()
    in_turn = _build(name)
    for leaf, given in ((one, labels[:5]), (other, labels[5:])):
        copied = leaf.detach().clone().requires_grad_()
        in_turn(copied, given, _generator()).backward()
        assert (leaf.grad is None) == (copied.grad is None)
        assert leaf.grad is None or torch.equal(leaf.grad, copied.grad)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    points, labels = BATCHES["unbalanced"]
    order = torch.randperm(len(labels), generator=_generator(3))
    one, other = _build(name).double(), _build(name).double()
    for _ in range(3):
        expected = one(points, labels, _generator())
        torch.testing.assert_close(other(points[order], labels[order], _generator()), expected)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_parameter_takes_part(name: str) -> None:
    """A parameter that no batch moves would be a hyperparameter in disguise."""
    regularizer = _build(name)
    points = random_points(12).float().requires_grad_()
    regularizer(points, torch.arange(12) % NUM_CLASSES, _generator()).backward()
    for key, parameter in regularizer.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", REGULARIZERS)
def test_its_state_makes_the_round_trip(name: str) -> None:
    first, fresh = _build(name), _build(name)
    for seed in range(3):
        first(random_points(9, seed).float(), torch.arange(9) % 4, _generator())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    fresh.load_state_dict(first.state_dict(), strict=True)
    for seed in range(3, 6):
        points, labels = random_points(9, seed).float(), torch.arange(9) % 3
        assert torch.equal(fresh(points, labels, _generator()), first(points, labels, _generator()))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_input_is_left_alone(name: str) -> None:
    regularizer = _build(name)
    points, labels = BATCHES["balanced"]
    for _ in range(2):
        embeddings, given = points.float(), labels.clone()
        regularizer(embeddings, given, _generator())
        assert torch.equal(embeddings, points.float())
        assert torch.equal(given, labels)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_rewrites_what_it_says_and_nothing_else(name: str) -> None:
    regularizer = _build(name)
    points, labels = random_points(40), torch.arange(40) % 4
    for kind, tuples in _all_kinds(points, labels).items():
        if kind not in regularizer.rewrites:
            if not regularizer.rewrites:
                assert regularizer.rewrite(tuples, labels, _generator()) is tuples
            continue
        before = [column.clone() for column in tuples]
        rewritten = regularizer.rewrite(tuples, labels, _generator())
        assert type(rewritten) is type(tuples)
        for column, given, old in zip(rewritten, tuples, before, strict=True):
            assert torch.equal(given, old)
            assert (column.shape, column.dtype) == (old.shape, old.dtype)
            assert column.min() >= 0
            assert column.max() < len(labels)
        assert any(not torch.equal(column, old) for column, old in zip(rewritten, before, strict=True))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_generator_alone_decides_and_the_global_one_stays_as_it_was(name: str) -> None:
    points, labels = random_points(20), torch.arange(20) % 4
    before = torch.get_rng_state()
    one, other = _build(name), _build(name)
    assert torch.equal(one(points, labels, _generator(1)), other(points, labels, _generator(1)))
    for kind in one.rewrites:
        tuples = _all_kinds(points, labels)[kind]
        generator = _generator(1)
        first = one.rewrite(tuples, labels, generator)
        assert all(map(torch.equal, first, other.rewrite(tuples, labels, _generator(1))))
        assert not all(map(torch.equal, first, one.rewrite(tuples, labels, generator))), "a generator moves on"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_works_without_a_generator_or_a_miner(name: str) -> None:
    points, labels = BATCHES["balanced"]
    with torch.random.fork_rng(devices=[]):
        regularizer = _build(name, miner=None)
        assert regularizer(points.float(), labels).isfinite()
        for kind in regularizer.rewrites:
            regularizer.rewrite(_all_kinds(points, labels)[kind], labels)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_never_waits_for_the_device(name: str) -> None:
    """A fake tensor has a shape and no content: .item(), nonzero and reading by a mask raise on it."""
    with FakeTensorMode():
        regularizer = _build(name)
        labels, made = torch.zeros(12, dtype=torch.int64), empty_kinds(12)
        for _ in range(2):
            regularizer(torch.zeros(12, DIM, requires_grad=True), labels, None).backward()
        for kind in regularizer.rewrites:
            regularizer.rewrite(made[kind], labels, None)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_it_compiles_without_a_break(name: str, backend: str) -> None:
    points, labels = BATCHES["unbalanced"]
    torch._dynamo.reset()
    plain = _build(name)
    compiled = torch.compile(_build(name), fullgraph=True, backend=backend, dynamic=False)
    for _ in range(3):
        one, other = (points.float().requires_grad_() for _ in range(2))
        expected, value = plain(one, labels), compiled(other, labels)
        torch.testing.assert_close(value, expected)
        expected.backward()
        value.backward()
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REGULARIZERS)
def test_on_a_gpu_it_gives_the_same_without_a_host_sync(name: str) -> None:
    points, labels = BATCHES["balanced"]
    here = _build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        around = _surroundings()
    there = _build(name, **around).cuda()
    around["network"].cuda()
    around["loss"].cuda()
    given, kinds = labels.cuda(), _all_kinds(points.float(), labels)
    moved = {kind: type(tuples)(*(column.cuda() for column in tuples)) for kind, tuples in kinds.items()}
    for _ in range(3):
        expected = here(points.float(), labels, _generator()).item()
        embeddings = points.float().cuda().requires_grad_()
        generator = _generator()
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = there(embeddings, given, generator)
            value.backward()
            rewritten = {kind: there.rewrite(moved[kind], given, _generator()) for kind in there.rewrites}
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
        for kind, tuples in rewritten.items():
            for column, wanted in zip(tuples, here.rewrite(kinds[kind], labels, _generator()), strict=True):
                assert torch.equal(column.cpu(), wanted)
