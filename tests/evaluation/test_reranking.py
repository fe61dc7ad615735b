"""Re-ranking and query expansion against slow loops, with ties, small sets and pairs that do not count."""

import numpy as np
import pytest

from raydml.evaluation.nearness import RetrievalError
from raydml.evaluation.pair_distances import PairDistances
from raydml.evaluation.ranking import nearest_neighbours
from raydml.evaluation.reranking import KReciprocal, QueryExpansion, expanded_queries, reranked_relevant
from raydml.evaluation.scoring import MetricSpec, score_by_all
from raydml.metrics.geometry import unit_rows
from tests.evaluation.slow_reranking import slow_expansion, slow_k_reciprocal, slow_ranks


def lattice(num_images, seed, largest=4, dim=3):
    """Embeddings of small integers: many equal distances, and identical images."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, largest, (num_images, dim)).astype(np.float32), generator.integers(0, 4, num_images)


def grid():
    """A square of 6 x 6 places: each has mirror images, whose distances differ by rounding at most."""
    rows = np.array([(x, y) for x in range(6) for y in range(6)], dtype=np.float32)
    return rows, (rows.sum(axis=1) % 3).astype(np.int64)


def noise(num_images, seed):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((4, 5))
    labels = generator.integers(0, 4, num_images)
    rows = unit_rows(centres[labels] + generator.standard_normal((num_images, 5)))
    return rows.astype(np.float32), labels


def ranks_by(parts, num_queries, depth):
    """first (Q,), hits (Q, depth) and nearest (Q,) of all parts."""
    first, hits, nearest = np.zeros(num_queries, int), np.zeros((num_queries, depth), bool), np.zeros(num_queries, int)
    for rows, ranks in parts:
        first[rows], hits[rows], nearest[rows] = ranks.first, ranks.hits, ranks.nearest
    return first, hits, nearest


def agree(parts, distances, relevant, depth):
    """Compare parts with the ranks that a slow sort of the distances gives."""
    first, hits, _ = ranks_by(parts, len(distances), depth)
    for query, ranks in enumerate(slow_ranks(distances, relevant)):
        assert first[query] == (ranks[0] if ranks else 0), query
        assert (np.flatnonzero(hits[query]) + 1).tolist() == [rank for rank in ranks if rank <= depth], query


@pytest.mark.parametrize("images", [lattice(40, 0), lattice(40, 1, largest=2), grid(), noise(45, 3)])
@pytest.mark.parametrize("settings", [KReciprocal(7, 3, 0.3), KReciprocal(5, 1, 0.0), KReciprocal(35, 6, 0.5)])
def test_leave_one_out_is_that_of_the_slow_loop(images, settings):
    rows, labels = images
    everyone = list(range(len(rows)))
    distances = slow_k_reciprocal(rows, everyone, everyone, *settings)
    np.fill_diagonal(distances, np.inf)
    relevant = labels[:, None] == labels
    for working_bytes in (1, 2**28):  # one query at a time, and all at once
        parts = reranked_relevant(rows, query_labels=labels, depth=12, settings=settings, working_bytes=working_bytes)
        agree(parts, distances, relevant, depth=12)


@pytest.mark.parametrize("images", [lattice(42, 4), noise(42, 5)])
def test_queries_beside_a_gallery_and_in_it(images):
    rows, labels = images
    settings = KReciprocal(6, 4, 0.3)
    relevant = labels[:12, None] == labels[12:]
    distances = slow_k_reciprocal(rows, range(12), range(12, 42), *settings)
    parts = reranked_relevant(
        rows[:12], rows[12:], query_labels=labels[:12], gallery_labels=labels[12:], depth=30, settings=settings
    )
    agree(parts, distances, relevant, depth=30)
    # The first 12 search all 42, themselves left out: the others are distractors.
    distances = slow_k_reciprocal(rows, range(12), range(42), *settings)
    distances[range(12), range(12)] = np.inf
    parts = reranked_relevant(
        rows[:12], rows, query_labels=labels[:12], gallery_labels=labels, own=np.arange(12), depth=8, settings=settings
    )
    agree(parts, distances, labels[:12, None] == labels, depth=8)


def test_pairs_that_do_not_count_come_last_and_are_never_relevant():
    rows, labels = noise(40, 6)
    cameras = np.arange(40) % 3
    settings = KReciprocal(6, 3, 0.3)
    distances = slow_k_reciprocal(rows, range(40), range(40), *settings)
    same = cameras[:, None] == cameras
    parts = reranked_relevant(
        rows, query_labels=labels, depth=10, settings=settings,
        excluded=lambda queries, gallery: cameras[queries][:, None] == cameras[gallery], working_bytes=40_000,
    )  # fmt: skip
    agree(parts, np.where(same, np.inf, distances), labels[:, None] == labels, depth=10)


def test_no_order_but_that_of_plain_distances_with_a_weight_of_1():
    rows, labels = noise(50, 7)
    parts = reranked_relevant(rows, query_labels=labels, depth=5, settings=KReciprocal(5, 2, 1.0))
    nearest = ranks_by(parts, 50, 5)[2]
    assert nearest.tolist() == nearest_neighbours(rows, k=1)[0][:, 0].tolist()


def test_identical_images_are_found_in_order_of_index():
    rows = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)[[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]
    labels = np.arange(12) % 3
    parts = reranked_relevant(rows, query_labels=labels, depth=3, settings=KReciprocal(3, 2, 0.3))
    first, hits, nearest = ranks_by(parts, 12, 3)
    assert hits.all()
    assert set(first) == {1}
    assert nearest.tolist() == [3, 4, 5] + [0, 1, 2] * 3
    same = np.ones((12, 4), dtype=np.float32)  # no distance at all
    parts = reranked_relevant(same, query_labels=labels, depth=1, settings=KReciprocal(3, 2, 0.3))
    assert np.isfinite(ranks_by(parts, 12, 1)[0]).all()


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        (KReciprocal(20, 6), "k_reciprocal:k1=9,k2=6"),
        (KReciprocal(5, 11), "k_reciprocal:k1=5,k2=10"),
        (QueryExpansion(10), "query_expansion:n=9"),
    ],
)
def test_more_neighbours_than_images_are_refused_with_the_cure(settings, cure):
    rows, labels = noise(10, 8)
    with pytest.raises(RetrievalError, match=f"Cure: --rerank {cure}"):
        score_by_all(rows, labels, None, ("leave_one_out",), MetricSpec((1,), rerank=settings))


@pytest.mark.parametrize(("n", "alpha"), [(1, 3.0), (4, 3.0), (4, 0.0), (9, 1.5)])
@pytest.mark.parametrize("is_own", [False, True])
def test_expanded_queries_are_those_of_the_slow_loop(n, alpha, is_own):
    rows = noise(24, 9)[0]
    rows[[3, 15]] = rows[8]  # identical images before and behind the query
    queries, own = (rows, np.arange(24)) if is_own else (rows[:10], None)
    gallery = rows if is_own else rows[10:]
    found = expanded_queries(queries, gallery, own=own, settings=QueryExpansion(n, alpha))
    np.testing.assert_allclose(found, slow_expansion(queries, gallery, own, n, alpha), atol=1e-6)


def test_a_query_identical_to_many_images_is_not_its_own_neighbour():
    rows = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (8, 1))
    rows[7] = [1.0, 0.0]
    found = expanded_queries(rows, rows, own=np.arange(8), settings=QueryExpansion(2, 3.0))
    np.testing.assert_allclose(found[:7], rows[:7], atol=1e-6)
    total = rows[7].astype(float) + 2 * 0.6**3 * rows[0].astype(float)
    np.testing.assert_allclose(found[7], total / np.linalg.norm(total), atol=1e-6)


def test_scores_of_expanded_queries_are_those_of_a_slow_search():
    rows, labels = noise(40, 10)
    rows *= 3  # cosines: the length does not count
    unit = unit_rows(rows.astype(float)).astype(np.float32)
    expanded = slow_expansion(unit, unit, range(40), 5, 3.0)
    distances = ((expanded[:, None] - unit[None].astype(float)) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    ranks = slow_ranks(distances, labels[:, None] == labels)
    spec = MetricSpec((1, 3), rerank=QueryExpansion(5))
    found = score_by_all(rows, labels, None, ("leave_one_out",), spec).metrics
    assert found["recall_at_3"] == pytest.approx(np.mean([of[0] <= 3 for of in ranks]))
    sizes = [int((labels == label).sum()) - 1 for label in labels]
    precision = [sum(rank <= size for rank in of) / size for of, size in zip(ranks, sizes, strict=True)]
    assert found["r_precision"] == pytest.approx(np.mean(precision))


def test_re_ranking_helps_where_neighbours_agree():
    """Two long clusters: the end of each is nearer to the other cluster by distance, and not by its neighbours."""
    rows = np.concatenate([np.linspace(0, 4, 15), np.linspace(5, 9, 15)])[:, None].astype(np.float32)
    labels = np.repeat([0, 1], 15)
    plain, again = (
        score_by_all(rows, labels, None, ("leave_one_out",), MetricSpec((1,), rerank=rerank)).metrics["map_at_r"]
        for rerank in (None, KReciprocal(8, 4, 0.1))
    )
    assert again > plain + 0.03


def test_distances_of_blocks_and_of_pairs():
    rows = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)
    rows[7] = rows[21]
    found = PairDistances(rows).block(np.array([7, 3]), np.arange(30))
    expected = ((rows[[7, 3]].astype(float)[:, None] - rows[None].astype(float)) ** 2).sum(axis=2)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert found[0, 7] == found[0, 21] == 0
    assert found[1, 7] == found[1, 21]
    pairs = PairDistances(rows).pairs(np.array([3, 3]), np.array([7, 9]))
    np.testing.assert_allclose(pairs, expected[1, [7, 9]], atol=1e-10)
