"""Verification by all pairs against scikit-learn, slow loops and numbers by hand."""

import itertools

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score, roc_curve

from raydml.evaluation.scoring import ScoringError
from raydml.evaluation.verification import verify
from raydml.metrics.verification import (
    MOST_POINTS,
    PairCounts,
    equal_error_rate,
    is_measured,
    roc_auc,
    roc_points,
    tar_at_far,
)


def clouds(num_images, seed, lattice=False):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, num_images)
    if lattice:  # many equal distances, and identical images of two classes
        return generator.integers(0, 3, (num_images, 3)).astype(np.float32), labels
    rows = generator.standard_normal((5, 4))[labels] + generator.standard_normal((num_images, 4))
    return rows.astype(np.float32), labels


def slow(rows, labels, pairs):
    """Metric -> value by scikit-learn and by trying every threshold, from pairs of numbers."""
    distances = np.array([((rows[i].astype(float) - rows[j].astype(float)) ** 2).sum() for i, j in pairs]).round(9)
    genuine = np.array([labels[i] == labels[j] for i, j in pairs])
    false, true, _ = roc_curve(genuine, -distances, drop_intermediate=False)
    found = {"roc_auc": roc_auc_score(genuine, -distances)}
    found["eer"] = brentq(lambda rate: 1 - rate - np.interp(rate, false, true), 0, 1)
    for name in ("1e-1", "1e-2") if (~genuine).sum() >= 3_000 else ("1e-1",):
        accepted = [
            (distances[genuine] <= threshold).mean()
            for threshold in [-1.0, *distances]
            if (distances[~genuine] <= threshold).mean() <= float(name)
        ]
        found[f"tar_at_far_{name}"] = max(accepted)
        found[f"fnmr_at_fmr_{name}"] = 1 - max(accepted)
    return found, int(genuine.sum()), int((~genuine).sum())


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("working_bytes", [1, 2**28])
def test_every_two_images(lattice, working_bytes):
    rows, labels = clouds(100, seed=1, lattice=lattice)
    expected, num_genuine, num_impostors = slow(rows, labels, list(itertools.combinations(range(100), 2)))
    found = verify(rows, labels, None, "leave_one_out", working_bytes=working_bytes)
    assert found.metrics == pytest.approx(expected, abs=1e-9)
    assert found.sentence == (
        f"verification: {num_genuine:,} genuine and {num_impostors:,} impostor pairs (every two of 100 images), by "
        "Euclidean distance"
    )
    assert found.notes == (
        "TAR@FAR=1e-3 is not measured: it needs 30,000 impostor pairs (rule of 30)",
        "TAR@FAR=1e-4 is not measured: it needs 300,000 impostor pairs (rule of 30)",
    )


@pytest.mark.parametrize("lattice", [False, True])
def test_the_points_of_the_curve_are_scikit_learns(lattice):
    rows, labels = clouds(60, seed=4, lattice=lattice)
    pairs = list(itertools.combinations(range(60), 2))
    squares = np.array([((rows[i].astype(float) - rows[j].astype(float)) ** 2).sum() for i, j in pairs]).round(9)
    genuine = np.array([labels[i] == labels[j] for i, j in pairs])
    false, true, thresholds = roc_curve(genuine, -squares, drop_intermediate=False)
    expected = {(threshold, fpr, tpr) for threshold, fpr, tpr in zip(-thresholds, false, true, strict=True)}
    found = verify(rows, labels, None, "leave_one_out").roc
    assert len(found.distances) == len(np.unique(squares[genuine]))
    for distance, far, tar in zip(*found, strict=True):
        nearest = min(expected, key=lambda point: abs(point[0] - distance**2))
        assert (far, tar) == pytest.approx(nearest[1:], abs=1e-12)


def test_a_long_curve_keeps_its_ends_and_small_rates():
    distances = np.sort(np.random.default_rng(0).random(50_000))
    within = np.floor(distances**4 * 1_000_000).astype(np.int64)
    found = roc_points(PairCounts(distances, within, within, 1_000_000))
    assert len(found.tar) <= MOST_POINTS
    assert found.tar[-1] == 1
    assert found.tar[0] == 1 / 50_000
    assert (np.diff(found.tar) > 0).all()
    assert np.diff(found.tar).max() < 0.005, "no part of the curve is left out"
    decades = np.floor(np.log10(found.far[found.far > 0])).astype(int)
    assert (np.bincount(-decades)[1:6] >= 30).all(), "nor of its logarithmic axis"


