"""Trials that several ranks train together: the numbers of one rank with the whole batch, to rounding.

The ranks of a number are started once and train one trial after the other in float64; this process is rank 0, and
trains the same trials alone for comparison.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torchvision.ops import StochasticDepth

from raydml import registry
from raydml.config.trial import parse_machine, parse_trial
from raydml.models.network import Head, Network, build_network
from raydml.training.gradient_cache import train_in_chunks
from raydml.training.rank_group import RankGroup
from raydml.training.rank_layers import spread_over_ranks
from raydml.training.rank_processes import RankProcesses
from raydml.training.trainer import Trainer
from raydml.training.weight_average import WeightAverage

pytestmark = pytest.mark.xdist_group("ranks")
TOLERANCE = 1e-9
TIMES = ("epoch_s", "images_per_s", "clustering_s", "peak_memory_bytes")
LOSSES, MINERS = registry.names("losses"), registry.names("miners")
# With settings under which a loss, a miner or a regulariser has something to say in the few batches of these trials.
AT_WORK: dict[str, dict[str, Any]] = {
    "cross_batch_memory": {"size": 30, "start_step": 1},  # wraps round
    "embedding_norm": {"power": 2, "weight": 0.1},
    "matryoshka": {"dims": [4, 8]},
    "mdr": {"weight": 0.6},
    "orthogonality": {"weight": 1.0},
    "rho": {"probability": 0.5},
    "threshold_consistency": {"negative_margin": -0.5},
}
MODEL = {"backbone": "convnet", "weights": "none", "embedding_dim": 16, "dropout": 0.2}
NOT_OF_UNIT_LENGTH = {"model": {**MODEL, "normalize": "none"}}
MDR = {"model": {**MODEL, "normalize": "mean_distance"}, "regularizers": {"mdr": {"weight": 0.6}}}
AUGMENTED = {
    "random_resized_crop": [0.5, 1.0],
    "flip": True,
    "color_jitter": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1},
    "erasing": {"probability": 0.3},
}


def trial_of(**changes: Any) -> dict[str, Any]:
    """Three classes of digits; batches of 15, which two and four ranks cannot share equally."""
    return {
        "epochs": 2,
        "data": {
            "name": "digits",
            "resize_px": 8,
            "crop_px": 8,
            "split": {"order": "sorted", "test_fraction": 0.5, "val_fraction": 0.4},
            "augmentation": AUGMENTED,
        },
        "model": MODEL,
        "loss": {"name": "contrastive"},
        "sampler": {"name": "class_balanced", "classes_per_batch": 3, "images_per_class": 5, "batches_per_epoch": 2},
        "optimizer": {"name": "sgd", "learning_rate": 1e-2, "momentum": 0.9},
        "recall_at": [1],
        **changes,
    }


def fitting_miner(loss: str, number: int) -> dict[str, Any] | None:
    """Return a miner that fits a loss, each time another one, or None where the loss takes none."""
    accepts = registry.load("losses", loss).accepts
    fitting = [name for name in MINERS if registry.build("miners", name).yields in accepts]
    return {"name": fitting[number % len(fitting)]} if fitting else None


def cases() -> dict[str, dict[str, Any]]:
    found = {}
    for number, loss in enumerate(LOSSES):
        found[f"loss {loss}"] = trial_of(loss={"name": loss}, miner=fitting_miner(loss, number))
    for miner in MINERS:
        loss = "margin" if miner != "n_pair" else "n_pair"
        found[f"miner {miner}"] = trial_of(loss={"name": loss}, miner={"name": miner})
    for name in registry.names("regularizers"):
        miner = {"name": "distance_weighted"} if name == "rho" else {"name": "multi_similarity"}
        model = NOT_OF_UNIT_LENGTH if name == "embedding_norm" else {}
        found[f"regularizer {name}"] = trial_of(
            loss={"name": "margin"}, miner=miner, regularizers={name: AT_WORK[name]}, **model
        )
    for name in registry.names("methods"):
        found[f"method {name}"] = trial_of(**METHODS[name])
    return {**found, **OTHERS}


METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "divide_conquer": {
        "epochs": 1,
        "loss": {"name": "margin"},
        "miner": {"name": "distance_weighted"},
        "method": {"name": "divide_conquer", "num_learners": 2, "recluster_every": 1, "finetune_from": 0.67},
        "sampler": {"name": "class_balanced", "classes_per_batch": 3, "images_per_class": 25},
        "optimizer": {"name": "sgd", "learning_rate": 1e-3},
    },
    "mic": {
        "loss": {"name": "margin"},
        "miner": {"name": "distance_weighted"},
        "method": {"name": "mic", "num_clusters": 4, "recluster_every": 1, "adversarial_weight": 50.0},
    },
}
OTHERS = {
    "divide_conquer: slices, then the whole embedding, then finetuning": trial_of(
        **{**METHODS["divide_conquer"], "epochs": 3}
    ),
    "levels and batch scale of MDR": trial_of(
        loss={"name": "triplet", "squared": False}, miner={"name": "distance_weighted", "variant": "mdr"}, **MDR
    ),
    "an uneven last batch": trial_of(sampler={"name": "uniform", "batch_size": 131}, epochs=1),
    "adamw, clipped, the head first": trial_of(
        loss={"name": "proxy_anchor"},
        optimizer={"name": "adamw", "learning_rate": 1e-3, "gradient_clip": 0.1, "weight_decay": 1e-2},
        schedule={"name": "cosine", "new_layer_warmup_epochs": 1},
    ),
}
FEW = ["contrastive", "multi_similarity", "proxy_anchor", "fast_ap"]
SELECTED = [*(f"loss {name}" for name in FEW), *(f"method {name}" for name in registry.names("methods"))]
SELECTED += ["regularizer cross_batch_memory", "levels and batch scale of MDR"]


class Trained(NamedTuple):
    """What a trial has come to: the loss and the gradient's norm of each step, its results, its state."""

    steps: list[float]
    results: list[dict[str, Any]]
    state: dict[str, torch.Tensor]


