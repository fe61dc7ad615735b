"""Divide & Conquer against its release's steps, its timetable by hand, and the clusters it follows."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from raydml import registry
from raydml.data.catalog import DataError
from raydml.methods._base import Batch, Method, Objective
from raydml.methods.divide_conquer import DivideConquer
from raydml.methods.plain import Plain
from raydml.models.network import Head, Network
from raydml.ops.clustering import KMeans, cluster
from raydml.training.parts import check_every_parameter_learns
from tests.golden_vectors import golden_facts, golden_tensors

CPU = torch.device("cpu")
RELEASE = {"name": "margin", "class_beta": False, "trainable_beta": False}
NEAREST = {"name": "nearest_beyond_cutoff"}
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 12))


def sliced_network(num_slices: int, feature_dim: int = 10, embedding_dim: int = 12, normalize: str = "l2") -> Network:
    """A head on features that are given as if they were images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = Head(feature_dim, embedding_dim, layer_norm=False, normalize=normalize, num_slices=num_slices)
    return Network(nn.Identity(), head, freeze_batch_norm=False)


def make_objective(network, loss, miner, regularizers, num_classes, embedding_dim, *, with_regularizers=True):
    sizes = {"num_classes": num_classes, "embedding_dim": embedding_dim}
    built_loss = registry.build("losses", **{**loss, **sizes})
    built_miner = registry.build("miners", **miner) if miner else None
    terms = {
        name: registry.build(
            "regularizers", name, **sizes, network=network, loss=built_loss, miner=built_miner, **settings
        )
        for name, settings in regularizers.items()
        if with_regularizers
    }
    return Objective(built_loss, built_miner, terms)


