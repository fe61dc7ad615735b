"""Scores by hand, against slow loops and other libraries; codes, protocols, and collapse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raydml.evaluation import scoring
from raydml.evaluation.nearness import RetrievalError
from raydml.evaluation.protocols import RetrievalTask, retrieval_tasks
from raydml.evaluation.scoring import (
    MetricSpec,
    QueryScores,
    ScoringError,
    class_values,
    is_collapsed,
    query_values,
    score_by_all,
    score_queries,
)
from raydml.metrics.names import METRIC_GROUPS
from tests.evaluation.scored import score
from tests.evaluation.slow_ranking import slow_recall_and_map
from tests.golden_vectors import golden


def test_score_by_hand():
    """On a line: 0 (a), 1 (b), 2 (a), 2.5 (a), 10 (b).

    a at 0: b a a -> P@1 0, hits at 2 of R = 2 -> R-precision 1/2, AP (1/2)/2
    b at 1: a(0) and a(2) tie, index decides -> a, R = 1 -> 0
    a at 2: a b -> 1, 1/2, 1/2;   a at 2.5: a b -> 1, 1/2, 1/2;   b at 10: a -> 0
    """
    embeddings = np.array([[0.0], [1.0], [2.0], [2.5], [10.0]], dtype=np.float32)
    labels = np.array([5, 9, 5, 5, 9])
    metrics = score(embeddings, labels, recall_at=(1, 2, 4))
    assert list(metrics) == ["recall_at_1", "recall_at_2", "recall_at_4", "r_precision", "map_at_r"]
    assert metrics["recall_at_1"] == pytest.approx(2 / 5)
    assert metrics["recall_at_2"] == pytest.approx(3 / 5)
    assert metrics["recall_at_4"] == 1.0
    assert metrics["r_precision"] == pytest.approx((1 / 2 + 0 + 1 / 2 + 1 / 2 + 0) / 5)
    assert metrics["map_at_r"] == pytest.approx((1 / 4 + 0 + 1 / 2 + 1 / 2 + 0) / 5)


def test_the_values_of_classes_by_hand():
    """The images of `test_score_by_hand`, and one of a class that has no other: it has no value."""
    embeddings = np.array([[0.0], [1.0], [2.0], [2.5], [10.0], [99.0]], dtype=np.float32)
    labels, spec = np.array([5, 9, 5, 5, 9, 7]), MetricSpec((1, 2))
    queries = score_by_all(embeddings, labels, None, ("leave_one_out",), spec).queries
    expected = {
        "map_at_r": [(1 / 4 + 1 / 2 + 1 / 2) / 3, 0],
        "r_precision": [1 / 2, 0],
        "recall_at_1": [2 / 3, 0],
        "recall_at_2": [1, 0],
    }
    assert {metric: class_values(queries, labels, spec, metric) for metric in expected} == {
        metric: pytest.approx(values) for metric, values in expected.items()
    }
    roles = ["query", "gallery", "gallery", "gallery", "query", "gallery"]
    queries = score_by_all(embeddings, labels, roles, ("query_gallery",), MetricSpec((1,))).queries
    # The query of class 5 finds that of 9, 5 and 5; that of class 9 finds 7, and R is 1.
    assert class_values(queries, labels, MetricSpec((1,)), "map_at_r") == pytest.approx([1 / 4, 0])


def test_the_values_of_many_classes_are_those_of_500_groups():
    numbers = np.arange(1001)
    values = numbers.astype(float)
    queries = QueryScores(numbers, numbers, numbers + 1, values, values, None, None, numbers)
    found = class_values(queries, numbers[::-1].copy(), MetricSpec((1,)), "r_precision")
    # In the order of the labels: 1000, 999, 998 in the first group, and then two in each.
    assert found == [999.0] + [997.5 - 2 * group - 1 for group in range(499)]
    found = class_values(queries, numbers // 2, MetricSpec((1,)), "r_precision")
    assert len(found) == 500
    # Two images a class, of which the first has 0 and 1: 501 classes, two of them in the first group.
    assert found[:2] == [(0.5 + 2.5) / 2, 4.5]


def test_score_of_perfect_and_of_random_embeddings():
    labels = np.repeat(np.arange(20), 10)
    perfect = np.eye(20, dtype=np.float32)[labels]
    assert set(score(perfect, labels).values()) == {1.0}
    noise = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    chance = score(noise, labels)
    assert chance["recall_at_1"] == pytest.approx(9 / 199, abs=0.06)
    assert chance["r_precision"] == pytest.approx(9 / 199, abs=0.03)


BOTH = ("float", "binary")


def images_of(labels, roles=None):
    """Labels and roles, as images have them."""
    return labels, roles


def scored(rows, images, protocols, recall_at, codes):
    return score_by_all(rows, *images, protocols, MetricSpec(tuple(recall_at), codes)).metrics


# Codes 10, 00, 11, 00 (a coordinate of 0 is bit 0) of the classes a, b, a, b. By float distance only row 2 finds its
# class first. By Hamming distance row 0 is at 1 from all others, so that the index decides and b comes first; the
# other three find their class.
SIGNED = np.array([[0.5, -1.0], [0.0, -2.0], [3.0, 0.1], [-1.0, 0.0]], dtype=np.float32)


def test_binary_codes_by_hand():
    images = images_of(np.array([0, 1, 0, 1]))
    metrics = scored(SIGNED, images, ["leave_one_out"], (1, 2), BOTH)
    names = ["recall_at_1", "recall_at_2", "r_precision", "map_at_r"]
    assert list(metrics) == names + [f"binary_{name}" for name in names]
    assert [metrics[name] for name in names] == [1 / 4, 3 / 4, 1 / 4, 1 / 4]
    assert [metrics[f"binary_{name}"] for name in names] == [3 / 4, 1.0, 3 / 4, 3 / 4]
    without = scored(SIGNED, images, ["leave_one_out"], (1, 2), ("float",))
    assert without == {name: metrics[name] for name in names}


def test_binary_codes_between_queries_and_gallery_by_hand():
    """Rows 1 and 2 search rows 0 and 3: 00 finds 00 (b, right), 11 finds 10 (a, right); by float both find row 0."""
    images = images_of(np.array([0, 1, 0, 1]), roles=("gallery", "query", "query", "gallery"))
    metrics = scored(SIGNED, images, ["query_gallery"], (1,), BOTH)
    assert (metrics["recall_at_1"], metrics["binary_recall_at_1"]) == (0.5, 1.0)


def test_binary_codes_are_scored_under_every_protocol():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 8)
    rows = (generator.standard_normal((12, 10))[labels] + generator.standard_normal((96, 10))).astype(np.float32)
    protocols = ["leave_one_out", "one_gallery_image"]
    metrics = scored(rows, images_of(labels), protocols, (1, 3), BOTH)
    names = ["recall_at_1", "recall_at_3", "r_precision", "map_at_r"]
    kinds = ["", "binary_", "one_gallery_image_", "one_gallery_image_binary_"]
    assert list(metrics) == [kind + name for kind in kinds for name in names]
    bits = np.where(rows > 0, 1, 0)
    recall, average = slow_recall_and_map(torch.from_numpy(bits).float(), labels)  # its stable sort is our rule of ties
    assert metrics["binary_recall_at_1"] == pytest.approx(recall)
    assert metrics["binary_map_at_r"] == pytest.approx(average)
    repeated = score(bits.astype(np.float32), labels, recall_at=(1, 3), protocol="one_gallery_image")
    assert {name: metrics[f"one_gallery_image_binary_{name}"] for name in names} == repeated
    assert len({metrics[f"{kind}map_at_r"] for kind in kinds}) == 4


def clouds(num_classes=12, num_each=8, dim=10, noise=1.0, seed=0):
    """(rows, labels): classes that overlap."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), num_each)
    rows = generator.standard_normal((num_classes, dim))[labels]
    return (rows + noise * generator.standard_normal((len(labels), dim))).astype(np.float32), labels


