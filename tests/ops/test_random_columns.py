"""Random draws against the frequencies they promise."""

import itertools
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from raydml.ops.random_columns import draw_columns, draw_different_columns, draw_different_numbers, uniform

WEIGHT = torch.tensor([[0.0, 1.0, 0.0, 3.0, 6.0, 0.0], [5.0, 0.0, 2.0, 0.0, 0.0, 3.0]])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _fits(drawn: Tensor, weight: Tensor) -> bool:
    """Whether the columns drawn from one row have the frequencies of its weights, and no other ones were drawn."""
    count = drawn.bincount(minlength=len(weight)).double()
    likely = weight > 0
    expected = weight.double()[likely] / weight.double().sum() * len(drawn)
    return not count[~likely].any() and chisquare(count[likely], expected).pvalue > 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_have_the_frequencies_of_their_weights(dtype: torch.dtype, scale: float) -> None:
    drawn = draw_columns(WEIGHT.to(dtype) * scale, _generator(), 20_000)
    assert drawn.shape == (2, 20_000)
    assert drawn.dtype == torch.int64
    assert all(_fits(columns, weight) for columns, weight in zip(drawn, WEIGHT, strict=True))


def test_columns_of_a_mask_are_all_as_likely() -> None:
    mask = WEIGHT > 0
    drawn = draw_columns(mask, _generator(), 20_000)
    assert all(_fits(columns, weight.double()) for columns, weight in zip(drawn, mask, strict=True))


def test_light_columns_behind_heavy_ones_are_not_forgotten() -> None:
    """A running sum in float32 would not move by 1e-8 of what came before."""
    weight = torch.cat([torch.ones(1), torch.full((1000,), 1e-8)])[None]
    assert (draw_columns(weight, _generator(), 500_000) > 0).any()  # 5 expected


def test_rows_and_draws_are_independent() -> None:
    drawn = draw_columns(torch.ones(200, 3), _generator(), 100)
    assert _fits(drawn[:, 0], torch.ones(3))
    together = Counter(zip(drawn[:-1].flatten().tolist(), drawn[1:].flatten().tolist(), strict=True))
    assert chisquare(list(together.values())).pvalue > 1e-3
    assert len(together) == 9


class _Extremes:
    """In place of the random numbers: the least and the greatest that there are."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, shape: tuple[int, ...], device: torch.device, generator: object) -> Tensor:  # noqa: ARG002
        return torch.full(shape, self.value, dtype=torch.float64, device=device)


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
def test_columns_without_weight_are_never_drawn(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydml.ops.random_columns.uniform", _Extremes(value))
    weight = torch.rand(500, 40, generator=_generator(), dtype=torch.float64)
    weight = weight.masked_fill(torch.rand(500, 40, generator=_generator(1)) < 0.7, 0)
    weight = weight[weight.any(dim=1)] * torch.logspace(-300, 300, 40, dtype=torch.float64)
    drawn = draw_columns(weight, None)
    assert (weight.gather(1, drawn) > 0).all()
    different = draw_different_columns(weight, None, 40)
    enough = torch.arange(40) < (weight > 0).sum(dim=1, keepdim=True)
    assert torch.equal(weight.gather(1, different) > 0, enough)


def test_the_least_of_all_weights_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydml.ops.random_columns.uniform", _Extremes(1 - 2**-53))
    assert draw_columns(torch.tensor([[0.0, 5e-324, 0.0]], dtype=torch.float64), None).item() == 1


def test_rows_without_weight_yield_some_column() -> None:
    drawn = draw_columns(torch.zeros(3, 4), _generator(), 5)
    assert ((drawn >= 0) & (drawn < 4)).all()
    assert draw_columns(torch.zeros(3, 0), _generator(), 5).tolist() == [[0] * 5] * 3
    assert draw_columns(torch.zeros(0, 4), _generator(), 5).shape == (0, 5)
    assert draw_columns(torch.zeros(0, 0), _generator()).shape == (0, 1)


def test_different_columns_are_different() -> None:
    drawn = draw_different_columns(torch.rand(300, 20, generator=_generator()), _generator(1), 20)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(20).expand(300, 20))
    assert draw_different_columns(WEIGHT, _generator(), 0).shape == (2, 0)
    assert draw_different_columns(WEIGHT, _generator(), 3).sort(dim=1).values.tolist() == [[1, 3, 4], [0, 2, 5]]


def test_different_columns_have_the_frequencies_of_a_draw_without_replacement() -> None:
    """First b then c: w_b / W * w_c / (W - w_b)."""
    weight = torch.tensor([1.0, 2.0, 0.0, 3.0])
    drawn = draw_different_columns(weight.expand(20_000, 4), _generator(), 2)
    found = Counter(map(tuple, drawn.tolist()))
    expected = {}
    for b, c in itertools.permutations((0, 1, 3), 2):
        w_b, w_c, total = weight[b].item(), weight[c].item(), weight.sum().item()
        expected[b, c] = 20_000 * w_b / total * w_c / (total - w_b)
    assert found.keys() == expected.keys()
    assert chisquare([found[key] for key in expected], list(expected.values())).pvalue > 1e-3


def test_different_columns_after_the_heavy_ones_are_the_lightest() -> None:
    weight = torch.tensor([[0.0, 1.0, 1e-300, 0.0]], dtype=torch.float64)
    assert draw_different_columns(weight, _generator(), 2).tolist() == [[1, 2]]


def test_different_numbers_are_different_and_below_their_bound() -> None:
    for bound in (256, 1000, 2**40):
        numbers, counts = draw_different_numbers(torch.tensor(bound), _generator(), 128)
        assert numbers.shape == counts.shape == (128,)
        assert numbers.dtype == torch.int64
        assert counts.all()
        assert len(set(numbers.tolist())) == 128
        assert ((numbers >= 0) & (numbers < bound)).all()


def test_all_sets_of_different_numbers_are_as_likely() -> None:
    generator = _generator()
    drawn = [draw_different_numbers(torch.tensor(6), generator, 2) for _ in range(4000)]
    assert all(counts.all() for _, counts in drawn)
    found = Counter(tuple(numbers.tolist()) for numbers, _ in drawn)
    assert found.keys() == set(itertools.permutations(range(6), 2))
    assert chisquare(list(found.values())).pvalue > 1e-3


def test_what_a_small_bound_cannot_give_does_not_count() -> None:
    numbers, counts = draw_different_numbers(torch.tensor(3), _generator(), 20)
    assert sorted(numbers[counts].tolist()) == [0, 1, 2]
    numbers, counts = draw_different_numbers(torch.tensor(0), _generator(), 5)
    assert numbers.tolist() == [0] * 5
    assert not counts.any()
    assert draw_different_numbers(torch.tensor(7), _generator(), 0)[0].shape == (0,)


def test_the_generator_alone_decides() -> None:
    before = torch.get_rng_state()
    for draw in (
        lambda g: draw_columns(WEIGHT, g, 9),
        lambda g: draw_different_columns(WEIGHT, g, 6),
        lambda g: draw_different_numbers(torch.tensor(1000), g, 9)[0],
        lambda g: uniform((9,), torch.device("cpu"), g),
    ):
        assert torch.equal(draw(_generator(3)), draw(_generator(3)))
        generator = _generator(3)
        assert not torch.equal(draw(generator), draw(generator))
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_waits_for_the_device() -> None:
    with FakeTensorMode():
        draw_columns(torch.zeros(3, 4), None, 2)
        draw_different_columns(torch.zeros(3, 4), None, 2)
        draw_different_numbers(torch.zeros((), dtype=torch.int64), None, 2)
