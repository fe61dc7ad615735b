"""Binary codes against bits counted one pair at a time, 8-bit integers against values by hand."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydml.evaluation import nearness as codes
from raydml.evaluation.nearness import RetrievalError, binary_codes, int8_codes
from tests.evaluation.joined_ranks import assert_ranks, rank_relevant_codes
from tests.golden_vectors import golden_arrays, golden_facts


def test_a_bit_is_whether_a_coordinate_is_above_zero():
    rows = np.array([[0.0, -0.0, 1e-45, -1e-45], [3.0, -3.0, np.inf, -np.inf]], dtype=np.float32)
    found = binary_codes(rows)
    assert found.tolist() == [[0b00100000], [0b10100000]]
    assert found.dtype == np.uint8
    with pytest.raises(RetrievalError, match="NaN, which has no sign"):
        binary_codes(np.array([[1.0, np.nan]], dtype=np.float32))


@pytest.mark.parametrize(("num_bits", "num_bytes"), [(1, 1), (8, 1), (9, 2), (64, 8), (65, 9), (512, 64)])
def test_eight_bits_to_a_byte(num_bits, num_bytes):
    rows = np.random.default_rng(num_bits).standard_normal((5, num_bits)).astype(np.float32)
    found = binary_codes(rows)
    assert found.shape == (5, num_bytes)
    assert np.unpackbits(found, axis=1)[:, :num_bits].tolist() == (rows > 0).astype(int).tolist()


def slow_ranks(queries, gallery, query_labels, gallery_labels, depth, own):
    """Bits that differ, counted one pair at a time on Python's integers; sorted by (distance, index)."""
    queries, gallery = (
        [int("".join("1" if x > 0 else "0" for x in row), 2) for row in side] for side in (queries, gallery)
    )
    first, hits, nearest = [], [], []
    for number, query in enumerate(queries):
        order = sorted(
            (bin(query ^ row).count("1"), j) for j, row in enumerate(gallery) if own is None or own[number] != j
        )
        right = [bool(gallery_labels[other] == query_labels[number]) for _, other in order]
        first.append(right.index(True) + 1 if True in right else 0)
        hits.append(right[:depth])
        nearest.append(order[0][1])
    return first, hits, nearest


# Dimensions that fill their last byte and their last eight bytes, and that do not.
@pytest.mark.parametrize(
    ("num_bits", "depth"), [(1, 3), (6, 40), (24, 9), (61, 5), (64, 5), (65, 5), (200, 30), (2048, 60)]
)
@pytest.mark.parametrize("kind", ["leave one out", "gallery", "own"])
def test_ranks_are_those_by_hamming_distance_and_index(num_bits, depth, kind):
    generator = np.random.default_rng(num_bits)
    rows = generator.standard_normal((150, num_bits)).astype(np.float32)
    rows[::7] = rows[3] * 2  # other lengths, the same signs
    rows[5] = -rows[3]  # all bits differ
    labels = generator.integers(0, 60, 150)
    own = None
    if kind == "leave one out":
        found = rank_relevant_codes(binary_codes(rows), query_labels=labels, depth=depth, working_bytes=40_000)
        expected = slow_ranks(rows, rows, labels, labels, depth, range(150))
    else:
        own = generator.permutation(150)[:40] if kind == "own" else None
        places = np.arange(40, 80) if own is None else own
        found = rank_relevant_codes(
            binary_codes(rows[places]),
            binary_codes(rows),
            query_labels=labels[places],
            gallery_labels=labels,
            depth=depth,
            own=own,
        )
        expected = slow_ranks(rows[places], rows, labels[places], labels, depth, own)
    assert_ranks(found, expected)


def test_no_distance_of_codes_is_computed_twice(monkeypatch):
    """The index is part of the score, so no two scores are equal."""
    rows = np.random.default_rng(0).standard_normal((200, 5)).astype(np.float32)
    labels = np.arange(200) % 67
    expected = slow_ranks(rows, rows, labels, labels, 9, range(200))
    monkeypatch.setattr(codes.HammingNearness, "settle", lambda _self, queries, _columns: np.zeros(0)[queries])
    assert_ranks(rank_relevant_codes(binary_codes(rows), query_labels=labels, depth=9), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_few_bits_give_the_full_sort(data):
    num_rows, num_bits = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 12))
    bits = np.array(data.draw(st.lists(st.integers(0, 2**num_bits - 1), min_size=num_rows, max_size=num_rows)))
    rows = ((bits[:, None] >> np.arange(num_bits)) & 1).astype(np.float32)
    labels = np.array(data.draw(st.lists(st.integers(0, 6), min_size=num_rows, max_size=num_rows)))
    depth = data.draw(st.integers(1, num_rows - 1))
    found = rank_relevant_codes(
        binary_codes(rows), query_labels=labels, depth=depth, working_bytes=data.draw(st.sampled_from([1, 600, 2**28]))
    )
    assert_ranks(found, slow_ranks(rows, rows, labels, labels, depth, range(num_rows)))