@pytest.mark.parametrize("lattice", [False, True])
def test_queries_and_gallery_and_distractors(lattice):
    rows, labels = clouds(110, seed=2, lattice=lattice)
    roles = ["query"] * 40 + ["gallery"] * 60 + ["distractor"] * 10
    others = np.where(np.arange(110) < 100, labels, -1)
    expected = slow(rows, others, list(itertools.product(range(40), range(40, 110))))[0]
    found = verify(rows, labels, roles, "query_gallery")
    assert found.metrics == pytest.approx(expected, abs=1e-9)
    assert "(40 queries and 70 gallery images)" in found.sentence
    roles = ["distractor"] * 10 + [""] * 100
    others = np.where(np.arange(110) < 10, -1, labels)
    pairs = [pair for pair in itertools.combinations(range(110), 2) if pair[1] >= 10]
    expected = slow(rows, others, pairs)[0]
    found = verify(rows, labels, roles, "leave_one_out")
    assert found.metrics == pytest.approx(expected, abs=1e-9)
    assert "(every two of 100 images, and each with 10 distractors)" in found.sentence


def test_pairs_that_do_not_count():
    rows, labels = clouds(100, seed=3)
    cameras = np.arange(100) % 4
    pairs = [(i, j) for i, j in itertools.combinations(range(100), 2) if cameras[i] != cameras[j]]
    found = verify(
        rows, labels, None, "leave_one_out", excluded=lambda first, second: cameras[first][:, None] == cameras[second]
    )
    assert found.metrics == pytest.approx(slow(rows, labels, pairs)[0], abs=1e-9)


def test_too_many_pairs_are_those_of_drawn_images():
    rows, labels = clouds(400, seed=4)
    everything = verify(rows, labels, None, "leave_one_out")
    for limits in ({"max_pairs": 20_000}, {"max_genuine": 5_000}):
        drawn = verify(rows, labels, None, "leave_one_out", **limits)
        assert "images, drawn from every two of 400 images)" in drawn.sentence
        assert drawn.sentence == verify(rows, labels, None, "leave_one_out", **limits).sentence, "always the same"
        assert drawn.metrics["roc_auc"] == pytest.approx(everything.metrics["roc_auc"], abs=0.03)


def test_rates_by_hand():
    """Genuine at 1, 2, 4, 4; impostors at 2, 3, 5, 6, 7.

    Nearer than 1: none, than 2: none (one as near), than 4: two. AUC: (5 + 4.5 + 3 + 3) / 20. Accepted up to 2: half of
    the genuine and 1 of 5 impostors; up to 4: all, and 2 of 5. The curve goes from (0.2, 0.5) up to 3 (0.4, 0.5) and
    then to (0.4, 1): FMR is 0.4 while FNMR falls from 0.5 to 0, so they are equal at 0.4.
    """
    counts = PairCounts(np.array([1.0, 2, 4, 4]), np.array([0, 0, 2, 2]), np.array([0, 1, 2, 2]), 5)
    assert roc_auc(counts) == pytest.approx(15.5 / 20)
    assert [tar_at_far(counts, far) for far in (0.1, 0.2, 0.39, 0.4)] == [0.25, 0.5, 0.5, 1.0]
    assert equal_error_rate(counts) == pytest.approx(0.4)


def test_separable_classes_and_classes_that_are_all_the_same():
    labels = np.repeat(np.arange(30), 4)
    apart = verify(np.eye(30, dtype=np.float32)[labels], labels, None, "leave_one_out").metrics
    assert (apart["roc_auc"], apart["eer"], apart["tar_at_far_1e-2"]) == (1, 0, 1)
    same = verify(np.ones((120, 3), dtype=np.float32), labels, None, "leave_one_out").metrics
    assert (same["roc_auc"], same["eer"], same["tar_at_far_1e-1"]) == (0.5, 0.5, 0)


def test_the_rule_of_30():
    assert [is_measured(0.1, number) for number in (299, 300)] == [False, True]
    assert [is_measured(1e-3, number) for number in (29_999, 30_000)] == [False, True]


@pytest.mark.parametrize(("labels", "kind"), [([0, 1, 2], "genuine"), ([0, 0, 0], "impostor")])
def test_pairs_of_one_kind_alone_are_refused(labels, kind):
    with pytest.raises(ScoringError, match=f"there is no {kind} pair"):
        verify(np.eye(3, dtype=np.float32), np.array(labels), None, "leave_one_out")
