import numpy as np
import pytest
import torch

from raydml.losses.multi_similarity import MultiSimilarity
from raydml.miners.multi_similarity import MultiSimilarityMiner
from raydml.training.parts import OPTIMIZERS, build_optimizer, check_every_parameter_learns, learning_rate_factor
from tests.golden_vectors import golden

LONG = {"num_batches": 5, "num_epochs": 8, "warmup_epochs": 0}


def factors(name, **changes):
    settings = {**LONG, **changes}
    return [
        learning_rate_factor(name, epoch=epoch, batch=batch, **settings)
        for epoch in range(settings["num_epochs"])
        for batch in range(settings["num_batches"])
    ]


def torch_rates(make_scheduler, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant_warms_up_linearly_and_stays():
    assert factors("constant") == [1.0] * 40
    warm = factors("constant", warmup_epochs=2)
    assert warm[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert warm[10:] == [1.0] * 30


def test_cosine_is_torchs():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40), 40)
    assert factors("cosine") == pytest.approx(expected)


def test_cosine_starts_after_the_warm_up():
    values = factors("cosine", warmup_epochs=2)
    assert values[9] == 1.0
    assert values[10] == 1.0
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=30), 30)
    assert values[10:] == pytest.approx(expected)


def test_step_is_torchs_multistep_over_epochs():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.2), 8)
    per_epoch = factors("step", num_batches=1, milestones=(2, 5), gamma=0.2)
    assert per_epoch == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_is_allowed():
    assert factors("cosine", num_epochs=1, warmup_epochs=3)[-1] == pytest.approx(5 / 15)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimiser_takes_a_step_and_momentum_reaches_those_that_have_it(name):
    parameter = torch.nn.Parameter(torch.ones(3))
    groups = {"head": [parameter], "loss": []}
    own = {"momentum": 0.5} if name in ("sgd", "rmsprop") else {}
    optimizer = build_optimizer(name, groups, learning_rates={"head": 0.1}, weight_decay=0.0, **own)
    assert [group["name"] for group in optimizer.param_groups] == ["head"]
    assert optimizer.param_groups[0].get("momentum") == own.get("momentum")
    parameter.square().sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


def test_parameters_in_no_group_or_in_two_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    all_of_them = list(model.parameters())
    check_every_parameter_learns(model.named_parameters(), {"head": all_of_them})
    with pytest.raises(ValueError, match=r"no optimiser group.*: 1\.bias\."):
        check_every_parameter_learns(model.named_parameters(), {"head": all_of_them[:3]})
    with pytest.raises(ValueError, match=r"0\.weight \(backbone, head\)"):
        check_every_parameter_learns(model.named_parameters(), {"backbone": all_of_them[:1], "head": all_of_them})


def rates(num_epochs, base, milestones, gamma):
    settings = {"num_epochs": num_epochs, "num_batches": 1, "warmup_epochs": 0, "batch": 0}
    return [
        base * learning_rate_factor("step", epoch=epoch, milestones=milestones, gamma=gamma, **settings)
        for epoch in range(num_epochs)
    ]


@pytest.mark.parametrize("case", ["default", "other"])
def test_the_schedule_of_mdr(case):
    arrays, facts = golden("mdr_schedule")
    expected, values = arrays[f"lr_{case}"], facts["hyperparameters"][case]
    got = rates(len(expected), values["lr"], values["milestones"], values["gamma"])
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_the_schedule_of_the_multi_similarity_code():
    """Its milestones are iterations. Those of its cases that warm up begin elsewhere than ours; no recipe uses that."""
    arrays, facts = golden("deep_metric_optim")
    case = facts["cases"][0]
    assert (case["case"], case["wi"]) == ("lr0", 0)
    got = rates(len(arrays["lr0__lr"]), case["base_lr"], case["steps"], case["gamma"])
    np.testing.assert_allclose(got, arrays["lr0__lr"], rtol=1e-9)


def test_adam_with_one_learning_rate_as_deep_metric_trains():
    """Its multipliers of the learning rate have no effect: all parameters take the same."""
    arrays, facts = golden("deep_metric_optim")
    case = facts["cases"][-1]
    value = {key.removeprefix("adam0__"): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("adam0__")}
    base, head, bias = (torch.nn.Parameter(value[key]) for key in ("base_weight0", "head_weight0", "head_bias0"))
    loss = MultiSimilarity(alpha=2.0, beta=case["beta_scale_neg"], base=0.5)
    miner = MultiSimilarityMiner(epsilon=0.1)
    optimizer = build_optimizer(
        "adam",
        {"backbone": [base], "head": [head, bias]},
        learning_rates={"backbone": case["lr"], "head": case["lr"]},
        weight_decay=case["weight_decay"],
    )
    losses = []
    for _ in range(case["steps"]):
        embeddings = torch.nn.functional.normalize(torch.relu(value["inputs"] @ base.T) @ head.T + bias)
        total = loss(embeddings, value["labels"], miner(embeddings.detach(), value["labels"], torch.Generator()))
        losses.append(total.item())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    np.testing.assert_allclose(losses, value["losses"], rtol=1e-6, atol=1e-9)
    for got, key in ((base, "base_weight"), (head, "head_weight"), (bias, "head_bias")):
        np.testing.assert_allclose(got.detach(), value[key], rtol=1e-6, atol=1e-9)


def test_a_group_of_its_own_takes_the_rate_of_the_head_and_its_own_decay():
    parameters = {name: [torch.nn.Parameter(torch.ones(1))] for name in ("backbone", "head", "loss", "adversary")}
    optimizer = build_optimizer(
        "adam",
        parameters,
        learning_rates={"backbone": 0.1, "head": 0.2, "loss": 0.3},
        weight_decay=0.5,
        own_weight_decays={"adversary": 0.25},
    )
    assert [group["name"] for group in optimizer.param_groups] == ["backbone", "head", "loss", "adversary"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3, 0.2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0, 0.25]


def test_the_exponential_schedule_is_that_of_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": 1e-5}])
    torchs = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.3)
    expected = []
    for _ in range(6):
        expected += [optimizer.param_groups[0]["lr"]] * 3  # the release steps it once per epoch
        optimizer.step()
        torchs.step()
    settings = {"num_batches": 3, "num_epochs": 6, "warmup_epochs": 0, "gamma": 0.3}
    steps = [(epoch, batch) for epoch in range(6) for batch in range(3)]
    got = [1e-5 * learning_rate_factor("exponential", epoch=epoch, batch=batch, **settings) for epoch, batch in steps]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