def in_float64(trainer: Trainer) -> Trainer:
    trainer.method.double()
    first = trainer.method.network.trunk.blocks[0]
    first.register_forward_pre_hook(lambda _block, images: (images[0].double(),))
    if trainer.average is not None:
        trainer.average = WeightAverage(trainer.method.network, trainer.average.decay)
    return trainer


def trainer_of(trial: dict[str, Any], ranks: RankGroup | None = None) -> Trainer:
    return in_float64(Trainer(parse_trial(trial), parse_machine({}), device="cpu", ranks=ranks))


def trained(trainer: Trainer) -> Trained:
    steps, step = [], trainer._step

    def kept(*arguments):
        values = step(*arguments)
        steps.extend(float(value) for value in values)
        return values

    trainer._step = kept  # type: ignore[method-assign]
    results = [{k: v for k, v in result.items() if k not in TIMES} for result in trainer.epochs()]
    return Trained(steps, results, {name: value.clone() for name, value in trainer.method.state_dict().items()})


def train_all(ranks: RankGroup, trials: dict[str, dict[str, Any]]) -> dict[str, Trained]:
    """Train trials one after the other, in all ranks at once; all have the state of rank 0 in the end, bit for bit."""
    found = {}
    for name, trial in trials.items():
        found[name] = trained(trainer_of(trial, ranks))
        of_first = ranks.from_first(lambda name=name: found[name].state)
        for key, value in found[name].state.items():
            assert torch.equal(value, of_first[key]), f"rank {ranks.rank}, {name}: {key}"
    return found


def work(ranks: RankGroup, _device: str, function, *arguments) -> None:
    function(ranks, *arguments)


def by_ranks(num_ranks: int, function, *arguments, device: str = "cpu"):
    """Return what a function of a group and arguments returns on rank 0 of so many ranks, all of which call it."""
    devices = ["cpu" if device == "cpu" else f"cuda:{rank}" for rank in range(num_ranks)]
    processes = RankProcesses(devices, work, function, *arguments)
    try:
        with processes.errors_named():
            return function(processes.group, *arguments)
    finally:
        processes.close()


@functools.cache
def alone(name: str) -> Trained:
    return trained(trainer_of(cases()[name]))


def furthest(found: Trained, expected: Trained) -> float:
    """Return the largest difference of steps and state, relative where a value is above 1; whole numbers are equal."""
    assert found.state.keys() == expected.state.keys()
    assert len(found.steps) == len(expected.steps) > 0
    differences = [
        abs(one - other) / max(1, abs(other)) for one, other in zip(found.steps, expected.steps, strict=True)
    ]
    for name, value in found.state.items():
        other = expected.state[name]
        assert value.dtype == other.dtype
        if value.is_floating_point():
            differences.append(float((value - other).abs().div(other.abs().clamp(min=1)).max()) if value.numel() else 0)
        else:
            assert torch.equal(value, other), name
    assert all(map(math.isfinite, differences))
    return max(differences)


def assert_same_results(found: Trained, expected: Trained) -> None:
    for one, other in zip(found.results, expected.results, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, str):
                assert value == other[key]
            else:  # a sum of an epoch is kept in float32
                assert value == pytest.approx(other[key], rel=1e-5, abs=1e-6), key


