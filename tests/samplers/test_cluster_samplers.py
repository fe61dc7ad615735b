"""Samplers that follow clusters: each against its rule and the releases' own batches."""

import itertools
from collections import Counter

import numpy as np
import pytest

from raydml.data.catalog import DataError
from raydml.samplers._base import ClassIndex, group_classes
from raydml.samplers._cluster import ClusterGroups, ClusterRoundRobin, group_images, num_rounds
from tests.golden_vectors import golden, golden_arrays, golden_cases
from tests.samplers.draws import assert_as_likely, labels_of

BOTH = pytest.mark.parametrize("of_clusters", [ClusterGroups, ClusterRoundRobin])


@BOTH
def test_planning_before_clusters_are_assigned_is_refused(of_clusters):
    sampler = of_clusters(labels_of(50, 50, 50), batch_size=12)
    with pytest.raises(DataError, match="call assign"):
        sampler.plan(np.random.default_rng(0))
    state = sampler.state_dict()
    assert state == {"clusters": None}
    sampler.assign(np.arange(150) % 4)
    sampler.load_state_dict(state)  # that of a trial before its first clustering
    with pytest.raises(DataError, match="call assign"):
        sampler.plan(np.random.default_rng(0))
    if of_clusters is ClusterRoundRobin:
        with pytest.raises(DataError, match="call assign"):
            _ = sampler.batches_per_epoch


@BOTH
@pytest.mark.parametrize(
    "clusters", [np.zeros(149, dtype=int), np.zeros((150, 1), dtype=int), np.zeros(150), np.full(150, -2)]
)
def test_what_is_no_clustering_is_refused(of_clusters, clusters):
    with pytest.raises(DataError, match=r"clusters of shape .* for each of the 150 images.* -1"):
        of_clusters(labels_of(50, 50, 50), batch_size=12).assign(clusters)


@BOTH
def test_no_images_are_refused_and_unused_ones_never_shown(of_clusters):
    sampler = of_clusters(labels_of(50, 50, 50), batch_size=12)
    with pytest.raises(DataError, match="-1 for every image"):
        sampler.assign(np.full(150, -1))
    clusters = np.random.default_rng(0).choice([-1, 2, 3, 8], size=150)
    sampler.assign(clusters)
    generator = np.random.default_rng(1)
    shown = np.concatenate([batch for _ in range(60) for batch in sampler.plan(generator).batches])
    assert set(shown.tolist()) == set(np.flatnonzero(clusters >= 0).tolist())


@BOTH
def test_the_clusters_assigned_last_count_and_are_a_copy(of_clusters):
    labels, clusters = labels_of(50, 50, 50), np.arange(150) % 5
    sampler, fresh = (of_clusters(labels, batch_size=12) for _ in range(2))
    sampler.assign((np.arange(150) + 1) % 4)
    sampler.plan(np.random.default_rng(0))
    sampler.assign(clusters)
    fresh.assign(clusters)
    clusters[:] = 0
    got, expected = sampler.plan(np.random.default_rng(1)), fresh.plan(np.random.default_rng(1))
    assert np.array_equal(np.concatenate(got.batches), np.concatenate(expected.batches))
    assert sampler.state_dict()["clusters"] == (np.arange(150) % 5).tolist()


@pytest.mark.parametrize("settings", golden_cases("mic_batch_construction", lambda case: case["case"].startswith("s")))
def test_the_rule_of_cluster_groups_is_that_of_the_release_draw_by_draw(settings):
    arrays, case, per_group = golden_arrays("mic_batch_construction"), settings["case"], settings["samples_per_class"]
    given, drawn, kept, swapped, targets, images = arrays[f"{case}_trace"].T
    first, index = int(arrays[f"{case}_init_class"]), ClassIndex(arrays[f"{case}_cluster_labels"])
    # The trace names the cluster that was drawn; the rule takes its place among the candidates.
    visited, numbers = [first, first], [first]
    for cluster in drawn[per_group::per_group].tolist():
        numbers.append([c for c in range(len(index)) if c not in visited].index(cluster))
        visited = [visited[1], cluster]
    groups = group_classes(np.array(numbers), len(index))
    assert np.repeat(groups, per_group)[: len(targets)].tolist() == targets.tolist()
    assert (kept == (swapped < 0)).all()
    padded = np.zeros((2, len(groups) * per_group), dtype=np.int64)  # the second trace ends within a group
    padded[0, : len(given)], padded[1, : len(given)] = given, swapped
    numbers, swaps = padded.reshape(2, len(groups), per_group)
    got = group_images(index, groups, swaps, numbers).reshape(-1)[: len(given)]
    assert got.tolist() == images.tolist()