def slow_rankings(rows, labels):
    """Of each row, whether the nearest, the second nearest ... of all others is of its class."""
    rankings = []
    for own, row in enumerate(rows.astype(np.float64)):
        distances = np.square(rows - row).sum(axis=1)
        order = [other for other in np.argsort(distances, kind="stable") if other != own]
        rankings.append([bool(labels[other] == labels[own]) for other in order])
    return rankings


def slow_average_precision(right, depth):
    hits = [rank for rank in range(1, depth + 1) if right[rank - 1]]
    return sum(sum(right[:rank]) / rank for rank in hits) / min(sum(right), depth)


def test_ranking_is_over_the_whole_list():
    """96 images: all 95 others are fewer than 1,000, and the depth is theirs."""
    rows, labels = clouds(noise=2.0)
    found = score(rows, labels, groups=("ranking",))
    rankings = slow_rankings(rows, labels)
    assert list(found) == ["mrr", "map_at_1000"]
    assert found["mrr"] == pytest.approx(np.mean([1 / (right.index(True) + 1) for right in rankings]))
    assert found["map_at_1000"] == pytest.approx(np.mean([slow_average_precision(right, 95) for right in rankings]))
    both = score(rows, labels, groups=("retrieval", "ranking"))
    assert both == score(rows, labels) | found
    assert both["map_at_r"] < both["map_at_1000"]  # it sees the same hits, and more