def assert_equal_to_one_rank(found: dict[str, Trained]) -> None:
    for name, trial in found.items():
        assert_same_results(trial, alone(name))
    differences = {name: furthest(trial, alone(name)) for name, trial in found.items()}
    assert not {name: difference for name, difference in differences.items() if difference > TOLERANCE}


def continued(ranks: RankGroup) -> dict[str, Trained]:
    """One epoch with one rank and the next with all of them, and the reverse; the checkpoint is that of rank 0."""
    trial = trial_of(**RESUMED)
    one, several = trainer_of(trial), trainer_of(trial, ranks)
    next(one.epochs()), next(several.epochs())
    with_all, with_one = trainer_of(trial, ranks), trainer_of(trial)
    with_one.load_state_dict(several.state_dict())
    if ranks.is_first:  # the others get their state from there
        with_all.load_state_dict(one.state_dict())
    return {"one, then all": trained(with_all), "all, then one": trained(with_one)}


RESUMED = {
    "loss": {"name": "margin"},
    "miner": {"name": "multi_similarity"},
    "regularizers": {"cross_batch_memory": AT_WORK["cross_batch_memory"]},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "ema": 0.7},
}


def averaged(ranks: RankGroup) -> Trained:
    """The mean of the ranks' gradients, as DistributedDataParallel takes it."""

    def mean(of_rows, of_batch):
        of_rows = list(of_rows)
        RankGroup.sum_gradients(ranks, of_rows, of_batch)
        for parameter in of_rows:
            parameter.grad /= ranks.num_ranks

    ranks.sum_gradients = mean  # type: ignore[method-assign]
    try:
        return trained(trainer_of(trial_of(), ranks))
    finally:
        del ranks.sum_gradients


def with_a_loss_of_its_own(ranks: RankGroup) -> Trained:
    """Each rank computes the loss of its own rows, and the gradients of all parameters are averaged."""

    def mean(of_rows, of_batch):
        parameters = [*of_rows, *of_batch]
        RankGroup.sum_gradients(ranks, parameters, [])
        for parameter in parameters:
            parameter.grad /= ranks.num_ranks

    ranks.gather = lambda features: features  # type: ignore[method-assign]
    ranks.sum_gradients = mean  # type: ignore[method-assign]
    try:
        trainer = trainer_of(trial_of(), ranks)
        of_batch = trainer.method.batch_loss
        trainer.method.batch_loss = lambda batch, generator: of_batch(
            batch._replace(labels=batch.labels[ranks.rows(len(batch.labels))]), generator
        )
        return trained(trainer)
    finally:
        del ranks.gather, ranks.sum_gradients


def through_layers(ranks: RankGroup) -> list[torch.Tensor]:
    """The features, gradients and statistics of a backbone with layers that look at the batch or draw for it."""
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4, momentum=None),
        StochasticDepth(0.3, "row"),
        torch.nn.Dropout(0.4),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.BatchNorm1d(4, affine=False),
    )
    head = Head(4, 2, layer_norm=False, normalize="mean_distance", dropout=0.5)
    network = Network(trunk, head, freeze_batch_norm=False).double()
    images = torch.randn(11, 3, 6, 6, dtype=torch.float64)
    return through(network, images, ranks)


def through_timm(ranks: RankGroup) -> list[torch.Tensor]:
    """The same of a network of timm: its BatchNorm has the activation inside, and its blocks are left out at random."""
    settings = {"layer_norm": False, "normalize": "l2", "freeze_batch_norm": False, "drop_path": 0.4}
    network = build_network(backbone="timm:test_efficientnet", embedding_dim=8, weights="none", seed=0, **settings)
    torch.manual_seed(0)
    return through(network.double(), torch.randn(11, 3, 64, 64, dtype=torch.float64), ranks)


def through_chunks(ranks: RankGroup) -> list[torch.Tensor]:
    """The same in chunks of four of the eleven images: one chunk is shared by two ranks."""
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        StochasticDepth(0.3, "row"),
        torch.nn.Dropout(0.4),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
    )
    network = Network(trunk, Head(4, 2, layer_norm=False, normalize="l2", dropout=0.5), freeze_batch_norm=False)
    train_in_chunks(network.double(), 4, ranks)
    return through(network, torch.randn(11, 3, 6, 6, dtype=torch.float64), ranks)


