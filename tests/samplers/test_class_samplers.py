"""Samplers of published systems that draw classes, then images: each against its rule and the release's own batches."""

import itertools
from collections import Counter
from functools import partial

import numpy as np
import pytest

from raydml.data.catalog import DataError
from raydml.samplers._base import (
    ClassIndex,
    ShuffledClasses,
    distinct_numbers,
    earlier_visits,
    group_classes,
    in_rounds,
    index_for_groups,
    most_groups,
)
from raydml.samplers.balanced_with_replacement import BalancedWithReplacement
from raydml.samplers.class_balanced import ClassBalanced
from raydml.samplers.class_groups import ClassGroups
from raydml.samplers.identity_chunks import IdentityChunks
from raydml.samplers.random_classes import RandomClasses
from raydml.samplers.random_identity import RandomIdentity
from tests.golden_vectors import golden, golden_arrays, golden_cases, golden_facts
from tests.samplers.draws import assert_as_likely, labels_of


def test_the_index_lists_the_images_of_each_class():
    index = ClassIndex(np.array([30, 5, 30, 7, 5, 30]))
    assert index.labels_present.tolist() == [5, 7, 30]
    assert index.counts.tolist() == [2, 1, 3]
    assert index.order.tolist() == [1, 4, 3, 0, 2, 5]
    assert index.images(np.array([0, 2]), np.array([[0, 1, 2], [2, 3, 7]])).tolist() == [[1, 4, 1], [5, 0, 2]]
    some = ClassIndex(np.array([30, 5, 30, 7, 5, 30]), np.array([0, 4, 5]))
    assert (some.order.tolist(), some.counts.tolist(), some.num_images) == ([4, 0, 5], [1, 2], 6)


def test_every_set_of_distinct_numbers_is_as_likely():
    below, sizes = np.tile([5, 7, 3, 1], 6000), np.tile([2, 3, 3, 1], 6000)
    flat = distinct_numbers(below, sizes, np.random.default_rng(0))
    rows = np.split(flat, np.cumsum(sizes)[:-1])
    for first, (count, size) in enumerate([(5, 2), (7, 3), (3, 3), (1, 1)]):
        drawn = Counter(tuple(sorted(row.tolist())) for row in rows[first::4])
        sets = list(itertools.combinations(range(count), size))
        assert set(drawn) == set(sets)
        assert_as_likely([drawn[numbers] for numbers in sets], 6000 / len(sets))


def test_distinct_numbers_of_nothing():
    none = np.zeros(0, dtype=int)
    assert distinct_numbers(none, none, np.random.default_rng(0)).shape == (0,)
    assert distinct_numbers(np.array([4]), np.array([0]), np.random.default_rng(0)).shape == (0,)


def test_rounds_hold_each_class_once_and_in_turn():
    classes = np.array([2, 0, 2, 2, 1, 0])
    assert earlier_visits(classes, 4).tolist() == [0, 0, 1, 2, 0, 1]
    assert [places.tolist() for places in in_rounds(classes, 4)] == [[0, 1, 4], [2, 5], [3]]


def test_a_shuffle_stays_within_the_class_and_every_order_is_as_likely():
    index, generator = ClassIndex(labels_of(4, 3, 2)), np.random.default_rng(1)
    shuffled, orders = ShuffledClasses(index), Counter()
    for _ in range(4800):
        shuffled.shuffle_anew(np.array([2, 0]), generator)
        assert shuffled.order[4:7].tolist() == index.order[4:7].tolist()  # class 1 is not among them
        orders[tuple(shuffled.order[:4].tolist())] += 1
        assert sorted(shuffled.take(np.array([2, 0]), 2)[0].tolist()) == index.order[7:].tolist()
        assert shuffled.shown.tolist() == [2, 3, 2]
    assert len(orders) == 24
    assert_as_likely(list(orders.values()), 200)


