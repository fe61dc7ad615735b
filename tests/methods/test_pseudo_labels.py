"""Features whose clusters are pseudo-labels, against MIC's release, hand values and slow loops."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional

from raydml.methods.mic import standardise_by_class, window_features
from tests.golden_vectors import golden


def standardised(features, labels, how):
    features = np.array(features, dtype=np.float32)
    assert standardise_by_class(features, np.array(labels), how) is None  # in place
    return features


def test_standardisation_is_the_releases():
    arrays, facts = golden("mic_mining")
    for case in facts["hyperparameters"]:
        prefix = f"c{case['case']}_"
        actual = standardised(arrays[prefix + "features"], arrays[prefix + "class_labels"], case["cluster_mode"])
        np.testing.assert_allclose(actual, arrays[prefix + "standardised"], **facts["tolerance"])
    assert {case["cluster_mode"] for case in facts["hyperparameters"]} == {"mean", "mstd"}


FEATURES, LABELS = [[1, 12], [5, 12], [3, 0], [9, 12], [4, 40]], [7, 7, 2, 7, 2]


def test_mean_by_hand():
    expected = [[-4, 0], [0, 0], [-0.5, -20], [4, 0], [0.5, 20]]
    assert standardised(FEATURES, LABELS, "mean").tolist() == expected


def test_mstd_by_hand():
    third = (32 / 3) ** 0.5  # of 1, 5 and 9, over all three; 12, 12 and 12 have none and stay at 0
    expected = [[-4 / third, 0], [0, 0], [-1, -1], [4 / third, 0], [1, 1]]
    np.testing.assert_allclose(standardised(FEATURES, LABELS, "mstd"), expected, rtol=1e-6)


def test_none_changes_nothing():
    assert standardised(FEATURES, LABELS, "none").tolist() == FEATURES


@pytest.mark.parametrize("how", ["mean", "mstd"])
def test_the_only_image_of_a_class_and_a_constant_feature_become_zero(how):
    features = np.float32([[0.1, number] for number in range(8)])  # in float32 the mean of seven 0.1 is not 0.1
    actual = standardised(features, [0] * 7 + [1], how)
    assert actual[:, 0].tolist() == [0] * 8
    assert actual[7].tolist() == [0, 0]


def test_class_offsets_and_class_scales_are_forgotten():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(60, 5)).astype(np.float32)
    labels = generator.integers(4, size=60)
    offsets, scales = generator.normal(size=(4, 5)), generator.uniform(0.5, 2, size=(4, 5))
    moved = features + offsets[labels]
    np.testing.assert_allclose(
        standardised(moved, labels, "mean"), standardised(features, labels, "mean"), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        standardised(moved * scales[labels], labels, "mstd"), standardised(features, labels, "mstd"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("case", [0, 1])
def test_clusters_of_standardised_features_are_what_classes_share(case):
    arrays, facts = golden("mic_mining_recovery")
    num_clusters = facts["hyperparameters"][case]["n_clusters"]
    features, labels = arrays[f"c{case}_features"], arrays[f"c{case}_class_labels"]

    def agreement(points):
        k_means = KMeans(num_clusters, n_init=20, random_state=0).fit(points)
        return adjusted_rand_score(arrays[f"c{case}_latent_mode"], k_means.labels_)

    far_apart = features + 100 * np.random.default_rng(0).normal(size=(labels.max() + 1, features.shape[1]))[labels]
    assert agreement(standardised(features, labels, "mean")) == 1
    assert agreement(standardised(far_apart, labels, "mean")) == 1
    assert agreement(far_apart) < 0.1  # the classes are in the way


def test_windows_on_the_first_stage_are_the_releases():
    arrays, facts = golden("mic_network_pieces")
    maps = torch.from_numpy(arrays["c0_layer1_out"]).float()
    torch.testing.assert_close(window_features(maps), torch.from_numpy(arrays["c0_init_feature"]), **facts["tolerance"])


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (56, 28, [(0, 18), (12, 30), (24, 42), (36, 54)], [(0, 9), (6, 15), (12, 21), (18, 27)]),
        (14, 4, [(0, 4), (3, 7), (6, 10), (9, 13)], [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (12, 5, [(0, 4), (3, 7), (6, 10)], [(0, 2), (1, 3), (2, 4), (3, 5)]),
        (7, 2, [(0, 2), (2, 4), (4, 6)], [(0, 1), (1, 2)]),
        (1, 1, [(0, 1)], [(0, 1)]),
    ],
)
def test_windows_on_maps_of_other_sizes(height, width, rows, columns):
    maps = torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(0))
    expected = [
        [float(image[channel, top:bottom, left:right].mean()) for channel in range(2) for top, bottom in rows
         for left, right in columns]
        for image in maps
    ]  # fmt: skip
    actual = window_features(maps)
    assert actual.shape == (3, 2 * len(rows) * len(columns))
    torch.testing.assert_close(actual, functional.normalize(torch.tensor(expected), dim=1))


def test_pooled_features_only_get_length_one():
    features = torch.tensor([[3.0, 4.0], [0.0, -2.0], [0.0, 0.0]])
    torch.testing.assert_close(window_features(features), torch.tensor([[0.6, 0.8], [0.0, -1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 4)])
def test_half_precision_maps_give_float32(shape):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    actual = window_features(maps)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, window_features(maps.float()))
