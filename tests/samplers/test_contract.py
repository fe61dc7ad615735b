"""The contract of every sampler on disk, whatever its rule."""

import inspect
import io
import json
import tracemalloc

import numpy as np
import pytest
import torch

from raydml import registry
from raydml.data.catalog import DataError
from raydml.errors import ConfigError
from raydml.samplers._base import EpochPlan, make_plan
from raydml.samplers._cluster import ClusterGroups, ClusterRoundRobin
from tests.samplers.small_settings import small_settings

SAMPLERS = {name: registry.load("samplers", name) for name in registry.names("samplers")}
# Not plugins: no trial can name them, a method that clusters builds the one it needs.
CLUSTER_SAMPLERS = {"cluster_groups": ClusterGroups, "cluster_round_robin": ClusterRoundRobin}
EVERY = {**SAMPLERS, **CLUSTER_SAMPLERS}
NUM_CLASSES = 17

# Every sampler with settings for few images, and others where a setting changes what a plan looks like.
CASES = [
    *((name, small_settings(name)) for name in SAMPLERS),
    ("class_balanced", {"classes_per_batch": 3, "images_per_class": 4}),
    ("balanced_with_replacement", {"batch_size": 14, "images_per_class": 4}),
    ("random_identity", {"batch_size": 12, "images_per_class": 4, "drop_last": False}),
    ("identity_chunks", {"batch_size": 14, "images_per_class": 4}),
    ("identity_chunks", {"batch_size": 12, "images_per_class": 1, "batches_per_epoch": 40}),
    ("class_groups", {"batch_size": 12, "images_per_class": 3}),
    ("random_classes", {"batch_size": 14, "images_per_class": 3, "batches_per_epoch": 9}),
    ("cluster_groups", {"batch_size": 12, "images_per_cluster": 4, "random_cluster_probability": 0.3}),
    ("cluster_round_robin", {"batch_size": 12, "images_per_class": 4}),
]
IDS = [name + "".join(f"-{value}" for value in settings.values()) for name, settings in CASES]
EVERY_CASE = pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)


def labels_and_clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mixed classes of 1 to 17 images whose numbers have gaps; clusters 3, 4, 5, 9 and images that are in none."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(7 + 13 * np.arange(NUM_CLASSES) ** 2, np.arange(1, NUM_CLASSES + 1)))
    return labels, generator.choice([-1, 3, 4, 5, 9], size=len(labels))


def built(name: str, settings: dict, labels: np.ndarray, clusters: np.ndarray):
    sampler = EVERY[name](labels, **settings)
    if name in CLUSTER_SAMPLERS:
        sampler.assign(clusters)
    return sampler


def assert_same(got: EpochPlan, expected: EpochPlan) -> None:
    assert got[1:3] == expected[1:3]
    for name in ("batches", "learners", "flip", "targets"):
        one, other = getattr(got, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert len(one) == len(other), name
            assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True)), name


@pytest.mark.parametrize("name", SAMPLERS)
def test_settings_describe_themselves_and_keep_to_their_limits(name):
    model = registry.settings_model("samplers", name)
    assert next(iter(inspect.signature(SAMPLERS[name]).parameters)) == "labels"
    assert "batch_size" in model.model_fields or {"classes_per_batch", "images_per_class"} <= set(model.model_fields)
    assert 20 <= len(registry.describe("samplers", name)) <= 100
    for key, field in model.model_fields.items():
        assert len(field.description or "") > 10, key
        if field.annotation is not bool:
            with pytest.raises(ConfigError, match=rf"{key} = 0: must be >= \d"):
                registry.checked_settings("samplers", name, {key: 0})


def can_be_built(name, settings, labels) -> bool:
    try:
        SAMPLERS[name](labels, **settings)
    except DataError:
        return False
    return True


@pytest.mark.parametrize("name", SAMPLERS)
def test_upper_limits_are_cut_to_the_images_and_what_fits_is_kept(name):
    fields = registry.settings_model("samplers", name).model_fields
    generator = np.random.default_rng(0)
    num_cut = num_kept = 0
    for _ in range(100):
        counts = generator.integers(2, generator.integers(3, 30), size=generator.integers(3, 20))
        counts = np.append(counts, np.ones(max(0, generator.integers(-20, 20)), dtype=int))
        labels = np.repeat(np.arange(len(counts)), counts)
        per_class = int(generator.integers(2, 9))
        given = {"images_per_class": per_class, "classes_per_batch": int(generator.integers(2, 20))}
        given |= {"batch_size": per_class * int(generator.integers(2, 20))}
        given = {key: value for key, value in given.items() if key in fields}
        settings = registry.checked_settings("samplers", name, given)
        cut = SAMPLERS[name].cut_to(labels, **settings)
        assert can_be_built(name, cut, labels), (settings, counts)
        assert all(2 <= cut[key] <= given[key] for key in given), (settings, cut)
        assert SAMPLERS[name].cut_to(labels, **cut) == cut
        fits = can_be_built(name, settings, labels)
        num_cut, num_kept = num_cut + (not fits), num_kept + fits
        assert (cut == settings) == fits, (settings, cut, counts)
    assert num_cut > 5
    assert num_kept > 5


