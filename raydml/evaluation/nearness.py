"""How near queries and gallery rows are: fast scores of bounded error, and exact squared distances of single pairs.

The score of a pair is ``q.g - |g|^2 / 2``, larger for nearer rows, from one float32 matrix product. Its rounding
error depends on the position of a row in the matrix, but is bounded. Two scores whose difference is less than twice the
bound do not give the order of the two rows; the distances, summed in float64, do.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Codes = NDArray[np.uint8]

#: The score of a column that is no candidate (padding, or the query itself): below every real score, and finite.
#: bfloat16 holds the float value too, so no matrix product rounds it.
MASKED_SCORE = {
    torch.float32: -1.5 * 2.0**127,
    torch.float64: -1.5 * 2.0**127,
    torch.int32: torch.iinfo(torch.int32).min,
}
#: The score of a gallery row that a query cannot find, see `HiddenRows`: below every real score, above the padding's.
HIDDEN_SCORE = {torch.float32: -(2.0**127), torch.float64: -(2.0**127), torch.int32: torch.iinfo(torch.int32).min + 1}
# Score matrices have a multiple of this many columns, so that they divide into groups of columns.
_COLUMN_MULTIPLE = 64
# The square of a larger number overflows float32. NaN fails every comparison.
_LARGEST = 1e17
# Bytes of float64 differences at a time, few enough for the cache of a CPU.
_CACHE_BYTES = 2**21
# Numbers of the gallery that are converted to float64 at a time.
_FINE_NUMBERS = 2**22


class RetrievalError(ValueError):
    """Embeddings that cannot be searched: NaN, too many bits, or fewer rows than neighbours requested."""


class Nearness(Protocol):
    """How near each of Q queries is to each of M gallery rows.

    own: (Q,) the gallery row that is the query itself, which it cannot find; None if there is none. width: columns of
    the scores, M rounded up by `padded_width`. device, dtype: of the scores. first_copies: (width,) the first gallery
    row that is identical to each, -1 in the padding; copy_numbers: (width,) the number of identical gallery rows with a
    lower index; both on the device.
    """

    num_queries: int
    num_rows: int
    width: int
    own: Integers | None
    device: torch.device
    dtype: torch.dtype

    @property
    def first_copies(self) -> Tensor: ...

    @property
    def copy_numbers(self) -> Tensor: ...

    def finer(self) -> Nearness | None:
        """Return the same nearness with finer scores, which take longer; None where there are none."""
        ...

    def score(self, numbers: Integers, out: Tensor) -> Tensor:
        """Fill out (n, width) with the scores of some queries, MASKED_SCORE in the padding.

        Returns margins (n, 1): of two scores of a query that differ by more, the larger one is nearer.
        """
        ...

    def settle(self, queries: Integers, columns: Integers) -> NDArray[np.float64]:
        """Return the exact squared distances (P,) of pairs of a query and a gallery row."""
        ...


class EuclideanNearness:
    """Euclidean distance: the gallery is on the device, in the form that one matrix product scores."""

    dtype = torch.float32

    def __init__(
        self, queries: Floats, gallery: Floats | None, device: torch.device, own: Integers | None = None
    ) -> None:
        self.own = np.arange(len(queries)) if gallery is None else own
        self.queries, self.gallery = queries, queries if gallery is None else gallery
        self.device, self.num_queries = device, len(queries)
        self.num_rows, self.dim = self.gallery.shape
        self.width = padded_width(self.num_rows)
        # A shift changes no distance, but rounding grows with the length of the vectors.
        self.centre = self.gallery.mean(axis=0, dtype=np.float64).astype(np.float32)
        columns = np.zeros((self.width, self.dim + 1), dtype=np.float32)
        np.subtract(self.gallery, self.centre, out=columns[: self.num_rows, : self.dim])
        squares = np.einsum("md,md->m", columns, columns, dtype=np.float64)
        columns[:, self.dim] = -squares / 2
        columns[self.num_rows :, self.dim] = MASKED_SCORE[self.dtype]
        self.longest = float(np.sqrt(squares.max()))
        self.columns = torch.from_numpy(columns).to(device)

    def finer(self) -> FineNearness:
        return FineNearness(self)

    def score(self, numbers: Integers, out: Tensor) -> Tensor:
        points = np.ones((len(numbers), self.dim + 1), dtype=np.float32)
        np.subtract(self.queries[numbers], self.centre, out=points[:, :-1])
        torch.mm(torch.from_numpy(points).to(self.device), self.columns.T, out=out)
        points[:, -1] = 0
        rounding = self.rounding(np.sqrt(np.einsum("nd,nd->n", points, points, dtype=np.float64)))
        margins = np.nextafter((2 * rounding).astype(np.float32), np.float32(np.inf))  # not rounded down
        return torch.from_numpy(margins[:, None]).to(self.device)

    def rounding(self, lengths: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bound the error of the scores of queries of these lengths (n,), measured from the centre.

        The error of a sum of n products in float32 is at most 8 sqrt(n) u times the lengths, in any order, with a
        probability of 1 - 10^-13 (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019,
        theorem 3.1 with lambda = 8). Another 16 u cover the shift, the halved squares and the comparisons. Everything
        below the smallest normal number may be lost.
        """
        unit = np.finfo(np.float32).eps / 2
        inputs = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
        relative = (8 * np.sqrt(self.dim + 1) + 16) * unit + inputs
        lost = (self.dim + 1) * float(np.finfo(np.float32).smallest_normal)
        return relative * self.longest * (lengths + self.longest) + lost

    def settle(self, queries: Integers, columns: Integers) -> NDArray[np.float64]:
        if len(columns) > self.num_rows:  # many may be pairs of a query with identical rows
            pairs = queries * self.num_rows + self._first_copies[columns]
            pairs, places = np.unique(pairs, return_inverse=True)
            return self.distances(*np.divmod(pairs, self.num_rows))[places]
        return self.distances(queries, columns)

    def distances(self, queries: Integers, columns: Integers) -> NDArray[np.float64]:
        """Sum the squared distances of pairs (P,) in float64."""
        distances = np.empty(len(queries))
        at_once = max(1, _CACHE_BYTES // (8 * self.dim))
        for start in range(0, len(queries), at_once):
            part = slice(start, start + at_once)
            differences = self.gallery[columns[part]] - self.queries[queries[part]].astype(np.float64)
            distances[part] = np.square(differences, out=differences).sum(axis=1)
        return distances

    @cached_property
    def _first_copies(self) -> Integers:
        """(M,) the first gallery row that is identical to each."""
        rows = np.ascontiguousarray(self.gallery).view(np.dtype((np.void, 4 * self.dim)))[:, 0]
        _, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
        return first[inverse]

    @cached_property
    def first_copies(self) -> Tensor:
        padding = (0, self.width - self.num_rows)
        return torch.from_numpy(np.pad(self._first_copies, padding, constant_values=-1)).to(self.device)

    @cached_property
    def copy_numbers(self) -> Tensor:
        order = np.argsort(self._first_copies, kind="stable")
        firsts = self._first_copies[order]
        numbers = np.zeros(self.width, dtype=np.int64)
        numbers[order] = np.arange(self.num_rows) - np.searchsorted(firsts, firsts)
        return torch.from_numpy(numbers).to(self.device)


class FineNearness:
    """Euclidean distance by float64 scores, for queries among which many rows are nearly as near as others.

    nearness: the same by float32 scores.
    """

    dtype = torch.float64

    def __init__(self, nearness: EuclideanNearness) -> None:
        self._nearness = nearness
        self.own, self.device = nearness.own, nearness.device
        self.num_queries, self.num_rows, self.width = nearness.num_queries, nearness.num_rows, nearness.width
        self.settle = nearness.settle

    def finer(self) -> None:
        return None

    @property
    def first_copies(self) -> Tensor:
        return self._nearness.first_copies

    @property
    def copy_numbers(self) -> Tensor:
        return self._nearness.copy_numbers

    def score(self, numbers: Integers, out: Tensor) -> Tensor:
        gallery, queries = self._nearness.gallery, self._nearness.queries
        centre = self._nearness.centre.astype(np.float64)
        points = queries[numbers] - centre
        on_device = torch.from_numpy(points).to(self.device)
        at_once = max(1, _FINE_NUMBERS // self._nearness.dim)
        for start in range(0, self.num_rows, at_once):
            rows = torch.from_numpy(gallery[start : start + at_once]).to(self.device, torch.float64)
            rows -= torch.from_numpy(centre).to(self.device)
            part = out[:, start : start + len(rows)]
            torch.mm(on_device, rows.T, out=part)
            part -= rows.square().sum(dim=1) / 2
        out[:, self.num_rows :] = MASKED_SCORE[self.dtype]
        # As for float32, with another 16 u for the rounding of the shift; see `EuclideanNearness.rounding`.
        relative = (8 * np.sqrt(self._nearness.dim + 1) + 32) * np.finfo(np.float64).eps / 2
        lengths = np.sqrt(np.einsum("nd,nd->n", points, points))
        rounding = relative * self._nearness.longest * (lengths + self._nearness.longest)
        return torch.from_numpy(np.nextafter(2 * rounding, np.inf)[:, None]).to(self.device)


class HammingNearness:
    """Hamming distance. The score -(distance * width + column) is different for each row, so there are no ties."""

    device = torch.device("cpu")
    dtype = torch.int32

    def __init__(self, queries: Codes, gallery: Codes | None, own: Integers | None = None) -> None:
        self.own = np.arange(len(queries)) if gallery is None else own
        for codes in (queries, queries if gallery is None else gallery):
            assert (codes.dtype, codes.ndim, codes.shape[-1]) == (np.uint8, 2, queries.shape[-1])
            assert codes.size
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
        # Not needed: no scores are equal.
        self.first_copies, self.copy_numbers = torch.arange(self.width), torch.zeros(self.width, dtype=torch.int64)

    def finer(self) -> None:
        return None

    def score(self, numbers: Integers, out: Tensor) -> Tensor:
        import faiss  # here, because training needs no faiss

        num_queries = len(numbers)
        assert out.is_contiguous()
        queries = self.queries[numbers]  # has to live as long as its pointer
        pointers = [faiss.swig_ptr(array) for array in (queries, self.padded)]
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


def padded_width(num_rows: int) -> int:
    """Return the number of score columns for this many gallery rows."""
    return num_rows + -num_rows % _COLUMN_MULTIPLE


def check_search(queries: Floats, gallery: Floats | None, k: int, own: Integers | None = None) -> None:
    """Raise RetrievalError for float32 (N, D) that are not finite numbers, or a k that is out of range."""
    is_own = gallery is None or own is not None
    gallery = queries if gallery is None else gallery
    for name, rows in (("queries", queries), ("gallery", gallery)):
        assert (rows.dtype, rows.ndim, rows.shape[-1]) == (np.float32, 2, queries.shape[-1])
        assert rows.size
        usable = (rows.max(axis=1) < _LARGEST) & (rows.min(axis=1) > -_LARGEST)
        if not usable.all():
            raise RetrievalError(
                f"{name}: {int((~usable).sum())} of {len(rows)} embeddings hold NaN, infinity or numbers beyond 1e17, "
                f"the first is row {int(usable.argmin())}. The training diverged: lower the learning rate or clip "
                "the gradient."
            )
    check_num_neighbours(k, len(gallery), is_own=is_own)


def check_num_neighbours(k: int, num_rows: int, *, is_own: bool) -> None:
    """Raise RetrievalError unless a query finds k of these gallery rows; is_own: one of them is the query itself."""
    available = num_rows - is_own
    if not 1 <= k <= available:
        besides = " besides the query itself" if is_own else ""
        raise RetrievalError(
            f"k = {k} neighbours were requested, but the gallery holds {available} images{besides}; "
            f"use k in 1..{available}."
        )
