"""The trial's sampler inside every cluster: for each sampler that a trial can name, against the rule."""

import io
import json
from functools import partial

import numpy as np
import pytest
import torch

from raydml import registry
from raydml.data.catalog import DataError
from raydml.samplers._cluster import ClusterRoundRobin, PerCluster, cluster_sampler, clusters_of_two_classes
from tests.samplers.small_settings import small_settings

SAMPLERS = {name: registry.load("samplers", name) for name in registry.names("samplers")}
# Settings that all the images satisfy, and the batch size that follows from them.
CASES = {name: (small_settings(name), 12) for name in SAMPLERS}
CASES |= {
    "class_balanced": ({"classes_per_batch": 3, "images_per_class": 4}, 12),
    "balanced_with_replacement": ({"batch_size": 14, "images_per_class": 4}, 12),
    "identity_chunks": ({"batch_size": 14, "images_per_class": 4}, 12),
    "class_groups": ({"batch_size": 12, "images_per_class": 3}, 12),
    "random_classes": ({"batch_size": 14, "images_per_class": 3, "batches_per_epoch": 9}, 14),
}
SMALL, LARGE, PURE, TINY = 2, 5, 6, 9  # clusters: of 24, 61 and 20 images, the last of one class, and of 4


def labels_and_clusters() -> tuple[np.ndarray, np.ndarray]:
    """Classes whose numbers have gaps, in mixed order; the images of one class that are in no cluster come last."""
    cells = [
        *[(SMALL, label, 6) for label in (3, 8, 20, 21)],
        *[(LARGE, label, 10) for label in (8, 20, 21, 40, 77)],
        (LARGE, 3, 11),
        (PURE, 40, 20),
        *[(TINY, label, 2) for label in (3, 77)],
        *[(-1, label, 1) for label in (3, 8, 40)],
    ]
    rows = np.concatenate([np.tile((label, cluster), (count, 1)) for cluster, label, count in cells])
    labels, clusters = np.random.default_rng(5).permutation(rows).T
    return labels, clusters


def maker(name: str):
    return partial(SAMPLERS[name], **CASES[name][0])


def assigned(name: str) -> tuple[np.ndarray, np.ndarray, PerCluster]:
    """Labels, clusters, and the sampler of that name inside each cluster."""
    labels, clusters = labels_and_clusters()
    sampler = PerCluster(labels, maker(name))
    sampler.assign(clusters)
    return labels, clusters, sampler


def of_batches(plan) -> list[list[int]]:
    return [batch.tolist() for batch in plan.batches]


