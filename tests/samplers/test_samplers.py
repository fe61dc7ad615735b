"""Class-balanced and uniform batches against their rules; what holds for every sampler is in test_contract."""

import numpy as np
import pytest

from raydml.samplers.class_balanced import ClassBalanced
from raydml.samplers.uniform import Uniform
from tests.samplers.draws import labels_of

SHAPES = [
    # class sizes, P, K
    *(([180] * 5, 5, 8), ([60] * 100, 28, 4), ([2] * 50, 7, 4), (list(range(2, 42)), 9, 4), ([1000, 2, 3], 2, 4)),
    *(([5, 5, 5, 5], 3, 5), ([4] * 10, 10, 1)),
]


@pytest.mark.parametrize(("counts", "per_batch", "per_class"), SHAPES)
def test_batches_are_p_classes_of_k_images_and_every_class_and_image_has_its_turn(counts, per_batch, per_class):
    labels = labels_of(*counts)
    sampler = ClassBalanced(labels, classes_per_batch=per_batch, images_per_class=per_class)
    generator = np.random.default_rng(1)
    expected = max(-(-len(labels) // (per_batch * per_class)), -(-len(counts) // per_batch))
    string: list[int] | np.ndarray = []
    for _ in range(8):
        plan = sampler.plan(generator)
        assert len(plan.batches) == expected == sampler.batches_per_epoch
        duplicates = 0
        for batch in plan.batches:
            assert batch.dtype == np.int64
            assert batch.shape == (per_batch * per_class,) == (sampler.batch_size,)
            of_class = labels[batch].reshape(per_batch, per_class)
            assert (of_class == of_class[:, :1]).all()
            assert len(set(of_class[:, 0])) == per_batch
            for group in batch.reshape(per_batch, per_class):
                size = counts[labels[group[0]]]
                assert len(set(group)) == min(size, per_class)  # repetition only where there is no other way
                assert np.ptp(np.unique(group, return_counts=True)[1]) <= 1  # and then as evenly as can be
            duplicates += len(batch) - len(set(batch))
        assert plan.num_duplicates == duplicates
        shown = np.concatenate(plan.batches)
        assert plan.coverage == pytest.approx(len(set(shown)) / len(labels))
        assert set(labels[shown]) == set(labels)
        visits = np.bincount(labels[shown]) / per_class
        assert np.ptp(visits) <= 1
        string += shown.tolist()
    string = np.array(string)
    for label, count in enumerate(counts):  # all images of a class before one of them again
        if count >= per_class:
            of_label = string[labels[string] == label]
            for start in range(0, len(of_label), count):
                once = of_label[start : start + count]
                assert len(set(once)) == len(once)


def test_all_images_are_shown_within_the_promised_visits():
    labels = labels_of(*range(2, 42))
    sampler = ClassBalanced(labels, classes_per_batch=8, images_per_class=4, batches_per_epoch=5)
    generator = np.random.default_rng(3)
    # each epoch of 5 x 8 visits is one visit of each of the 40 classes; the largest needs ceil(41 / 4) = 11
    shown = set(np.concatenate([batch for _ in range(11) for batch in sampler.plan(generator).batches]).tolist())
    assert shown == set(range(len(labels)))


def test_images_and_classes_are_drawn_evenly():
    labels = labels_of(*[10] * 12)
    sampler = ClassBalanced(labels, classes_per_batch=5, images_per_class=4)
    generator = np.random.default_rng(4)
    together = np.zeros((12, 12))
    pairs = np.zeros((120, 120))
    for _ in range(400):
        for batch in sampler.plan(generator).batches:
            classes = np.unique(labels[batch])
            together[np.ix_(classes, classes)] += 1
            for group in batch.reshape(5, 4):
                pairs[np.ix_(group, group)] += 1
    met = together[~np.eye(12, dtype=bool)]
    assert met.std() < 1.2 * np.sqrt(met.mean())  # independent draws would scatter like that (Poisson)
    shown = pairs[(labels[:, None] == labels) & ~np.eye(120, dtype=bool)]
    assert shown.std() < 1.2 * np.sqrt(shown.mean())


@pytest.mark.parametrize("other", [labels_of(9, 9, 8), labels_of(9, 9), labels_of(9, 9, 9, seed=1)])
def test_a_state_of_other_images_is_refused(other):
    state = ClassBalanced(labels_of(9, 9, 9), classes_per_batch=2).state_dict()
    with pytest.raises(ValueError, match="other images"):
        ClassBalanced(other, classes_per_batch=2).load_state_dict(state)


def test_too_few_classes_or_batches_are_refused_by_name():
    labels = labels_of(*[4] * 10)
    with pytest.raises(ValueError, match=r"classes_per_batch = 11, but there are only 10 .* at most 10"):
        ClassBalanced(labels, classes_per_batch=11)
    with pytest.raises(ValueError, match=r"batches_per_epoch = 3 cannot show all 10 classes.* at least 4"):
        ClassBalanced(labels, classes_per_batch=3, batches_per_epoch=3)
    enough = ClassBalanced(labels, classes_per_batch=3, batches_per_epoch=4)
    assert len(enough.plan(np.random.default_rng()).batches) == 4


def test_uniform_shows_each_image_at_most_once_and_drops_the_rest():
    sampler, generator = Uniform(np.zeros(100), batch_size=32), np.random.default_rng(0)
    plans = [sampler.plan(generator) for _ in range(20)]
    for plan in plans:
        assert [len(batch) for batch in plan.batches] == [32, 32, 32]
        assert len(set(np.concatenate(plan.batches))) == 96
        assert (plan.coverage, plan.num_duplicates) == (pytest.approx(0.96), 0)
    assert len(set(np.concatenate([batch for plan in plans for batch in plan.batches]))) == 100
    assert not np.array_equal(plans[0].batches, plans[1].batches)


def test_uniform_refusals():
    with pytest.raises(ValueError, match=r"sampler.batch_size = 32, but there are only 31 training images"):
        Uniform(np.zeros(31), batch_size=32)
    sampler = Uniform(np.zeros(100))
    assert sampler.state_dict() == {}
    sampler.load_state_dict({})
    with pytest.raises(ValueError, match="another sampler"):
        sampler.load_state_dict({"order": [], "cursor": []})


def test_a_set_of_the_size_of_stanford_online_products_is_planned():
    generator = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(11_318), 2), generator.integers(0, 11_318, 59_551 - 2 * 11_318)])
    plan = ClassBalanced(labels, classes_per_batch=28, images_per_class=4).plan(generator)
    assert len(plan.batches) == 532  # ceil(59551 / 112)
    assert len(np.unique(labels[np.concatenate(plan.batches)])) == 11_318