def build(
    cls=DivideConquer, labels=LABELS, num_epochs=20, network=None, loss=RELEASE, miner=None, regularizers=(), **settings
) -> Method:
    """sampler: its name and settings; the rest are the method's settings."""
    name, sampler = settings.pop("sampler", ("class_balanced", {"classes_per_batch": 3, "images_per_class": 4}))
    given = {"num_learners": 3, **settings} if cls is DivideConquer else settings
    network = network or sliced_network(given.get("num_learners", 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        objective = partial(make_objective, network, loss, miner, dict(regularizers))
        context = {"num_epochs": num_epochs} if cls is DivideConquer else {}
        return cls(
            network=network,
            train_labels=labels,
            make_objective=objective,
            make_sampler=partial(registry.load("samplers", name), **sampler),
            **context,
            **given,
        )


def blobs(centres: np.ndarray, seed: int = 0) -> torch.Tensor:
    """Features about well separated directions, one of 10 axes for each image."""
    noise = np.random.default_rng(seed).normal(size=(len(centres), 10)) / 40
    return torch.from_numpy((3 * np.eye(10)[centres] + noise).astype(np.float32))


def recluster(method: Method, points: torch.Tensor, epoch: int = 0) -> dict[str, float]:
    return method.recluster(lambda forward: forward(points).numpy(), epoch, CPU)


def losses_of_epoch(method: Method, points: torch.Tensor, labels: np.ndarray, epoch: int, seed: int = 0):
    """The loss of each batch of an epoch, with its learner, after a clustering where it is time for one."""
    if method.time_to_recluster(epoch):
        recluster(method, points, epoch)
    plan = method.plan_epoch(epoch, np.random.default_rng(seed))
    learners = [0] * len(plan.batches) if plan.learners is None else plan.learners.tolist()
    for learner, rows in zip(learners, plan.batches, strict=True):
        batch = Batch(points[rows], torch.from_numpy(labels[rows]), epoch, learner)
        yield learner, method.batch_loss(batch, torch.Generator().manual_seed(seed))


def release_method(weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, facts: dict) -> DivideConquer:
    settings = facts["hyperparameters"]
    network = sliced_network(settings["K"], weight.shape[1], settings["embedding_size"])
    method = build(
        network=network,
        labels=np.arange(int(labels.max()) + 1).repeat(4),
        num_epochs=20,
        loss={**RELEASE, "margin": settings["margin"], "beta": settings["beta"]},
        miner=NEAREST,
        num_learners=settings["K"],
    ).double()
    with torch.no_grad():
        network.head.linear.weight.copy_(weight)
        network.head.linear.bias.copy_(bias)
    return method


def test_the_losses_and_gradients_of_every_learner_are_the_releases():
    facts, arrays = golden_facts("divide_conquer_head"), golden_tensors("divide_conquer_head")
    method = release_method(arrays["W"], arrays["b"], arrays["labels"], facts)
    linear, tolerance = method.network.head.linear, facts["tolerance"]
    torch.testing.assert_close(method.embed(arrays["feat"]), arrays["embedding"], **tolerance)
    torch.testing.assert_close(method._clustering_features(arrays["feat"]), arrays["penultimate"], **tolerance)
    for learner, name in [(0, "learner0"), (1, "learner1"), (2, "learner2"), (3, "learner3"), (0, "full"), (3, "full")]:
        method.zero_grad()
        epoch = 8 if name == "full" else 7
        loss = method.batch_loss(Batch(arrays["feat"], arrays["labels"], epoch, learner), torch.Generator())
        loss.backward()
        torch.testing.assert_close(loss, arrays[f"{name}__loss"], **tolerance)
        torch.testing.assert_close(linear.weight.grad, arrays[f"{name}__grad_W"], **tolerance)
        torch.testing.assert_close(linear.bias.grad, arrays[f"{name}__grad_b"], **tolerance)
        if name != "full":
            others = torch.ones(4, dtype=torch.bool).index_fill(0, torch.tensor(learner), False).repeat_interleave(4)
            assert not linear.weight.grad[others].any()


def test_thirteen_steps_of_both_phases_are_the_releases():
    facts, arrays = golden_facts("divide_conquer_train_steps"), golden_tensors("divide_conquer_train_steps")
    settings, tolerance = facts["hyperparameters"], facts["tolerance"]
    method = release_method(arrays["W0"], arrays["b0"], arrays["labels"], facts)
    assert (method.timeline.full, method.timeline.finetune) == (8, settings["finetune_epoch"])
    parameters = [parameter for group in method.parameter_groups().values() for parameter in group]
    optimizer = torch.optim.Adam(
        parameters,
        lr=settings["lr"],
        betas=settings["adam_betas"],
        eps=settings["adam_eps"],
        weight_decay=settings["weight_decay"],
    )
    epochs, learners = arrays["epoch"].tolist(), arrays["learner"].tolist()
    assert min(epochs) < 8 <= max(epochs)
    for step, (epoch, learner) in enumerate(zip(epochs, learners, strict=True)):
        batch = Batch(arrays["feat"][step], arrays["labels"][step], epoch, learner)
        loss = method.batch_loss(batch, torch.Generator())
        torch.testing.assert_close(loss, arrays["loss"][step], **tolerance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(method.network.head.linear.weight.data, arrays["W_end"], **tolerance)
    torch.testing.assert_close(method.network.head.linear.bias.data, arrays["b_end"], **tolerance)
    betas = torch.cat([objective.loss.beta for objective in method.objectives])
    assert torch.equal(betas, arrays["beta_end"].double())
    assert method.parameter_groups()["loss"] == []


def test_two_hundred_epochs_go_as_in_the_release():
    method = build(num_epochs=200)
    assert [epoch for epoch in range(200) if method.time_to_recluster(epoch)] == list(range(0, 190, 2))
    assert method.timeline == (80, 190, 200)
    every_third = build(num_epochs=200, recluster_every=3)
    assert [epoch for epoch in range(200) if every_third.time_to_recluster(epoch)] == list(range(0, 190, 3))


# First epoch on the whole embedding, first of finetuning, and the clusterings, by hand from 0.95 and 8/19.
@pytest.mark.parametrize(
    ("num_epochs", "full", "finetune", "clusterings"),
    [
        (1, 1, 1, [0]),
        (2, 1, 2, [0]),
        (3, 2, 3, [0, 2]),
        (5, 3, 5, [0, 2, 4]),
        (20, 8, 19, list(range(0, 19, 2))),
        (100, 40, 95, list(range(0, 95, 2))),
        (400, 160, 380, list(range(0, 380, 2))),
    ],
)
def test_other_budgets_take_the_same_shares(num_epochs, full, finetune, clusterings):
    method = build(num_epochs=num_epochs)
    assert method.timeline == (full, finetune, num_epochs)
    assert [epoch for epoch in range(num_epochs) if method.time_to_recluster(epoch)] == clusterings


@pytest.mark.parametrize(
    ("settings", "timeline"),
    [
        ({"finetune_from": 1.0}, (5, 10, 10)),  # 10 * 8/19 = 4.2
        ({"finetune_from": 1.0, "full_embedding_from": 1.0}, (10, 10, 10)),
        ({"finetune_from": 0.5, "full_embedding_from": 1.0}, (5, 5, 10)),
        ({"finetune_from": 0.5, "full_embedding_from": 0.0}, (0, 5, 10)),
        ({"finetune_from": 0.0}, (0, 0, 10)),
        ({"num_learners": 1}, (0, 0, 10)),
        ({"finetune_from": 1.0, "full_embedding_from": 0.07, "num_epochs": 100}, (7, 100, 100)),  # 7.000000000000001
    ],
)
def test_the_ends_of_the_shares(settings, timeline):
    method = build(**{"num_epochs": 10, **settings})
    _, finetune, end = timeline
    assert method.timeline == timeline
    assert method.time_to_recluster(0) == (finetune > 0)
    assert set(method.samplers) == {
        name for name, some in (("clusters", finetune > 0), ("images", finetune < end)) if some
    }


@pytest.mark.parametrize("num_epochs", [1, 2, 3, 10])
def test_each_epoch_trains_the_slices_and_the_batches_of_its_phase(num_epochs):
    method, points = build(num_epochs=num_epochs, num_learners=3), blobs(np.arange(72) % 3)
    full, finetune, _ = method.timeline
    linear = method.network.head.linear
    for epoch in range(num_epochs):
        learners = set()
        for learner, loss in losses_of_epoch(method, points, LABELS, epoch):
            linear.zero_grad()
            loss.backward()
            trained = linear.weight.grad.reshape(3, -1).any(dim=1).tolist()
            assert trained == ([index == learner for index in range(3)] if epoch < full else [True] * 3)
            learners.add(learner)
        assert learners == ({0, 1, 2} if epoch < finetune else {0})


def losses_see(method: Method) -> list[torch.Tensor]:
    """A list to which every batch adds the embeddings that its loss is given."""
    seen = []

    class Note(nn.Module):
        def forward(self, embeddings, labels):  # noqa: ARG002
            seen.append(embeddings.detach())
            return embeddings.sum()

    method.objectives = nn.ModuleList(Objective(Note()) for _ in method.objectives)
    return seen


# What makes a batch of vectors one of the head's: their lengths, or their mean distance.
SIZES = {"l2": lambda points: points.norm(dim=1), "mean_distance": lambda points: torch.pdist(points).mean()}


@pytest.mark.parametrize("normalize", SIZES)
def test_slices_and_later_the_whole_embedding_are_normalised(normalize):
    points, size = blobs(np.arange(24) % 3), SIZES[normalize]
    network = sliced_network(3, normalize=normalize)
    with torch.no_grad():
        network.head.linear.weight[:4] *= 5  # evaluation by mean_distance weighs slices by their sizes
        evaluated = network.eval()(points)
    method = build(network=network.train())
    seen = losses_see(method)
    for learner in range(3):
        for epoch in (7, 8, 19):
            method.batch_loss(Batch(points, torch.zeros(24), epoch, learner), torch.Generator())
        own, whole, finetuned = seen[-3:]
        slice_of_learner = evaluated[:, 4 * learner : 4 * learner + 4]
        torch.testing.assert_close(own, slice_of_learner / size(slice_of_learner).mean())
        torch.testing.assert_close(size(whole), torch.ones_like(size(whole)))
        torch.testing.assert_close(whole, evaluated / size(evaluated).mean())
        assert torch.equal(whole, finetuned)
    assert torch.equal(method.eval().embed(points), evaluated)


def test_without_normalisation_the_loss_sees_what_evaluation_sees():
    points = blobs(np.arange(24) % 3)
    method = build(network=sliced_network(3, normalize="none"))
    seen, evaluated = losses_see(method), method.embed(points)
    for epoch in (7, 8):
        method.batch_loss(Batch(points, torch.zeros(24), epoch, 2), torch.Generator())
    assert torch.equal(seen[0], evaluated[:, 8:])
    assert torch.equal(seen[1], evaluated)


@pytest.mark.parametrize("normalize", SIZES)
def test_one_learner_trains_what_the_head_gives(normalize):
    points, network = blobs(np.arange(24) % 3), sliced_network(1, normalize=normalize)
    method = build(network=network, num_learners=1)
    seen = losses_see(method)
    method.batch_loss(Batch(points, torch.zeros(24), 0, 0), torch.Generator())
    assert torch.equal(seen[0], network(points))


NOT_DEFAULT = {
    "recluster_every": 5,
    "full_embedding_from": 0.5,
    "release_matching": True,
    "kmeans_iterations": 20,
    "kmeans_restarts": 5,
    "kmeans_points_per_centroid": 256,
    "kmeans_spherical": True,
    "kmeans_seed": 1,
}
BALANCED = {"name": "class_balanced", "batch_size": 32}


def check(sampler=BALANCED, **settings) -> None:
    DivideConquer.check_settings(sampler, **dict(registry.settings_model("methods", "divide_conquer")(**settings)))


def test_every_setting_has_its_turn():
    assert {"num_learners", "finetune_from", *NOT_DEFAULT} == set(
        registry.settings_model("methods", "divide_conquer").model_fields
    )


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_how_to_cluster_is_refused_where_nothing_is_clustered(name):
    given = {name: NOT_DEFAULT[name]}
    for nothing in ({"num_learners": 1}, {"finetune_from": 0.0}):
        check(**nothing)
        cause = "{} = {}".format(*next(iter(nothing.items()))).replace("0.0", "0")
        with pytest.raises(ValueError, match=rf"^{name} = {given[name]} has no effect: .*{cause}.*; leave it out"):
            check(**nothing, **given)
    check(**given)


def test_all_that_has_no_effect_is_named():
    with pytest.raises(ValueError, match=r"^finetune_from = 0\.5, kmeans_seed = 1 have no effect: .*; leave them out"):
        check(num_learners=1, finetune_from=0.5, kmeans_seed=1)
    check(num_learners=1, finetune_from=0.95, recluster_every=2)  # written, but what they are anyway
    check(finetune_from=0.5)


def test_a_number_of_batches_is_refused_where_clusters_decide_it():
    sampler = {**BALANCED, "batches_per_epoch": 5}
    check(sampler, num_learners=1)
    with pytest.raises(ValueError, match=r"sampler\.batches_per_epoch = 5 has no effect: .*; remove it"):
        check(sampler)


def test_one_learner_is_plain_training_bit_for_bit():
    loss = {"name": "margin", "class_beta": True}
    points = blobs(np.arange(72) % 5)
    ends = []
    for cls, settings in ((Plain, {}), (DivideConquer, {"num_learners": 1})):
        method = build(cls, network=sliced_network(1), loss=loss, miner={"name": "distance_weighted"}, **settings)
        assert not any(method.time_to_recluster(epoch) for epoch in range(20))
        groups = [{"params": group} for group in method.parameter_groups().values() if group]
        optimizer = torch.optim.Adam(groups, lr=0.01)
        for epoch in range(4):
            for _, value in losses_of_epoch(method, points, LABELS, epoch, seed=epoch):
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        ends.append([parameter.detach() for parameter in method.parameters()])
    assert len(ends[0]) == 3
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], sliced_network(1).head.linear.weight)


def test_the_network_gets_a_slice_for_each_learner():
    assert DivideConquer.network_arguments(num_learners=4, recluster_every=2) == {"num_slices": 4}
    with pytest.raises(AssertionError, match="network_arguments"):
        build(network=sliced_network(2))


def test_clusters_keep_their_numbers():
    centres, points = np.arange(72) % 3, blobs(np.arange(72) % 3)
    unit = nn.functional.normalize(points).numpy()
    first = cluster(unit, 3, KMeans(iterations=100, max_points_per_centroid=10**7), CPU).assignment
    for seed in range(100):  # until k-means numbers the same clusters in a cycle
        again = cluster(unit, 3, KMeans(iterations=100, seed=seed), CPU).assignment
        renamed = [again[first == number][0] for number in range(3)]
        if (again == np.array(renamed)[first]).all() and renamed in ([1, 2, 0], [2, 0, 1]):
            break
    else:
        raise AssertionError("no seed gives a cycle")
    for release_matching in (False, True):
        method = build(release_matching=release_matching)
        assert "cluster_changed" not in recluster(method, points)
        assert method.clusters.tolist() == first.tolist()
        assert len({*zip(centres.tolist(), first.tolist(), strict=True)}) == 3
        method.kmeans = method.kmeans._replace(seed=seed)
        metrics = recluster(method, points, epoch=2)
        assert metrics["cluster_changed"] == 0
        assert (method.clusters.numpy() == first).all() != release_matching
        plan = method.plan_epoch(2, np.random.default_rng(0))
        assert plan.learners.tolist() == [0, 1, 2] * 2  # 24 images each, 12 a batch
        for learner, rows in zip(plan.learners, plan.batches, strict=True):
            assert (method.clusters.numpy()[rows] == learner).all()


def test_the_settings_reach_k_means():
    method = build(kmeans_iterations=7, kmeans_restarts=3, kmeans_points_per_centroid=50, kmeans_spherical=True)
    assert method.kmeans == KMeans(7, 3, 50, True, 1234)
    assert build().kmeans == KMeans(100, 1, 10_000_000, False, 1234)
    # Clusters are of directions: a length makes no difference.
    points, lengths = blobs(np.arange(72) % 3), torch.linspace(0.1, 50, 72)[:, None]
    one, other = build(), build()
    recluster(one, points)
    recluster(other, points * lengths)
    assert torch.equal(one.clusters, other.clusters)


def test_singletons_are_left_out_until_the_next_clustering():
    # Images 0 and 1 are the only ones of classes 0 and 1 in cluster C, which has 20 images of class 2 and 9 of class 3.
    labels = np.array([0, 1] + [2] * 20 + [3] * 9 + [0] * 12 + [1] * 12 + [4])
    centres = np.array([0] * 31 + [1] * 24 + [1])
    sampler = ("class_balanced", {"classes_per_batch": 2, "images_per_class": 4})
    method = build(labels=labels, num_learners=2, sampler=sampler)
    metrics = recluster(method, blobs(centres))
    assert metrics["num_singletons"] == 3
    assert metrics["num_clusters"] == 2
    assert np.flatnonzero(method.clusters.numpy() < 0).tolist() == [0, 1, 55]
    generator = np.random.default_rng(0)
    for epoch, left_out in ((0, {0, 1, 55}), (19, {55})):  # finetuning takes all but the only image of its class
        shown = {image for _ in range(80) for rows in method.plan_epoch(epoch, generator).batches for image in rows}
        assert shown == set(range(56)) - left_out
    moved = np.where(np.arange(56) < 2, 1, centres)
    recluster(method, blobs(moved), epoch=2)
    assert np.flatnonzero(method.clusters.numpy() < 0).tolist() == [55]


def test_what_is_logged_of_clusters_that_are_too_small():
    # Five classes in one cluster, two in another, and one that fills a cluster alone.
    labels = np.repeat(np.arange(8), 12)
    centres = np.repeat([0, 0, 0, 0, 0, 1, 1, 2], 12)
    method = build(labels=labels)
    metrics = recluster(method, blobs(centres))
    assert metrics["clusters_resampled"] == 1
    assert metrics["clusters_skipped"] == 1
    assert metrics["num_singletons"] == 0
    assert metrics["num_clusters"] == 3
    assert all(type(value) is float for value in metrics.values())
    learners = set(method.plan_epoch(0, np.random.default_rng(0)).learners.tolist())
    assert learners == set(method.clusters[:84].tolist())
    assert len(learners) == 2


def test_the_state_survives_a_restart_between_clusterings():
    points = blobs(np.arange(72) % 3)
    for sampler in (("class_balanced", {"classes_per_batch": 3}), ("identity_chunks", {"batch_size": 12})):
        method, other = build(sampler=sampler), build(sampler=sampler)
        recluster(method, points)
        generator = np.random.default_rng(3)
        method.plan_epoch(0, generator)
        other.load_state_dict(method.state_dict())
        assert set(other.samplers) == {"clusters", "images"}
        for name, each in other.samplers.items():
            each.load_state_dict(json.loads(json.dumps(method.samplers[name].state_dict())))
        again = np.random.default_rng(0)
        again.bit_generator.state = generator.bit_generator.state
        shifted = blobs(np.arange(72) % 3, seed=9)
        for epoch in (1, 2, 3, 19):
            if method.time_to_recluster(epoch):
                assert recluster(method, shifted, epoch) == recluster(other, shifted, epoch)
            plans = [each.plan_epoch(epoch, drawn) for each, drawn in ((method, generator), (other, again))]
            assert [rows.tolist() for rows in plans[0].batches] == [rows.tolist() for rows in plans[1].batches]
        assert torch.equal(method.clusters, other.clusters)


@pytest.mark.parametrize(
    ("loss", "regularizers", "settings", "num_learners", "has_whole"),
    [
        ("margin", {}, {}, 3, False),
        ("triplet", {"mdr": {}}, {}, 3, False),
        ("proxy_nca", {}, {}, 3, True),
        ("margin", {"cross_batch_memory": {"size": 64}}, {}, 3, True),  # its memory is of D numbers
        ("proxy_nca", {}, {"finetune_from": 1.0, "full_embedding_from": 1.0}, 3, False),
        ("proxy_nca", {}, {"full_embedding_from": 0.0}, 0, True),
        ("margin", {}, {"full_embedding_from": 0.0}, 3, False),
        ("proxy_nca", {}, {"finetune_from": 0.0}, 1, False),
        ("proxy_nca", {}, {"num_learners": 1}, 1, False),
    ],
)
def test_there_is_no_objective_that_nothing_trains(loss, regularizers, settings, num_learners, has_whole):
    method = build(loss={"name": loss}, regularizers=regularizers, num_epochs=10, **settings)
    assert len(method.objectives) == num_learners
    assert (method.whole_objective is not None) == has_whole
    check_every_parameter_learns(method.named_parameters(), method.parameter_groups())
    points, trained = blobs(np.arange(72) % 3), set()
    for epoch in range(10):
        for _, value in losses_of_epoch(method, points, LABELS, epoch):
            method.zero_grad(set_to_none=True)
            value.backward()
            trained |= {name for name, parameter in method.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in method.named_parameters()}


@pytest.mark.parametrize("loss", registry.names("losses"))
def test_any_loss_trains_in_every_phase(loss):
    method, points = build(loss={"name": loss}, num_epochs=4, finetune_from=0.75), blobs(np.arange(72) % 3)
    assert method.timeline == (2, 3, 4)
    for epoch in range(4):
        for _, value in losses_of_epoch(method, points, LABELS, epoch):
            assert value.isfinite()
            value.backward()
    assert all(parameter.grad.isfinite().all() for parameter in method.parameters() if parameter.grad is not None)


def finite_epochs(method: Method, points: torch.Tensor) -> None:
    for epoch in range(4):
        assert all(value.isfinite() for _, value in losses_of_epoch(method, points, LABELS, epoch))


@pytest.mark.parametrize("miner", [*registry.names("miners"), "variant"])
def test_any_miner_works_and_so_does_the_variant_of_the_paper(miner):
    settings = {"name": miner} if miner != "variant" else {"name": "distance_weighted", "variant": "divide_conquer"}
    yields = registry.build("miners", **settings).yields
    loss = next(name for name in ("margin", "n_pair", "triplet") if yields in registry.load("losses", name).accepts)
    finite_epochs(build(loss={"name": loss}, miner=settings, num_epochs=4, finetune_from=0.75), blobs(LABELS % 3))


# A trial refuses prefixes of slices: tests/config/test_trial.py.
@pytest.mark.parametrize("regularizer", [name for name in registry.names("regularizers") if name != "matryoshka"])
def test_any_regulariser_works(regularizer):
    settings = {"size": 64, "start_step": 2} if regularizer == "cross_batch_memory" else {}
    terms = {"miner": {"name": "distance_weighted"}, "regularizers": {regularizer: settings}}
    finite_epochs(build(num_epochs=4, finetune_from=0.75, **terms), blobs(np.arange(72) % 3))


DEGENERATE = {
    "all features equal": (LABELS, torch.ones(72, 10)),
    "classes that are clusters": (LABELS, blobs(LABELS)),
    "one image a class": (np.arange(72), blobs(np.arange(72) % 3)),
    "more learners than images": (np.repeat([0, 1], [3, 2]), blobs(np.arange(5))),
    "fewer classes than a batch has": (np.repeat([0, 1], 36), blobs(np.arange(72) % 3)),
}


SMALL_BATCHES = {
    "class_balanced": {"classes_per_batch": 2, "images_per_class": 2},
    "uniform": {"batch_size": 4},
    "random_classes": {"batch_size": 4, "images_per_class": 2, "batches_per_epoch": 3},
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", registry.names("samplers"))
def test_degenerate_data_give_finite_losses(case, name):
    labels, points = DEGENERATE[case]
    sampler = name, SMALL_BATCHES.get(name, {"batch_size": 4, "images_per_class": 2})
    if name == "class_groups" and labels.max() < 2:  # before any training
        with pytest.raises(DataError, match="takes 3 classes, and there are 2"):
            build(labels=labels, sampler=sampler, num_learners=6)
        return
    method = build(labels=labels, sampler=sampler, num_learners=6, num_epochs=4, finetune_from=0.75)
    for epoch in range(4):
        values = [value for _, value in losses_of_epoch(method, points, labels, epoch)]
        assert values
        for value in values:
            method.zero_grad()
            value.backward()
            assert value.isfinite()
            assert all(each.grad.isfinite().all() for each in method.parameters())


def test_where_no_cluster_has_two_classes_all_images_are_one():
    labels, points = DEGENERATE["classes that are clusters"]
    method = build(labels=labels, num_learners=6)
    metrics = recluster(method, points)
    assert metrics["clusters_skipped"] == metrics["num_clusters"] > 1
    plan = method.plan_epoch(0, np.random.default_rng(0))
    assert plan.learners.tolist() == [0] * 6  # 72 images, 12 a batch
    assert len(set(method.clusters.tolist())) == metrics["num_clusters"]


def test_a_single_class_is_refused():
    with pytest.raises(DataError, match=r"divide_conquer: all training images are of one class; give"):
        build(labels=np.zeros(40, dtype=np.int64), sampler=("uniform", {"batch_size": 4}))
