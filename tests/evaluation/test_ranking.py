"""Exact search against a full float64 sort, with the ties, duplicates and sizes that break approximate ones."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from raydml.evaluation import ranking
from raydml.evaluation.nearness import EuclideanNearness, FineNearness, RetrievalError, padded_width
from raydml.evaluation.ranking import WORKING_BYTES, nearest_neighbours
from tests.evaluation.joined_ranks import assert_ranks, rank_relevant


def slow_order(query, gallery, own=None):
    """The definition: all rows but the own one, sorted by (float64 distance, index); pairs of these two."""
    distances = np.square(gallery.astype(np.float64) - query.astype(np.float64)).sum(axis=1).tolist()
    return sorted((distance, other) for other, distance in enumerate(distances) if other != own)


def slow_neighbours(queries, gallery, k, leave_one_out):
    ranked = [slow_order(query, gallery, number if leave_one_out else None)[:k] for number, query in enumerate(queries)]
    return np.array([[j for _, j in row] for row in ranked]), np.array([[d for d, _ in row] for row in ranked])


def slow_ranks(queries, gallery, query_labels, gallery_labels, depth, own):
    """(first, hits, nearest) of the sorted lists: rank of the first relevant row, from 1, or 0."""
    first, hits, nearest = [], [], []
    for number, query in enumerate(queries):
        order = [other for _, other in slow_order(query, gallery, None if own is None else own[number])]
        right = [bool(gallery_labels[other] == query_labels[number]) for other in order]
        first.append(right.index(True) + 1 if True in right else 0)
        hits.append(right[:depth])
        nearest.append(order[0])
    return first, hits, nearest


def cloud(num_rows, dim, seed, unit=True):
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit else rows


def crowd(noise, seed):
    """300 rows around one point and 40 elsewhere, in random order."""
    rows = np.concatenate([cloud(1, 16, seed) + np.float32(noise) * cloud(300, 16, seed + 1), cloud(40, 16, seed + 2)])
    return np.random.default_rng(seed).permutation(rows)


CLOUDS = {
    "unit vectors": lambda: cloud(150, 16, 0),
    "one dimension": lambda: cloud(120, 1, 1, unit=False),
    "grid full of ties": lambda: np.random.default_rng(2).integers(0, 3, (150, 3)).astype(np.float32),
    "halves full of ties": lambda: np.random.default_rng(2).integers(0, 3, (150, 3)).astype(np.float32) / 2,
    "bits (Hamming ties)": lambda: np.random.default_rng(3).integers(0, 2, (120, 24)).astype(np.float32),
    "all the same point": lambda: np.full((90, 8), 0.3, dtype=np.float32),
    "two heaps of duplicates": lambda: np.repeat(cloud(2, 8, 4), 45, axis=0),
    "a crowd": lambda: crowd(1e-4, 40),
    "a crowd a few roundings wide": lambda: crowd(1e-7, 50),
    "a crowd of copies": lambda: crowd(0, 60),
    "a crowd far from the origin": lambda: crowd(1e-3, 70) + np.float32(64),
    "far from the origin": lambda: cloud(150, 8, 5, unit=False) + np.float32(4096),
    "nearly collapsed": lambda: cloud(1, 32, 6) + np.float32(1e-5) * cloud(150, 32, 7),
    "lengths from 1e-4 to 1e4": lambda: cloud(150, 8, 8) * np.logspace(-4, 4, 150, dtype=np.float32)[:, None],
    "products below the smallest float32": lambda: cloud(150, 16, 9) * np.float32(1e-21),
    "as large as it may be": lambda: cloud(150, 16, 9) * np.float32(9e16),
}


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_leave_one_out_is_the_full_sort(name, k):
    rows = CLOUDS[name]()
    indices, distances = nearest_neighbours(rows, k=k)
    expected_indices, expected_distances = slow_neighbours(rows, rows, k, leave_one_out=True)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6, atol=1e-45)
    np.testing.assert_array_equal(indices, expected_indices)
    assert indices.dtype == np.int64
    assert distances.dtype == np.float32


@pytest.mark.parametrize("num_rows", [64, 65, 300, 2_000])
@pytest.mark.parametrize("k", [1, 3, 40, 63])
def test_every_size_of_group_finds_the_same(num_rows, k):
    """Galleries that fill the last group and that do not, and from 1 to 64 columns to a group."""
    queries, gallery = cloud(12, 6, 30), cloud(num_rows, 6, 31)
    gallery[num_rows // 2] = gallery[num_rows // 3]
    expected = slow_neighbours(queries, gallery, k, leave_one_out=False)
    np.testing.assert_array_equal(nearest_neighbours(queries, gallery, k=k)[0], expected[0])


def test_a_duplicate_stays_a_neighbour_and_only_the_own_index_goes():
    rows = np.array([[0, 0], [5, 5], [0, 0], [9, 9]], dtype=np.float32)
    indices, distances = nearest_neighbours(rows, k=3)
    assert indices.tolist() == [[2, 1, 3], [3, 0, 2], [0, 1, 3], [1, 0, 2]]
    assert distances.tolist() == [[0, 50, 162], [32, 50, 50], [0, 50, 162], [32, 162, 162]]


@pytest.mark.parametrize("length", [1.0, 0.3])
def test_ties_at_the_last_place_take_the_lowest_index_beyond_the_candidates(length):
    """300 rows at the same distance: many more than any slack of candidates."""
    rows = np.zeros((301, 300), dtype=np.float32)
    rows[np.arange(1, 301), np.arange(300)] = length
    assert nearest_neighbours(rows[:1], rows[1:], k=5)[0].tolist() == [[0, 1, 2, 3, 4]]
    assert nearest_neighbours(rows[:1], rows[:0:-1].copy(), k=5)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_neither_chunks_nor_threads_change_a_bit():
    rows = np.concatenate([cloud(180, 24, 10), np.repeat(cloud(3, 24, 11), 20, axis=0)])
    labels = np.random.default_rng(0).integers(0, 90, len(rows))
    before = torch.get_num_threads()
    found = []
    try:
        for working_bytes, num_threads in ((2**28, 1), (1, 1), (20_000, 2), (10**5, 3)):
            torch.set_num_threads(num_threads)
            found.append(
                (
                    *nearest_neighbours(rows, k=9, working_bytes=working_bytes),
                    *rank_relevant(rows, query_labels=labels, depth=9, working_bytes=working_bytes),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_ranks_by_hand():
    """On a line: 0 (a), 1 (b), 2 (b), 3 (a), 9 (c). 2 is as far from 1 as from 3: the index decides."""
    rows = np.array([[0.0], [1.0], [2.0], [3.0], [9.0]], dtype=np.float32)
    found = rank_relevant(rows, query_labels=np.array([7, 4, 4, 7, 5]), depth=2)
    assert found.first.tolist() == [3, 2, 1, 3, 0]
    assert found.hits.tolist() == [[False, False], [False, True], [True, False], [False, False], [False, False]]
    assert found.nearest.tolist() == [1, 0, 1, 2, 3]


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("depth", [1, 20])
def test_ranks_in_leave_one_out_are_those_of_the_full_sort(name, depth):
    """Classes of 1 to 4: most nearest relevant rows are far beyond the depth, and some queries have none."""
    rows = CLOUDS[name]()
    labels = np.random.default_rng(1).permutation(len(rows)) % 61
    found = rank_relevant(rows, query_labels=labels, depth=depth)
    own = range(len(rows))
    expected = slow_ranks(rows, rows, labels, labels, depth, own)
    assert_ranks(found, expected)
    assert max(expected[0]) > 40
    labels[:50] = np.arange(100, 150)
    alone = rank_relevant(rows, query_labels=labels, depth=depth)
    assert_ranks(alone, slow_ranks(rows, rows, labels, labels, depth, own))
    assert (alone.first[:50] == 0).all()


@pytest.mark.parametrize("name", CLOUDS)
def test_ranks_in_a_gallery_are_those_of_the_full_sort(name):
    """Labels of the queries that the gallery does not have, below, between and above its own."""
    rows = CLOUDS[name]()
    queries, gallery = rows[:40], rows[30:]
    query_labels = np.random.default_rng(2).integers(-5, 45, 40)
    gallery_labels = 2 * np.random.default_rng(3).integers(0, 20, len(gallery))
    found = rank_relevant(queries, gallery, query_labels=query_labels, gallery_labels=gallery_labels, depth=3)
    expected = slow_ranks(queries, gallery, query_labels, gallery_labels, 3, None)
    assert_ranks(found, expected)
    assert 0 in expected[0]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_query_does_not_find_the_row_that_it_is_itself(name):
    """Queries in the gallery, in another order, with distractors (label -1) behind them."""
    rows = CLOUDS[name]()
    own = np.random.default_rng(4).permutation(50)
    query_labels = np.arange(50) % 21
    gallery_labels = np.full(len(rows), -1)
    gallery_labels[own] = query_labels
    queries = rows[own]
    found = rank_relevant(
        queries, rows, query_labels=query_labels, gallery_labels=gallery_labels, depth=len(rows) - 1, own=own
    )
    assert_ranks(found, slow_ranks(queries, rows, query_labels, gallery_labels, len(rows) - 1, own))
    assert (found.nearest != own).all()


@pytest.mark.parametrize("name", CLOUDS)
def test_float64_scores_of_a_whole_gallery_give_the_same(name, monkeypatch):
    """They replace the exact distances of single pairs where very many rows are nearly as near as others."""
    scored = []

    def score(self, numbers, out, *, original=FineNearness.score):
        scored.append(len(numbers))
        return original(self, numbers, out)

    monkeypatch.setattr(FineNearness, "score", score)
    monkeypatch.setattr(ranking._Chunk, "_is_too_much", lambda chunk, *_numbers: chunk.nearness.finer() is not None)
    monkeypatch.setattr(ranking, "_FINE_AT_ONCE", 32)
    monkeypatch.setattr("raydml.evaluation.nearness._FINE_NUMBERS", 500)
    rows = CLOUDS[name]()
    for k in (1, 20):
        expected = slow_neighbours(rows, rows, k, leave_one_out=True)
        np.testing.assert_array_equal(nearest_neighbours(rows, k=k)[0], expected[0])
    labels = np.random.default_rng(1).permutation(len(rows)) % 61
    found = rank_relevant(rows, query_labels=labels, depth=4)
    assert_ranks(found, slow_ranks(rows, rows, labels, labels, 4, range(len(rows))))
    assert scored, "no query was scored again"
    assert max(scored) <= 32


def test_float64_scores_are_used_where_a_crowd_would_take_hours(monkeypatch):
    """Without them each of 300 queries settles 300 pairs."""
    settled = []

    def settle(self, queries, columns, *, original=EuclideanNearness.settle):
        settled.append(len(queries))
        return original(self, queries, columns)

    monkeypatch.setattr(EuclideanNearness, "settle", settle)
    labels = np.random.default_rng(1).permutation(340) % 170
    rank_relevant(CLOUDS["a crowd"](), query_labels=labels, depth=4)
    assert sum(settled) < 340 * 20, "most pairs are in order by float64 scores"


@pytest.mark.parametrize("kind", ["unit vectors", "a crowd"])
def test_the_rounding_bound_covers_the_error_of_float64(kind):
    rows = cloud(340, 64, 5) if kind == "unit vectors" else CLOUDS[kind]()
    points = EuclideanNearness(rows, None, torch.device("cpu"))
    out = torch.empty((len(rows), points.width), dtype=torch.float64)
    bound = points.finer().score(np.arange(len(rows)), out).numpy()[:, 0] / 2
    gallery = points.gallery.astype(np.longdouble) - points.centre
    exact = gallery @ gallery.T - (gallery**2).sum(axis=1) / 2
    error = np.abs(out[:, : len(rows)].numpy() - exact).max(axis=1)
    assert error.max() > 0
    assert (error <= bound).all()
    assert bound.max() < 1e-13 * max(1.0, float(np.square(rows).sum(axis=1).max()))


FLOATS = st.floats(-3, 3, width=32)
# What the rows are made of: few values on a grid, any floats, floats whose differences float32 cannot hold.
KINDS = {
    "grid": (st.integers(-2, 2), 1.0, 0.0),
    "tenths": (st.integers(-2, 2), 0.1, 0.0),
    "floats": (FLOATS, 1.0, 0.0),
    "far from the origin": (FLOATS, 1.0, 3_000.0),
    "collapsed": (FLOATS, 1e-7, 1.0),
    "tiny": (FLOATS, 1e-20, 0.0),
}


@st.composite
def searches(draw):
    """(queries, gallery or None, query labels, gallery labels, own, depth, working_bytes)."""
    values, scale, offset = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    shape = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=24)
    rows = draw(arrays(np.float64, draw(shape), elements=values, fill=st.nothing())) * scale + offset
    rows = rows.astype(np.float32)
    copied = draw(st.lists(st.integers(0, len(rows) - 1), max_size=6))
    rows = np.concatenate([rows, rows[copied]])
    labels = np.array(draw(st.lists(st.integers(-2, 5), min_size=len(rows), max_size=len(rows))))
    working_bytes = draw(st.sampled_from([1, 700, 2**28]))
    kind = draw(st.sampled_from(["leave one out", "gallery", "own"]))
    if kind == "leave one out":
        depth = draw(st.integers(1, len(rows) - 1))
        return rows, None, labels, None, None, depth, working_bytes
    num_queries = draw(st.integers(1, len(rows)))
    if kind == "own":
        own = np.array(draw(st.permutations(range(len(rows))))[:num_queries])
        depth = draw(st.integers(1, len(rows) - 1))
        return rows[own], rows, labels[own], labels, own, depth, working_bytes
    start = draw(st.integers(0, len(rows) - 1))
    gallery, gallery_labels = rows[start:], labels[start:]
    depth = draw(st.integers(1, len(gallery)))
    return rows[:num_queries], gallery, labels[:num_queries], gallery_labels, None, depth, working_bytes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(searches())
def test_any_rows_labels_depth_and_chunks_give_the_full_sort(search):
    queries, gallery, query_labels, gallery_labels, own, depth, working_bytes = search
    found = rank_relevant(
        queries,
        gallery,
        query_labels=query_labels,
        gallery_labels=gallery_labels,
        depth=depth,
        own=own,
        working_bytes=working_bytes,
    )
    searched = queries if gallery is None else gallery
    labels = query_labels if gallery is None else gallery_labels
    own = range(len(queries)) if gallery is None else own
    assert_ranks(found, slow_ranks(queries, searched, query_labels, labels, depth, own))
    if gallery is None or search[4] is None:
        indices, distances = nearest_neighbours(queries, gallery, k=depth, working_bytes=working_bytes)
        expected = slow_neighbours(queries, searched, depth, leave_one_out=gallery is None)
        np.testing.assert_array_equal(indices, expected[0])
        np.testing.assert_allclose(distances, expected[1], rtol=1e-6, atol=1e-45)


@pytest.fixture
def settled(monkeypatch):
    """The number of pairs in each request for exact distances."""
    pairs = []
    original = EuclideanNearness.settle

    def counted(self, queries, columns):
        pairs.append(len(queries))
        return original(self, queries, columns)

    monkeypatch.setattr(EuclideanNearness, "settle", counted)
    return pairs


def exact_scores(points, rows):
    """q.g - |g|^2 / 2 about the centre that the scores are made about, in float64."""
    gallery = points.gallery.astype(np.float64) - points.centre
    return (rows.astype(np.float64) - points.centre) @ gallery.T - (gallery**2).sum(axis=1) / 2


@pytest.mark.parametrize("dim", [3, 64, 512, 2048])
@pytest.mark.parametrize("kind", ["unit vectors", "far from the origin", "lengths from 1e-2 to 1e2", "all positive"])
def test_the_rounding_bound_covers_the_error_of_float32(dim, kind):
    assert torch.get_float32_matmul_precision() == "highest"
    rows = cloud(300, dim, dim)
    if kind == "far from the origin":
        rows += np.float32(50)
    elif kind == "all positive":
        rows = np.abs(rows)
    elif kind == "lengths from 1e-2 to 1e2":
        rows *= np.logspace(-2, 2, 300, dtype=np.float32)[:, None]
    points = EuclideanNearness(rows, None, torch.device("cpu"))
    out = torch.empty(300, points.width)
    bound = points.score(np.arange(300), out).numpy()[:, 0] / 2
    error = np.abs(out[:, :300].numpy() - exact_scores(points, rows)).max(axis=1)
    assert error.max() > 0
    assert (error <= bound).all()
    # A bound much wider than the differences of scores would need exact distances for every query.
    if kind == "unit vectors":
        assert bound.max() < 1e-4


def test_the_rounding_bound_follows_the_precision_of_products():
    points = EuclideanNearness(cloud(30, 64, 0), None, torch.device("cpu"))
    lengths, bounds = np.ones(2), []
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            bounds.append(points.rounding(lengths)[0])
    finally:
        torch.set_float32_matmul_precision("highest")
    # Inputs of 11 and of 8 bits: each product is off by up to 2^-10 and 2^-7 of the lengths, with a whole row 1 long.
    assert bounds[1] - bounds[0] >= 2**-10 * points.longest
    assert bounds[2] - bounds[0] >= 2**-7 * points.longest


def test_a_coarse_product_finds_the_same_neighbours():
    """With bfloat16 products, if the processor has them, the error of a score is a percent."""
    rows = np.concatenate([cloud(200, 64, 1), np.random.default_rng(1).integers(-40, 40, (60, 64))]).astype(np.float32)
    integers = rows[200:]
    labels = np.arange(260) % 87
    expected = [rank_relevant(rows, query_labels=labels, depth=9), nearest_neighbours(integers, k=9)[0]]
    try:
        torch.set_float32_matmul_precision("medium")
        found = [rank_relevant(rows, query_labels=labels, depth=9), nearest_neighbours(integers, k=9)[0]]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_ranks(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_rows_that_are_well_apart_need_few_exact_distances(settled):
    """2,000 clear cases: few pairs are too close for float32."""
    rows = cloud(2_000, 32, 20)
    labels = np.arange(2_000) % 700
    rank_relevant(rows, query_labels=labels, depth=10)
    # 20,000 neighbours and 4 million scores; around one rank in a hundred another row is within the rounding.
    assert sum(settled) < 8_000


def test_the_order_of_two_irrelevant_rows_does_not_matter(settled):
    """Of a thousand neighbours most are nearly as far as the next one; only those beside a relevant one matter."""
    rows, labels = cloud(3_000, 64, 21), np.arange(3_000) % 600
    found = rank_relevant(rows, query_labels=labels, depth=1_000)
    assert sum(settled) < 60_000  # of 3 million
    picked = [0, 7, 1_234, 2_999]
    expected = slow_ranks(rows[picked], rows, labels[picked], labels, 1_000, picked)
    assert_ranks(type(found)(*(values[picked] for values in found)), expected)


def test_a_large_distance_from_the_origin_needs_no_more_exact_distances(settled):
    """Without centring, float32 could not resolve these distances."""
    rows, labels = cloud(400, 16, 16, unit=False), np.arange(400) % 150
    rank_relevant(rows, query_labels=labels, depth=5)
    near = sum(settled)
    settled.clear()
    rank_relevant(rows + np.float32(4096), query_labels=labels, depth=5)
    assert sum(settled) <= 2 * near + 100


def test_float64_decides_where_float32_is_wrong(settled):
    """Around a point far from the others two rows differ in the seventh digit: the product alone has them reversed."""
    generator = np.random.default_rng(0)
    rows = (1 + 1e-7 * generator.integers(-8, 9, (80, 16))).astype(np.float32)
    rows[-1] = 5.0  # keeps the mean away from the heap
    labels = np.arange(80) % 30
    points = EuclideanNearness(rows, None, torch.device("cpu"))
    out = torch.empty(80, points.width)
    points.score(np.arange(80), out)
    np.fill_diagonal(out.numpy()[:, :80], -np.inf)
    expected = slow_ranks(rows, rows, labels, labels, 6, range(80))
    float32_alone = out[:, :80].argmax(dim=1).numpy()
    assert (float32_alone != np.array(expected[2])).mean() > 0.3, "the example must be one that float32 gets wrong"
    assert_ranks(rank_relevant(rows, query_labels=labels, depth=6), expected)
    assert sum(settled) > 0


def test_more_pairs_than_are_examined_at_once_find_the_same():
    """1,280 rows in heaps of four: the scores of the queries that need care are more than 2^20."""
    rows = np.repeat(cloud(320, 8, 4), 4, axis=0)
    labels = np.arange(1_280) % 571
    picked = np.arange(0, 1_280, 31)
    found = rank_relevant(rows, query_labels=labels, depth=11)
    expected = slow_ranks(rows[picked], rows, labels[picked], labels, 11, picked)
    assert_ranks(type(found)(*(values[picked] for values in found)), expected)
    neighbours = slow_neighbours(rows[:100], rows, 11, leave_one_out=False)
    np.testing.assert_array_equal(nearest_neighbours(rows[:100], rows, k=11)[0], neighbours[0])


def test_the_distance_to_a_heap_is_summed_once_a_query(monkeypatch):
    """900 of 1,000 rows are identical and no integers: a query needs few distances instead of 900."""
    rows = np.concatenate([np.repeat(cloud(1, 12, 40), 900, axis=0), cloud(100, 12, 41)])
    labels = np.random.default_rng(42).permutation(1_000) % 400
    summed = []
    original = EuclideanNearness.distances
    monkeypatch.setattr(
        EuclideanNearness, "distances", lambda self, *pairs: summed.append(len(pairs[0])) or original(self, *pairs)
    )
    found = rank_relevant(rows, query_labels=labels, depth=3)
    assert sum(summed) < 20 * 1_000
    picked = np.arange(0, 1_000, 97)
    expected = slow_ranks(rows[picked], rows, labels[picked], labels, 3, picked)
    assert_ranks(type(found)(*(values[picked] for values in found)), expected)


@pytest.mark.parametrize("num_rows", [500, 1_000, 2_000])
def test_the_scores_at_a_time_follow_working_bytes_and_not_the_square(num_rows, monkeypatch):
    sizes = []
    original = EuclideanNearness.score
    monkeypatch.setattr(
        EuclideanNearness, "score", lambda self, rows, out: sizes.append(out.nbytes) or original(self, rows, out)
    )
    rows = cloud(num_rows, 8, 0)
    nearest_neighbours(rows, k=1, working_bytes=100_000)
    assert max(sizes) <= 100_000
    assert sum(sizes) == 4 * num_rows * padded_width(num_rows)
    # At least one query is scored at a time, whatever its size.
    sizes.clear()
    nearest_neighbours(rows, k=1, working_bytes=1)
    assert len(sizes) == num_rows


MEMORY = """
import resource, sys
import numpy as np
from raydml.evaluation.ranking import ranked_relevant
num_rows, dim, depth, working_bytes = map(int, sys.argv[1:5])
generator = np.random.default_rng(0)
labels = np.sort(generator.integers(0, num_rows // 5, num_rows))
rows = generator.standard_normal((num_rows, dim), dtype=np.float32)
if sys.argv[5:]:  # a crowd
    rows[::10] *= 1e4
    rows = 1 + 1e-4 * rows
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
list(ranked_relevant(rows[:64], query_labels=np.zeros(64, dtype=np.int64), depth=1))  # what loads at the first call
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for queries, _ in ranked_relevant(rows, query_labels=labels, depth=depth, working_bytes=working_bytes):
    if queries.stop > 6_000:  # several chunks: all later ones take the same
        break
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_bytes(num_rows, dim, depth, working_bytes, *kind):
    """What a search of random rows, the worst ones, or of a crowd, takes beyond them: the growth of its own process."""
    command = [sys.executable, "-c", MEMORY, *map(str, (num_rows, dim, depth, working_bytes, *kind))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")


@on_linux
def test_memory_is_a_few_times_the_working_bytes():
    """All scores would be 576 MB."""
    assert peak_bytes(12_000, 16, 10, 2**26) < 4 * 2**26


@on_linux
def test_a_crowd_takes_no_more_memory():
    assert peak_bytes(12_000, 16, 10, 2**26, "crowd") < 5 * 2**26


@pytest.mark.slow
@on_linux
def test_stanford_online_products_fits_in_a_laptop():
    """60,502 x 512: the scores would be 14.6 GB."""
    assert peak_bytes(60_502, 512, 1_000, WORKING_BYTES) < 1.5e9


def bad(value):
    rows = cloud(10, 4, 14)
    rows[6, 2] = value
    return rows


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e18, -1e18])
def test_unusable_embeddings_are_named(value):
    with pytest.raises(RetrievalError, match=r"queries: 1 of 10 embeddings hold NaN.*first is row 6"):
        nearest_neighbours(bad(value), k=1)
    with pytest.raises(RetrievalError, match=r"gallery: 1 of 10 .* row 6"):
        nearest_neighbours(cloud(3, 4, 15), bad(value), k=1)
    with pytest.raises(RetrievalError, match=r"queries: 1 of 10 embeddings"):
        rank_relevant(bad(value), query_labels=np.zeros(10, dtype=np.int64), depth=1)


@pytest.mark.parametrize(
    ("queries", "gallery", "k", "message"),
    [
        (cloud(5, 4, 0), None, 5, r"k = 5 .* holds 4 images besides the query itself; use k in 1\.\.4"),
        (cloud(5, 4, 0), cloud(3, 4, 1), 4, r"k = 4 .* holds 3 images; use k in 1\.\.3"),
        (cloud(5, 4, 0), None, 0, r"k = 0"),
    ],
)
def test_more_neighbours_than_there_are_images_are_refused(queries, gallery, k, message):
    with pytest.raises(RetrievalError, match=message):
        nearest_neighbours(queries, gallery, k=k)


def test_a_depth_beyond_the_gallery_is_refused():
    rows, labels = cloud(5, 4, 0), np.arange(5)
    with pytest.raises(RetrievalError, match=r"k = 5 .* 4 images besides the query itself"):
        rank_relevant(rows, rows, query_labels=labels, gallery_labels=labels, depth=5, own=labels)
