"""Geometry of embeddings: by hand, against loops over all pairs, and against numpy's singular values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raydml.metrics.geometry import class_distances, spectral_decay


def slow_distances(embeddings, labels):
    """(intra, inter) from the definitions, one pair at a time; a vector of length 0 has cosine 0 with all."""

    def distance(one, two):
        lengths = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in two))
        return 1 - (sum(x * y for x, y in zip(one, two, strict=True)) / lengths if lengths else 0)

    rows, classes = embeddings.astype(np.float64).tolist(), sorted(set(labels.tolist()))
    within, means = [], []
    for name in classes:
        members = [row for row, label in zip(rows, labels, strict=True) if label == name]
        pairs = [distance(one, two) for i, one in enumerate(members) for j, two in enumerate(members) if i != j]
        if pairs:
            within.append(sum(pairs) / len(pairs))
        units = [[x / (math.sqrt(sum(y * y for y in row)) or 1) for x in row] for row in members]
        means.append([sum(column) / len(units) for column in zip(*units, strict=True)])
    between = [distance(one, two) for i, one in enumerate(means) for j, two in enumerate(means) if i != j]
    return np.mean(within) if within else np.nan, np.mean(between) if between else np.nan


def clouds(num_classes=7, num_rows=60, dim=5, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows) * 3 - 4
    rows = generator.standard_normal((30, dim))[labels] + 0.7 * generator.standard_normal((num_rows, dim))
    return (rows * generator.uniform(0.1, 9, (num_rows, 1))).astype(np.float32), labels


def test_orthogonal_classes():
    """Each class on an axis of its own, with any lengths: distance 0 within, a right angle between any two."""
    labels = np.repeat([3, 8, 1], [4, 2, 5])
    rows = np.eye(3, dtype=np.float32)[np.repeat([0, 1, 2], [4, 2, 5])] * np.arange(1, 12, dtype=np.float32)[:, None]
    assert class_distances(rows, labels) == pytest.approx((0, 1, 0))


def test_distances_by_hand():
    """Class 0 at 0 and 90 degrees, class 1 at 180 and 180: cosines 0 and 1 within, cos 135 degrees between."""
    rows = np.array([[2, 0], [0, 3], [-1, 0], [-5, 0]], dtype=np.float32)
    found = class_distances(rows, np.array([0, 0, 1, 1]))
    assert found.intra == pytest.approx((1 + 0) / 2)
    assert found.inter == pytest.approx(1 + math.sqrt(1 / 2))
    assert found.density == pytest.approx(0.5 / (1 + math.sqrt(1 / 2)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_loop_over_all_pairs_agrees(seed):
    rows, labels = clouds(seed=seed)
    labels[:2] = [100, 101]  # classes of one image each: they have a mean, and nothing within
    rows[7] = 0
    rows[labels == labels[9]] = 0  # a class without any direction
    found = class_distances(rows, labels)
    intra, inter = slow_distances(rows, labels)
    assert found == pytest.approx((intra, inter, intra / inter))
    assert 0.05 < intra < inter < 1.5, "the example should not sit at a limit"


def test_each_class_counts_once_within():
    """A class of two at a right angle and one of fifty at a point: a half, though most pairs are in the latter."""
    rows = np.concatenate([np.eye(2), np.repeat([[1.0, 1.0]], 50, axis=0)]).astype(np.float32)
    assert class_distances(rows, np.repeat([0, 1], [2, 50])).intra == pytest.approx(1 / 2)


def test_undefined_distances_are_nan():
    rows, labels = clouds()
    one = class_distances(rows, np.zeros(60, dtype=np.int64))
    assert one.intra == pytest.approx(slow_distances(rows, np.zeros(60, dtype=np.int64))[0])
    assert np.isnan([one.inter, one.density]).all()
    alone = class_distances(rows, np.arange(60))
    assert alone.inter == pytest.approx(slow_distances(rows, np.arange(60))[1])
    assert np.isnan([alone.intra, alone.density]).all()
    assert class_distances(np.zeros((60, 5), dtype=np.float32), labels) == pytest.approx((1, 1, 1))


def test_classes_in_one_direction_have_no_density_beyond_all_bounds():
    """As the authors' code, no division by less than 1e-8."""
    found = class_distances(np.ones((6, 3), dtype=np.float32), np.repeat([0, 1], 3))
    assert found.intra == pytest.approx(0, abs=1e-12)
    assert np.isfinite(found.density)


def slow_rho(rows):
    """KL(uniform || normalised singular values but the largest), numpy's singular values of the matrix itself."""
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)[1:]
    shares = values / values.sum()
    return sum(1 / len(shares) * math.log(1 / len(shares) / share) for share in shares)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (40, 40), (300, 64), (3, 3)])
def test_spectral_decay_is_that_of_the_singular_values(shape):
    generator = np.random.default_rng(shape[0])
    rows = generator.standard_normal(shape) * np.exp(-0.1 * np.arange(shape[1])) + 0.5
    rows = rows.astype(np.float32)
    assert spectral_decay(rows) == pytest.approx(slow_rho(rows), rel=1e-6)
    assert spectral_decay(rows) > 0.001
    assert spectral_decay(1_000 * rows) == pytest.approx(spectral_decay(rows), rel=1e-4)


def test_spectral_decay_by_hand():
    """Singular values 9, 3, 1: of 3 and 1 the shares are 3/4 and 1/4."""
    rows = np.zeros((6, 3), dtype=np.float32)
    rows[[4, 0, 2], [0, 1, 2]] = 9, 3, 1
    expected = (math.log((1 / 2) / (3 / 4)) + math.log((1 / 2) / (1 / 4))) / 2
    assert spectral_decay(rows) == pytest.approx(expected)
    assert spectral_decay(np.eye(5, dtype=np.float32)) == pytest.approx(0, abs=1e-12)
    # The largest one, mostly the mean, is left out: it may be anything.
    rows[4, 0] = 1e4
    assert spectral_decay(rows) == pytest.approx(expected)


def test_fewer_directions_decay_more():
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((200, 16))
    decays = [spectral_decay((noise * share ** np.arange(16)).astype(np.float32)) for share in (1.0, 0.9, 0.7)]
    assert decays == sorted(decays)
    assert decays[0] < 0.05 < decays[2]


@pytest.mark.parametrize("shape", [(50, 2), (50, 1), (2, 50), (1, 4)])
def test_two_directions_are_too_few(shape):
    assert np.isnan(spectral_decay(np.ones(shape, dtype=np.float32)))


def test_a_direction_that_is_not_used_decays_without_end():
    generator = np.random.default_rng(0)
    flat = (generator.standard_normal((50, 3)) @ generator.standard_normal((3, 8))).astype(np.float32)
    flat[:, 7] = 0
    for rows in (flat, np.zeros((9, 4)), np.ones((9, 4)), np.eye(9)[:, :4] * [1, 1, 1, 0]):
        assert spectral_decay(rows.astype(np.float32)) == math.inf
