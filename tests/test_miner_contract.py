"""What every miner on disk must hold. A miner joins by having a file; so does its own test file."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raydml import plugins
from raydml.tuples import Pairs, Triplets, all_pairs

MINERS = plugins.names("miners")
HERE = Path(__file__).parent
DIM = 8


def _random(num_rows: int, seed: int = 0) -> Tensor:
    points = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(points, dim=1)


BATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "balanced": (_random(12), torch.arange(12) % 4),
    "unbalanced": (_random(9), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3])),
    "one class only": (_random(5), torch.full((5,), 2)),
    "all classes distinct": (_random(6), torch.arange(6)),
    "single row": (_random(1), torch.tensor([3])),
    "empty": (_random(0), torch.zeros(0, dtype=torch.int64)),
    "every row the same": (_random(1).repeat(6, 1), torch.tensor([0, 0, 1, 1, 2, 2])),
    "all at the origin": (torch.zeros(6, DIM), torch.tensor([0, 0, 1, 1, 2, 2])),
    "opposite": (torch.cat([_random(3), -_random(3)]), torch.tensor([0, 0, 1, 1, 2, 2])),
    "far apart": (_random(8) * 1e4, torch.arange(8) % 3),
    "tiny": (_random(8) * 1e-20, torch.arange(8) % 3),
    "two dimensions": (_random(8)[:, :2], torch.arange(8) % 3),
}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _same(one: Pairs | Triplets, other: Pairs | Triplets) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_there_are_miners() -> None:
    assert MINERS


@pytest.mark.parametrize("name", MINERS)
def test_it_has_a_test_file_of_its_own(name: str) -> None:
    path = HERE / "miners" / f"test_{name}.py"
    assert path.is_file(), f"raydml/miners/{name}.py has no {path.relative_to(HERE.parent)}"
    assert "def test_" in path.read_text()


@pytest.mark.parametrize("name", MINERS)
def test_it_is_a_module_without_state_that_says_what_it_yields(name: str) -> None:
    cls = plugins.load("miners", name)
    assert issubclass(cls, nn.Module)
    assert cls.yields in ("pairs", "triplets")
    assert list(inspect.signature(cls.forward).parameters) == ["self", "embeddings", "labels", "generator"]
    assert not plugins.build("miners", name).state_dict()


@pytest.mark.parametrize("name", MINERS)
def test_some_loss_takes_what_it_yields(name: str) -> None:
    yields = plugins.load("miners", name).yields
    assert any(yields in plugins.load("losses", loss).accepts for loss in plugins.names("losses"))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", MINERS)
def test_what_it_yields_is_true_to_the_labels(name: str, precision: str, batch: str) -> None:
    points, labels = BATCHES[batch]
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
    points = points.to(dtype, copy=True).requires_grad_()
    pairs = all_pairs(labels)
    miner = plugins.build("miners", name)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        mined = miner(points, labels, _generator())
    assert not any(column.requires_grad for column in mined)
    if miner.yields == "pairs":
        assert isinstance(mined, Pairs)
        for found, possible in zip(mined, pairs, strict=True):
            assert found.dtype == torch.bool
            assert found.shape == possible.shape
            assert not (found & ~possible).any()
        return
    assert isinstance(mined, Triplets)
    assert mined.valid.dtype == torch.bool
    for column in mined[:3]:
        assert column.dtype == torch.int64
        assert column.shape == mined.valid.shape
        assert ((column >= 0) & (column < len(labels))).all()
    anchor, positive, negative, valid = mined
    assert pairs.positive[anchor, positive][valid].all()
    assert pairs.negative[anchor, negative][valid].all()
    possible = pairs.positive.any(dim=1) & pairs.negative.any(dim=1)
    assert torch.equal(valid, possible[anchor])


@pytest.mark.parametrize("name", MINERS)
def test_the_number_of_rows_depends_on_the_shape_alone(name: str) -> None:
    miner = plugins.build("miners", name)
    shapes = {
        tuple(column.shape for column in miner(_random(10), labels, _generator()))
        for labels in (torch.arange(10) % 2, torch.arange(10), torch.zeros(10, dtype=torch.int64))
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("name", MINERS)
def test_the_generator_alone_decides_and_the_global_one_stays_as_it_was(name: str) -> None:
    points, labels = BATCHES["balanced"]
    miner = plugins.build("miners", name)
    before = torch.get_rng_state()
    first = miner(points, labels, _generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert _same(first, miner(points, labels, _generator(1)))


@pytest.mark.parametrize("name", MINERS)
def test_a_generator_moves_on(name: str) -> None:
    """A miner that draws anything must not draw the same thing in the next batch."""
    points, labels = _random(40), torch.arange(40) % 4
    miner, generator = plugins.build("miners", name), _generator()
    before = generator.get_state()
    first = miner(points, labels, generator)
    if torch.equal(generator.get_state(), before):
        assert _same(first, miner(points, labels, _generator(5))), "random, but not from the generator"
    else:
        assert not _same(first, miner(points, labels, generator))


@pytest.mark.parametrize("name", MINERS)
def test_it_works_without_a_generator(name: str) -> None:
    points, labels = BATCHES["balanced"]
    with torch.random.fork_rng(devices=[]):
        assert len(plugins.build("miners", name)(points, labels, None)[0]) == 12


@pytest.mark.parametrize("name", MINERS)
def test_it_never_waits_for_the_device(name: str) -> None:
    """A fake tensor has a shape and no content: .item(), nonzero and boolean indexing raise on it."""
    with FakeTensorMode():
        miner = plugins.build("miners", name)
        miner(torch.zeros(12, DIM), torch.zeros(12, dtype=torch.int64), None)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MINERS)
def test_every_loss_that_accepts_it_is_finite_behind_it(name: str, batch: str) -> None:
    points, labels = BATCHES[batch]
    miner = plugins.build("miners", name)
    for loss_name in plugins.names("losses"):
        if miner.yields not in plugins.load("losses", loss_name).accepts:
            continue
        loss = plugins.build("losses", loss_name, num_classes=6, embedding_dim=points.shape[1])
        embeddings = points.clone().requires_grad_()
        value = loss(embeddings, labels, miner(embeddings, labels, _generator()))
        value.backward()
        assert value.isfinite()
        assert embeddings.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", MINERS)
def test_on_a_gpu_it_gives_the_same_without_a_host_sync(name: str) -> None:
    points, labels = BATCHES["balanced"]
    miner = plugins.build("miners", name)
    expected = miner(points, labels, _generator())
    points, labels = points.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mined = miner(points, labels, _generator())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert _same(type(mined)(*(column.cpu() for column in mined)), expected)