@pytest.mark.parametrize("make", [cluster_sampler, PerCluster])
@pytest.mark.parametrize("name", SAMPLERS)
def test_clusters_take_turns_and_a_batch_is_of_one(name, make):
    labels, clusters = labels_and_clusters()
    sampler, generator = make(labels, maker(name)), np.random.default_rng(0)
    assert sampler.batch_size == CASES[name][1]
    with pytest.raises(DataError, match="call assign"):
        sampler.plan(generator)
    with pytest.raises(DataError, match="call assign"):
        _ = sampler.batches_per_epoch
    sampler.assign(clusters)
    num_rounds = 61 // sampler.batch_size  # as often as a batch goes into the largest cluster
    assert sampler.batches_per_epoch == 3 * num_rounds
    shown = set()
    for _ in range(30):
        plan = sampler.plan(generator)
        assert plan.learners.tolist() == [SMALL, LARGE, TINY] * num_rounds
        assert plan.learners.dtype == np.int64
        for learner, batch in zip(plan.learners, plan.batches, strict=True):
            assert (batch.shape, batch.dtype) == ((sampler.batch_size,), np.int64)
            assert (clusters[batch] == learner).all()
            # From two classes, fewer than a batch has, it draws with replacement, as the release does.
            assert learner == TINY or len(set(labels[batch].tolist())) > 1
            shown |= set(batch.tolist())
        assert plan.targets is None
    assert shown == set(np.flatnonzero((clusters >= 0) & (clusters != PURE)).tolist())
    counts = [len(set(batch)) for batch in of_batches(plan)]
    assert plan.num_duplicates == sum(sampler.batch_size - count for count in counts)
    assert plan.coverage == len({image for batch in of_batches(plan) for image in batch}) / len(labels)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_batches_of_a_cluster_are_those_of_the_trials_own_sampler(name):
    labels = labels_and_clusters()[0]
    sampler, own = PerCluster(labels, maker(name)), maker(name)(labels)
    sampler.assign(np.full(len(labels), 3))
    generators = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(3):
        plan = sampler.plan(generators[0])
        assert plan.learners.tolist() == [3] * (len(labels) // sampler.batch_size)
        expected = of_batches(own.plan(generators[1]))
        while len(expected) < len(plan.batches):
            expected += of_batches(own.plan(generators[1]))
        assert of_batches(plan) == expected[: len(plan.batches)]
    assert sampler.num_resampled == 0


def test_a_cluster_whose_plan_is_used_up_plans_anew():
    labels, clusters = np.arange(57) % 3, np.repeat([0, 1], [40, 17])
    sampler = PerCluster(labels, partial(SAMPLERS["uniform"], batch_size=8))
    sampler.assign(clusters)
    plan = sampler.plan(np.random.default_rng(2))
    assert plan.learners.tolist() == [0, 1] * 5
    large, small = of_batches(plan)[::2], of_batches(plan)[1::2]
    assert sorted(image for batch in large for image in batch) == list(range(40))  # one shuffle of them
    for first in (0, 2):  # a shuffle of 17 gives two batches
        assert len(set(small[first] + small[first + 1])) == 16
    assert len({frozenset(batch) for batch in small}) == 5


# Which clusters a sampler refuses, by hand: TINY has 4 images of 2 classes, SMALL 4 classes of 6, LARGE 6 of 10.
# "uniform" needs 12 images, "random_classes" 14 images with 3 of each class, the others 3 classes.
REFUSED = {name: {SMALL, TINY} if name == "random_classes" else {TINY} for name in CASES}


@pytest.mark.parametrize("name", SAMPLERS)
def test_clusters_that_the_sampler_refuses_are_counted_and_served(name):
    labels, clusters, sampler = assigned(name)
    assert sampler.num_resampled == len(REFUSED[name])
    settings, batch_size = CASES[name]
    per_class = settings.get("images_per_class", 1)
    classes = {cluster: set() for cluster in REFUSED[name]}
    generator = np.random.default_rng(3)
    for _ in range(20):
        plan = sampler.plan(generator)
        for learner, batch in zip(plan.learners.tolist(), plan.batches, strict=True):
            if learner in REFUSED[name]:
                whole = batch[: batch_size // per_class * per_class].reshape(-1, per_class)
                assert (labels[whole] == labels[whole[:, :1]]).all()
                classes[learner] |= set(labels[batch].tolist())
    assert all(classes[cluster] == set(labels[clusters == cluster].tolist()) for cluster in classes)
    sampler.assign(np.where(clusters == TINY, -1, clusters))
    assert sampler.num_resampled == len(REFUSED[name] - {TINY})


def test_round_robin_counts_the_clusters_with_too_few_classes():
    labels, clusters = labels_and_clusters()
    for batch_size, expected in ((8, 0), (12, 1), (16, 1), (20, 2), (24, 2), (28, 3)):  # 2, 4 and 6 classes
        sampler = ClusterRoundRobin(labels, batch_size=batch_size, images_per_class=4)
        sampler.assign(clusters)
        assert sampler.num_resampled == expected


def test_class_balanced_is_the_rule_of_the_release():
    labels, clusters = labels_and_clusters()
    sampler = cluster_sampler(labels, maker("class_balanced"))
    own = ClusterRoundRobin(labels, batch_size=12, images_per_class=4)
    assert isinstance(sampler, ClusterRoundRobin)
    for each in (sampler, own):
        each.assign(clusters)
    plans = [of_batches(each.plan(np.random.default_rng(4))) for each in (sampler, own)]
    assert plans[0] == plans[1]
    for name in set(SAMPLERS) - {"class_balanced"}:
        assert isinstance(cluster_sampler(labels, maker(name)), PerCluster)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_restart_goes_on_as_if_nothing_had_happened(name):
    (labels, clusters, sampler), generator = assigned(name), np.random.default_rng(6)
    sampler.plan(generator)
    state = sampler.state_dict()
    before = json.dumps(state)
    file = io.BytesIO()
    torch.save({"sampler": state, "generator": generator.bit_generator.state}, file)
    expected = [of_batches(sampler.plan(generator)) for _ in range(3)]
    assert json.dumps(state) == before
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    restored, again = PerCluster(labels, maker(name)), np.random.default_rng(0)
    restored.load_state_dict(saved["sampler"])
    again.bit_generator.state = saved["generator"]
    assert [of_batches(restored.plan(again)) for _ in range(3)] == expected
    assert restored.num_resampled == sampler.num_resampled
    restored.assign(clusters)  # begins anew
    assert restored.state_dict() == assigned(name)[2].state_dict()
    restored.load_state_dict({"clusters": None})  # that of a trial before its first clustering
    with pytest.raises(DataError, match="call assign"):
        restored.plan(again)


def test_states_of_others_are_refused():
    labels, _, sampler = assigned("identity_chunks")
    state = sampler.state_dict()
    with pytest.raises(DataError, match=r"another sampler.*resume with the sampler"):
        sampler.load_state_dict({"position": 3})
    with pytest.raises(DataError, match=r"each of the 113"):
        PerCluster(np.append(labels, 3), maker("identity_chunks")).load_state_dict(state)
    with pytest.raises(DataError, match=r"samplers for 2 clusters, and 3 take part.*resume with"):
        sampler.load_state_dict({**state, "samplers": state["samplers"][:2]})
    with pytest.raises(DataError, match=r"samplers for 0 clusters"):
        sampler.load_state_dict({"clusters": state["clusters"]})
    with pytest.raises(DataError, match="other images"):
        sampler.load_state_dict({**state, "samplers": state["samplers"][::-1]})


def test_what_cannot_be_divided_is_refused():
    labels, clusters = labels_and_clusters()
    with pytest.raises(DataError, match="training images"):
        PerCluster(labels, partial(SAMPLERS["uniform"], batch_size=500))
    sampler = PerCluster(labels, maker("uniform"))
    with pytest.raises(DataError, match=r"none of the 6 clusters has images of two classes.* fewer clusters"):
        sampler.assign(np.unique(labels, return_inverse=True)[1])
    for wrong in (clusters[1:], clusters.astype(float), clusters - 1):
        with pytest.raises(DataError, match=r"clusters of shape"):
            sampler.assign(wrong)


def test_clusters_of_two_classes_by_hand():
    clusters = np.array([4, 4, 1, 1, 7, 0, 0, 0, -1, -1])
    labels = np.array([9, 3, 3, 3, 3, 5, 5, 6, 5, 6])
    assert clusters_of_two_classes(clusters, labels).tolist() == [0, 4]
    assert clusters_of_two_classes(np.full(10, -1), labels).tolist() == []