@pytest.mark.parametrize("case", golden_facts("classification_sampler")["cases"], ids=lambda case: case["case"])
def test_balanced_with_replacement_keeps_the_invariants_of_the_release(case):
    arrays = golden_arrays("classification_sampler")
    labels, theirs = arrays[f"{case['case']}__targets"], arrays[f"{case['case']}__batches"]
    settings = {key: case[key] for key in ("batch_size", "images_per_class")}
    sampler = BalancedWithReplacement(labels, **settings)
    plan = sampler.plan(np.random.default_rng(case["seed"]))
    assert sampler.batch_size == case["effective_batch"]
    assert len(plan.batches) == case["num_batches"] == len(theirs)
    for batch in [*plan.batches, *theirs]:
        classes = labels[batch].reshape(case["classes_per_batch"], case["images_per_class"])
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0])) == case["classes_per_batch"]
    assert (plan.num_duplicates > 0) == case["has_duplicates_in_some_batch"]


def test_balanced_with_replacement_draws_evenly_from_every_class_however_large():
    counts = np.array([39, 2, 6, 6, 20, 3, 9, 15])
    labels, generator = labels_of(*counts), np.random.default_rng(5)
    sampler = BalancedWithReplacement(labels, batch_size=15, images_per_class=5)
    plans = [sampler.plan(generator) for _ in range(600)]
    batches = [batch for plan in plans for batch in plan.batches]
    assert len(plans[0].batches) == 100 // 15
    sets = Counter(tuple(sorted(set(labels[batch].tolist()))) for batch in batches)
    assert_as_likely([sets[chosen] for chosen in itertools.combinations(range(8), 3)], len(batches) / 56)
    shown = np.bincount(np.concatenate(batches), minlength=100)
    assert_as_likely(shown, np.bincount(labels[np.concatenate(batches)])[labels] / counts[labels])
    # n images drawn 5 times leave n (1 - (1 - 1/n)^5) different ones, also where there would have been enough
    different = [len(set(group)) for batch in batches for group in batch.reshape(3, 5) if labels[group[0]] == 3]
    assert np.mean(different) == pytest.approx(6 * (1 - (5 / 6) ** 5), abs=0.06)


def assert_each_class_once(stream: np.ndarray, labels: np.ndarray, per_class: int) -> None:
    groups = stream.reshape(-1, per_class)
    assert (labels[groups] == labels[groups[:, :1]]).all()
    assert len(set(labels[groups[:, 0]])) == len(groups)
    for group in groups:
        if (labels == labels[group[0]]).sum() >= per_class:
            assert len(set(group)) == per_class


