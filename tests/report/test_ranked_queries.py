"""Neighbours and average precision of single queries, by hand and against a slow loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raydml.evaluation.nearness import RetrievalError
from raydml.evaluation.protocols import ProtocolError
from raydml.report import retrievals
from raydml.report.retrievals import rank_queries
from tests.evaluation.slow_ranking import slow_recall_and_map

# On a line, classes 0 0 0 | 1 1 1, and one image of class 1 among those of class 0.
PLACES = np.array([[0.0], [1.0], [2.5], [10.0], [11.0], [1.25]], dtype=np.float32)
LABELS = np.array([0, 0, 0, 1, 1, 1])


def test_every_image_searches_all_others():
    ranked = rank_queries(PLACES, LABELS, num_neighbours=2)
    assert ranked.queries.tolist() == [0, 1, 2, 3, 4, 5]
    assert ranked.neighbours.tolist() == [[1, 5], [5, 0], [5, 1], [4, 2], [3, 2], [1, 0]]
    assert ranked.distances[:2].tolist() == [[1.0, 1.25], [0.25, 1.0]]
    assert ranked.right.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0], [1, 0], [0, 0]]
    assert ranked.num_relevant.tolist() == [2] * 6
    assert ranked.num_right.tolist() == [1, 1, 1, 1, 1, 0]
    # Half of the precision at each right one of the first two: 1/1, or 1/2.
    assert ranked.average_precision.tolist() == [0.5, 0.25, 0.25, 0.5, 0.5, 0.0]
    assert ranked.map_at_r == pytest.approx(1 / 3)
    assert ranked.recall_at_1 == 0.5


def test_queries_search_the_gallery_alone_where_images_have_roles():
    roles = ["query", "gallery", "gallery", "gallery", "gallery", "query"]
    ranked = rank_queries(PLACES, LABELS, roles, num_neighbours=3)
    assert ranked.queries.tolist() == [0, 5]
    assert ranked.neighbours.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert ranked.num_relevant.tolist() == [2, 2]
    assert ranked.average_precision.tolist() == [1.0, 0.0]
    with pytest.raises(ProtocolError, match="1 images without a role"):
        rank_queries(PLACES, LABELS, ["", *roles[1:]])


def test_distractors_are_found_and_never_right():
    # Image 1 lies nearest to both of its class, and image 5 to image 1.
    ranked = rank_queries(PLACES, LABELS, ["", "distractor", "", "", "", ""], num_neighbours=3)
    assert ranked.queries.tolist() == [0, 2, 3, 4, 5]
    assert ranked.neighbours[:2].tolist() == [[1, 5, 2], [5, 1, 0]]
    assert ranked.distances[0].tolist() == [1.0, 1.25, 2.5]
    assert ranked.right[0].tolist() == [False, False, True]
    assert ranked.num_relevant.tolist() == [1, 1, 2, 2, 2]
    with_roles = rank_queries(
        PLACES, LABELS, ["query", "distractor", "gallery", "gallery", "gallery", "query"], num_neighbours=2
    )
    assert with_roles.neighbours.tolist() == [[1, 2], [1, 2]]
    assert with_roles.average_precision.tolist() == [0.0, 0.0]


def test_a_query_behind_its_own_duplicates_does_not_find_itself():
    places = np.zeros((7, 1), dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 2, 2, 0])
    for roles in (None, [""] * 6 + ["distractor"]):
        ranked = rank_queries(places, labels, roles, num_neighbours=2)
        assert ranked.neighbours[:6].tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1]]


def test_the_number_of_neighbours_kept_and_the_size_of_a_part_change_no_number(monkeypatch):
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 4, 50)
    rows = generator.standard_normal((50, 3)).astype(np.float32)
    whole = rank_queries(rows, labels, num_neighbours=30)
    assert whole.neighbours.shape == (50, 30)
    monkeypatch.setattr(retrievals, "_MAX_PAIRS", 100)
    parts = rank_queries(rows, labels, num_neighbours=3)
    assert parts.neighbours.tolist() == whole.neighbours[:, :3].tolist()
    for one, other in zip(parts[4:], whole[4:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    right = [whole.right[query, :relevant].sum() for query, relevant in enumerate(whole.num_relevant)]
    assert whole.num_right.tolist() == right


def test_the_only_image_of_its_class_has_nothing_to_find():
    ranked = rank_queries(PLACES[:3], np.array([0, 0, 1]))
    assert ranked.num_relevant.tolist() == [1, 1, 0]
    assert ranked.average_precision[:2].tolist() == [1.0, 1.0]
    assert math.isnan(ranked.average_precision[2])
    assert ranked.map_at_r == 1.0
    alone = rank_queries(PLACES[:3], np.array([0, 1, 2]))
    assert math.isnan(alone.map_at_r)
    assert alone.neighbours.shape == (3, 2)


def test_neighbours_beyond_r_do_not_count():
    # Class 1 has one other image, and it comes second: AP@1 is 0 however many neighbours are ranked.
    ranked = rank_queries(np.array([[0.0], [1.0], [3.0]], dtype=np.float32), np.array([1, 0, 1]))
    assert ranked.right[0].tolist() == [False, True]
    assert ranked.average_precision[0] == 0.0


def test_the_means_are_those_of_a_slow_loop():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 9, 120)
    rows = (generator.standard_normal((9, 5))[labels] + generator.standard_normal((120, 5))).astype(np.float32)
    ranked = rank_queries(rows, labels, num_neighbours=119)
    assert 0.05 < ranked.map_at_r < 0.95
    recall, average = slow_recall_and_map(torch.from_numpy(rows), labels)
    assert ranked.map_at_r == pytest.approx(average, abs=1e-12)
    assert ranked.recall_at_1 == pytest.approx(recall, abs=1e-12)


@pytest.mark.parametrize(
    ("rows", "labels", "roles"),
    [(PLACES[:1], LABELS[:1], None), (PLACES, LABELS[:3], None), (PLACES, LABELS, ["query"])],
)
def test_what_does_not_fit_together_is_refused(rows, labels, roles):
    with pytest.raises(ValueError, match="the numbers must be equal and at least 2"):
        rank_queries(rows, labels, roles)


def test_embeddings_that_hold_nan_are_refused():
    with pytest.raises(RetrievalError, match="NaN"):
        rank_queries(PLACES * np.nan, LABELS)
