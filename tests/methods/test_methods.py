"""The contract of methods, for every method on disk: its answers, its state, its randomness, and bad data."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from raydml import registry
from raydml.config.trial import parse_machine
from raydml.data.datasets import digit_images
from raydml.methods._base import Batch, Method
from raydml.models.network import build_network
from raydml.training import parts
from raydml.training.parts import check_every_parameter_learns
from raydml.training.trainer import Trainer
from tests.training.test_trainer import BALANCED, assert_same, trial_of, without_times

LABELS = np.repeat(np.arange(4), 6)
METHODS = registry.names("methods")

# Settings with which a method does on a few digits, in a few epochs, all that it can do.
BUSY = {
    "plain": {},
    "divide_conquer": {"num_learners": 2, "recluster_every": 1, "finetune_from": 0.75, "full_embedding_from": 0.67},
    "mic": {"num_clusters": 5, "recluster_every": 2, "adversary_dim": 8, "auxiliary_dim": 8},
}
LOSSES = {
    "margin": {
        "loss": {"name": "margin", "class_beta": True},
        "miner": {"name": "distance_weighted"},
        "regularizers": {"mdr": {"weight": 0.1}},
    },
    "proxies": {"loss": {"name": "proxy_nca"}},
}


def test_the_suite_knows_every_method():
    assert set(BUSY) == set(METHODS)


def trial_with(name, family="margin", **changes):
    if name == "divide_conquer":  # how long its epochs are, the clusters decide
        changes = {"sampler": {key: value for key, value in BALANCED.items() if key != "batches_per_epoch"}, **changes}
    return trial_of(LOSSES[family], method={"name": name, **BUSY[name]}, **changes)


def trainer_with(name, family="margin", **changes):
    return Trainer(trial_with(name, family, **changes), parse_machine({}), device="cpu")


def method_with(trial, labels=LABELS):
    return parts.build_method(trial, labels, torch.device("cpu"))


def images_of(num_images=6):
    return torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def features_of(num_images, seed=0):
    """What a trainer hands to recluster: a function applied to as many images."""
    images = torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def features(forward, *, inner_layers=False):  # noqa: ARG001 - all images are pixels here
        with torch.inference_mode():
            return forward(images).numpy()

    return features


def planned(method, epoch=0, seed=0):
    if method.time_to_recluster(epoch):
        method.eval()
        method.recluster(features_of(len(LABELS)), epoch, torch.device("cpu"))
        method.train()
    return method.plan_epoch(epoch, np.random.default_rng(seed))


def batches_of(plan, labels, epoch):
    """What a trainer hands to batch_loss, one after the other; of any images."""
    for position, indices in enumerate(plan.batches):
        targets = labels[indices] if plan.targets is None else plan.targets[position]
        learner = 0 if plan.learners is None else int(plan.learners[position])
        yield Batch(images_of(len(indices)), torch.from_numpy(targets), epoch, learner)


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def method(name):
    return method_with(trial_with(name))


def test_a_method_is_a_method_and_takes_the_context(method):
    assert isinstance(method, Method)
    assert type(method).__mro__[1] is Method  # inheritance one level deep


def test_a_plan_points_into_the_images_and_repeats_with_its_generator(name, method):
    plan = planned(method)
    assert plan.batches
    assert all(batch.dtype == np.int64 and batch.min() >= 0 and batch.max() < len(LABELS) for batch in plan.batches)
    repeated = planned(method_with(trial_with(name)))
    assert all(np.array_equal(a, b) for a, b in zip(plan.batches, repeated.batches, strict=True))
    for more in (plan.learners, plan.targets, plan.flip):
        assert more is None or len(more) == len(plan.batches)


def test_the_losses_of_all_epochs_are_finite_and_reach_every_parameter(method):
    reached = set()
    for epoch in range(4):
        plan = planned(method, epoch)
        for batch in batches_of(plan, LABELS, epoch):
            method.zero_grad(set_to_none=True)
            loss = method.batch_loss(batch, torch.Generator())
            assert loss.shape == ()
            assert loss.isfinite()
            loss.backward()
            reached |= {key for key, parameter in method.named_parameters() if parameter.grad is not None}
    assert {key for key, _ in method.named_parameters()} - reached == set()


def test_calling_a_method_embeds_one_image_as_many(method):
    method.eval()
    embeddings = method(images_of())
    assert embeddings.shape == (6, 16)
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, method.embed(images_of()))
    torch.testing.assert_close(method(images_of()[:1]), embeddings[:1])


def test_embeddings_are_normalised_as_the_network_says(name, method):
    """Unit length, or one unit slice a learner of Divide & Conquer."""
    method.eval()
    num_slices = BUSY[name].get("num_learners", 1)
    lengths = method(images_of()).reshape(6, num_slices, -1).norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones(6, num_slices))


def test_the_network_alone_embeds_as_the_method_does(name, method):
    """What is exported and evaluated later: rebuilt from the trial and the weights of the network."""
    arguments = parts.network_arguments(trial_with(name))
    network = build_network(**arguments, weights="none", seed=99)
    network.load_state_dict(method.network.state_dict())
    assert torch.equal(network.eval()(images_of()), method.eval()(images_of()))


def test_every_parameter_has_one_group_and_every_own_group_a_decay(method):
    groups = method.parameter_groups()
    assert {"backbone", "head", "loss"} <= set(groups)
    assert set(groups) - {"backbone", "head", "loss"} == set(method.weight_decays())
    check_every_parameter_learns(method.named_parameters(), groups)


def test_a_method_without_answers_says_so():
    network = build_network(**parts.network_arguments(trial_with("plain")), weights="none", seed=0)
    bare = Method(network, {})
    assert not bare.time_to_recluster(0)
    for question in (
        partial(bare.recluster, features_of(4), 0, torch.device("cpu")),
        partial(bare.plan_epoch, 0, np.random.default_rng(0)),
        partial(bare.batch_loss, Batch(images_of(), torch.arange(6), 0, 0), torch.Generator()),
        partial(bare.embed, images_of()),
    ):
        with pytest.raises(NotImplementedError):
            question()


FAMILIES = [next(iter(LOSSES)), *(pytest.param(family, marks=pytest.mark.slow) for family in list(LOSSES)[1:])]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_goes_on_anywhere_as_if_it_had_not_stopped(tmp_path, name, family):
    """Saved after each batch of the whole run, and continued from each of these states to the end of its epoch."""
    unbroken = trainer_with(name, family)
    states, results = [], []
    for result in unbroken.steps():
        results.append(result)
        states.append(unbroken.state_dict())
    expected = without_times([result for result in results if result is not None])
    assert expected[-1]["ended"] == "finished"
    other = trainer_with(name, family)
    chosen = (1, len(states) // 2, len(states) // 2 + 1)  # within an epoch, where one ends, where the next begins
    for number in chosen:
        other.load_state_dict(states[number])
        steps = other.steps()
        for later in range(number + 1, len(states)):
            following = next(steps)
            assert (following is None) == (results[later] is None), (number, later)
        assert_same(other.state_dict(), states[-1], f"from {number}")
    unbroken.save(tmp_path / "checkpoint")
    torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)


def test_the_seed_decides_everything(name):
    first, second, third = (list(trainer_with(name, seed=seed, epochs=2).epochs()) for seed in (3, 3, 4))
    assert without_times(first) == without_times(second)
    assert without_times(first) != without_times(third)


def test_no_image_but_those_that_train_is_clustered_or_trained_on(name):
    trainer = trainer_with(name, epochs=2)
    asked = []
    whole = trainer._features
    trainer._features = lambda forward, **how: asked.append(whole(forward, **how)) or asked[-1]
    list(trainer.epochs())
    num_images = len(trainer.train_images.labels)
    assert set(trainer.train_images.labels.tolist()) == {0, 1, 2}
    assert all(len(features) == num_images for features in asked)
    assert (len(asked) > 0) == trainer.method.time_to_recluster(0)


def test_what_a_clustering_says_is_in_the_result_of_its_epoch(name):
    trainer = trainer_with(name, epochs=2)
    clusters = trainer.method.time_to_recluster(0)
    first, second = trainer.epochs()
    for key in ("num_clusters", "cluster_balance", "cluster_nmi", "clustering_s"):
        assert (key in first) == clusters
    assert "cluster_changed" not in first
    assert ("cluster_changed" in second) == trainer_with(name).method.time_to_recluster(1)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_features_are_of_the_images_as_evaluation_sees_them(cache):
    """Also where training crops come from the files themselves (8 px here), and whatever the augmentation."""
    changed = {"resize_px": 24, "crop_px": 20, "augmentation": {"flip": True, "random_resized_crop": [0.3, 0.5]}}
    data = {**trial_of().data.model_dump(exclude_none=True), **changed, "cache": cache}
    trainer = trainer_with("plain", data=data)
    got = trainer._features(lambda images: images.flatten(1))
    digits, _ = digit_images()
    for row in (0, 3, 100):
        digit = trainer.preprocessing.read(digits[int(trainer.train_images.paths[row].removeprefix("digits/"))])
        seen = trainer.preprocessing.for_evaluation(torch.from_numpy(digit.copy())[None])
        np.testing.assert_array_equal(got[row], seen.flatten().numpy())


SAMPLERS = {
    "few classes": ({"name": "class_balanced", "classes_per_batch": 3, "images_per_class": 4}, [6, 6, 6]),
    "one image a class": ({"name": "class_balanced", "classes_per_batch": 4, "images_per_class": 3}, [1] * 12),
    "unequal classes": ({"name": "uniform", "batch_size": 8}, [30, 1, 1, 2]),
}


@pytest.mark.parametrize("case", SAMPLERS)
def test_degenerate_data_give_finite_losses(name, case):
    sampler, sizes = SAMPLERS[case]
    labels = np.repeat(np.arange(len(sizes)), sizes)
    method = method_with(trial_with(name, sampler=sampler), labels)
    for epoch in range(4):
        if method.time_to_recluster(epoch):
            method.eval()
            said = method.recluster(features_of(len(labels)), epoch, torch.device("cpu"))
            method.train()
            assert all(math.isfinite(value) for value in said.values())
        plan = method.plan_epoch(epoch, np.random.default_rng(epoch))
        assert plan.batches
        for batch in batches_of(plan, labels, epoch):
            assert method.batch_loss(batch, torch.Generator().manual_seed(0)).isfinite()


@pytest.mark.parametrize("method_name", [name for name in METHODS if name != "plain"])
def test_images_that_all_look_the_same_can_be_clustered(method_name):
    method = method_with(trial_with(method_name)).eval()

    def features(forward, *, inner_layers=False):  # noqa: ARG001 - all images are pixels here
        with torch.inference_mode():
            return forward(torch.ones(len(LABELS), 3, 8, 8)).numpy()

    said = method.recluster(features, 0, torch.device("cpu"))
    assert all(math.isfinite(value) for value in said.values())
    plan = method.train().plan_epoch(0, np.random.default_rng(0))
    assert plan.batches


def test_features_that_are_not_finite_end_the_trial():
    """A part that validation does not embed with may break alone: here the auxiliary head, after two epochs."""
    trainer = trainer_with("mic")
    epochs = trainer.epochs()
    results = [next(epochs), next(epochs)]
    with torch.no_grad():
        trainer.method.auxiliary_head.linear.weight.fill_(math.nan)
    results += list(epochs)
    assert [result["ended"] for result in results] == ["", "", "non_finite_loss"]
    assert results[-1]["epoch"] == 3
    assert results[-1]["best_val_map_at_r"] == max(result["val_map_at_r"] for result in results[:2])
    assert trainer.state_dict()["under_way"] is None
