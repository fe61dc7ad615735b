"""What every miner on disk must hold. A miner joins by having a file; so does its own test file."""

import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from raydml import registry
from raydml.ops.tuples import Pairs, TripletRanges, Triplets, all_pairs
from tests.batches import BATCHES, DIM, random_points

MINERS = registry.names("miners")
HERE = Path(__file__).parents[1]
KINDS = {"pairs": Pairs, "triplets": Triplets, "triplet_ranges": TripletRanges}

# These choose triplets, not anchors, so that one anchor may go without and another have many.
ANY_ANCHOR = {"random"}


def _choices(annotation: object) -> tuple[object, ...]:
    """The values of a Literal, also of one among others (Literal[...] | None)."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(value for part in get_args(annotation) for value in _choices(part))
    return ()


def _cases() -> Iterator[tuple[str, dict[str, object]]]:
    """Every miner with its defaults, and once with each other choice of each of its settings."""
    for name in MINERS:
        yield name, {}
        for key, field in registry.settings_model("miners", name).model_fields.items():
            yield from ((name, {key: value}) for value in _choices(field.annotation) if value != field.default)


def _each(cases: list[tuple[str, dict[str, object]]]) -> pytest.MarkDecorator:
    ids = [" ".join([name, *(f"{key}={value}" for key, value in settings.items())]) for name, settings in cases]
    return pytest.mark.parametrize(("name", "settings"), cases, ids=ids)


CASES = list(_cases())
PAIR_CASES = [case for case in CASES if registry.build("miners", case[0], **case[1]).yields == "pairs"]
each_case = _each(CASES)
each_case_of_pairs = _each(PAIR_CASES)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _check_pairs(mined: Pairs, possible: Pairs) -> None:
    for found, allowed in zip(mined, possible, strict=True):
        assert found.dtype == torch.bool
        assert found.shape == allowed.shape
        assert not (found & ~allowed).any()


def _check_triplets(mined: Triplets, possible: Pairs, every_anchor: bool) -> None:
    anchor, positive, negative, valid = mined
    assert valid.dtype == torch.bool
    for column in mined[:3]:
        assert column.dtype == torch.int64
        assert column.shape == valid.shape
        assert ((column >= 0) & (column < len(possible.positive))).all()
    assert possible.positive[anchor, positive][valid].all()
    assert possible.negative[anchor, negative][valid].all()
    if every_anchor:
        served = possible.positive.any(dim=1) & possible.negative.any(dim=1)
        assert set(anchor[valid].tolist()) == set(served.nonzero().flatten().tolist())


def _check_ranges(mined: TripletRanges, possible: Pairs, points: Tensor) -> None:
    size = len(points)
    for column in mined:
        assert column.shape == (size, size)
    assert mined.positive.dtype == torch.bool
    assert not (mined.positive & ~possible.positive).any()
    assert mined.order.dtype == mined.start.dtype == mined.stop.dtype == torch.int64
    assert torch.equal(mined.order.sort(dim=1).values, torch.arange(size).expand(size, size))
    num_negatives = possible.negative.sum(dim=1, keepdim=True)
    in_front = torch.arange(size) < num_negatives
    assert torch.equal(possible.negative.gather(1, mined.order), in_front)
    assert ((mined.start >= 0) & (mined.start <= num_negatives)).all()
    assert ((mined.stop >= 0) & (mined.stop <= num_negatives)).all()
    distance = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    ascending = distance.gather(1, mined.order)
    if size:
        # In float32 neighbours may change places: squares are off by 1e-7 of the largest.
        squares = ascending.square().clamp(min=1e-12)  # what is nearer than 1e-6 is as near as that
        falls = (squares.diff(dim=1) < -1e-6 * distance.max().square()) & in_front[:, 1:]
        assert not falls.any()


def _check(mined: tuple[Tensor, ...], kind: str, points: Tensor, labels: Tensor, every_anchor: bool = True) -> None:
    possible = all_pairs(labels)
    assert isinstance(mined, KINDS[kind])
    if isinstance(mined, Pairs):
        _check_pairs(mined, possible)
    elif isinstance(mined, Triplets):
        _check_triplets(mined, possible, every_anchor)
    elif isinstance(mined, TripletRanges):
        _check_ranges(mined, possible, points)


def test_there_are_miners() -> None:
    assert MINERS


def test_every_choice_is_a_case() -> None:
    assert {name for name, _ in _cases()} == set(MINERS)
    assert len(CASES) > len(MINERS)
    assert ("semi_hard", {"negatives": "nearest"}) in CASES
    assert ("all", {"tuples": "pairs"}) in PAIR_CASES


@pytest.mark.parametrize("name", MINERS)
def test_it_has_a_test_file_of_its_own(name: str) -> None:
    path = HERE / "miners" / f"test_{name}.py"
    assert path.is_file(), f"raydml/miners/{name}.py has no {path.relative_to(HERE.parent)}"
    assert "def test_" in path.read_text()


@each_case
def test_it_is_a_module_without_state_that_says_what_it_yields(name: str, settings: dict) -> None:
    miner = registry.build("miners", name, **settings)
    assert isinstance(miner, nn.Module)
    assert miner.yields in KINDS
    assert not miner.state_dict()


@each_case
def test_it_is_called_like_all_others(name: str, settings: dict) -> None:
    miner = registry.build("miners", name, **settings)
    found = list(inspect.signature(miner.forward).parameters.values())
    names = ["embeddings", "labels", "generator"] + ["pairs", "references"] * (miner.yields == "pairs")
    assert [parameter.name for parameter in found][: len(names)] == names
    assert all(parameter.default is None for parameter in found[2:])


@each_case
def test_some_loss_takes_what_it_yields(name: str, settings: dict) -> None:
    yields = registry.build("miners", name, **settings).yields
    assert any(yields in registry.load("losses", loss).accepts for loss in registry.names("losses"))


@each_case
def test_what_it_yields_is_true_to_the_labels(name: str, settings: dict) -> None:
    """On every batch, in every precision."""
    miner = registry.build("miners", name, **settings)
    for precision in ("float32", "float64", "bfloat16", "autocast"):
        dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(precision, torch.float32)
        for batch, (points, labels) in BATCHES.items():
            given = points.to(dtype, copy=True).requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
                mined = miner(given, labels, _generator())
            assert not any(column.requires_grad for column in mined), (precision, batch)
            _check(mined, miner.yields, given.detach(), labels, name not in ANY_ANCHOR)


@each_case
def test_two_dimensions_are_enough(name: str, settings: dict) -> None:
    miner = registry.build("miners", name, **settings)
    points, labels = random_points(8)[:, :2], torch.arange(8) % 3
    _check(miner(points, labels, _generator()), miner.yields, points, labels, name not in ANY_ANCHOR)


@each_case
def test_autocast_does_not_change_what_is_mined(name: str, settings: dict) -> None:
    miner = registry.build("miners", name, **settings)
    points, labels = random_points(300).float(), torch.arange(300) % 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mined = miner(points, labels, _generator())
    assert _same(mined, miner(points, labels, _generator()))


@each_case
def test_the_number_of_rows_depends_on_the_shape_alone(name: str, settings: dict) -> None:
    miner = registry.build("miners", name, **settings)
    shapes = {
        tuple(column.shape for column in miner(random_points(10).float(), labels, _generator()))
        for labels in (torch.arange(10) % 2, torch.arange(10), torch.zeros(10, dtype=torch.int64))
    }
    assert len(shapes) == 1


@each_case
def test_the_generator_alone_decides_and_the_global_one_stays_as_it_was(name: str, settings: dict) -> None:
    points, labels = BATCHES["balanced"]
    miner = registry.build("miners", name, **settings)
    before = torch.get_rng_state()
    first = miner(points, labels, _generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert _same(first, miner(points, labels, _generator(1)))


@each_case
def test_a_generator_moves_on(name: str, settings: dict) -> None:
    """A miner that draws anything must not draw the same thing in the next batch."""
    points, labels = random_points(40), torch.arange(40) % 4
    miner, generator = registry.build("miners", name, **settings), _generator()
    before = generator.get_state()
    first = miner(points, labels, generator)
    if torch.equal(generator.get_state(), before):
        assert _same(first, miner(points, labels, _generator(5))), "random, but not from the generator"
    else:
        assert not _same(first, miner(points, labels, generator))


@each_case
def test_it_works_without_a_generator(name: str, settings: dict) -> None:
    points, labels = BATCHES["balanced"]
    miner = registry.build("miners", name, **settings)
    with torch.random.fork_rng(devices=[]):
        _check(miner(points, labels, None), miner.yields, points, labels, name not in ANY_ANCHOR)


@each_case_of_pairs
def test_pair_miners_choose_from_what_they_are_given(name: str, settings: dict) -> None:
    """Candidates in a memory of another size than the batch, some of them taken out."""
    miner = registry.build("miners", name, **settings)
    points, labels = BATCHES["balanced"]
    for size in (30, 5, 0):
        memory, theirs = random_points(size, seed=1), torch.arange(size) % 4
        same = labels[:, None] == theirs
        some = torch.rand(same.shape, generator=_generator(2)) < 0.7
        given = Pairs(same & some, ~same & some)
        copy = Pairs(*(mask.clone() for mask in given))
        mined = miner(points, labels, _generator(), given, memory)
        _check_pairs(mined, given)
        assert _same(given, copy), "the candidates were changed"
        if size == 30:
            assert mined.positive.any()
            assert mined.negative.any()


@each_case_of_pairs
def test_pairs_of_the_batch_are_the_same_as_none_given(name: str, settings: dict) -> None:
    miner = registry.build("miners", name, **settings)
    points, labels = BATCHES["unbalanced"]
    given = miner(points, labels, _generator(), all_pairs(labels), points.clone())
    assert _same(given, miner(points, labels, _generator()))


@each_case
def test_it_never_waits_for_the_device(name: str, settings: dict) -> None:
    """A fake tensor has a shape and no content: .item(), nonzero and reading by a mask raise on it."""
    with FakeTensorMode():
        miner = registry.build("miners", name, **settings)
        labels = torch.zeros(12, dtype=torch.int64)
        miner(torch.zeros(12, DIM), labels, None)
        if miner.yields == "pairs":
            mask = torch.zeros(12, 20, dtype=torch.bool)
            miner(torch.zeros(12, DIM), labels, None, Pairs(mask, mask), torch.zeros(20, DIM))


@each_case
def test_every_loss_that_accepts_it_is_finite_behind_it(name: str, settings: dict) -> None:
    miner = registry.build("miners", name, **settings)
    failures = []
    for loss_name in registry.names("losses"):
        if miner.yields not in registry.load("losses", loss_name).accepts:
            continue
        loss = registry.build("losses", loss_name, num_classes=6, embedding_dim=DIM)
        for batch, (points, labels) in BATCHES.items():
            embeddings = points.float().requires_grad_()
            value = loss(embeddings, labels, miner(embeddings, labels, _generator()))
            value.backward()
            if not (value.isfinite() and embeddings.grad.isfinite().all()):
                failures.append(f"{loss_name}, {batch}: {value}")
    assert not failures, "\n".join(failures)


@pytest.mark.gpu
@each_case
def test_on_a_gpu_it_gives_the_same_without_a_host_sync(name: str, settings: dict) -> None:
    points, labels = BATCHES["balanced"]
    miner = registry.build("miners", name, **settings)
    expected = miner(points, labels, _generator())
    there, classes = points.cuda(), labels.cuda()
    miner(there, classes, _generator())  # what is made at the first call only
    torch.cuda.set_sync_debug_mode("error")
    try:
        mined = miner(there, classes, _generator())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = type(mined)(*(column.cpu() for column in mined))
    if isinstance(found, TripletRanges):  # the order of what lies behind the negatives is left open
        in_front = torch.arange(len(labels)) < all_pairs(labels).negative.sum(dim=1, keepdim=True)
        found, expected = (ranges._replace(order=ranges.order * in_front) for ranges in (found, expected))
    assert _same(found, expected)
