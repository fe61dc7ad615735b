"""What every loss on disk must hold, whoever wrote it. A loss joins by having a file; so does its own test file."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raydml import plugins
from raydml.tuples import Pairs, Triplets, all_pairs

NUM_CLASSES, DIM = 6, 8
LOSSES = plugins.names("losses")
HERE = Path(__file__).parent


def _random(num_rows: int, seed: int = 0) -> Tensor:
    points = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(points, dim=1)


# Batches that have broken a released implementation somewhere: (embeddings (B, D), labels (B,)).
BATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "balanced": (_random(12), torch.arange(12) % 4),
    "unbalanced": (_random(9), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3])),
    "one class only": (_random(5), torch.full((5,), 2)),
    "all classes distinct": (_random(6), torch.arange(6)),
    "single row": (_random(1), torch.tensor([3])),
    "empty": (_random(0), torch.zeros(0, dtype=torch.int64)),
    "every row the same": (_random(1).repeat(6, 1), torch.tensor([0, 0, 1, 1, 2, 2])),
    "copies within a class": (_random(3).repeat(2, 1), torch.tensor([0, 1, 2, 0, 1, 2])),
    "copies across classes": (_random(3).repeat(2, 1), torch.tensor([0, 0, 1, 1, 2, 2])),
    "all at the origin": (torch.zeros(6, DIM, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])),
    "one at the origin": (torch.cat([_random(5), _random(1) * 0]), torch.tensor([0, 0, 1, 1, 2, 2])),
    "opposite": (torch.cat([_random(3), -_random(3)]), torch.tensor([0, 0, 1, 1, 2, 2])),
    "far apart": (_random(8) * 1e4, torch.arange(8) % 3),
    "far from the origin": (_random(8) + 1e4, torch.arange(8) % 3),
    "tiny": (_random(8) * 1e-20, torch.arange(8) % 3),
}


def _build(name: str, **settings: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return plugins.build("losses", name, num_classes=NUM_CLASSES, embedding_dim=DIM, **settings)


def _triplets(labels: Tensor, seed: int = 0, num_triplets: int = 30) -> Triplets:
    """Triplets at random; those that are none by their labels are marked invalid."""
    generator = torch.Generator().manual_seed(seed)
    high = max(len(labels), 1)
    count = num_triplets if len(labels) else 0
    a, p, n = (torch.randint(high, (count,), generator=generator) for _ in range(3))
    return Triplets(a, p, n, (labels[a] == labels[p]) & (a != p) & (labels[a] != labels[n]))


def _inputs(loss: nn.Module, labels: Tensor) -> list[Pairs | Triplets | None]:
    made = {"pairs": all_pairs(labels), "triplets": _triplets(labels)}
    return [None, *(made[kind] for kind in loss.accepts)]


def _nothing(loss: nn.Module, size: int) -> list[Pairs | Triplets]:
    none = torch.zeros(size, size, dtype=torch.bool)
    rows = torch.zeros(size, dtype=torch.int64)
    made = {"pairs": Pairs(none, none), "triplets": Triplets(rows, rows, rows, rows.bool())}
    return [made[kind] for kind in loss.accepts]


def test_there_are_losses() -> None:
    assert LOSSES


@pytest.mark.parametrize("name", LOSSES)
def test_it_has_a_test_file_of_its_own(name: str) -> None:
    path = HERE / "losses" / f"test_{name}.py"
    assert path.is_file(), f"raydml/losses/{name}.py has no {path.relative_to(HERE.parent)}"
    assert "def test_" in path.read_text()


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_a_module_that_says_what_it_accepts(name: str) -> None:
    cls = plugins.load("losses", name)
    assert issubclass(cls, nn.Module)
    assert set(cls.accepts) <= {"pairs", "triplets"}
    assert list(inspect.signature(cls.forward).parameters) == ["self", "embeddings", "labels", "tuples"]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_finite_with_finite_gradients(name: str, precision: str, batch: str) -> None:
    points, labels = BATCHES[batch]
    loss = _build(name)
    if precision == "float64":
        loss = loss.double()
    dtype = torch.float32 if precision == "autocast" else torch.get_default_dtype()
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, dtype)
    for tuples in _inputs(loss, labels):
        loss.zero_grad()
        embeddings = points.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            value = loss(embeddings, labels, tuples)
        assert value.shape == ()
        assert value.dtype == (torch.float64 if precision == "float64" else torch.float32)
        assert math.isfinite(value.item())
        assert value.item() >= 0
        value.backward()
        assert embeddings.grad is not None
        assert embeddings.grad.isfinite().all()
        for key, parameter in loss.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_does_not_change_the_number(name: str) -> None:
    points, labels = BATCHES["balanced"]
    loss, embeddings = _build(name), BATCHES["balanced"][0].float()
    plain = loss(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(embeddings, labels), plain)
    exact = loss.double()(points, labels)
    assert plain.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_zero_in_the_graph_when_nothing_is_left(name: str) -> None:
    loss = _build(name)
    points, labels = BATCHES["balanced"]
    for tuples in _nothing(loss, len(labels)):
        embeddings = points.clone().requires_grad_()
        value = loss(embeddings, labels, tuples)
        assert value.item() == 0
        assert value.requires_grad
        value.backward()
        assert not embeddings.grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name: str) -> None:
    loss = _build(name).double()
    points, labels = BATCHES["unbalanced"]
    keys = [key for key, _ in loss.named_parameters()]
    for tuples in _inputs(loss, labels):

        def value(embeddings: Tensor, *parameters: Tensor, tuples: Pairs | Triplets | None = tuples) -> Tensor:
            named = dict(zip(keys, parameters, strict=True))
            return torch.func.functional_call(loss, named, (embeddings, labels, tuples))

        leaves = [points.clone(), *(p.detach().clone() for p in loss.parameters())]
        assert torch.autograd.gradcheck(value, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_takes_part(name: str) -> None:
    """A parameter that no batch moves would be a hyperparameter in disguise."""
    loss = _build(name)
    points, labels = _random(24).float(), torch.arange(24) % NUM_CLASSES
    loss(points.requires_grad_(), labels).backward()
    for key, parameter in loss.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    loss = _build(name).double()
    points, labels = BATCHES["unbalanced"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    place = order.argsort()  # where an old row went
    for tuples in _inputs(loss, labels):
        moved = tuples
        if isinstance(tuples, Pairs):
            moved = Pairs(*(mask[order][:, order] for mask in tuples))
        elif isinstance(tuples, Triplets):
            moved = Triplets(*(place[index] for index in tuples[:3]), tuples.valid)
        torch.testing.assert_close(loss(points[order], labels[order], moved), loss(points, labels, tuples))


@pytest.mark.parametrize("name", LOSSES)
def test_invalid_triplets_do_not_count(name: str) -> None:
    loss = _build(name).double()
    if "triplets" not in loss.accepts:
        pytest.skip("takes no triplets")
    points, labels = BATCHES["balanced"]
    some = _triplets(labels)
    assert some.valid.any()
    assert not some.valid.all()
    kept = Triplets(*(column[some.valid] for column in some))
    torch.testing.assert_close(loss(points, labels, some), loss(points, labels, kept))


@pytest.mark.parametrize("name", LOSSES)
def test_tuples_of_the_wrong_kind_are_refused(name: str) -> None:
    loss = _build(name)
    points, labels = BATCHES["balanced"]
    made = {"pairs": all_pairs(labels), "triplets": _triplets(labels)}
    for kind, tuples in made.items():
        if kind not in loss.accepts:
            with pytest.raises(ValueError, match="miner"):
                loss(points.float(), labels, tuples)


@pytest.mark.parametrize("name", LOSSES)
def test_it_never_waits_for_the_device(name: str) -> None:
    """A fake tensor has a shape and no content: .item(), nonzero and boolean indexing raise on it."""
    with FakeTensorMode():
        loss = _build(name)
        labels = torch.zeros(12, dtype=torch.int64)
        rows = torch.zeros(12, dtype=torch.int64)
        made = {"pairs": all_pairs(labels), "triplets": Triplets(rows, rows, rows, rows.bool())}
        for tuples in [None, *(made[kind] for kind in loss.accepts)]:
            loss(torch.zeros(12, DIM, requires_grad=True), labels, tuples).backward()


@pytest.mark.parametrize("name", LOSSES)
def test_the_input_is_left_alone(name: str) -> None:
    loss = _build(name)
    points, labels = BATCHES["balanced"]
    for tuples in _inputs(loss, labels):
        embeddings, given = points.float(), labels.clone()
        loss(embeddings, given, tuples)
        assert torch.equal(embeddings, points.float())
        assert torch.equal(given, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_its_state_makes_the_round_trip(name: str) -> None:
    points, labels = BATCHES["balanced"]
    trained, fresh = _build(name), _build(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.rand_like(parameter))
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh(points.float(), labels), trained(points.float(), labels))


@pytest.mark.parametrize("name", LOSSES)
def test_a_fresh_one_depends_on_the_seed_alone(name: str) -> None:
    one, other = _build(name), _build(name)
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.parametrize("name", LOSSES)
def test_going_down_its_gradient_brings_classes_together(name: str) -> None:
    """Free points under the loss alone: at the end every point's nearest neighbour is of its class."""
    points, labels = _random(16, seed=5).requires_grad_(), torch.arange(16) % 4
    before = torch.cdist(points.detach(), points.detach()).fill_diagonal_(math.inf)
    assert (labels[before.argmin(dim=1)] != labels).any()
    loss = _build(name).double()
    optimizer = torch.optim.Adam([points, *loss.parameters()], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(nn.functional.normalize(points, dim=1), labels).backward()
        optimizer.step()
    distance = torch.cdist(*[nn.functional.normalize(points.detach(), dim=1)] * 2).fill_diagonal_(math.inf)
    assert torch.equal(labels[distance.argmin(dim=1)], labels)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_on_a_gpu_it_gives_the_same_without_a_host_sync(name: str) -> None:
    points, labels = BATCHES["balanced"]
    loss = _build(name)
    for tuples in _inputs(loss, labels):
        expected = loss.cpu()(points.float(), labels, tuples).item()
        loss.cuda()
        there = None if tuples is None else type(tuples)(*(column.cuda() for column in tuples))
        embeddings, given = points.float().cuda().requires_grad_(), labels.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = loss(embeddings, given, there)
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert value.item() == pytest.approx(expected, rel=1e-4)