@pytest.mark.parametrize("case", ["binary2", "binary3", "binary4"])
def test_golden_classification_recall_of_codes(case):
    """Between the bounds of all orders of ties, and so exact where they meet; binary2 has one order only."""
    arrays = golden_arrays("classification_recall")
    about = golden_facts("classification_recall")
    facts = next(entry for entry in about["cases"] if entry["case"] == case)
    of = {name.removeprefix(f"{case}__"): arrays[name] for name in arrays if name.startswith(f"{case}__")}
    queries, gallery, gallery_labels = binary_codes(of["query_embeddings"]), None, None
    if not facts["self_retrieval"]:
        gallery, gallery_labels = binary_codes(of["db_embeddings"]), of["db_labels"]
    ranks = rank_relevant_codes(
        queries, gallery, query_labels=of["query_labels"], gallery_labels=gallery_labels, depth=facts["k"]
    )
    # Of all that the first query could find nothing is nearer than what it found.
    others = np.delete(of["hamming_row0"], 0) if gallery is None else of["hamming_row0"]
    assert of["hamming_row0"][ranks.nearest[0]] == others.min()
    by_rank = [100 * np.mean((ranks.first >= 1) & (ranks.first <= k)) for k in range(1, facts["k"] + 1)]
    by_hits = 100 * np.maximum.accumulate(ranks.hits, axis=1).mean(axis=0)
    np.testing.assert_allclose(by_rank, by_hits)
    assert (by_hits >= of["recall_pessimistic"] - 1e-4).all()
    assert (by_hits <= of["recall_optimistic"] + 1e-4).all()
    if case == "binary2":
        np.testing.assert_allclose(of["recall_optimistic"], of["recall_pessimistic"])
        np.testing.assert_allclose(by_hits, of["recall"], rtol=1e-6)


def test_threads_are_torchs_and_are_put_back(monkeypatch):
    seen = []
    original = codes.HammingNearness.score
    monkeypatch.setattr(
        codes.HammingNearness, "score", lambda *args: seen.append(faiss.omp_get_max_threads()) or original(*args)
    )
    rows = binary_codes(np.random.default_rng(0).standard_normal((20, 9)).astype(np.float32))
    before_torch, before_faiss = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(2)
        torch.set_num_threads(3)
        callers = faiss.omp_get_max_threads()  # 3 where faiss and torch share one OpenMP
        rank_relevant_codes(rows, query_labels=np.arange(20) % 4, depth=2)
        assert seen == [3]
        assert faiss.omp_get_max_threads() == callers
        with pytest.raises(AssertionError):  # also where the search fails
            rank_relevant_codes(rows, query_labels=np.arange(19), depth=2)
        assert faiss.omp_get_max_threads() == callers
    finally:
        torch.set_num_threads(before_torch)
        faiss.omp_set_num_threads(before_faiss)


def test_a_depth_out_of_range_is_refused():
    rows, labels = np.zeros((5, 3), dtype=np.uint8), np.arange(5)
    with pytest.raises(RetrievalError, match=r"k = 5 .* use k in 1\.\.4"):
        rank_relevant_codes(rows, query_labels=labels, depth=5)
    with pytest.raises(RetrievalError, match="k = 0"):
        rank_relevant_codes(rows, query_labels=labels, depth=0)


def test_more_bits_than_32_bit_scores_hold_are_refused_before_anything_is_computed():
    """4,096 codes of 65,536 bytes: 2^31 exactly. With 64 codes less they fit, also where all bits differ."""
    labels = np.zeros(4_096, dtype=np.int64)
    rows = np.zeros((4_096, 2**16), dtype=np.uint8)
    with pytest.raises(RetrievalError, match=r"4096 codes of 524288 bits.* below 2\^31. Cure: shorter codes"):
        rank_relevant_codes(rows[:1], rows, query_labels=labels[:1], gallery_labels=labels, depth=1)
    # 229,824 bits of 9,344 codes are 8,192 below 2^31, but the score counts the column too.
    many = np.zeros((9_344, 28_728), dtype=np.uint8)
    with pytest.raises(RetrievalError, match=r"9344 codes of 229824 bits"):
        rank_relevant_codes(many[:1], many, query_labels=np.zeros(1, int), gallery_labels=np.zeros(9_344, int), depth=1)
    few = rows[:-64]
    few[-2:] = 255
    ones = np.full((1, 2**16), 255, dtype=np.uint8)
    found = rank_relevant_codes(
        ones, few, query_labels=np.ones(1, dtype=np.int64), gallery_labels=np.arange(len(few)), depth=1
    )
    assert (found.first.tolist(), found.nearest.tolist()) == ([4], [len(few) - 2])


def test_integers_by_hand():
    """The largest of all, -2, becomes -127: a scale of 63.5 for every row."""
    rows = np.array([[1.0, -2.0, 0.0], [0.1, 0.012, -0.02]], dtype=np.float32)
    found = int8_codes(rows)
    # 63.5 lies between two integers and goes to the even one; 6.35, 0.762 and -1.27 to the nearest.
    assert found.tolist() == [[64, -127, 0], [6, 1, -1]]
    assert found.dtype == np.float32


def test_integers_fit_into_eight_bits_and_lose_half_a_step():
    rows = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32)
    found = int8_codes(rows)
    assert (found == found.astype(np.int8)).all()
    assert np.abs(found).max() == 127
    step = np.abs(rows).max() / 127
    assert np.abs(found * step - rows).max() <= step / 2 * (1 + 1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_zeros_become_zeros_and_tiny_values_do_not(value):
    found = int8_codes(np.array([[value, 0.0], [-value, 0.0]], dtype=np.float32))
    assert found.tolist() == [[127.0 * (value > 0), 0], [-127.0 * (value > 0), 0]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_integers_of_nan_and_infinity_are_refused(value):
    with pytest.raises(RetrievalError, match="NaN or infinity, so they have no int8 codes"):
        int8_codes(np.array([[1.0, value]], dtype=np.float32))