@pytest.mark.parametrize("case", golden_cases("deep_metric_sampler", lambda case: case["case"].startswith("fast")))
def test_random_identity_keeps_the_invariants_of_the_release(case):
    arrays = golden_arrays("deep_metric_sampler")
    labels, theirs = arrays[f"{case['case']}__labels"], arrays[f"{case['case']}__stream"]
    settings = {"batch_size": case["batch_size"], "images_per_class": case["num_instances"]}
    for drop_last in (True, False):
        sampler = RandomIdentity(labels, **settings, drop_last=drop_last)
        plan = sampler.plan(np.random.default_rng(0))
        ours = np.concatenate(plan.batches)
        num_shown = case["batches_per_epoch"] * case["batch_size"] if drop_last else case["epoch_indices"]
        assert len(ours) == num_shown
        assert len(plan.batches) == -(-num_shown // case["batch_size"])
        for stream in (ours, theirs):
            assert_each_class_once(stream, labels, case["num_instances"])


def test_random_identity_draws_classes_and_images_evenly():
    counts = [5, 3, 4, 2, 10, 6]
    labels, generator = labels_of(*counts), np.random.default_rng(6)
    sampler = RandomIdentity(labels, batch_size=8, images_per_class=4)
    assert sampler.batches_per_epoch == 3
    places, sets, repeated = np.zeros((6, 6)), Counter(), Counter()
    for _ in range(3000):
        groups = np.concatenate(sampler.plan(generator).batches).reshape(6, 4)
        places[np.arange(6), labels[groups[:, 0]]] += 1
        for group in groups:
            sets[labels[group[0]], tuple(sorted(set(group.tolist())))] += 1
            repeated[labels[group[0]], len(set(group.tolist()))] += 1
    assert_as_likely(places, 500)
    assert_as_likely([number for (label, _), number in sets.items() if label == 0], 600)  # 5 sets of 4 in 5
    assert_as_likely([number for (label, _), number in sets.items() if label == 5], 200)
    # 4 draws with replacement from 3: one image with 3/81, two with 42/81, three with 36/81
    assert_as_likely([repeated[1, number] for number in (1, 2, 3)], 3000 * np.array([3, 42, 36]) / 81)


def num_rebuilds(batches: list[np.ndarray], labels: np.ndarray, per_class: int) -> int:
    """Follows the rule batch by batch with plain sets; fails where it is broken. How often all was cut anew."""
    images = {label: set(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels).tolist()}
    chunks = {label: max(len(members) // per_class, 1) for label, members in images.items()}
    per_batch = len(batches[0]) // per_class
    left, shown, rebuilds = dict(chunks), set(), 0
    for batch in batches:
        if sum(number > 0 for number in left.values()) < per_batch:
            left, shown, rebuilds = dict(chunks), set(), rebuilds + 1
        groups = batch.reshape(per_batch, per_class).tolist()
        assert len({labels[group[0]] for group in groups}) == per_batch
        for group in groups:
            label = labels[group[0]]
            left[label] -= 1
            assert left[label] >= 0
            assert set(group) <= images[label]
            assert len(set(group)) == min(per_class, len(images[label]))  # a small class shows all it has
            assert not shown & set(group)
            shown |= set(group)
    return rebuilds


@pytest.mark.parametrize("case", golden_cases("deep_metric_sampler", lambda case: case["case"].startswith("ms")))
def test_identity_chunks_keeps_the_invariants_of_the_release(case):
    arrays = golden_arrays("deep_metric_sampler")
    labels, theirs = arrays[f"{case['case']}__labels"], arrays[f"{case['case']}__batches"]
    settings = {"batch_size": case["batch_size"], "images_per_class": case["num_instances"]}
    sampler = IdentityChunks(labels, **settings, batches_per_epoch=case["max_iters"])
    ours = sampler.plan(np.random.default_rng(0)).batches
    assert np.shape(ours) == theirs.shape
    for batches in (ours, list(theirs)):
        assert num_rebuilds(batches, labels, case["num_instances"]) > 1


@pytest.mark.parametrize("batches_per_epoch", [1, 3, 50, None])
def test_identity_chunks_go_on_from_epoch_to_epoch(batches_per_epoch):
    labels, generator = labels_of(*range(2, 20)), np.random.default_rng(7)
    sampler = IdentityChunks(labels, batch_size=17, images_per_class=4, batches_per_epoch=batches_per_epoch)
    assert (sampler.batch_size, sampler.batches_per_epoch) == (16, batches_per_epoch or -(-189 // 16))
    batches = []
    while len(batches) < 200:
        batches += sampler.plan(generator).batches
    assert num_rebuilds(batches, labels, 4) > 10


def test_identity_chunks_draw_classes_and_images_evenly():
    labels, generator = labels_of(7, 7, 7, 7, 7, 2), np.random.default_rng(8)
    sampler = IdentityChunks(labels, batch_size=6, images_per_class=3, batches_per_epoch=1)
    fresh, images, repeated = Counter(), Counter(), Counter()
    for _ in range(3000):
        sampler.load_state_dict(IdentityChunks(labels, batch_size=6, images_per_class=3).state_dict())
        (batch,) = sampler.plan(generator).batches
        fresh[tuple(sorted(set(labels[batch].tolist())))] += 1
        for group in batch.reshape(2, 3):
            if labels[group[0]] == 0:
                images[tuple(sorted(group.tolist()))] += 1
            elif labels[group[0]] == 5:
                repeated[Counter(group.tolist()).most_common(1)[0][0]] += 1
    assert_as_likely([fresh[pair] for pair in itertools.combinations(range(6), 2)], 200)
    assert len(images) == 35
    assert_as_likely(list(images.values()), sum(images.values()) / 35)
    assert_as_likely(list(repeated.values()), sum(repeated.values()) / 2)


def test_identity_chunks_top_up_small_classes_by_independent_draws():
    labels, most = np.repeat([0, 1], 2), Counter()
    sampler = IdentityChunks(labels, batch_size=10, images_per_class=5, batches_per_epoch=1500)
    for batch in sampler.plan(np.random.default_rng(11)).batches:
        for group in batch.reshape(2, 5).tolist():
            most[max(Counter(group).values())] += 1
    assert_as_likely([most[4], most[3]], [750, 2250])  # both once and three draws more, all alike with 2/8


def test_identity_chunks_choose_among_the_classes_that_have_chunks_left():
    # Three classes with 3, 1 and 1 chunks, one a batch of two. By hand: the first pair is {0,1}, {0,2} or {1,2} with
    # 1/3 each; after {1,2} only class 0 is left, and all is cut anew; otherwise 0 and the other one follow for sure.
    labels, seconds = np.repeat([0, 1, 2], [3, 1, 1]), Counter()
    for seed in range(3000):
        sampler = IdentityChunks(labels, batch_size=2, images_per_class=1, batches_per_epoch=2)
        first, second = (
            tuple(sorted(labels[batch].tolist())) for batch in sampler.plan(np.random.default_rng(seed)).batches
        )
        seconds[first, second] += 1
    assert_as_likely([seconds[(0, 1), (0, 2)], seconds[(0, 2), (0, 1)]], 1000)
    assert_as_likely([seconds[(1, 2), pair] for pair in ((0, 1), (0, 2), (1, 2))], 1000 / 3)
    assert sum(seconds.values()) == 3000
    assert len(seconds) == 5


def test_random_classes_keep_the_invariants_of_the_release():
    arrays, facts = golden("mdr_batches")
    labels, settings = arrays["labels"], facts["hyperparameters"]
    per_class = settings["images_per_class"]
    sampler = RandomClasses(labels, batch_size=16, images_per_class=per_class, batches_per_epoch=8)
    ours = sampler.plan(np.random.default_rng(0)).batches
    theirs = [batch[:length] for batch, length in zip(arrays["batches"], arrays["lengths"], strict=True)]
    for batches in (ours, theirs):
        assert len(batches) == settings["iter_per_epoch"]
        for batch in batches:
            assert len(batch) == settings["batch_size"] == len(set(batch.tolist()))
            runs = [(label, len(list(run))) for label, run in itertools.groupby(labels[batch].tolist())]
            assert len({label for label, _ in runs}) == len(runs)
            for label, length in runs[:-1]:
                assert length == min(per_class, (labels == label).sum())
            assert runs[-1][1] <= min(per_class, (labels == runs[-1][0]).sum())


def test_random_classes_are_independent_draws_of_classes_and_images():
    labels, generator = labels_of(4, 4, 4, 4, 1), np.random.default_rng(9)
    sampler = RandomClasses(labels, batch_size=8, images_per_class=3, batches_per_epoch=4000)
    plan = sampler.plan(generator)
    orders, cut, pairs = Counter(), Counter(), Counter()
    for batch in plan.batches:
        runs = tuple(label for label, _ in itertools.groupby(labels[batch].tolist()))
        orders[runs[:2]] += 1
        if 4 not in runs:  # three of two classes, two of the third
            cut[tuple(sorted(batch[6:].tolist()))] += 1
        if runs[0] == 2:
            pairs[tuple(sorted(batch[:3].tolist()))] += 1
    assert_as_likely([orders[pair] for pair in itertools.permutations(range(5), 2)], 200)
    assert len(cut) == 24  # 4 classes x 6 pairs
    assert_as_likely(list(cut.values()), sum(cut.values()) / 24)
    assert_as_likely(list(pairs.values()), sum(pairs.values()) / 4)
    assert plan.num_duplicates == 0


@pytest.mark.parametrize("settings", golden_cases("mic_batch_construction", lambda case: case["case"].startswith("m")))
def test_the_rule_of_class_groups_is_that_of_the_release_number_by_number(settings):
    arrays, case, per_group = golden_arrays("mic_batch_construction"), settings["case"], settings["samples_per_class"]
    given = arrays[f"{case}_idx"]
    index = ClassIndex(np.repeat(np.arange(len(arrays[f"{case}_class_sizes"])), arrays[f"{case}_class_sizes"]))
    groups = group_classes(given[::per_group], len(index), before=int(arrays[f"{case}_init_class"]))
    classes = np.repeat(groups, per_group)[: len(given)]
    assert classes.tolist() == arrays[f"{case}_out_class"].tolist()
    images = index.images(classes, given[:, None])[:, 0]
    assert (images - index.starts[classes]).tolist() == arrays[f"{case}_out_within_class"].tolist()


def test_the_class_of_a_group_by_hand():
    # 5 classes. 7 mod 5 = 2; of 0 1 3 4 number 6 mod 4 = 2 is 3; of 0 1 4 number 2 is 4; of 0 1 2 number 5 mod 3 = 2.
    assert group_classes(np.array([7, 6, 2, 5]), 5).tolist() == [2, 3, 4, 2]
    # With 0 in place of the groups before: of 1 2 3 4 number 2 is 3; of 1 2 4 (without 0 and 3) number 1 is 2.
    assert group_classes(np.array([7, 6, 1]), 5, before=0).tolist() == [2, 3, 2]


def test_class_groups_are_of_other_classes_than_the_two_before_and_evenly_so():
    counts = np.array([2, 2, 3, 12, 29])
    labels, generator = labels_of(*counts), np.random.default_rng(10)
    sampler = ClassGroups(labels, batch_size=12, images_per_class=3)
    assert sampler.batches_per_epoch == 4
    following, shown, first = np.zeros((5, 5, 5)), np.zeros(48), np.zeros(5)
    for _ in range(1500):
        images = np.concatenate(sampler.plan(generator).batches)
        groups = labels[images].reshape(16, 3)
        assert (groups == groups[:, :1]).all()
        classes = groups[:, 0]
        first[classes[0]] += 1
        assert classes[0] != classes[1]
        np.add.at(following, (classes[:-2], classes[1:-1], classes[2:]), 1)
        shown += np.bincount(images, minlength=48)
    assert_as_likely(first, 300)
    for older, newer in itertools.permutations(range(5), 2):
        others = [label for label in range(5) if label not in (older, newer)]
        seen = following[older, newer]
        assert seen[[older, newer]].sum() == 0
        assert_as_likely(seen[others], seen.sum() / 3)
    for label, count in enumerate(counts):
        of_class = shown[labels == label]
        assert_as_likely(of_class, of_class.sum() / count)


UNEVEN = (4, 4, 2, 2, 1)


@pytest.mark.parametrize(
    ("sampler", "counts", "batch_size", "images_per_class", "message"),
    [
        (BalancedWithReplacement, [30] * 4, 25, 5, "= 25 of 5 images a class needs 5 .* only 4 .* at most 20"),
        (BalancedWithReplacement, [30] * 4, 9, 5, "batch_size = 9 holds fewer than two .* at least 10"),
        (BalancedWithReplacement, [30] * 4, 160, 40, "160, but there are only 120 training images; give at most 120"),
        (RandomIdentity, [30] * 7, 22, 5, "batch_size = 22 is no multiple of .*images_per_class = 5; .* 20 or 25"),
        (RandomIdentity, [30] * 7, 40, 5, "needs 8 classes a batch, but there are only 7 .* at most 35"),
        (IdentityChunks, [30] * 7, 44, 5, "needs 8 classes a batch, but there are only 7 .* at most 35"),
        (RandomClasses, UNEVEN, 12, 3, "= 12, but 5 training classes .* up to 3 .* only 11; .* at most 11"),
        (ClassGroups, [50] * 2, 12, 4, "takes 3 classes, and there are 2 .* take the sampler class_balanced"),
        (ClassGroups, [50] * 3, 14, 4, "batch_size = 14 is no multiple of .*images_per_class = 4; .* 12 or 16"),
        (ClassGroups, [3] * 3, 12, 4, "only 9 training images; give at most 9"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(sampler, counts, batch_size, images_per_class, message):
    with pytest.raises(DataError, match=message):
        sampler(labels_of(*counts), batch_size=batch_size, images_per_class=images_per_class)


@pytest.mark.parametrize(
    ("sampler", "size"),
    [
        (partial(RandomIdentity, labels_of(*[30] * 7), batch_size=40, images_per_class=5, drop_last=False), 35),
        (partial(RandomClasses, labels_of(*UNEVEN), batch_size=11, images_per_class=3, batches_per_epoch=1), 11),
    ],
)
def test_the_largest_batch_has_every_image_once(sampler, size):
    (batch,) = sampler().plan(np.random.default_rng(0)).batches
    assert len(batch) == len(set(batch.tolist())) == size


LONE = 34
OF_GROUPS = {
    ClassBalanced: {"classes_per_batch": 8, "images_per_class": 4},
    RandomIdentity: {"batch_size": 32, "images_per_class": 4},
    IdentityChunks: {"batch_size": 32, "images_per_class": 4},
    BalancedWithReplacement: {"batch_size": 32, "images_per_class": 4},
    ClassGroups: {"batch_size": 32, "images_per_class": 4},
}


@pytest.mark.parametrize("of", OF_GROUPS)
def test_images_without_another_of_their_class_are_negatives_and_no_positives_of_themselves(of):
    # Two classes of one image between others, 6 classes of 8 images.
    labels, generator = labels_of(*[1, 8, 1] * 6, *[1] * (LONE - 12)), np.random.default_rng(3)
    is_lone = np.bincount(labels)[labels] == 1
    sampler, shown, groups_with_positives, num_groups = of(labels, **OF_GROUPS[of]), set(), 0, 0
    for _ in range(40):
        plan = sampler.plan(generator)
        assert len(plan.batches) == sampler.batches_per_epoch
        for batch in plan.batches:
            assert len(batch) == 32
            lone = batch[is_lone[batch]]
            shown |= set(lone.tolist())
            if of is not ClassGroups:  # a group may come again there
                assert len(set(lone)) == len(lone)
            for group in batch.reshape(8, 4):
                num_groups += 1
                assert len({*is_lone[group]}) == 1
                if is_lone[group[0]]:
                    assert len(set(labels[group])) == 4
                else:
                    assert len(set(labels[group])) == 1
                    groups_with_positives += 1
    assert len(shown) == LONE
    # There are 6 classes and 6 groups; these have one chunk in a round, and the classes two.
    low, high = (0.55, 0.67) if of is IdentityChunks else (0.45, 0.55)
    assert low < groups_with_positives / num_groups < high


@pytest.mark.parametrize("of", [ClassBalanced, IdentityChunks])
def test_groups_of_classes_with_one_image_resume_exactly(of):
    labels = labels_of(*[8] * 6, *[1] * LONE)
    plans, generator = [], np.random.default_rng(3)
    sampler = of(labels, **OF_GROUPS[of])
    for _ in range(2):
        sampler.plan(generator)
    other, state = of(labels, **OF_GROUPS[of]), generator.bit_generator.state
    other.load_state_dict(sampler.state_dict())
    for one in (sampler, other):
        generator.bit_generator.state = state
        plans.append([batch.tolist() for _ in range(2) for batch in one.plan(generator).batches])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("counts", "per_class", "num_needed", "sizes", "most"),
    [
        ([3, 2, 5], 4, 8, [3, 2, 5], 3),  # none has one image
        ([1, 1, 1, 1], 2, 2, [1, 1, 1, 1], 4),  # every class has one
        ([3, 1, 2, 1], 1, 2, [3, 1, 2, 1], 4),  # groups of one image have no pairs
        ([3, 1, 2, 1], 2, 2, [3, 2, 2], 3),
        ([3, 1, 2, 1], 3, 2, [3, 2], 2),  # too few for a group
        ([2] + [1] * 9, 2, 2, [2, 9], 5),  # as many groups as other classes
        ([2] + [1] * 9, 2, 4, [2, 3, 3, 3], 5),  # or as a batch needs
        ([2] + [1] * 9, 2, 9, [2, 3, 2, 2, 2], 5),  # or as there can be
    ],
)
def test_the_groups_of_classes_with_one_image_by_hand(counts, per_class, num_needed, sizes, most, caplog):
    labels = 3 + 2 * labels_of(*counts)
    index = index_for_groups(labels, per_class, num_needed)
    assert index.counts.tolist() == sizes
    assert most_groups(labels, per_class) == most
    assert index.num_images == len(labels)
    plain = ClassIndex(labels)
    if sizes == counts:
        assert index.num_shared == 0
        assert np.array_equal(index.order, plain.order)
    kept = set(range(len(labels)))
    if sum(sizes) < sum(counts):
        kept = set(np.flatnonzero(np.bincount(labels)[labels] > 1).tolist())
        assert "2 of 4 training classes have one image, too few for a group of 3" in caplog.text
    assert set(index.order.tolist()) == kept
