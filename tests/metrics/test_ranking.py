"""Metrics against hand values, a slow loop, another library, and the numbers of five published systems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from raydml.metrics.clustering import ami, ari, nmi, pair_f1
from raydml.metrics.ranking import average_precision, precision_at_r, recall, reciprocal_rank
from tests.evaluation.joined_ranks import rank_relevant
from tests.golden_vectors import golden, golden_case, golden_cases

# Three queries of classes 0, 0, 1; R = 3, 2, 1.
#   query 0: right wrong right wrong  -> R-precision 2/3, AP@3 = (1/1 + 2/3) / 3 = 5/9
#   query 1: wrong right right wrong  -> R-precision 1/2, AP@2 = (1/2) / 2 = 1/4
#   query 2: wrong wrong wrong right  -> 0, 0
HITS = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=bool)
RELEVANT = np.array([3, 2, 1])


def test_hits_behind_rank_r_do_not_count():
    changed = HITS.copy()
    changed[0, 3], changed[1, 2:], changed[2, 1:] = True, [False, True], [True, True, True]
    assert precision_at_r(changed, RELEVANT).tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert average_precision(changed, RELEVANT).tolist() == pytest.approx([5 / 9, 1 / 4, 0])


def test_order_counts_for_map_and_not_for_r_precision():
    hits, relevant = np.array([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=bool), np.array([4, 4])
    assert precision_at_r(hits, relevant).tolist() == [0.25, 0.25]
    assert average_precision(hits, relevant).tolist() == [0.25, 0.0625]


def ours(embeddings, labels, ks):
    relevant = np.bincount(labels)[labels] - 1
    ranks = rank_relevant(embeddings, query_labels=labels, depth=int(relevant.max()))
    return (
        {k: recall(ranks.first, k).mean() for k in ks},
        np.nanmean(precision_at_r(ranks.hits, relevant)),
        np.nanmean(average_precision(ranks.hits, relevant)),
    )


def noisy_classes(seed, num_rows=160, num_classes=9, dim=6, noise=0.8):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows)
    embeddings = generator.standard_normal((num_classes, dim))[labels]
    return (embeddings + noise * generator.standard_normal((num_rows, dim))).astype(np.float32), labels


def test_values_of_each_query_by_hand():
    first = np.array([1, 2, 4, 0])
    assert recall(first, 1).tolist() == [True, False, False, False]
    assert recall(first, 2).tolist() == [True, True, False, False]
    assert recall(first, 4).tolist() == [True, True, True, False]
    assert recall(first, 1_000).tolist() == [True, True, True, False]  # rank 0: nothing to be found
    assert reciprocal_rank(first).tolist() == [1, 1 / 2, 1 / 4, 0]
    assert precision_at_r(HITS, RELEVANT).tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert average_precision(HITS, RELEVANT).tolist() == pytest.approx([5 / 9, 1 / 4, 0])


def test_average_precision_to_a_depth_by_hand():
    """Query 0: hits at 1, 3 of R = 3; query 1: hits at 2, 3 of R = 2; query 2: one at 4 of R = 1."""
    found = {depth: average_precision(HITS, RELEVANT, depth).tolist() for depth in (1, 2, 4)}
    assert found[1] == pytest.approx([1, 0, 0])  # divided by min(R, 1)
    assert found[2] == pytest.approx([1 / 2, (1 / 2) / 2, 0])
    assert found[4] == pytest.approx([(1 + 2 / 3) / 3, (1 / 2 + 2 / 3) / 2, 1 / 4])


def test_map_at_a_depth_is_not_map_at_r():
    """A class found in a row, but only behind R others: 0 at R, nearly a half at ten times R."""
    hits = np.repeat([[False, True, False]], [10, 10, 80], axis=1)
    relevant = np.array([10])
    assert average_precision(hits, relevant).tolist() == [0.0]
    expected = sum(rank / (10 + rank) for rank in range(1, 11)) / 10
    assert average_precision(hits, relevant, 100).tolist() == pytest.approx([expected])
    assert 0.3 < expected < 0.5
    perfect = np.repeat([[True, False]], [10, 90], axis=1)
    assert average_precision(perfect, relevant).tolist() == average_precision(perfect, relevant, 100).tolist() == [1.0]


def test_a_query_without_relevant_images_has_no_precision_and_a_reciprocal_rank_of_zero():
    hits, relevant = np.array([[True, False], [False, False]]), np.array([1, 0])
    for values in (
        precision_at_r(hits, relevant),
        average_precision(hits, relevant),
        average_precision(hits, relevant, 2),
    ):
        np.testing.assert_array_equal(values, [1.0, np.nan])
    assert reciprocal_rank(np.array([1, 0])).mean() == 0.5


@pytest.mark.parametrize("depth", [None, 1, 3, 40])
def test_a_slow_loop_agrees_on_each_query(depth):
    generator = np.random.default_rng(0)
    # More queries than are computed at a time.
    hits = generator.random((5_000, 40)) < generator.random((5_000, 1))
    relevant = generator.integers(0, 41, 5_000)
    found = average_precision(hits, relevant, depth)
    precisions = precision_at_r(hits, relevant)
    for query in [*range(0, 5_000, 61), 4_094, 4_095, 4_096, 4_097, 4_999]:
        row, num_relevant = hits[query].tolist(), int(relevant[query])
        if num_relevant == 0:
            assert np.isnan(found[query])
            assert np.isnan(precisions[query])
            continue
        last = num_relevant if depth is None else depth
        total = sum(sum(row[:rank]) / rank for rank in range(1, last + 1) if row[rank - 1])
        assert found[query] == pytest.approx(total / min(num_relevant, last))
        assert precisions[query] == pytest.approx(sum(row[:num_relevant]) / num_relevant)


def theirs(embeddings, labels, names, k):
    """What pytorch-metric-learning says, by Euclidean distance between the vectors as they are."""
    accuracy_calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distance = pytest.importorskip("pytorch_metric_learning.distances").LpDistance(normalize_embeddings=False)
    calculator = accuracy_calculator.AccuracyCalculator(
        include=names, k=k, knn_func=inference.CustomKNN(distance), device=torch.device("cpu")
    )
    return calculator.get_accuracy(torch.from_numpy(embeddings), torch.from_numpy(labels))


@pytest.mark.parametrize("seed", [3, 4])
def test_pytorch_metric_learning_agrees_at_r(seed):
    embeddings, labels = noisy_classes(seed)
    found = theirs(
        embeddings, labels, ("precision_at_1", "r_precision", "mean_average_precision_at_r"), "max_bin_count"
    )
    recalls, precision, average = ours(embeddings, labels, (1,))
    assert recalls[1] == pytest.approx(found["precision_at_1"], abs=1e-6)
    assert precision == pytest.approx(found["r_precision"], abs=1e-6)
    assert average == pytest.approx(found["mean_average_precision_at_r"], abs=1e-6)


@pytest.mark.parametrize("k", [30, 159])
def test_pytorch_metric_learning_agrees_over_the_whole_ranking(k):
    """Its mean_average_precision is ours to a depth of its k, as long as k is not below R. Its reciprocal ranks end at
    k, ours do not."""
    embeddings, labels = noisy_classes(5)
    relevant = np.bincount(labels)[labels] - 1
    assert relevant.max() <= 30
    found = theirs(embeddings, labels, ("mean_average_precision", "mean_reciprocal_rank"), k)
    ranks = rank_relevant(embeddings, query_labels=labels, depth=k)
    assert average_precision(ranks.hits, relevant, k).mean() == pytest.approx(found["mean_average_precision"], abs=1e-6)
    reciprocals = np.where(recall(ranks.first, k), reciprocal_rank(ranks.first), 0)
    assert reciprocals.mean() == pytest.approx(found["mean_reciprocal_rank"], abs=1e-6)


def test_below_r_pytorch_metric_learning_divides_by_r_and_we_by_the_depth():
    """Five of each of two classes, far apart: all that can be found in three places is found."""
    labels = np.repeat([0, 1], 5)
    embeddings = (100 * labels[:, None] + np.random.default_rng(0).random((10, 2))).astype(np.float32)
    ranks = rank_relevant(embeddings, query_labels=labels, depth=3)
    assert average_precision(ranks.hits, np.full(10, 4), 3).tolist() == [1.0] * 10
    found = theirs(embeddings, labels, ("mean_average_precision",), 3)
    assert found["mean_average_precision"] == pytest.approx(3 / 4)


def test_pytorch_metric_learning_agrees_on_partitions():
    """Its NMI is the arithmetic one."""
    accuracy_calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    calculator = accuracy_calculator.AccuracyCalculator(device=torch.device("cpu"))
    generator = np.random.default_rng(6)
    labels = generator.integers(0, 9, 200)
    clusters = np.where(generator.random(200) < 0.5, labels, generator.integers(0, 9, 200))
    both = torch.from_numpy(labels), torch.from_numpy(clusters)
    assert nmi(labels, clusters, mean="arithmetic") == pytest.approx(calculator.calculate_NMI(*both))
    assert ami(labels, clusters) == pytest.approx(calculator.calculate_AMI(*both))


def recalls_of(queries, query_labels, ks, gallery=None, gallery_labels=None):
    gallery = None if gallery is None else gallery.astype(np.float32)
    ranks = rank_relevant(
        queries.astype(np.float32), gallery, query_labels=query_labels, gallery_labels=gallery_labels, depth=1
    )
    return [recall(ranks.first, k).mean() for k in ks]


@pytest.mark.parametrize("case", golden_cases("classification_recall", lambda case: "given_results" in case["case"]))
def test_golden_classification_recall_of_given_tables(case):
    arrays = {key: array.numpy() for key, array in golden_case("classification_recall", case["case"]).items()}
    table = arrays["results"]
    if case["self_retrieval"]:
        table = np.array([[other for other in row if other != own] for own, row in enumerate(table)])
    hits = arrays["db_labels"][table] == arrays["query_labels"][:, None]
    first = np.array([row.index(True) + 1 if True in row else 0 for row in hits.tolist()])
    found = [recall(first, k).mean() for k in range(1, case["k"] + 1)]
    np.testing.assert_allclose(100 * np.array(found), arrays["recall"])


def test_golden_classification_report_over_a_thousand_neighbours():
    arrays, _ = golden("classification_recall")
    embeddings, labels = arrays["wrapper_k1000__query_embeddings"], arrays["wrapper_k1000__query_labels"]
    found = recalls_of(embeddings, labels, [1, 2, 4, 8, 10, 20, 30, 40, 50, 100, 1000])
    expected = [25.28, 37.04, 50.37, 63.43, 67.69, 77.59, 84.07, 88.15, 90.74, 96.57, 100.00]
    np.testing.assert_allclose(100 * np.array(found), expected, atol=0.005001)


def test_we_depart_from_the_self_similarity_quirk():
    """Five images, the last alone in its class: without the query itself it has no hit at any k."""
    arrays, _ = golden("deep_metric_recall")
    features = arrays["self_zero_quirk__query_feats"]
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    found = recalls_of(features, arrays["self_zero_quirk__query_labels"], [1, 4])
    assert found[1] == pytest.approx(4 / 5)
    assert arrays["self_zero_quirk__recalls"][2] == 1.0


@pytest.mark.parametrize("name", ["classification_nmi", "deep_metric_nmi"])
@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_golden_nmi(name, mean):
    for case in golden_cases(name, lambda case: "faiss" not in case):
        arrays = golden_case(name, case.id)
        found = nmi(arrays["labels"].numpy(), arrays["assignments"].numpy(), mean=mean)
        assert found == pytest.approx(float(arrays[f"nmi_{mean}"]), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("case", golden_cases("mic_cluster_metrics"))
def test_golden_mic_cluster_metrics(case):
    """Where no pair matches, the reference has no F1; ours is 0."""
    arrays = golden_case("mic_cluster_metrics", case["case"])
    labels, clusters = arrays["true_labels"].numpy(), arrays["cluster_labels"].numpy()
    expected, exact = float(arrays["f1"]), {"rel": case["tolerance"]["rtol"], "abs": case["tolerance"]["atol"]}
    assert np.isnan(expected) == (case["reference_f1"] != "finite")
    assert pair_f1(labels, clusters) == pytest.approx(0.0 if np.isnan(expected) else expected, **exact)
    for mean in ("geometric", "arithmetic"):
        assert nmi(labels, clusters, mean=mean) == pytest.approx(float(arrays[f"nmi_{mean}"]), **exact)


def slow_nmi(labels, clusters, mean):
    """From the probabilities, one cell at a time; entropy is the information of a partition about itself."""
    shared = slow_information(labels, clusters)
    entropies = slow_information(labels, labels), slow_information(clusters, clusters)
    return shared / (np.sqrt(entropies[0] * entropies[1]) if mean == "geometric" else sum(entropies) / 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slow_loops_agree_on_nmi_and_pair_f1(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(-3, 9, 120)
    clusters = np.where(generator.random(120) < 0.6, labels // 2, generator.integers(-1, 5, 120))
    pairs = [(labels[i] == labels[j], clusters[i] == clusters[j]) for i in range(120) for j in range(i)]
    both = sum(same_label and same_cluster for same_label, same_cluster in pairs)
    precision = both / sum(same_cluster for _, same_cluster in pairs)
    recall = both / sum(same_label for same_label, _ in pairs)
    assert pair_f1(labels, clusters) == pytest.approx(2 * precision * recall / (precision + recall))
    for mean in ("geometric", "arithmetic"):
        assert nmi(labels, clusters, mean=mean) == pytest.approx(slow_nmi(labels, clusters, mean))


def test_partitions_that_agree_or_are_independent():
    labels = np.array([4, 4, -1, -1, 9])
    names = np.array([0, 0, 7, 7, 2], dtype=np.int32)
    one = np.zeros(5, dtype=np.int64)
    for mean in ("geometric", "arithmetic"):
        assert nmi(labels, names, mean=mean) == pytest.approx(1)
        assert nmi(labels, one, mean=mean) == pytest.approx(0)
        assert nmi(one, one, mean=mean) == 1
    assert pair_f1(labels, names) == 1
    assert pair_f1(np.arange(5), np.arange(5)) == 0
    # 5 choose 2 pairs of the one cluster, two of the classes.
    assert pair_f1(labels, one) == pytest.approx(2 * 2 / (2 + 10))


def expected_information(labels, clusters):
    """Mean over all orders of the clusters: what two partitions of these sizes share by chance."""
    orders = list(itertools.permutations(clusters.tolist()))
    return np.mean([slow_information(labels, np.array(order)) for order in orders])


def slow_information(labels, clusters):
    shared = 0.0
    for label in np.unique(labels):
        for own in np.unique(clusters):
            share = np.mean((labels == label) & (clusters == own))
            if share:
                shared += share * np.log(share / (np.mean(labels == label) * np.mean(clusters == own)))
    return shared


@pytest.mark.parametrize("clusters", [[0, 0, 1, 1, 1, 1], [0, 1, 2, 0, 1, 2], [5, 5, 5, 5, 5, -1]])
def test_adjusted_information_is_corrected_by_the_mean_over_all_orders(clusters):
    labels, clusters = np.array([0, 0, 0, 1, 1, 2]), np.array(clusters)
    chance = expected_information(labels, clusters)
    entropies = (slow_information(labels, labels) + slow_information(clusters, clusters)) / 2
    expected = (slow_information(labels, clusters) - chance) / (entropies - chance)
    assert ami(labels, clusters) == pytest.approx(expected)


def test_adjusted_rand_index_by_hand():
    """Classes {0,1,2}, {3,4,5} and clusters {0,1}, {2,3}, {4,5}: 2 pairs in both (0-1 and 4-5), 6 in a class, 3 in a
    cluster, 15 in all. Chance: 6 * 3 / 15 = 1.2, so (2 - 1.2) / (4.5 - 1.2) = 8 / 33."""
    labels = np.array([7, 7, 7, 2, 2, 2])
    assert ari(labels, np.array([0, 0, 1, 1, -1, -1])) == pytest.approx(8 / 33)
    assert ari(labels, np.array([3, 3, 3, 9, 9, 9])) == pytest.approx(1)
    # {0, 1} and {2, 3} cut across: no pair in both, 2 and 2 of 6: (0 - 2/3) / (2 - 2/3).
    assert ari(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(-1 / 2)
    generator = np.random.default_rng(0)
    labels, clusters = generator.integers(0, 9, 300), generator.integers(0, 5, 300)
    pairs = np.triu_indices(300, 1)
    in_class, in_cluster = (ids[pairs[0]] == ids[pairs[1]] for ids in (labels, clusters))
    chance = in_class.sum() * in_cluster.sum() / len(pairs[0])
    expected = ((in_class & in_cluster).sum() - chance) / ((in_class.sum() + in_cluster.sum()) / 2 - chance)
    assert ari(labels, clusters) == pytest.approx(expected)


def test_adjusted_information_by_hand():
    """{0, 1} and {2, 3} cut across: nothing shared. Of the 3 ways to pair four, one shares log 2, so chance is a third
    of it: (0 - log 2 / 3) / (log 2 - log 2 / 3)."""
    labels = np.array([0, 0, 1, 1])
    assert ami(labels, np.array([0, 1, 0, 1])) == pytest.approx(-1 / 2)
    assert ami(labels, np.array([7, 7, -3, -3])) == pytest.approx(1)
    generator = np.random.default_rng(0)
    many = generator.integers(0, 200, 1_000), generator.integers(0, 200, 1_000)
    assert nmi(*many, mean="arithmetic") > 0.5
    assert ami(*many) == pytest.approx(0, abs=0.03)


def test_stanford_online_products_is_not_too_large():
    """60,502 images, 11,316 classes; the classes cut in halves by position make the result known."""
    labels = np.repeat(np.arange(11_316), 6)[:60_502]
    halves = labels * 2 + np.arange(60_502) % 2
    entropies = [
        -np.sum(s * np.log(s)) for s in (np.bincount(a)[np.bincount(a) > 0] / 60_502 for a in (labels, halves))
    ]
    # The halves know the classes: what is shared is the classes' entropy.
    assert nmi(labels, halves, mean="arithmetic") == pytest.approx(2 * entropies[0] / sum(entropies))
    assert nmi(labels, halves, mean="geometric") == pytest.approx(np.sqrt(entropies[0] / entropies[1]))
    sizes = [np.bincount(a).astype(float) for a in (labels, halves)]
    pairs = [float((size * (size - 1) / 2).sum()) for size in sizes]
    assert pair_f1(labels, halves) == pytest.approx(2 * pairs[1] / sum(pairs))
