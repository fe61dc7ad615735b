"""MIC's adversary against its release, a hand value and what it means to train against it."""

import pytest
import torch
from torch.nn import functional

from raydml.methods.mic import _Adversary as Adversary
from tests.golden_vectors import golden_case, golden_facts

FACTS = golden_facts("mic_adversarial")


def random_unit(num_rows, dim, seed):
    points = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(points, dim=1)


def adversary_of(source_dim, target_dim, hidden_dim):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Adversary(source_dim, target_dim, hidden_dim)


@pytest.mark.parametrize("case", FACTS["hyperparameters"], ids=lambda case: f"case{case['case']}")
def test_value_and_gradients_are_the_releases(case):
    arrays = golden_case("mic_adversarial", case["case"])
    adversary = adversary_of(case["aux_dim(source)"], case["class_dim(target)"], case["proj_dim"]).double()
    weights = dict(zip(("W1", "b1", "W2", "b2"), adversary.parameters(), strict=True))
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(arrays[name])
    inputs = {name: arrays[name].requires_grad_() for name in ("class_emb", "aux_emb")}
    loss = adversary(source=inputs["aux_emb"], target=inputs["class_emb"])
    loss.backward()
    torch.testing.assert_close(loss, arrays["loss"], **FACTS["tolerance"])
    for name, tensor in {**weights, **inputs}.items():
        torch.testing.assert_close(
            tensor.grad, arrays[f"grad_{name}"], **FACTS["tolerance"], msg=lambda m, n=name: n + m
        )


def test_by_hand():
    adversary = adversary_of(2, 2, 2).double()
    with torch.no_grad():
        values = [[1, 0], [0, -1]], [0, 0], [[1, 0], [1, 1]], [0, 0]
        for parameter, value in zip(adversary.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    # The sources point to (0.6, 0.8) and (0, -1): behind the ReLU (0.6, 0) and (0, 1), behind the second layer
    # (0.6, 0.6) and (0, 1).
    source = torch.tensor([[3.0, 4.0], [0.0, -5.0]], dtype=torch.float64)
    target = torch.tensor([[0.0, 2.0], [0.6, 0.8]], dtype=torch.float64)
    expected = -((0 + 0.5) + (0 + 0.64)) / 4
    assert adversary(source, target).item() == pytest.approx(expected, rel=1e-12)


def test_a_value_lies_between_zero_and_minus_one_over_the_dimensions():
    adversary = adversary_of(5, 8, 16).double()
    assert -1 / 8 < adversary(random_unit(50, 5, seed=0), random_unit(50, 8, seed=1)).item() < 0


def test_the_adversary_learns_to_predict_and_the_embeddings_to_defeat_it():
    adversary = adversary_of(4, 4, 32).double()
    source, target = (random_unit(64, 4, seed).requires_grad_() for seed in (0, 1))

    def train(parameters, num_steps):
        before = adversary(source, target).item()
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(num_steps):
            optimizer.zero_grad()
            adversary(source, target).backward()
            optimizer.step()
        return before, adversary(source, target).item()

    before, after = train(adversary.parameters(), 100)
    assert after < 1.5 * before < 0  # more correlated
    before, after = train([source], 50)
    assert before < after
    before, after = train([target], 50)
    assert before < after


def test_float32_under_autocast():
    adversary = adversary_of(8, 8, 16)
    source, target = (random_unit(6, 8, seed).float() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = adversary(source, target)
        rounded = adversary(source.bfloat16(), target)
    assert under.dtype == rounded.dtype == torch.float32
    assert torch.equal(under, adversary(source, target))


@pytest.mark.parametrize("awkward", [0.0, 1e-30, 1e30])
def test_gradients_are_finite_for_embeddings_of_any_length(awkward):
    adversary = adversary_of(4, 4, 8)
    source, target = (random_unit(3, 4, seed).float().mul(awkward).requires_grad_() for seed in (0, 1))
    adversary(source, target).backward()
    for tensor in (source, target, *adversary.parameters()):
        assert tensor.grad.isfinite().all()
