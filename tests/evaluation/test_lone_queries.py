"""Queries without another image of their class to find: left out of every mean, and counted."""

import numpy as np
import pytest

from raydml.data.catalog import OWN_IMAGES
from raydml.evaluation.embed import evaluate_embeddings, lone_queries_miss
from raydml.evaluation.protocols import describe_protocol
from raydml.evaluation.saved_embeddings import SavedEmbeddings
from raydml.evaluation.scoring import MetricSpec
from raydml.inference.evaluate import evaluate_saved
from tests.evaluation.slow_ranking import slow_scores

SPEC = MetricSpec((1, 2, 5), groups=("retrieval", "ranking"))


def images(seed, num_classes=12):
    """Points of classes with 1 to 4 images, noisy enough that some queries fail; a third of the classes have one."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), [1 + number % 4 for number in range(num_classes)])
    generator.shuffle(labels)
    centres = generator.standard_normal((num_classes, 3))
    return (centres[labels] + generator.standard_normal((len(labels), 3))).astype(np.float32), labels


@pytest.mark.parametrize("seed", range(3))
def test_means_without_them_are_those_of_a_slow_loop(seed):
    rows, labels = images(seed)
    found = evaluate_embeddings(rows, labels, None, ["leave_one_out"], SPEC)
    every = range(len(labels))
    expected, num_lone = slow_scores(rows, labels, every, every, lambda query, row: False)  # noqa: ARG005
    expected["map_at_1000"] = expected.pop("map")  # the gallery is smaller than 1,000
    assert found.metrics == pytest.approx(expected)
    assert found.num_lone_queries == num_lone == 3
    assert found.protocols["leave_one_out"].endswith("find, and left out of the means: 3 queries")


@pytest.mark.parametrize("seed", range(3))
def test_between_queries_and_gallery(seed):
    """Classes with queries alone are left out; those with gallery images alone are wrong for every query."""
    rows, labels = images(seed)
    generator = np.random.default_rng(seed)
    roles = np.where(generator.random(len(labels)) < 0.5, "query", "gallery")
    found = evaluate_embeddings(rows, labels, roles.tolist(), ["query_gallery"], SPEC._replace(intervals=True))
    queries, gallery = np.flatnonzero(roles == "query"), np.flatnonzero(roles == "gallery")
    expected, num_lone = slow_scores(rows, labels, queries, gallery, lambda query, row: False)  # noqa: ARG005
    expected["map_at_1000"] = expected.pop("map")
    assert found.metrics == pytest.approx(expected)
    assert found.num_lone_queries == num_lone > 0
    low, high = found.intervals["recall_at_1"]
    assert low <= expected["recall_at_1"] <= high


def test_in_a_benchmark_they_are_misses_as_in_its_published_scores():
    rows, labels = images(0)
    names = tuple(f"{number:02d}" for number in range(12))
    paths = tuple(f"{number}.jpg" for number in range(len(labels)))
    saved = SavedEmbeddings(rows, labels, names, paths, None, {"dataset": "vehicleid_small"})
    own = evaluate_saved(saved._replace(facts={"dataset": "image_folder"}), SPEC)
    published = evaluate_saved(saved, SPEC)
    share = 1 - 3 / len(labels)
    for name in ("recall_at_1", "recall_at_5", "mrr"):
        assert published.metrics[name] == pytest.approx(own.metrics[name] * share)
    for name in ("r_precision", "map_at_r", "map_at_1000"):
        assert published.metrics[name] == own.metrics[name]
    assert published.protocols["leave_one_out"].endswith("and counted as misses: 3 queries")
    assert not any(lone_queries_miss(name) for name in (*OWN_IMAGES, "digits"))
    assert lone_queries_miss("sop")


def test_distractors_are_of_no_class():
    """An image of class 0 and three distractors that bear its number: it has nothing to find."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    roles = ["", "distractor", "distractor", "distractor", "", ""]
    sentence = describe_protocol("leave_one_out", labels, roles)
    assert sentence.endswith("left out of the means: 1 query")
    found = evaluate_embeddings(np.eye(6, dtype=np.float32), labels, roles, ["leave_one_out"], MetricSpec((1,)))
    assert found.num_lone_queries == 1