def test_ranking_ends_at_the_thousandth():
    """1,301 images on a line and two classes of two."""
    rows = np.arange(1_301, dtype=np.float32)[:, None]
    labels = np.arange(1_301)
    labels[[0, 999]], labels[[4, 1_300]] = -1, -2
    found = score(rows, labels, groups=("ranking",))
    # Nearer than the other one are: 1..998; 1..998 and 1000..1300; all others; all but 0..3.
    ranks = [999, 1_300, 1_300, 1_296]
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 4)
    missing = score(rows, labels, groups=("ranking",), lone_misses=True)
    assert missing["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 1_301)
    assert missing["map_at_1000"] == found["map_at_1000"]
    assert found["map_at_1000"] == pytest.approx((1 / 999) / 4)


def test_ranking_of_a_large_class_is_cut_at_a_thousand():
    """A class of 1,100 in front, of which 1,000 count: all right is 1."""
    labels = np.repeat([0, 1], [1_100, 40])
    rows = (1_000 * labels + np.random.default_rng(0).random(1_140)).astype(np.float32)[:, None]
    assert score(rows, labels, groups=("ranking",)) == pytest.approx(
        {"mrr": 1, "map_at_1000": (1_100 + 40 * 1) / 1_140}
    )


def test_clusters_of_separable_classes_are_the_classes():
    rows, labels = clouds(num_classes=6, noise=0.01)
    found = score(rows, labels, groups=("clustering",))
    assert list(found) == ["nmi_geometric", "nmi_arithmetic", "ami", "ari", "pair_f1"]
    # k-means from random rows may begin with two rows of one class: then the clusters are not the classes.
    starts = [
        score(*clouds(num_classes=2, num_each=30, noise=0.01, seed=seed), groups=("clustering",)) for seed in (0, 1)
    ]
    for metrics in starts:
        assert metrics == pytest.approx(dict.fromkeys(metrics, 1.0))
    noise = np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
    chance = score(noise, labels, groups=("clustering",))
    assert chance["ami"] == pytest.approx(0, abs=0.15)
    assert chance["ari"] == pytest.approx(0, abs=0.1)
    assert all(chance[name] < found[name] for name in found)


def test_geometry_of_classes_on_their_axes():
    labels = np.repeat(np.arange(5), 4)
    rows = np.eye(5, dtype=np.float32)[labels]
    assert score(rows, labels, groups=("geometry",)) == pytest.approx(
        {"intra_distance": 0, "inter_distance": 1, "density": 0, "rho": 0}, abs=1e-9
    )


def test_a_metric_that_is_not_defined_is_left_out():
    rows = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    assert list(score(rows, np.arange(20), groups=("geometry",))) == ["inter_distance"]  # no pair, and two directions
    assert list(score(rows, np.zeros(20, dtype=int), groups=("geometry",))) == ["intra_distance"]


def test_distractors_are_neither_clustered_nor_measured():
    rows, labels = clouds(num_classes=3, num_each=30, noise=0.3)
    kept = np.arange(90) % 3 > 0
    roles = ["" if keep else "distractor" for keep in kept]
    groups = ("clustering", "geometry")
    found = score(rows, labels, roles=roles, groups=groups)
    assert found == score(rows[kept], labels[kept], groups=groups)
    assert found != score(rows, labels, groups=groups)


def test_all_groups_and_codes_by_all_protocols():
    rows, labels = clouds(num_each=12)
    found = score_by_all(
        rows,
        labels,
        None,
        ["leave_one_out", "one_gallery_image"],
        MetricSpec((1,), ("float", "binary", "int8"), METRIC_GROUPS),
    )
    searched = ["recall_at_1", "r_precision", "map_at_r", "mrr", "map_at_1000"]
    others = ["nmi_geometric", "nmi_arithmetic", "ami", "ari", "pair_f1"]
    others += ["intra_distance", "inter_distance", "density", "rho"]
    expected = [f"{kind}{name}" for kind in ("", "binary_", "int8_") for name in searched + others]
    expected += [f"one_gallery_image_{kind}{name}" for kind in ("", "binary_", "int8_") for name in searched]
    assert sorted(found.metrics) == sorted(expected)
    assert np.isfinite(list(found.metrics.values())).all()
    # Metrics without a protocol are those of the codes: of signs as -1 and 1.
    signs = np.where(rows > 0, 1, -1).astype(np.float32)
    alone = score(signs, labels, groups=("clustering", "geometry"))
    assert {name: found.metrics[f"binary_{name}"] for name in others} == alone
    assert found.queries is not None
    assert found.queries.rows.tolist() == list(range(144))
    assert found.metrics["recall_at_1"] == np.mean(found.queries.first == 1)


def test_eight_bits_cost_hardly_anything():
    rows, labels = clouds(num_classes=60, dim=64, noise=1.1)
    exact, rounded = score(rows, labels), score(rows, labels, codes="int8")
    assert 0.5 < exact["map_at_r"] < exact["recall_at_1"] < 0.99
    for name in exact:
        assert rounded[name] == pytest.approx(exact[name], abs=0.01)
    assert rounded["map_at_r"] != exact["map_at_r"]
    steps = np.rint(rows.astype(np.float64) * (127 / np.abs(rows).max()))
    assert rounded["recall_at_1"] == np.mean([right[0] for right in slow_rankings(steps, labels)])


@pytest.mark.parametrize("codes", ["float", "binary", "int8"])
@pytest.mark.parametrize("lone_misses", [False, True])
def test_means_of_the_queries_are_the_metrics(codes, lone_misses):
    rows, labels = clouds(noise=1.5)
    labels[:3] = [100, 101, 102]  # nothing to be found: NaN, and not in the means
    spec = MetricSpec((1, 4), (codes,), ("retrieval", "ranking"), lone_misses=lone_misses)
    scored = score_by_all(rows, labels, None, ["leave_one_out"], spec)
    values = query_values(scored.queries, spec)
    prefix = "" if codes == "float" else f"{codes}_"
    assert {f"{prefix}{name}" for name in values} == set(scored.metrics)
    for name, of_each in values.items():
        assert of_each.shape == (96,)
        assert np.isnan(of_each).sum() == (
            3 if not lone_misses or name in ("r_precision", "map_at_r", "map_at_1000") else 0
        )
        assert scored.metrics[f"{prefix}{name}"] == pytest.approx(np.nanmean(of_each))
    # The other way of averaging would be another number.
    assert np.nan_to_num(values["map_at_r"]).mean() < scored.metrics[f"{prefix}map_at_r"]


def test_query_scores_by_hand():
    """On a line: 0 (a), 1 (b), 2 (a), 9 (b), 9.5 (c). Rows 3, 0 and 4 search rows 1, 2 and 4."""
    rows = np.array([[0.0], [1.0], [2.0], [9.0], [9.5]], dtype=np.float32)
    labels = np.array([5, 9, 5, 9, 7])
    found = score_queries(rows, labels, RetrievalTask(np.array([3, 0]), np.array([1, 2, 4])), to_1000=True)
    assert found.rows.tolist() == [3, 0]
    assert found.first.tolist() == [3, 2]  # 4, 2, then 1; 1, then 2
    assert found.num_relevant.tolist() == [1, 1]
    assert found.nearest.tolist() == [4, 1]
    assert found.r_precision.tolist() == found.average_precision.tolist() == [0, 0]
    assert found.average_precision_at_1000.tolist() == [1 / 3, 1 / 2]
    alone = score_queries(rows, labels, RetrievalTask(np.array([0, 1, 2, 3, 4]), None))
    assert alone.first.tolist() == [2, 3, 2, 3, 0]
    assert alone.num_relevant.tolist() == [1, 1, 1, 1, 0]
    assert alone.nearest.tolist() == [1, 0, 1, 4, 3]
    assert alone.average_precision_at_1000 is None
    np.testing.assert_array_equal(alone.r_precision, [0, 0, 0, 0, np.nan])


def test_rows_of_a_search_are_those_of_the_embeddings():
    """A part of the rows that search one another, in any order."""
    rows, labels = clouds()
    picked = np.random.default_rng(0).permutation(96)[:50]
    found, expected = (
        score_queries(rows, labels, RetrievalTask(picked, None)),
        slow_rankings(rows[picked], labels[picked]),
    )
    assert [right.index(True) + 1 if True in right else 0 for right in expected] == found.first.tolist()
    distances = np.square(rows[picked][:, None].astype(float) - rows[picked]).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    assert found.nearest.tolist() == picked[distances.argmin(axis=1)].tolist()


def test_one_search_of_a_protocol_is_a_part_of_its_score():
    rows, labels = clouds()
    each = [score_queries(rows, labels, search) for search in retrieval_tasks("one_gallery_image", labels)]
    expected = np.mean([np.mean(one.first <= 2) for one in each])
    assert score(rows, labels, recall_at=(2,), protocol="one_gallery_image")["recall_at_2"] == pytest.approx(expected)


def recalls(rows, labels, ks, **settings):
    found = score(rows.astype(np.float32), labels, recall_at=ks, **settings)
    return [found[f"recall_at_{k}"] for k in ks]


def recalls_apart(queries, query_labels, gallery, gallery_labels, ks, **settings):
    """Of a set of queries and a gallery, stored one after the other."""
    roles = ["query"] * len(queries) + ["gallery"] * len(gallery)
    rows, labels = np.concatenate([queries, gallery]), np.concatenate([query_labels, gallery_labels])
    return recalls(rows, labels, ks, protocol="query_gallery", roles=roles, **settings)


def test_score_gives_the_recall_of_classification_is_a_strong_baseline():
    arrays, about = golden("classification_recall")
    facts = {entry["case"]: entry for entry in about["cases"]}
    for case, kind in (("float0", "float"), ("float1", "float"), ("binary2", "binary")):
        of = {name.removeprefix(f"{case}__"): arrays[name] for name in arrays if name.startswith(f"{case}__")}
        ks = range(1, facts[case]["k"] + 1)
        if facts[case]["self_retrieval"]:
            found = recalls(of["query_embeddings"], of["query_labels"], ks, codes=kind)
        else:
            gallery = of["db_embeddings"], of["db_labels"]
            found = recalls_apart(of["query_embeddings"], of["query_labels"], *gallery, ks, codes=kind)
        np.testing.assert_allclose(100 * np.array(found), of["recall"], rtol=1e-6)


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_score_gives_the_recall_of_deep_metric(case):
    """On unit vectors; with k beyond what there is to find left out."""
    arrays, about = golden("deep_metric_recall")
    facts = next(entry for entry in about["cases"] if entry["case"] == case)
    queries = unit(arrays[f"{case}__query_feats"])
    query_labels, ks = arrays[f"{case}__query_labels"], [k for k in facts["ks"] if k < 100]
    if facts["gallery_equals_query"]:
        found = recalls(queries, query_labels, ks)
    else:
        gallery = unit(arrays[f"{case}__gallery_feats"])
        found = recalls_apart(queries, query_labels, gallery, arrays[f"{case}__gallery_labels"], ks)
    np.testing.assert_allclose(found, arrays[f"{case}__recalls"][: len(ks)])


@pytest.mark.parametrize(("name", "key", "percent"), [("divide_conquer", "", 1), ("mdr", "_percent", 100)])
def test_score_gives_the_recall_of_divide_and_conquer_and_of_mdr(name, key, percent):
    arrays, about = golden(f"{name}_eval")
    ks = about["hyperparameters"]["loo_K"]
    found = percent * np.array(recalls(arrays["loo__X"], arrays["loo__labels"], ks))
    np.testing.assert_allclose(found, arrays[f"loo__recall{key}"], rtol=1e-5)
    found = percent * np.array(recalls(arrays["ties__X"], arrays["ties__labels"], ks))
    assert (found >= arrays["ties__recall_low"] - 1e-6).all()
    assert (found <= arrays["ties__recall_high"] + 1e-6).all()
    parts = [arrays[f"inshop__{part}"] for part in ("query", "query_labels", "gallery", "gallery_labels")]
    found = percent * np.array(recalls_apart(*parts, about["hyperparameters"]["inshop_K"]))
    np.testing.assert_allclose(found, arrays[f"inshop__recall{key}"], rtol=1e-5)


def test_score_gives_the_nmi_of_divide_and_conquer_on_separated_data():
    arrays, _ = golden("divide_conquer_eval")
    found = score(arrays["kmnmi__X"], arrays["kmnmi__labels"], groups=("clustering",))
    assert found["nmi_arithmetic"] == pytest.approx(float(arrays["kmnmi__value"]))


@pytest.mark.parametrize("case", ["c0", "c1"])
def test_score_gives_the_recall_of_mic(case):
    arrays, _ = golden("mic_eval_one_set")
    ks = arrays[f"{case}_k_vals"].tolist()
    found = recalls(arrays[f"{case}_emb"], arrays[f"{case}_labels"], ks, lone_misses=True)
    assert found == pytest.approx(arrays[f"{case}_recall"].tolist())
    arrays, _ = golden("mic_eval_inshop")
    parts = [arrays[f"{case}_{part}"] for part in ("query_emb", "query_labels", "gallery_emb", "gallery_labels")]
    found = recalls_apart(*parts, arrays[f"{case}_k_vals"].tolist())
    assert found == pytest.approx(arrays[f"{case}_recall"].tolist())


def test_invalid_requests_are_refused():
    rows = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    with pytest.raises(ScoringError, match="recall_at: 8 neighbours, but a query has only 5 images to search"):
        score(rows, np.array([0, 0, 0, 1, 1, 1]), recall_at=(1, 8))
    with pytest.raises(ValueError, match="at least two images"):
        score(rows, np.arange(6), recall_at=(1,))
    for name, settings in (("groups", {"groups": ("retrieval", "speed")}), ("codes", {"codes": "int4"})):
        with pytest.raises(ScoringError, match=f"{name}: '(speed|int4)'; one of "):
            score(rows, np.array([0, 0, 0, 1, 1, 1]), recall_at=(1,), **settings)
    rows[2, 1] = np.nan
    with pytest.raises(RetrievalError, match="row 2"):
        score(rows, np.array([0, 0, 0, 1, 1, 1]), recall_at=(1,))


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_healthy_embeddings_are_not_called_collapsed():
    generator = np.random.default_rng(0)
    assert is_collapsed(generator.standard_normal((100, 8)).astype(np.float32)) is None
    # A narrow cone, as an untrained network gives it: 1 % spread.
    assert is_collapsed(unit(np.ones(64) + 0.01 * generator.standard_normal((100, 64)))) is None
    # Perfect classes: every image exactly on its class's corner.
    assert is_collapsed(np.repeat(np.eye(5, dtype=np.float32), 20, axis=0)) is None
    # Few images in two classes: one may well be the neighbour of all.
    assert is_collapsed(np.array([[0.0], [1.0], [-1.1]], dtype=np.float32)) is None


def test_each_kind_of_collapse_is_named():
    generator = np.random.default_rng(0)
    same = unit(np.ones(64) + 1e-6 * generator.standard_normal((100, 64)))
    assert "all embeddings are the same" in is_collapsed(same)
    assert "all embeddings are the same" in is_collapsed(np.zeros((50, 4), dtype=np.float32))
    assert "all embeddings are the same" in is_collapsed(np.full((50, 4), 700.0, dtype=np.float32))
    star = np.concatenate([np.zeros((1, 64)), np.eye(64)]).astype(np.float32)
    assert is_collapsed(star) == "64 of 65 images have the same nearest neighbour"
    broken = np.ones((30, 4), dtype=np.float32)
    broken[3, 3] = np.nan
    assert "NaN" in is_collapsed(broken)


def test_one_heap_with_a_single_outlier_is_a_collapse():
    rows = np.zeros((200, 4), dtype=np.float32)
    rows[17] = 1.0
    # Rows 1.. have row 0 nearest by index, row 0 has row 1: 199 of 200.
    assert is_collapsed(rows) == "199 of 200 images have the same nearest neighbour"


@pytest.fixture
def searched(monkeypatch):
    """The number of queries in each search for a collapse."""
    numbers = []
    original = scoring.nearest_neighbours

    def counted(queries, *args, **kwargs):
        numbers.append(len(queries))
        return original(queries, *args, **kwargs)

    monkeypatch.setattr(scoring, "nearest_neighbours", counted)
    return numbers


def test_a_healthy_set_is_not_searched_as_a_whole(searched):
    rows = np.random.default_rng(0).standard_normal((3_000, 8)).astype(np.float32)
    assert is_collapsed(rows) is None
    assert searched == [512]
    assert is_collapsed(rows[:512]) is None
    assert searched == [512, 512]  # these are all of them


# One image in the middle of many, or a heap (the first of the others is nearest) with one image outside.
@pytest.mark.parametrize("middle", [0, 1_234, 2_999])
def test_a_large_collapsed_set_is_found_and_counted_as_a_whole(middle, searched):
    star = 10 * unit(np.random.default_rng(0).standard_normal((3_000, 200)))
    star[middle] = 0
    assert is_collapsed(star) == "2999 of 3000 images have the same nearest neighbour"
    assert searched == [512, 3_000]


def test_all_images_decide_where_a_sample_suspects_a_collapse(searched):
    """A tenth of a percent more than 98 % around one image: much, but not a collapse."""
    generator = np.random.default_rng(0)
    rows = 10 * unit(generator.standard_normal((2_000, 200)))
    rows[7] = 0
    strays = generator.permutation(np.arange(8, 2_000))[:40]
    rows[strays] = 30 + generator.standard_normal((40, 200))
    assert is_collapsed(rows) is None
    assert searched == [512, 2_000]
