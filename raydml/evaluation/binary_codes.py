"""Quantised embeddings: their signs as binary codes, compared by Hamming distance, and 8-bit integers.

Hamming distances are small integers, so many neighbours tie. Equal distances are in order of index in the gallery, as
everywhere in raydml; published numbers of code that orders ties at random may differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raydml.evaluation.nearness import (
    MASKED_SCORE,
    Floats,
    Integers,
    RetrievalError,
    check_num_neighbours,
    padded_width,
)
from raydml.evaluation.ranking import WORKING_BYTES, Ranks, ranks_by
from raydml.ops.clustering import faiss_threads

Codes = NDArray[np.uint8]


def binary_codes(embeddings: Floats) -> Codes:
    """Return the packed signs (N, ceil(D / 8)) of embeddings (N, D): 1 for a coordinate above 0, else 0 (also for 0).

    Source: Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019.

    Raises RetrievalError for NaN, which has no sign.
    """
    if np.isnan(embeddings).any():
        raise RetrievalError("embeddings hold NaN, which has no sign, so they have no binary codes.")
    return np.packbits(embeddings > 0, axis=1)


def int8_codes(embeddings: Floats) -> Floats:
    """Round embeddings (N, D) to integers in -127..127, as float32, with one scale for all.

    Symmetric scalar quantisation: Euclidean distances keep their order up to rounding. Stored as int8 they take a
    quarter of the memory. Raises RetrievalError for NaN and infinity.
    """
    if not np.isfinite(embeddings).all():
        raise RetrievalError("embeddings hold NaN or infinity, so they have no int8 codes.")
    largest = float(np.abs(embeddings).max())
    return np.rint(embeddings / (largest or 1.0) * 127.0).astype(np.float32)


def ranked_relevant_codes(
    queries: Codes,
    gallery: Codes | None = None,
    *,
    query_labels: Integers,
    gallery_labels: Integers | None = None,
    depth: int,
    own: Integers | None = None,
    working_bytes: int = WORKING_BYTES,
) -> Iterator[tuple[slice, Ranks]]:
    """Yield what `ranking.ranked_relevant` yields, by Hamming distance, on the CPU with as many threads as torch.

    queries: (N, bytes), gallery: (M, bytes) or None for leave-one-out, of `binary_codes`; the rest as there.

    Raises RetrievalError: arrays of another kind, and as `ranked_relevant`.
    """
    nearness = HammingNearness(queries, gallery, own)
    check_num_neighbours(depth, nearness.num_rows, is_own=nearness.own is not None)
    with faiss_threads():
        yield from ranks_by(nearness, query_labels, gallery_labels, depth, working_bytes)


class HammingNearness:
    """Hamming distance. The score -(distance * width + column) is different for each row, so there are no ties."""

    device = torch.device("cpu")
    dtype = torch.int32

    def __init__(self, queries: Codes, gallery: Codes | None, own: Integers | None = None) -> None:
        self.own = np.arange(len(queries)) if gallery is None else own
        for name, codes in (("queries", queries), ("gallery", queries if gallery is None else gallery)):
            if codes.ndim != 2 or codes.dtype != np.uint8 or 0 in codes.shape:
                raise RetrievalError(
                    f"{name}: expected packed bits, uint8 (N, bytes); got {codes.dtype} {codes.shape}."
                )
        if gallery is not None and queries.shape[1] != gallery.shape[1]:
            raise RetrievalError(f"queries have {queries.shape[1]} bytes, the gallery has {gallery.shape[1]}.")
        self.queries = _whole_words(queries)
        self.gallery = self.queries if gallery is None else _whole_words(gallery)
        self.num_queries, self.num_rows = len(self.queries), len(self.gallery)
        self.width = padded_width(self.num_rows)
        if (8 * self.gallery.shape[1] + 1) * self.width >= 2**31:
            raise RetrievalError(
                f"{self.num_rows} codes of {8 * self.gallery.shape[1]} bits: their product must stay below 2^31. "
                "Cure: shorter codes, or fewer images"
            )
        # Padded rows, so that faiss writes the distances directly into the scores.
        self.padded = np.pad(self.gallery, ((0, self.width - self.num_rows), (0, 0)))
        self.minus_columns = -torch.arange(self.width, dtype=torch.int32)
        self.copy_numbers = torch.zeros(self.width, dtype=torch.int64)  # not needed: no scores are equal

    def score(self, rows: slice, out: Tensor) -> Tensor:
        import faiss  # here, because training needs no faiss

        num_queries = rows.stop - rows.start
        assert out.is_contiguous()
        pointers = [faiss.swig_ptr(array) for array in (self.queries[rows], self.padded)]
        faiss.hammings(  # type: ignore[attr-defined,unused-ignore]
            *pointers, num_queries, self.width, self.padded.shape[1], faiss.swig_ptr(out.numpy())
        )
        torch.add(self.minus_columns, out, alpha=-self.width, out=out)
        out[:, self.num_rows :] = MASKED_SCORE[self.dtype]
        return torch.zeros((num_queries, 1), dtype=self.dtype)

    def settle(self, queries: Integers, columns: Integers) -> NDArray[np.float64]:
        return np.bitwise_count(self.queries[queries] ^ self.gallery[columns]).sum(axis=1).astype(np.float64)


def _whole_words(codes: Codes) -> Codes:
    """Pad each code with zero bytes to a multiple of 8, the unit that faiss compares."""
    return np.ascontiguousarray(np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8))))
