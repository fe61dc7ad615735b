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

from raydml import registry
from raydml.config.trial import parse_machine, parse_trial
from raydml.training.rank_group import RankGroup
from raydml.training.rank_processes import RankProcesses
from raydml.training.trainer import Trainer

TOLERANCE = 1e-9
TIMES = ("epoch_s", "images_per_s", "clustering_s", "peak_memory_bytes")
LOSSES, MINERS = registry.names("losses"), registry.names("miners")
# With settings under which a loss, a miner or a regulariser has something to say in the few batches of these trials.
AT_WORK: dict[str, dict[str, Any]] = {
    "cross_batch_memory": {"size": 30, "start_step": 1},  # wraps round
    "embedding_norm": {"power": 2, "weight": 0.1},
    "mdr": {"weight": 0.6},
    "orthogonality": {"weight": 1.0},
    "rho": {"probability": 0.5},
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
        "epochs": 3,  # slices, the whole embedding, finetuning
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


def by_ranks(num_ranks: int, function, *arguments):
    """Return what a function of a group and arguments returns on rank 0 of so many ranks, all of which call it."""
    processes = RankProcesses(["cpu"] * num_ranks, work, function, *arguments)
    try:
        with processes.errors_named():
            return function(processes.group, *arguments)
    finally:
        processes.close()


@functools.cache
def alone(name: str) -> Trained:
    return trained(trainer_of(cases()[name]))


def furthest(found: Trained, expected: Trained) -> float:
    """Return the largest difference, relative where a value is above 1; also compares everything that is no float."""
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
    for one, other in zip(found.results, expected.results, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, str):
                assert value == other[key]
            else:  # a sum of an epoch is kept in float32
                assert value == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
    assert all(map(math.isfinite, differences))
    return max(differences)


def assert_equal_to_one_rank(num_ranks: int, names: list[str]) -> None:
    found = by_ranks(num_ranks, train_all, {name: cases()[name] for name in names})
    wrong = {name: difference for name in names if (difference := furthest(found[name], alone(name))) > TOLERANCE}
    assert not wrong


def test_two_ranks_are_one():
    assert_equal_to_one_rank(2, SELECTED)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_loss_miner_regulariser_and_method_is_the_same_on_several_ranks(num_ranks):
    assert_equal_to_one_rank(num_ranks, list(cases()))


def test_a_rank_has_rows_of_its_own():
    for num_rows in (4, 5, 7, 64):
        parts = [np.arange(num_rows)[RankGroup(rank, 4).rows(num_rows)] for rank in range(4)]
        assert np.concatenate(parts).tolist() == list(range(num_rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