def through_adapters(ranks: RankGroup) -> list[torch.Tensor]:
    """The same of a transformer whose adapters alone learn, in chunks."""
    settings = {"layer_norm": False, "normalize": "l2", "freeze_batch_norm": False, "drop_path": 0.4}
    lora = {"rank": 2, "alpha": 4.0, "targets": "attention"}
    network = build_network(
        **{"backbone": "timm:test_vit", "embedding_dim": 8, "weights": "none", "seed": 0, "crop_px": 32, **settings},
        train={"lora": lora},
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.trained_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    train_in_chunks(network.double(), 4, ranks)
    return through(network, torch.randn(11, 3, 32, 32, dtype=torch.float64), ranks)


def through(network: Network, images: torch.Tensor, ranks: RankGroup) -> list[torch.Tensor]:
    spread_over_ranks(network, ranks)
    own = images[ranks.rows(11)].clone().requires_grad_()
    ranks.num_rows = 11
    for _ in range(2):
        torch.manual_seed(1)
        embeddings = network(own)
    embeddings.square()[:, 0].sum().backward()
    ranks.sum_gradients(network.trunk.parameters(), network.head.parameters())
    network.eval()
    assert len(network(own)) == len(own)
    of_images = torch.from_numpy(ranks.joined(own.grad.numpy(), 11))
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [embeddings.detach(), of_images, *gradients, *network.buffers()]


def everything(ranks: RankGroup) -> dict[str, Any]:
    functions = continued, averaged, with_a_loss_of_its_own, through_layers, through_timm, through_chunks
    results = {function.__name__: function(ranks) for function in functions}
    return {**results, "selected": train_all(ranks, {name: cases()[name] for name in SELECTED})}


@pytest.fixture(scope="module")
def two_ranks():
    return by_ranks(2, everything)


def test_two_ranks_train_as_one(two_ranks):
    assert_equal_to_one_rank(two_ranks["selected"])


def test_a_trial_goes_on_with_another_number_of_ranks(two_ranks):
    expected = trained(trainer_of(trial_of(**RESUMED)))
    for name, found in two_ranks["continued"].items():
        second_epoch = expected._replace(steps=expected.steps[len(expected.steps) // 2 :], results=expected.results[1:])
        assert_same_results(found, second_epoch)
        assert furthest(found, second_epoch) < TOLERANCE, name


@pytest.mark.parametrize("wrong", ["averaged", "with_a_loss_of_its_own"])
def test_wrong_gradients_are_found(two_ranks, wrong):
    assert furthest(two_ranks[wrong], trained(trainer_of(trial_of()))) > 1000 * TOLERANCE


@pytest.mark.parametrize("of", [through_layers, through_timm, through_chunks], ids=lambda of: of.__name__)
def test_layers_of_a_backbone_see_the_whole_batch(two_ranks, of):
    for found, expected in zip(two_ranks[of.__name__], of(RankGroup()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_adapters_get_the_gradient_of_the_whole_batch():
    for found, expected in zip(by_ranks(2, through_adapters), through_adapters(RankGroup()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_loss_miner_regulariser_and_method_is_the_same_on_several_ranks(num_ranks):
    assert_equal_to_one_rank(by_ranks(num_ranks, train_all, cases()))


def train_on_gpus(ranks: RankGroup) -> Trained:
    trial = trial_of(loss={"name": "proxy_anchor"})
    device = "cpu" if ranks.num_ranks == 1 else f"cuda:{ranks.rank}"
    return trained(in_float64(Trainer(parse_trial(trial), parse_machine({}), device=device, ranks=ranks)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_cpu():
    found = by_ranks(2, train_on_gpus, device="cuda")
    on_cpu = found._replace(state={name: value.cpu() for name, value in found.state.items()})
    assert furthest(on_cpu, train_on_gpus(RankGroup())) < 1e-6


def test_a_rank_has_rows_of_its_own():
    for num_rows in (4, 5, 7, 64):
        parts = [np.arange(num_rows)[RankGroup(rank, 4).rows(num_rows)] for rank in range(4)]
        assert np.concatenate(parts).tolist() == list(range(num_rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("machine", [{"cpus_per_trial": 1}, {"cpus_per_trial": 4}])
def test_ranks_share_the_threads_of_a_trial(machine, monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    Trainer(parse_trial(trial_of()), parse_machine(machine), device="cpu", ranks=RankGroup(0, 2))
    assert counts == [max(1, machine["cpus_per_trial"] // 2)]


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch):
    trainer = Trainer(parse_trial(trial_of()), parse_machine({}), device="cpu", ranks=RankGroup(0, 16))
    monkeypatch.setattr(trainer.ranks, "from_first", lambda make: make())
    with pytest.raises(ValueError, match=r"16 ranks cannot share a batch of 15 images\. Cure: fewer GPUs"):
        next(trainer.steps())