def test_cluster_groups_draw_clusters_images_and_swaps_evenly():
    counts = np.array([40, 30, 20, 10])
    clusters, ids = labels_of(*counts), np.array([2, 3, 5, 11])
    sampler, generator = ClusterGroups(np.zeros(100), batch_size=24, images_per_cluster=3), np.random.default_rng(3)
    sampler.assign(ids[clusters])
    assert sampler.batches_per_epoch == 4
    following, swapped, taken = np.zeros((4, 4, 4)), np.zeros((4, 4)), np.zeros(100)
    for _ in range(2000):
        plan = sampler.plan(generator)
        assert plan.learners is None
        images, targets = np.concatenate(plan.batches), np.searchsorted(ids, np.concatenate(plan.targets))
        assert [len(one) for one in plan.targets] == [24] * 4
        assert set(np.concatenate(plan.targets)) <= set(ids.tolist())
        groups = targets.reshape(-1, 3)
        assert (groups == groups[:, :1]).all()
        np.add.at(following, (groups[:-2, 0], groups[1:-1, 0], groups[2:, 0]), 1)
        np.add.at(swapped, (targets, clusters[images]), 1)
        taken += np.bincount(images, minlength=100)
    for older, newer in itertools.permutations(range(4), 2):
        seen = following[older, newer]
        assert seen[[older, newer]].sum() == 0
        others = np.delete(seen, [older, newer])
        assert_as_likely(others, seen.sum() / 2)
    shares = swapped / swapped.sum(axis=1, keepdims=True)
    assert np.allclose(shares[~np.eye(4, dtype=bool)], 0.05, atol=0.004)  # 0.2 / 4 each, and 0.85 stay
    for cluster in range(4):
        of_cluster = taken[clusters == cluster]
        assert_as_likely(of_cluster, of_cluster.mean())


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0.0), (1.0, 0.75)])
def test_the_probability_of_a_random_cluster_is_a_setting(probability, expected):
    clusters = np.arange(4000) % 4
    sampler = ClusterGroups(clusters, batch_size=40, random_cluster_probability=probability)
    sampler.assign(clusters)
    plan = sampler.plan(np.random.default_rng(0))
    wrong = clusters[np.concatenate(plan.batches)] != np.concatenate(plan.targets)
    assert wrong.mean() == pytest.approx(expected, abs=0.03)


def test_cluster_groups_refusals():
    labels = labels_of(50, 50)
    with pytest.raises(DataError, match="takes 3 clusters with images, and there are 2; choose more"):
        ClusterGroups(labels, batch_size=12).assign(np.arange(100) % 2 * 5)
    with pytest.raises(DataError, match=r"batch_size = 14 is no multiple of sampler.images_per_cluster = 4"):
        ClusterGroups(labels, batch_size=14)
    with pytest.raises(DataError, match="only 100 training images"):
        ClusterGroups(labels, batch_size=112)


def round_robin(labels, clusters, batch_size=16, images_per_class=4) -> ClusterRoundRobin:
    sampler = ClusterRoundRobin(labels, batch_size=batch_size, images_per_class=images_per_class)
    sampler.assign(clusters)
    return sampler


def test_round_robin_takes_the_turns_of_the_release():
    arrays = golden_arrays("divide_conquer_batches")
    for size, reported in zip(arrays["dataset_len"].tolist(), arrays["len_reported"].tolist(), strict=True):
        assert num_rounds(np.array([size, 10]), 80) == max(reported, 1)
    sizes = arrays["merge_sizes"]
    clusters, labels = labels_of(*sizes), np.arange(sizes.sum()) % 25
    sampler = round_robin(labels, clusters, batch_size=80)
    assert sampler.batches_per_epoch == len(arrays["merge_order"])
    for seed in range(2):
        plan = sampler.plan(np.random.default_rng(seed))
        assert plan.learners.tolist() == arrays["merge_order"][:, 0].tolist()
        assert plan.learners.dtype == np.int64
        assert plan.targets is None
        for cluster, batch in zip(plan.learners, plan.batches, strict=True):
            assert (clusters[batch] == cluster).all()


def test_round_robin_keeps_the_invariants_of_the_release_within_a_batch():
    arrays, facts = golden("divide_conquer_batches")
    labels, settings = arrays["cb_labels"], facts["hyperparameters"]
    per_class = settings["cb_samples_per_class"]
    sampler = round_robin(labels, np.zeros(len(labels), dtype=np.int64), settings["cb_batch_size"], per_class)
    generator = np.random.default_rng(0)
    ours = [batch for _ in range(20) for batch in sampler.plan(generator).batches]
    for batch in [*ours, *arrays["cb_batches"]]:
        groups = batch.reshape(-1, per_class)
        assert (labels[groups] == labels[groups[:, :1]]).all()
        assert len(set(labels[groups[:, 0]])) == len(groups) == 4
        for group in groups:
            if (labels == labels[group[0]]).sum() >= per_class:
                assert len(set(group)) == per_class


