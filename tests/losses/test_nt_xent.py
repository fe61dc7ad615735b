"""NT-Xent and SupCon against hand values, slow loops and another library."""

import math
from typing import Literal

import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

from raydml.losses.nt_xent import NtXent
from tests.batches import uneven_batch
from tests.losses.oracles import check_library, pairs_of, random_kinds

Form = Literal["nt_xent", "sup_con"]
FORMS: tuple[Form, ...] = ("nt_xent", "sup_con")


def test_by_hand() -> None:
    points = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 0.5]], dtype=torch.float64)
    # Cosines: 0.6 of the positives; of the negatives 0 with the first and 0.8 with the second.
    first, second = math.log1p(math.exp((0 - 0.6) / 0.5)), math.log1p(math.exp((0.8 - 0.6) / 0.5))
    for form in FORMS:
        value = NtXent(temperature=0.5, form=form)(points, torch.tensor([0, 0, 1]))
        assert value.item() == pytest.approx((first + second) / 2, rel=1e-12)


def test_defaults() -> None:
    loss = NtXent()
    assert (loss.temperature, loss.form) == (0.1, "nt_xent")


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_pytorch_metric_learning(form: Form, seed: int, temperature: float) -> None:
    theirs = {"nt_xent": NTXentLoss, "sup_con": SupConLoss}[form](temperature=temperature)
    ours = NtXent(temperature=temperature, form=form)
    check_library(ours, theirs, uneven_batch(seed), gradient_rtol=1e-8, gradient_atol=1e-10)


def test_the_forms_differ_with_more_than_one_positive() -> None:
    points, labels = uneven_batch()
    assert abs(NtXent()(points, labels) - NtXent(form="sup_con")(points, labels)) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_a_slow_loop_over_chosen_pairs_with_references(form: Form) -> None:
    points = uneven_batch()[0]
    memory = uneven_batch(1)[0][:9]
    kind = random_kinds()
    value = NtXent(temperature=0.3, form=form)(points, torch.arange(14), pairs_of(kind), memory)
    cosine = torch.nn.functional.cosine_similarity(points[:, None], memory[None], dim=2).tolist()
    means = []
    for i in range(14):
        power = [math.exp(s / 0.3) for s in cosine[i]]
        rivals = [j for j in range(9) if kind[i, j] == 2 or (kind[i, j] == 1 and form == "sup_con")]
        terms = []
        for p in (j for j in range(9) if kind[i, j] == 1):
            total = sum(power[j] for j in rivals) + (power[p] if form == "nt_xent" else 0)
            terms.append(-math.log(power[p] / total))
        if form == "nt_xent":
            means += terms
        elif terms:
            means.append(sum(terms) / len(terms))
    chosen = kind == 1
    assert len(means) == int((chosen if form == "nt_xent" else chosen.any(dim=1)).sum())
    assert value.item() == pytest.approx(sum(means) / len(means), rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_it_does_not_overflow(form: Form) -> None:
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    value = NtXent(temperature=1e-3, form=form)(points, torch.tensor([0, 0, 1]))
    # The first is 2000 from its positive, while for the second the rival is as far as the positive.
    assert value.item() == pytest.approx((2000 + math.log(2)) / 2, rel=1e-5)
    value.backward()
    assert points.grad.isfinite().all()
