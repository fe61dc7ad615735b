"""Exact search against a full float64 sort, with the ties, duplicates and sizes that break approximate ones."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from raydml import retrieval
from raydml.metrics import recall_at_k
from raydml.retrieval import RetrievalError, binary_codes, nearest_neighbours

GOLDEN = Path(__file__).parent / "golden"


def slow_neighbours(queries, gallery, k, leave_one_out):
    """The definition, one query at a time: sort all rows by (float64 distance, index), own index struck out."""
    indices, distances = [], []
    for number, query in enumerate(queries):
        ranked = sorted(
            (float(((row.astype(np.float64) - query) ** 2).sum()), other)
            for other, row in enumerate(gallery)
            if not (leave_one_out and other == number)
        )[:k]
        indices.append([other for _, other in ranked])
        distances.append([distance for distance, _ in ranked])
    return np.array(indices), np.array(distances)


def cloud(num_rows, dim, seed, unit=True):
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit else rows


CLOUDS = {
    "unit vectors": lambda: cloud(150, 16, 0),
    "one dimension": lambda: cloud(120, 1, 1, unit=False),
    "grid full of ties": lambda: np.random.default_rng(2).integers(0, 3, (150, 3)).astype(np.float32),
    "bits (Hamming ties)": lambda: np.random.default_rng(3).integers(0, 2, (120, 24)).astype(np.float32),
    "all the same point": lambda: np.full((90, 8), 0.3, dtype=np.float32),
    "two heaps of duplicates": lambda: np.repeat(cloud(2, 8, 4), 45, axis=0),
    "far from the origin": lambda: cloud(150, 8, 5, unit=False) + np.float32(4096),
    "nearly collapsed": lambda: cloud(1, 32, 6) + np.float32(1e-5) * cloud(150, 32, 7),
    "lengths from 1e-4 to 1e4": lambda: cloud(150, 8, 8) * np.logspace(-4, 4, 150, dtype=np.float32)[:, None],
}


@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_leave_one_out_is_the_full_sort(name, k):
    rows = CLOUDS[name]()
    indices, distances = nearest_neighbours(rows, k=k)
    expected_indices, expected_distances = slow_neighbours(rows, rows, k, leave_one_out=True)
    np.testing.assert_allclose(distances, expected_distances, rtol=1e-6)
    np.testing.assert_array_equal(indices, expected_indices)
    assert indices.dtype == np.int64
    assert distances.dtype == np.float32


@pytest.mark.parametrize("k", [1, 13, 110])
def test_gallery_search_removes_nothing(k):
    gallery = np.random.default_rng(9).integers(0, 4, (110, 3)).astype(np.float32)
    queries = gallery[:40]
    indices, distances = nearest_neighbours(queries, gallery, k=k)
    expected_indices, expected_distances = slow_neighbours(queries, gallery, k, leave_one_out=False)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(distances, expected_distances)
    assert (distances[:, 0] == 0).all()


def test_a_duplicate_stays_a_neighbour_and_only_the_own_index_goes():
    rows = np.array([[0, 0], [5, 5], [0, 0], [9, 9]], dtype=np.float32)
    indices, distances = nearest_neighbours(rows, k=3)
    assert indices.tolist() == [[2, 1, 3], [3, 0, 2], [0, 1, 3], [1, 0, 2]]
    assert distances.tolist() == [[0, 50, 162], [32, 50, 50], [0, 50, 162], [32, 162, 162]]


def test_ties_at_the_last_place_take_the_lowest_index_beyond_the_candidates():
    """300 rows at the same distance: many more than any slack of candidates."""
    rows = np.zeros((301, 300), dtype=np.float32)
    rows[np.arange(1, 301), np.arange(300)] = 1.0
    assert nearest_neighbours(rows[:1], rows[1:], k=5)[0].tolist() == [[0, 1, 2, 3, 4]]
    assert nearest_neighbours(rows[:1], rows[:0:-1].copy(), k=5)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_neither_chunks_nor_threads_change_a_bit():
    rows = np.concatenate([cloud(180, 24, 10), np.repeat(cloud(3, 24, 11), 20, axis=0)])
    whole = nearest_neighbours(rows, k=9, num_threads=1)
    for working_bytes, num_threads in ((1, 1), (20_000, 2), (10**6, None)):
        other = nearest_neighbours(rows, k=9, working_bytes=working_bytes, num_threads=num_threads)
        np.testing.assert_array_equal(whole[0], other[0])
        np.testing.assert_array_equal(whole[1], other[1])


@pytest.mark.parametrize("dim", [3, 64, 512, 2048])
def test_the_rounding_margin_covers_what_faiss_loses(dim):
    rows = cloud(200, dim, dim)
    gallery = retrieval._Gallery(rows)
    shifted = gallery._shift(rows)
    rough, candidates = gallery.index.search(shifted, 200)
    error = np.abs(rough - retrieval._squared_distances(rows, rows[candidates])).max(axis=1)
    margin = gallery._rounding_margin(shifted)
    assert (error < margin).all()
    assert margin.max() < 1e-3, "a margin this wide would send every query to the slow path"


def test_a_long_way_from_the_origin_costs_no_second_search(monkeypatch):
    """Without centring, float32 cannot tell these distances apart and every query would be searched again."""
    again = []
    original = retrieval._Gallery._all_within
    monkeypatch.setattr(retrieval._Gallery, "_all_within", lambda self, *args: again.append(1) or original(self, *args))
    nearest_neighbours(cloud(200, 16, 16, unit=False) + np.float32(4096), k=5)
    assert len(again) <= 2


def test_working_memory_follows_the_bound(monkeypatch):
    sizes = []
    original = retrieval._squared_distances
    monkeypatch.setattr(retrieval, "_squared_distances", lambda q, rows: sizes.append(rows.nbytes) or original(q, rows))
    nearest_neighbours(cloud(500, 32, 12), k=20, working_bytes=1_000_000)
    assert len(sizes) > 1
    # The float32 rows are a quarter of what is counted for one chunk (a float64 copy twice over).
    assert max(sizes) <= 1_000_000 / 4


def test_threads_are_the_callers_and_are_put_back(monkeypatch):
    seen = []
    original = retrieval._Gallery.nearest

    def spy(self, *args):
        seen.append(faiss.omp_get_max_threads())
        return original(self, *args)

    monkeypatch.setattr(retrieval._Gallery, "nearest", spy)
    before_torch, before_faiss = torch.get_num_threads(), faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    torch.set_num_threads(1)
    try:
        nearest_neighbours(cloud(20, 4, 13), k=2)
        nearest_neighbours(cloud(20, 4, 13), k=2, num_threads=3)
        assert seen == [1, 3]
        assert faiss.omp_get_max_threads() in (1, 2)  # 1 where faiss and torch share one OpenMP
    finally:
        torch.set_num_threads(before_torch)
        faiss.omp_set_num_threads(before_faiss)


def bad(value):
    rows = cloud(10, 4, 14)
    rows[6, 2] = value
    return rows


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e18])
def test_unusable_embeddings_are_named(value):
    with pytest.raises(RetrievalError, match=r"queries: 1 of 10 embeddings hold NaN.*first is row 6"):
        nearest_neighbours(bad(value), k=1)
    with pytest.raises(RetrievalError, match=r"gallery: 1 of 10 .* row 6"):
        nearest_neighbours(cloud(3, 4, 15), bad(value), k=1)


@pytest.mark.parametrize(
    ("queries", "gallery", "k", "message"),
    [
        (cloud(5, 4, 0), None, 5, r"k = 5 .* holds 4 images besides the query itself; use k in 1\.\.4"),
        (cloud(5, 4, 0), cloud(3, 4, 1), 4, r"k = 4 .* holds 3 images; use k in 1\.\.3"),
        (cloud(5, 4, 0), None, 0, r"k = 0"),
        (cloud(5, 4, 0), cloud(5, 3, 1), 1, r"4 dimensions, the gallery has 3"),
        (cloud(5, 4, 0).astype(np.float64), None, 1, r"expected float32"),
        (cloud(5, 4, 0)[0], None, 1, r"shape \(4,\)"),
        (cloud(5, 4, 0)[:0], None, 1, r"shape \(0, 4\)"),
    ],
)
def test_wrong_arguments_are_explained(queries, gallery, k, message):
    with pytest.raises(RetrievalError, match=message):
        nearest_neighbours(queries, gallery, k=k)


def test_threads_below_one_are_refused():
    with pytest.raises(RetrievalError, match="num_threads: 0"):
        nearest_neighbours(cloud(5, 4, 0), k=1, num_threads=0)


# --- binary codes --------------------------------------------------------------------------------------------------


def test_a_bit_is_whether_a_coordinate_is_above_zero():
    rows = np.array([[0.0, -0.0, 1e-45, -1e-45], [3.0, -3.0, np.inf, -np.inf]], dtype=np.float32)
    codes = binary_codes(rows)
    assert codes.tolist() == [[0, 0, 1, 0], [1, 0, 1, 0]]
    assert codes.dtype == np.float32
    with pytest.raises(RetrievalError, match="NaN, which has no sign"):
        binary_codes(np.array([[1.0, np.nan]], dtype=np.float32))


def slow_hamming(queries, gallery, k, leave_one_out):
    """Bits that differ, counted one pair at a time on Python's integers; sorted by (distance, index)."""
    queries, gallery = (
        [int("".join("1" if x > 0 else "0" for x in row), 2) for row in side] for side in (queries, gallery)
    )
    ranked = [
        sorted((bin(query ^ row).count("1"), j) for j, row in enumerate(gallery) if not (leave_one_out and i == j))[:k]
        for i, query in enumerate(queries)
    ]
    return np.array([[j for _, j in row] for row in ranked]), np.array([[d for d, _ in row] for row in ranked])


