"""k-means against golden vectors and slow loops, the bookkeeping of clusters against golden vectors and hand values."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from raydml.metrics.clustering import cluster_metrics, nmi
from raydml.ops.clustering import (
    ClusteringError,
    KMeans,
    cluster,
    match_to_previous,
    membership_difference,
    without_singletons,
)
from tests.golden_vectors import golden, golden_case, golden_cases

CPU = torch.device("cpu")
ALL_POINTS = 10_000_000


def blobs(generator, num_points=900, dim=24, num_blobs=20):
    centres = generator.standard_normal((num_blobs, dim))
    points = centres[generator.integers(num_blobs, size=num_points)]
    return (points + 0.3 * generator.standard_normal((num_points, dim))).astype(np.float32)


def unit_vectors(generator, num_points=900, dim=24):
    points = np.abs(generator.standard_normal((num_points, dim))).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("case", ["km_a", "km_b"])
def test_golden_divide_and_conquer_kmeans(case):
    arrays, about = golden("divide_conquer_clusters")
    facts = about["hyperparameters"][case]
    settings = KMeans(facts["niter"], facts["nredo"], facts["max_points_per_centroid"], facts["spherical"])
    found = cluster(arrays[f"{case}__X"], facts["K"], settings._replace(seed=facts["seed"]), CPU)
    assert adjusted_rand_score(arrays[f"{case}__assign"], found.assignment) == 1
    assert found.objective == pytest.approx(float(arrays[f"{case}__objective"]), rel=1e-4)


@pytest.mark.parametrize("case", golden_cases("mic_mining_recovery"))
def test_golden_mic_restarts_recover_the_latent_modes(case):
    arrays = golden_case("mic_mining_recovery", case["case"])
    features, classes = arrays["features"].numpy(), arrays["class_labels"].numpy()
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    centred = features - np.stack([features[classes == label].mean(axis=0) for label in classes])
    found = cluster(centred, case["n_clusters"], KMeans(restarts=20), CPU)
    assert adjusted_rand_score(arrays["latent_mode"], found.assignment) >= 0.999


@pytest.mark.parametrize("case", golden_cases("classification_nmi", lambda case: "faiss" in case))
def test_golden_classification_nmi_of_clusters(case):
    arrays, release = golden_case("classification_nmi", case["case"]), case["faiss"]
    labels = arrays["labels"].numpy()
    settings = KMeans(release["niter"], release["nredo"], ALL_POINTS, seed=release["seed"])
    found = cluster(arrays["embeddings"].numpy(), len(np.unique(labels)), settings, CPU)
    value = nmi(labels, found.assignment, mean="arithmetic")
    assert value == pytest.approx(float(arrays["nmi_faiss"]), abs=case["kmeans_tolerance"])


def slow_nearest(points, centroids, spherical=False):
    found = []
    for point in points.astype(np.float64):
        if spherical:
            costs = [-float((point * row).sum()) for row in centroids.astype(np.float64)]
        else:
            costs = [float(((point - row) ** 2).sum()) for row in centroids.astype(np.float64)]
        found.append(int(np.argmin(costs)))
    return np.array(found)


@pytest.mark.parametrize("spherical", [False, True])
def test_every_point_is_in_the_cluster_of_its_nearest_centroid(spherical):
    points = blobs(np.random.default_rng(1))
    found = cluster(points, 9, KMeans(max_points_per_centroid=6, spherical=spherical), CPU)
    np.testing.assert_array_equal(found.assignment, slow_nearest(points, found.centroids, spherical))
    assert found.assignment.dtype == np.int64
    assert found.centroids.dtype == np.float32
    if spherical:
        np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-6)


def test_the_seed_decides_and_the_number_of_threads_does_not():
    points = unit_vectors(np.random.default_rng(5), 2000, 64)
    settings = KMeans(iterations=30, restarts=2, max_points_per_centroid=100)
    expected = cluster(points, 12, settings, CPU)
    assert (cluster(points, 12, settings._replace(seed=5), CPU).assignment != expected.assignment).any()
    before, before_faiss = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            faiss.omp_set_num_threads(7)
            found = cluster(points, 12, settings, CPU)
            assert faiss.omp_get_max_threads() == 7, "the number of threads is restored"
            np.testing.assert_array_equal(found.assignment, expected.assignment)
            np.testing.assert_array_equal(found.centroids, expected.centroids)
    finally:
        torch.set_num_threads(before)
        faiss.omp_set_num_threads(before_faiss)


@pytest.mark.gpu
@pytest.mark.parametrize("spherical", [False, True])
def test_a_gpu_gives_the_same_clusters_again_and_nearly_those_of_the_cpu(spherical):
    if not faiss.get_num_gpus():
        pytest.skip("this faiss has no GPU")
    points = blobs(np.random.default_rng(5), 5_000, 64)
    settings = KMeans(iterations=100, max_points_per_centroid=ALL_POINTS, spherical=spherical)
    first, again = (cluster(points, 12, settings, torch.device("cuda")) for _ in range(2))
    np.testing.assert_array_equal(first.assignment, again.assignment)
    np.testing.assert_array_equal(first.centroids, again.centroids)
    on_cpu = cluster(points, 12, settings, CPU)
    assert first.objective == pytest.approx(on_cpu.objective, rel=1e-3)
    assert adjusted_rand_score(on_cpu.assignment, first.assignment) > 0.99


@pytest.mark.parametrize("spherical", [False, True])
def test_more_restarts_and_more_iterations_give_a_better_objective(spherical):
    points = blobs(np.random.default_rng(3))
    sign = -1 if spherical else 1
    settings = KMeans(iterations=50, max_points_per_centroid=ALL_POINTS, spherical=spherical)
    one = cluster(points, 20, settings, CPU).objective
    assert sign * cluster(points, 20, settings._replace(restarts=10), CPU).objective < sign * one
    assert sign * cluster(points, 20, settings._replace(iterations=1), CPU).objective > sign * one


def test_the_last_centroids_are_the_means_of_their_clusters_and_more_iterations_change_nothing():
    points = blobs(np.random.default_rng(6))
    found = cluster(points, 10, KMeans(iterations=200), CPU)
    for number, centroid in enumerate(found.centroids):
        members = points[found.assignment == number].astype(np.float64)
        np.testing.assert_allclose(centroid, members.mean(axis=0), atol=1e-5)
    distances = ((points - found.centroids[found.assignment]) ** 2).sum(dtype=np.float64)
    assert found.objective == pytest.approx(distances, rel=1e-6)
    longer = cluster(points, 10, KMeans(iterations=2000), CPU)
    np.testing.assert_array_equal(longer.assignment, found.assignment)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("num_clusters", [5, 6, 9])
def test_not_more_points_than_clusters_are_clusters_of_their_own(num_clusters, spherical):
    points = np.array([[1, 0], [0, 2], [1, 0], [3, 3], [-1, 0]], dtype=np.float32)
    found = cluster(points, num_clusters, KMeans(spherical=spherical), CPU)
    assert found.assignment.tolist() == [0, 1, 0, 3, 4]
    assert found.centroids.shape == (num_clusters, 2)
    assert np.isfinite(found.centroids).all()
    assert found.objective == 0
    lengths = np.linalg.norm(found.centroids, axis=1)
    np.testing.assert_allclose(lengths[:4], [1, 1, 1, 1] if spherical else [1, 2, 1, np.sqrt(18)], rtol=1e-6)


def test_with_one_point_a_centroid_the_sample_is_the_centroids():
    points = blobs(np.random.default_rng(8), 60, 4)
    found = cluster(points, 6, KMeans(max_points_per_centroid=1), CPU)
    rows = [int(np.flatnonzero((points == centroid).all(axis=1))[0]) for centroid in found.centroids]
    assert len(set(rows)) == 6
    np.testing.assert_array_equal(found.assignment, slow_nearest(points, points[rows]))


@pytest.mark.parametrize("spherical", [False, True])
def test_identical_points_are_one_cluster(spherical):
    found = cluster(np.full((40, 3), 0.5, dtype=np.float32), 4, KMeans(spherical=spherical), CPU)
    assert np.isfinite(found.centroids).all()
    assert len(np.unique(found.assignment)) == 1
    zeros = cluster(np.zeros((40, 3), dtype=np.float32), 4, KMeans(spherical=spherical), CPU)
    assert zeros.assignment.tolist() == [0] * 40
    assert (zeros.centroids == 0).all()


def test_one_cluster_is_the_mean():
    points = blobs(np.random.default_rng(9), 50, 3)
    found = cluster(points, 1, KMeans(), CPU)
    assert found.assignment.tolist() == [0] * 50
    np.testing.assert_allclose(found.centroids[0], points.astype(np.float64).mean(axis=0), atol=1e-6)
    alone = cluster(points[:1], 1, KMeans(), CPU)
    assert alone.assignment.tolist() == [0]
    np.testing.assert_array_equal(alone.centroids, points[:1])


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_converted_and_left_alone(dtype):
    points = blobs(np.random.default_rng(10)).astype(dtype)
    kept = points.copy()
    found = cluster(points, 8, KMeans(), CPU)
    expected = cluster(points.astype(np.float32), 8, KMeans(), CPU)
    np.testing.assert_array_equal(found.assignment, expected.assignment)
    assert found.centroids.dtype == np.float32
    np.testing.assert_array_equal(points, kept)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strided", [False, True])
def test_rows_of_any_stride_are_taken_and_left_alone(strided):
    wide = blobs(np.random.default_rng(11))
    points = wide[::2, ::3] if strided else wide[:]
    kept = wide.copy()
    points.setflags(write=False)
    found = cluster(points, 8, KMeans(spherical=True), CPU)
    expected = cluster(points.copy(), 8, KMeans(spherical=True), CPU)
    np.testing.assert_array_equal(found.assignment, expected.assignment)
    np.testing.assert_array_equal(wide, kept)


def test_neither_the_precision_of_the_training_nor_its_random_numbers_are_touched():
    before = torch.get_float32_matmul_precision()
    points = unit_vectors(np.random.default_rng(12))
    expected = cluster(points, 8, KMeans(), CPU)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global one
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = cluster(points, 8, KMeans(), CPU)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(found.assignment, expected.assignment)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def with_bad_rows():
    points = np.ones((10, 3), dtype=np.float32)
    points[[2, 5, 7], 1] = np.nan, np.inf, -np.inf
    return points


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (with_bad_rows(), "3 of 10 rows hold NaN.*first is row 2.*learning rate"),
        (np.full((4, 2), 1e300), "4 of 4 rows"),
        (np.ones((0, 3), dtype=np.float32), "expected floats"),
        (np.ones((3, 0), dtype=np.float32), "expected floats"),
        (np.ones(3, dtype=np.float32), "expected floats"),
        (np.ones((3, 2), dtype=np.int64), "expected floats.*int64"),
    ],
)
def test_unusable_points_are_refused(points, message):
    with pytest.raises(ClusteringError, match=message):
        cluster(points, 2, KMeans(), CPU)


@pytest.mark.parametrize("case", ["cycle", "swap", "random8"])
def test_golden_matching(case):
    arrays, about = golden("divide_conquer_clusters")
    now, before = arrays[f"{case}__C_curr"], arrays[f"{case}__C_prev"]
    num_clusters = about["hyperparameters"][case]["K"]
    np.testing.assert_array_equal(membership_difference(now, before, num_clusters), arrays[f"{case}__cost"])
    np.testing.assert_array_equal(match_to_previous(now, before, num_clusters), arrays[f"{case}__C_matched"])
    released = match_to_previous(now, before, num_clusters, release_matching=True)
    np.testing.assert_array_equal(released, arrays[f"{case}__C_release"])


def test_membership_difference_against_the_definition():
    generator = np.random.default_rng(0)
    now, before = generator.integers(0, 5, 200), generator.integers(-1, 5, 200)
    expected = [[int(((now == i) != (before == j)).sum()) for j in range(5)] for i in range(5)]
    np.testing.assert_array_equal(membership_difference(now, before, 5), expected)


def test_a_cycle_is_undone_and_the_release_goes_round_it_once_more():
    before = np.repeat([0, 1, 2, 3], 4)
    now = np.array([1, 2, 0, 3])[before]  # what was 0 is now called 1, and so on
    np.testing.assert_array_equal(match_to_previous(now, before, 4), before)
    np.testing.assert_array_equal(
        match_to_previous(now, before, 4, release_matching=True), [2] * 4 + [0] * 4 + [1] * 4 + [3] * 4
    )


def test_images_of_no_cluster_before_take_part_by_size_alone():
    before = np.array([-1, -1, 0, 0, 1])
    now = np.array([0, 0, 1, 1, 0])
    np.testing.assert_array_equal(match_to_previous(now, before, 2), [1, 1, 0, 0, 1])
    assert match_to_previous(now, np.full(5, -1), 2).dtype == np.int64


def test_golden_singletons():
    arrays, _ = golden("divide_conquer_clusters")
    kept = arrays["singles__C_in"].copy()
    found = without_singletons(kept, arrays["singles__labels"])
    np.testing.assert_array_equal(found, arrays["singles__C_out"])
    np.testing.assert_array_equal(kept, arrays["singles__C_in"])


def test_singletons_against_a_loop_and_images_in_no_cluster_keep_their_mark():
    generator = np.random.default_rng(2)
    clusters, labels = generator.integers(-1, 4, 150), generator.integers(0, 40, 150)
    expected = [
        -1 if ((clusters == own) & (labels == label)).sum() == 1 else own
        for own, label in zip(clusters, labels, strict=True)
    ]
    assert without_singletons(clusters, labels).tolist() == expected
    assert without_singletons(clusters[:0], labels[:0]).tolist() == []


def test_metrics_by_hand():
    clusters, labels = np.array([0, 0, 1, 1, -1, 0, 0, 1, 1]), np.array([5, 5, 7, 7, 5, 5, 5, 7, 7])
    found = cluster_metrics(clusters, labels, None, 2)
    assert found == {"num_clusters": 2, "cluster_balance": pytest.approx(1), "cluster_nmi": pytest.approx(1)}
    # Sizes 3 and 1 of four clusters: (3/4 log 4/3 + 1/4 log 4) / log 4 = 1 - 3/4 * log 3 / log 4
    uneven = cluster_metrics(np.array([2, 2, 2, 0]), np.array([0, 0, 1, 1]), None, 4)
    assert uneven["num_clusters"] == 2
    assert uneven["cluster_balance"] == pytest.approx(1 - 0.75 * np.log(3) / np.log(4))
    alone = cluster_metrics(np.array([0, 0]), np.array([0, 1]), None, 1)
    assert alone == {"num_clusters": 1, "cluster_balance": 1.0, "cluster_nmi": 0.0}
    assert cluster_metrics(np.array([1, 1]), np.array([0, 1]), None, 3)["cluster_balance"] == 0


def test_nmi_of_unequal_entropies_takes_their_arithmetic_mean():
    """Four images of four classes in two clusters: I = log 2, entropies log 4 and log 2."""
    found = cluster_metrics(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), None, 2)
    assert found["cluster_nmi"] == pytest.approx(2 / 3)


def test_changes_are_counted_up_to_names_and_among_images_in_a_cluster_both_times():
    labels = np.zeros(8, dtype=np.int64)
    before = np.array([0, 0, 0, 1, 1, 1, -1, 2])
    renamed = np.array([1, 1, 1, 2, 2, 2, 0, -1])
    assert cluster_metrics(renamed, labels, before, 3)["cluster_changed"] == 0
    moved = np.array([1, 1, 2, 2, 2, 2, 0, -1])
    assert cluster_metrics(moved, labels, before, 3)["cluster_changed"] == pytest.approx(1 / 6)
    assert "cluster_changed" not in cluster_metrics(moved, labels, np.full(8, -1), 3)
    assert "cluster_changed" not in cluster_metrics(moved, labels, None, 3)