@EVERY_CASE
def test_a_plan_has_the_promised_shape_and_numbers(name, settings):
    labels, clusters = labels_and_clusters()
    sampler, generator = built(name, settings, labels, clusters), np.random.default_rng(1)
    for _ in range(5):
        plan = sampler.plan(generator)
        assert len(plan.batches) == sampler.batches_per_epoch > 0
        for batch in plan.batches[:-1]:
            assert len(batch) == sampler.batch_size
        assert len(plan.batches[-1]) == sampler.batch_size or settings.get("drop_last") is False
        shown, duplicates = set(), 0
        for batch in plan.batches:
            assert (batch.dtype, batch.ndim) == (np.int64, 1)
            assert 0 <= batch.min() <= batch.max() < len(labels)
            seen = set(batch.tolist())
            duplicates += len(batch) - len(seen)
            shown |= seen
        assert (plan.num_duplicates, plan.coverage) == (duplicates, len(shown) / len(labels))
        assert (type(plan.num_duplicates), type(plan.coverage)) == (int, float)


@EVERY_CASE
def test_only_the_generator_decides_and_only_the_order_of_the_labels_counts(name, settings):
    labels, clusters = labels_and_clusters()
    ranks = np.unique(labels, return_inverse=True)[1]
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 - no sampler may touch it
    one, other, renumbered = (built(name, settings, given, clusters) for given in (labels, labels.copy(), ranks))
    generators = [np.random.default_rng(7) for _ in range(3)]
    previous = None
    for _ in range(3):
        plan = one.plan(generators[0])
        assert_same(other.plan(generators[1]), plan)
        assert_same(renumbered.plan(generators[2]), plan)
        assert previous is None or not np.array_equal(previous, np.concatenate(plan.batches))
        previous = np.concatenate(plan.batches)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@EVERY_CASE
def test_half_an_epoch_then_a_resume_goes_on_as_if_nothing_had_happened(name, settings):
    labels, clusters = labels_and_clusters()
    sampler, generator = built(name, settings, labels, clusters), np.random.default_rng(2)
    sampler.plan(generator)
    plan = sampler.plan(generator)
    position = len(plan.batches) // 2
    # A checkpoint as a trainer writes it: tensors for arrays, and no pickled classes.
    saved = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in plan.to_dict().items()}
    file = io.BytesIO()
    torch.save({"plan": saved, "sampler": sampler.state_dict(), "generator": generator.bit_generator.state}, file)
    expected = [sampler.plan(generator) for _ in range(3)]
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    restored, again = EVERY[name](labels, **settings), np.random.default_rng(0)
    restored.load_state_dict(checkpoint["sampler"])
    again.bit_generator.state = checkpoint["generator"]
    rest = EpochPlan.from_dict(checkpoint["plan"])
    assert_same(rest, plan)
    assert all(np.array_equal(a, b) for a, b in zip(rest.batches[position:], plan.batches[position:], strict=True))
    for following in expected:
        assert_same(restored.plan(again), following)


@EVERY_CASE
def test_a_state_is_plain_and_stays_as_it_was(name, settings):
    labels, clusters = labels_and_clusters()
    sampler, generator = built(name, settings, labels, clusters), np.random.default_rng(3)
    sampler.plan(generator)
    state = sampler.state_dict()
    before = json.dumps(state)
    sampler.plan(generator)
    assert json.dumps(state) == before
    restored = EVERY[name](labels, **settings)
    restored.load_state_dict(state)
    restored.plan(generator)
    assert json.dumps(state) == before


@EVERY_CASE
def test_a_state_of_another_sampler_or_of_other_images_is_refused(name, settings):
    labels, clusters = labels_and_clusters()
    sampler = built(name, settings, labels, clusters)
    with pytest.raises(DataError, match=r"another sampler.*resume with the sampler"):
        EVERY[name](labels, **settings).load_state_dict({"position": 3})
    state = sampler.state_dict()
    if state:
        longer = np.append(labels, labels[0])
        with pytest.raises(DataError, match=r"other images|each of the 154"):
            EVERY[name](longer, **settings).load_state_dict(state)
    if "order" in state:
        damaged = {**state, "order": [state["order"][0], *state["order"][:-1]]}
        with pytest.raises(DataError, match="other images"):
            sampler.load_state_dict(damaged)
        for wrong in (-1, 10**6):
            with pytest.raises(DataError, match="other images"):
                sampler.load_state_dict({**state, "cursor": [wrong, *state["cursor"][1:]]})