def test_a_class_of_a_cluster_goes_round_its_images_and_skips_the_rest():
    # 15 images of class 2 in cluster 0: three visits of 4 show 12 different ones, then it is shuffled again; the 12 of
    # class 0 are all shown.
    labels, clusters = labels_of(24, 11, 30, seed=1), np.zeros(65, dtype=np.int64)
    for label in range(3):
        clusters[np.flatnonzero(labels == label)[1::2]] = 1
    sampler, generator = round_robin(labels, clusters, batch_size=8), np.random.default_rng(4)
    visits: dict[tuple[int, int], list[list[int]]] = {}
    for _ in range(400):
        plan = sampler.plan(generator)
        for cluster, batch in zip(plan.learners.tolist(), plan.batches, strict=True):
            for group in batch.reshape(2, 4).tolist():
                visits.setdefault((cluster, labels[group[0]]), []).append(group)
    assert len(visits) == 6
    for (cluster, label), groups in visits.items():
        members = np.flatnonzero((labels == label) & (clusters == cluster))
        per_shuffle = len(members) // 4
        left_out = Counter()
        for start in range(0, len(groups) - per_shuffle + 1, per_shuffle):
            shown = list(itertools.chain(*groups[start : start + per_shuffle]))
            assert len(set(shown)) == 4 * per_shuffle  # epochs end anywhere in between
            left_out.update(set(members.tolist()) - set(shown))
        if len(members) % 4:
            assert_as_likely([left_out[image] for image in members.tolist()], left_out.total() / len(members))


def test_a_class_smaller_than_its_share_is_drawn_with_replacement():
    labels, generator = labels_of(3, 2, 40), np.random.default_rng(5)
    sampler = round_robin(labels, np.zeros(45, dtype=np.int64), batch_size=12)
    different, draws = Counter(), np.zeros(45)
    for _ in range(700):
        for batch in sampler.plan(generator).batches:
            for group in batch.reshape(3, 4):
                different[labels[group[0]], len(set(group.tolist()))] += 1
                np.add.at(draws, group, 1)
    # 4 draws from 3 and from 2 images leave one, two or three different ones with 3, 42 and 36 of 81, 2 and 14 of 16
    assert_as_likely([different[0, number] for number in (1, 2, 3)], 2100 * np.array([3, 42, 36]) / 81)
    assert_as_likely([different[1, number] for number in (1, 2)], 2100 * np.array([2, 14]) / 16)
    assert_as_likely(draws[labels == 0], 2800)


def test_classes_of_a_cluster_are_drawn_evenly_and_again_only_where_there_are_too_few():
    labels, clusters = labels_of(*[12] * 8, seed=2), np.zeros(96, dtype=np.int64)
    clusters[labels >= 5] = 7  # five classes in one cluster, three in the other
    sampler, generator = round_robin(labels, clusters), np.random.default_rng(6)
    chosen, few = Counter(), Counter()
    for _ in range(1000):
        plan = sampler.plan(generator)
        for cluster, batch in zip(plan.learners.tolist(), plan.batches, strict=True):
            classes = labels[batch.reshape(4, 4)[:, 0]].tolist()
            if cluster == 0:
                chosen[tuple(sorted(classes))] += 1
            else:
                few[tuple(classes)] += 1
    assert_as_likely([chosen[four] for four in itertools.combinations(range(5), 4)], chosen.total() / 5)
    assert chosen.total() == 3000
    assert_as_likely([few[four] for four in itertools.product((5, 6, 7), repeat=4)], 3000 / 81)


def test_a_cluster_of_exactly_as_many_classes_as_a_batch_shows_each_in_every_batch():
    labels = labels_of(9, 9, 9, 9)
    sampler = round_robin(labels, np.zeros(36, dtype=np.int64))
    for seed in range(10):
        for batch in sampler.plan(np.random.default_rng(seed)).batches:
            assert set(labels[batch].tolist()) == {0, 1, 2, 3}


def test_clusters_without_a_full_batch_take_their_turns_and_those_of_one_class_none():
    labels = np.repeat([0, 1, 2, 3], [50, 50, 6, 5])
    clusters = np.repeat([4, 4, 1, 9], [50, 50, 6, 5])
    clusters[[0, 50]] = 6  # one image of class 0 and one of class 1
    sampler = round_robin(labels, clusters)
    plan = sampler.plan(np.random.default_rng(0))
    assert plan.learners.tolist() == [4, 6] * (98 // 16)
    assert sampler.batches_per_epoch == 12
    assert all(set(batch.tolist()) <= {0, 50} for batch in plan.batches[1::2])
    assert plan.num_duplicates >= 6 * 14
    assert plan.coverage <= 100 / 111
    small = round_robin(labels[100:], np.zeros(11, dtype=np.int64))
    assert len(small.plan(np.random.default_rng(0)).batches) == 1  # nothing but a cluster that is too small
    with pytest.raises(DataError, match=r"none of the 4 clusters has images of two classes.* fewer clusters"):
        sampler.assign(labels)


def test_assigning_anew_begins_anew():
    labels, clusters = labels_of(*[9] * 6), np.arange(54) % 2
    sampler = round_robin(labels, clusters, batch_size=8)
    unused = sampler.state_dict()
    sampler.plan(np.random.default_rng(0))
    assert sampler.state_dict() != unused
    sampler.assign(clusters)
    assert sampler.state_dict() == unused
    with pytest.raises(DataError, match=r"batch_size = 10 is no multiple"):
        ClusterRoundRobin(labels, batch_size=10, images_per_class=4)