@pytest.mark.parametrize(("num_bits", "k"), [(1, 3), (6, 40), (24, 9), (2048, 60)])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_neighbours_of_codes_are_those_by_hamming_distance_and_index(num_bits, k, leave_one_out):
    rows = np.random.default_rng(num_bits).standard_normal((150, num_bits)).astype(np.float32)
    rows[::7] = rows[3] * 2  # other lengths, the same signs
    queries = rows if leave_one_out else rows[40:80]
    codes = binary_codes(rows)
    found = nearest_neighbours(binary_codes(queries), None if leave_one_out else codes, k=k)
    expected = slow_hamming(queries, rows, k, leave_one_out)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])  # integers: exact, without a tolerance


@pytest.mark.parametrize("case", ["binary2", "binary3", "binary4"])
def test_golden_classification_recall_of_codes(case):
    """Between the bounds of all orders of ties, and so exact where they meet; binary2 has one order only."""
    arrays = np.load(GOLDEN / "classification_recall.npz")
    about = json.loads((GOLDEN / "classification_recall.json").read_text(encoding="utf-8"))
    facts = next(entry for entry in about["cases"] if entry["case"] == case)
    of = {name.removeprefix(f"{case}__"): arrays[name] for name in arrays.files if name.startswith(f"{case}__")}
    codes, gallery = binary_codes(of["query_embeddings"]), None
    gallery_labels = of.get("db_labels", of["query_labels"])
    if not facts["self_retrieval"]:
        gallery = binary_codes(of["db_embeddings"])
    indices, distances = nearest_neighbours(codes, gallery, k=facts["k"])
    np.testing.assert_array_equal(distances[0], of["hamming_row0"][indices[0]])
    recalls = recall_at_k(gallery_labels[indices], of["query_labels"], range(1, facts["k"] + 1))
    found = 100 * np.array(list(recalls.values()))
    assert (found >= of["recall_pessimistic"] - 1e-4).all()
    assert (found <= of["recall_optimistic"] + 1e-4).all()
    if case == "binary2":
        np.testing.assert_allclose(of["recall_optimistic"], of["recall_pessimistic"])
        np.testing.assert_allclose(found, of["recall"], rtol=1e-6)