@EVERY_CASE
@pytest.mark.parametrize("counts", [[1, 1], [2], [200], [1]], ids=["two images", "pair", "one class", "one image"])
def test_too_little_data_is_refused_with_a_cure(name, settings, counts):
    labels = np.repeat(np.arange(len(counts)) * 5, counts)
    if settings == {"batch_size": 12} and counts == [200]:  # it does not look at the classes
        assert built(name, settings, labels, labels).batches_per_epoch == 16
        return
    if settings.get("drop_last") is False and counts == [1, 1]:
        assert len(built(name, settings, labels, labels).plan(np.random.default_rng(0)).batches) == 1  # 2 x 4, repeated
        return
    with pytest.raises(DataError, match=r"give|take|choose"):
        built(name, settings, labels, labels)


BY_CLASS = [name for name, sampler in EVERY.items() if "images_per_class" in inspect.signature(sampler).parameters]


@pytest.mark.parametrize("name", BY_CLASS)
def test_labels_must_be_whole_numbers(name):
    for labels in (np.zeros((10, 2), dtype=int), np.arange(400) / 2, np.zeros(0, dtype=int)):
        with pytest.raises(DataError, match=r"labels of shape|no training image"):
            EVERY[name](labels)


@pytest.fixture(scope="module")
def online_products() -> np.ndarray:
    """Labels of 59,551 images in 11,318 mixed classes of 2 to 12, as Stanford Online Products has for training."""
    generator = np.random.default_rng(0)
    counts = np.full(11_318, 2)
    while missing := 59_551 - counts.sum():
        smaller = np.flatnonzero(counts < 12)
        counts[generator.choice(smaller, min(missing, 4_000), replace=False)] += 1
    return generator.permutation(np.repeat(np.arange(11_318), counts))


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_takes_memory_in_proportion_to_the_images(name, online_products):
    num_images, generator = len(online_products), np.random.default_rng(4)
    clusters = generator.integers(8, size=num_images)
    sampler = built(name, {}, online_products, clusters)
    sampler.plan(generator)
    tracemalloc.start()
    try:
        plan = sampler.plan(generator)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(map(len, plan.batches)) > 10_000
    assert peak_bytes < 150 * num_images


def test_coverage_and_duplicates_by_hand():
    plan = make_plan([np.array([0, 1, 1, 1]), np.array([1, 4])], 10)
    assert plan.num_duplicates == 2  # the same image in another batch is no duplicate
    assert plan.coverage == 0.3
    assert (plan.learners, plan.targets, plan.flip) == (None, None, None)


def test_a_plan_survives_lists_and_is_a_copy():
    targets = [np.array([5, 6, 7]), np.array([8])]
    learners, flip = np.array([4, 2]), np.array([True, False])
    plan = make_plan([np.array([0, 1, 2]), np.array([3])], 8, learners=learners, targets=targets, flip=flip)
    plain = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in plan.to_dict().items()}
    state = json.loads(json.dumps(plain))
    assert_same(EpochPlan.from_dict(state), plan)
    kept = plan.to_dict()
    read = EpochPlan.from_dict(kept)
    assert read.flip.dtype == bool
    read.batches[0][0] = read.learners[0] = 99
    assert (kept["images"][0], kept["learners"][0]) == (0, 4)
    assert (plan.batches[0][0], plan.learners[0]) == (0, 4)


@pytest.mark.parametrize(
    "damage",
    [
        *({"batch_sizes": [3, 2]}, {"batch_sizes": [4, 0]}, {"learners": [1]}, {"flip": [True]}),
        *({"targets": [1, 2, 3]}, {"images": [1]}),
    ],
)
def test_a_damaged_plan_is_refused(damage):
    plan = make_plan([np.array([0, 1, 2]), np.array([3])], 4, learners=np.array([0, 1]))
    with pytest.raises(DataError, match=r"damaged.*start the epoch anew"):
        EpochPlan.from_dict({**plan.to_dict(), **damage})
    with pytest.raises(DataError, match="lacks images, learners"):
        EpochPlan.from_dict({k: v for k, v in plan.to_dict().items() if k not in ("images", "learners")})
